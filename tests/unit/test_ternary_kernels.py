"""Low-bit products: every implementation gives the same bits, for all shapes, and they are the right ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import in_threads

from forgekit.errors import ArtifactError, ConfigError
from forgekit.infer import kernels
from forgekit.infer.kernels import cpu, plain
from forgekit.infer.kernels.llvm_grouped import digits_bytes
from forgekit.infer.kernels.llvm_ternary import FLAVOURS, token_bytes
from forgekit.quant.config import GroupPlan, TernaryPlan
from forgekit.quant.grid import fake_activations, fake_ternary, quantise_activations, ternarise
from forgekit.quant.groupwise import round_groups
from forgekit.quant.pack import pack2

needs_llvm = pytest.mark.skipif(not cpu.available(), reason="llvmlite is not installed")
SHAPES = [(1, 1), (3, 5), (7, 64), (5, 65), (9, 129), (16, 256), (2, 257), (33, 300), (6, 1000), (4, 2065)]
BATCHES = [1, 2, 3, 4, 5, 8, 64]


def flavours():
    """What this machine can run: its own, and those below it."""
    if not cpu.available():
        return []
    runs = cpu.machine().flavours
    features = {need for f in runs for need in f.needs}
    # AVX-512 with VNNI has the 256-bit form of the instruction too, under another name.
    return [f for f in FLAVOURS if f in runs or (f.name == "avx-vnni" and "avx512vnni" in features)]


def weights(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes_RC = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
    return codes_RC, pack2(codes_RC), torch.rand(rows, generator=generator)


def tokens(batch, columns, seed=1):
    return torch.randn(batch, columns, generator=torch.Generator().manual_seed(seed))


def expected(codes_RC, scale_R, x_BC):
    """By the definition, in 64-bit integers."""
    q_BC, scale_B1 = quantise_activations(x_BC)
    return (q_BC.long() @ codes_RC.long().T).float() * scale_R * scale_B1


@pytest.fixture(params=["llvm", "torch"])
def forced(request, monkeypatch):
    """Each implementation for the CPU in turn."""
    if request.param == "llvm" and not cpu.available():
        pytest.skip("llvmlite is not installed")
    monkeypatch.setenv(kernels.VARIABLE, request.param)
    assert kernels.backend() == request.param
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_right_to_the_bit_for_odd_shapes_and_all_batches(forced, shape):
    codes_RC, packed_RP, scale_R = weights(*shape)
    for batch in BATCHES:
        x_BC = tokens(batch, shape[1])
        got = kernels.ternary_matmul(packed_RP, scale_R, x_BC, shape[1])
        assert torch.equal(got, expected(codes_RC, scale_R, x_BC)), batch


@needs_llvm
@pytest.mark.parametrize("flavour", flavours(), ids=lambda f: f.name)
def test_every_kind_of_machine_that_can_be_tried_here_gives_the_same_bits(flavour):
    for rows, columns in SHAPES:
        codes_RC, packed_RP, scale_R = weights(rows, columns)
        for batch in BATCHES:
            x_BC = tokens(batch, columns)
            got = cpu.ternary_matmul(packed_RP, scale_R, x_BC, flavour)
            assert torch.equal(got, expected(codes_RC, scale_R, x_BC)), (rows, columns, batch)


@needs_llvm
@pytest.mark.parametrize("flavour", flavours(), ids=lambda f: f.name)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(flavour, sign):
    columns = 5000
    packed_RP = pack2(torch.full((5, columns), sign, dtype=torch.int8))
    x_BC = torch.full((5, columns), -3.0)
    # scale 3/127, every code -127: the sum is the whole story.
    got = cpu.ternary_matmul(packed_RP, torch.ones(5), x_BC, flavour)
    exact = torch.tensor(-sign * 127.0 * columns) * (torch.tensor(3.0) / 127)
    assert torch.equal(got, exact.expand(5, 5))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 700), st.integers(1, 9), st.integers(0, 2**31), st.floats(-30, 30))
def test_packed_products_equal_the_fake_quantised_ones(rows, columns, batch, seed, power):
    generator = torch.Generator().manual_seed(seed)
    W_RC = torch.randn(rows, columns, generator=generator)
    x_BC = torch.randn(batch, columns, generator=generator) * 10**power
    plan = TernaryPlan()
    ternary = ternarise(W_RC, plan)
    got = kernels.ternary_matmul(pack2(ternary.codes_RC), ternary.scale_R1, x_BC, columns)
    fake = torch.nn.functional.linear(fake_activations(x_BC), fake_ternary(W_RC, plan))
    limit = (fake_activations(x_BC).abs() @ fake_ternary(W_RC, plan).abs().T) * 1e-5
    assert ((got - fake).abs() <= limit + 1e-38).all()
    assert torch.equal(got, expected(ternary.codes_RC, ternary.scale_R1[:, 0], x_BC))


def test_halves_round_to_even_as_on_the_grid(forced):
    x_BC = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.5]])
    codes_RC = torch.eye(8, dtype=torch.int8)
    got = kernels.ternary_matmul(pack2(codes_RC), torch.ones(8), x_BC, 8)
    assert got.tolist() == [[127, 0, 2, 2, 0, -2, -2, 64]]


def test_tokens_of_zeros_and_tiny_and_huge_ones(forced):
    codes_RC, packed_RP, scale_R = weights(6, 70)
    x_BC = tokens(4, 70)
    x_BC[0] = 0
    x_BC[1] *= 1e-44  # the scale underflows to 0
    x_BC[2] = torch.linspace(-2.6e-43, 2.6e-43, 70)  # the scale is a denormal rounded down: codes would pass 127
    x_BC[3] *= 1e37
    got = kernels.ternary_matmul(packed_RP, scale_R, x_BC, 70)
    assert (got[0] == 0).all() and got.isfinite().all()
    assert torch.equal(got, expected(codes_RC, scale_R, x_BC))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 63, 64, 69])
def test_what_is_not_finite_is_not_hidden(forced, bad, place):
    _, packed_RP, scale_R = weights(6, 70)
    x_BC = tokens(3, 70)
    x_BC[1, place] = bad
    got = kernels.ternary_matmul(packed_RP, scale_R + 0.1, x_BC, 70)
    assert got[[0, 2]].isfinite().all() and not got[1].isfinite().any()


def test_shapes_and_dtypes_that_models_have(forced):
    codes_RC, packed_RP, scale_R = weights(10, 96)
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    got = kernels.ternary_matmul(packed_RP, scale_R[:, None], x, 96)
    assert got.shape == (2, 3, 10) and got.dtype == torch.float32
    assert torch.equal(got, expected(codes_RC, scale_R, x.view(6, 96)).view(2, 3, 10))
    # Views with gaps, no tokens, gradients asked for, autocast: nothing of this changes the numbers.
    wide = torch.cat([x, x], -1)[..., :96]
    assert torch.equal(kernels.ternary_matmul(packed_RP, scale_R, wide, 96), got)
    flat = torch.cat([x, x], -1).float().view(6, 192)[:, :96]
    assert torch.equal(kernels.ternary_matmul(packed_RP, scale_R, flat, 96), got.view(6, 10))
    gaps = torch.stack([packed_RP, packed_RP], 2)[:, :, 0]
    assert torch.equal(kernels.ternary_matmul(gaps, scale_R, x, 96), got)
    assert kernels.ternary_matmul(packed_RP, scale_R, x[:0], 96).shape == (0, 3, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        asked = kernels.ternary_matmul(packed_RP, scale_R, x.float().requires_grad_(), 96)
    assert torch.equal(asked, got) and not asked.requires_grad


def test_unrounded_activations(forced):
    codes_RC, packed_RP, scale_R = weights(12, 333)
    x = torch.randn(2, 4, 333, generator=torch.Generator().manual_seed(4))
    got = kernels.ternary_matmul_float(packed_RP, scale_R, x, 333)
    torch.testing.assert_close(got, x @ (codes_RC * scale_R[:, None]).T, rtol=1e-5, atol=1e-4)


def test_plain_decodes_large_matrices_piece_by_piece(monkeypatch):
    codes_RC, packed_RP, scale_R = weights(50, 100)
    x_BC = tokens(3, 100)
    scale_RG = torch.rand(50, 4).half()
    whole = plain.grouped_matmul(codes_RC, scale_RG, x_BC, 32)
    monkeypatch.setattr(plain, "PIECE", 700)
    assert torch.equal(plain.ternary_matmul(packed_RP, scale_R, x_BC), expected(codes_RC, scale_R, x_BC))
    torch.testing.assert_close(plain.grouped_matmul(codes_RC, scale_RG, x_BC, 32), whole)


@needs_llvm
def test_threads_share_the_rows_and_change_nothing(monkeypatch):
    monkeypatch.setattr(cpu, "SHARED_TERNARY", 0)
    monkeypatch.setattr(cpu, "SHARED_GROUPED", 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for rows in (1, 2, 5, 12, 13, 97):
            codes_RC, packed_RP, scale_R = weights(rows, 200)
            x_BC = tokens(5, 200)
            assert torch.equal(cpu.ternary_matmul(packed_RP, scale_R, x_BC), expected(codes_RC, scale_R, x_BC))
            grouped = round_groups(torch.randn(rows, 200), GroupPlan())
            got = cpu.grouped_matmul(grouped.codes_RC, grouped.scale_RG, x_BC, 32)
            torch.testing.assert_close(got, x_BC @ grouped.dense().T, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(before)


@needs_llvm
def test_callers_in_several_threads_do_not_disturb_each_other():
    codes_RC, packed_RP, scale_R = weights(64, 2048)  # long enough for calls to overlap
    wrong = []

    def work(seed):
        x_BC = tokens(32, 2048, seed)
        right = expected(codes_RC, scale_R, x_BC)
        for _ in range(40):
            if not torch.equal(cpu.ternary_matmul(packed_RP, scale_R, x_BC), right):
                wrong.append(seed)

    in_threads(4, work)
    assert not wrong


@needs_llvm
@pytest.mark.parametrize("flavour", flavours(), ids=lambda f: f.name)
@pytest.mark.parametrize("normed", [False, True])
def test_nothing_is_written_outside_the_output(flavour, normed):
    rows, columns, batch = 7, 70, 5
    _, packed_RP, scale_R = weights(rows, columns)
    x_BC = tokens(batch, columns)
    code = cpu.ternary(flavour)[1]
    out = torch.full((batch * rows + 32,), 7.0)
    room = batch * (token_bytes(flavour, columns) + (4 * columns if normed else 0))
    scratch = torch.full((room + 64,), 9, dtype=torch.uint8)
    table = torch.tensor([packed_RP.data_ptr(), scale_R.data_ptr(), rows])
    gain_C = torch.ones(columns) if normed else None
    places = [x_BC.data_ptr(), gain_C.data_ptr() if normed else 0, out[16:].data_ptr(), scratch[32:].data_ptr()]
    code.call(table.data_ptr(), 1, *places, batch, columns, 1)
    assert (out[:16] == 7).all() and (out[-16:] == 7).all() and (scratch[:32] == 9).all() and (scratch[-32:] == 9).all()
    right = cpu.TernaryMaps([(packed_RP, scale_R)], columns)(x_BC, gain_C)
    assert torch.equal(out[16:-16].view(batch, rows), right)


@pytest.mark.parametrize("group", [1, 16, 20, 32, 64, 128, 160, 512])
@pytest.mark.parametrize("shape", [(1, 1), (7, 64), (33, 300), (6, 1000), (130, 128)], ids=str)
def test_group_wise_products_equal_the_dense_ones(forced, shape, group):
    grouped = round_groups(torch.randn(shape, generator=torch.Generator().manual_seed(5)), GroupPlan(group=group))
    for batch in (1, 2, 4, 5):
        x_BC = tokens(batch, shape[1])
        got = kernels.grouped_matmul(grouped.codes_RC, grouped.scale_RG, x_BC, group)
        torch.testing.assert_close(got, x_BC @ grouped.dense().T, rtol=1e-4, atol=1e-4)


@needs_llvm
@pytest.mark.parametrize("flavour", [f for f in flavours() if f.whole], ids=lambda f: f.name)
def test_byte_products_of_a_head_are_as_exact_as_float32(flavour, monkeypatch):
    compiled = cpu.digits(flavour)
    monkeypatch.setattr(cpu, "digits", lambda: compiled)
    for rows, columns in [(1, 64), (3, 128), (37, 192), (130, 512), (9, 60), (7, 68), (5, 100), (37, 216)]:
        grouped = round_groups(torch.randn(rows, columns), GroupPlan())
        exact_RC = grouped.dense().double()
        for batch in (1, 2, 4, 5, 9):
            x_BC = tokens(batch, columns) * torch.logspace(-12, 3, columns)  # small ones beside large ones
            x_BC[-1] *= 1e-30
            got = cpu.grouped_matmul(grouped.codes_RC, grouped.scale_RG, x_BC, 32)
            # Errors of half a unit, unit = max|x| / 8.3e6, are independent: this is about seven standard deviations.
            limit = x_BC.abs().amax(1, keepdim=True).double() * exact_RC.square().sum(1).sqrt() * 2**-22
            assert ((got.double() - x_BC.double() @ exact_RC.T).abs() <= limit).all()


@needs_llvm
@pytest.mark.parametrize("flavour", [f for f in flavours() if f.whole], ids=lambda f: f.name)
@pytest.mark.parametrize("columns", [68, 128, 216])
def test_a_head_reads_and_writes_nothing_outside_its_tensors(flavour, columns):
    rows, batch = 7, 5
    grouped, x_BC = round_groups(torch.randn(rows, columns), GroupPlan()), tokens(batch, columns)
    codes = torch.full((64 + rows * columns + 64,), 77, dtype=torch.int8)
    codes[64:-64] = grouped.codes_RC.flatten()
    groups = grouped.scale_RG.shape[1]
    scale = torch.full((64 + rows * groups + 64,), float("nan"), dtype=torch.float16)
    scale[64:-64] = grouped.scale_RG.flatten()
    x, out = torch.full((64 + batch * columns + 64,), float("nan")), torch.full((batch * rows + 32,), 7.0)
    x[64:-64] = x_BC.flatten()
    scratch = torch.full((batch * digits_bytes(columns) + 128,), 9, dtype=torch.uint8)
    places = [codes[64:], scale[64:], x[64:], out[16:], scratch[64:]]
    cpu.digits(flavour).call(*[p.data_ptr() for p in places], batch, rows, columns, 1)
    assert (out[:16] == 7).all() and (out[-16:] == 7).all() and (scratch[:64] == 9).all() and (scratch[-64:] == 9).all()
    torch.testing.assert_close(out[16:-16].view(batch, rows), x_BC @ grouped.dense().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("columns", [64, 70, 72])
def test_heads_do_not_hide_what_is_not_finite(forced, bad, columns):
    grouped = round_groups(torch.randn(9, columns), GroupPlan())
    x_BC = tokens(3, columns)
    x_BC[1, 5], x_BC[2] = bad, 0
    got = kernels.grouped_matmul(grouped.codes_RC, grouped.scale_RG, x_BC, 32)
    assert got[0].isfinite().all() and not got[1].isfinite().any() and (got[2] == 0).all()


def test_group_wise_products_take_any_leading_shape(forced):
    grouped = round_groups(torch.randn(10, 40), GroupPlan())
    x = torch.randn(2, 3, 40)
    got = kernels.grouped_matmul(grouped.codes_RC, grouped.scale_RG, x.double(), 32)
    torch.testing.assert_close(got, x @ grouped.dense().T, rtol=1e-4, atol=1e-4)
    assert kernels.grouped_matmul(grouped.codes_RC, grouped.scale_RG, x[:0], 32).shape == (0, 3, 10)


def test_sizes_that_do_not_fit_are_refused():
    _, packed_RP, scale_R = weights(6, 70)
    x_BC = tokens(2, 70)
    for arguments in [
        (packed_RP[:, :16], scale_R, x_BC, 70),
        (packed_RP, scale_R[:5], x_BC, 70),
        (packed_RP, scale_R, x_BC[:, :69], 70),
        (packed_RP, scale_R, x_BC, 64),
        (packed_RP, scale_R, x_BC.long(), 70),
        (packed_RP.to(torch.int8), scale_R, x_BC, 70),
    ]:
        with pytest.raises(ArtifactError, match="^ternary product: "):
            kernels.ternary_matmul(*arguments)
        with pytest.raises(ArtifactError):
            kernels.ternary_matmul_float(*arguments)
    grouped = round_groups(torch.randn(10, 40), GroupPlan())
    codes_RC, scale_RG, x_BC = grouped.codes_RC, grouped.scale_RG, tokens(2, 40)
    for arguments in [
        (codes_RC, scale_RG, x_BC, 16),
        (codes_RC, scale_RG, x_BC, 0),
        (codes_RC, scale_RG[:9], x_BC, 32),
        (codes_RC, scale_RG, x_BC[:, 1:], 32),
        (codes_RC.float(), scale_RG, x_BC, 32),
    ]:
        with pytest.raises(ArtifactError, match="^group-wise product: "):
            kernels.grouped_matmul(*arguments)


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "torch")
    assert kernels.backend() == kernels.backend("cuda") == "torch"
    monkeypatch.setenv(kernels.VARIABLE, "turch")
    with pytest.raises(ConfigError, match="torch"):
        kernels.backend()
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    with pytest.raises(ConfigError, match="'triton' cannot be used on cpu"):
        kernels.backend()
    monkeypatch.setenv(kernels.VARIABLE, "llvm")
    with pytest.raises(ConfigError, match="'llvm' cannot be used on cuda"):
        kernels.backend("cuda")


def test_without_llvm_torch_does_it(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: False)
    kernels._choose.cache_clear()
    try:
        monkeypatch.delenv(kernels.VARIABLE, raising=False)
        assert kernels.backend() == "torch"
        monkeypatch.setenv(kernels.VARIABLE, "numba")
        with pytest.raises(ConfigError, match="pip install llvmlite"):
            kernels.backend()
    finally:
        kernels._choose.cache_clear()


@needs_llvm
def test_a_flavour_that_gives_wrong_numbers_is_passed_over(monkeypatch):
    first, *others = cpu.machine().flavours
    assert others
    broken = replace(first, add=lambda w, sums, u, q: first.add(w, sums, u[::-1], q))
    monkeypatch.setattr(cpu, "machine", lambda: cpu.Machine((broken, *others), True, None))
    cpu.ternary.cache_clear()
    try:
        assert cpu.ternary()[0] == others[0]
    finally:
        cpu.ternary.cache_clear()


@needs_llvm
def test_without_openmp_one_thread_does_it(monkeypatch):
    found = cpu.machine()
    monkeypatch.setattr(cpu, "machine", lambda: cpu.Machine(found.flavours, found.halves, None))
    cpu.ternary.cache_clear()
    try:
        codes_RC, packed_RP, scale_R = weights(300, 4096)
        x_BC = tokens(1, 4096)
        assert torch.equal(cpu.ternary_matmul(packed_RP, scale_R, x_BC), expected(codes_RC, scale_R, x_BC))
    finally:
        cpu.ternary.cache_clear()


def test_weights_elsewhere_than_activations_are_refused():
    packed_RP, scale_R, x_BC = pack2(torch.ones(4, 64, dtype=torch.int8)), torch.ones(4), torch.randn(2, 64)
    with pytest.raises(ArtifactError, match="ternary product: weights on meta, activations on cpu; move the model"):
        kernels.ternary_matmul(packed_RP.to("meta"), scale_R.to("meta"), x_BC, 64)
    head = round_groups(torch.randn(4, 64), GroupPlan())
    with pytest.raises(ArtifactError, match="group-wise product: weights on meta, activations on cpu"):
        kernels.grouped_matmul(head.codes_RC.to("meta"), head.scale_RG.to("meta"), x_BC, 32)


@pytest.mark.skipif(not cpu.available(), reason="no llvmlite")
def test_instructions_that_llvm_does_not_know_are_passed_over(monkeypatch):
    import llvmlite.binding as llvm

    if len(cpu.machine().flavours) < 2:
        pytest.skip("one way only")
    best, parse = cpu.ternary()[0], llvm.parse_assembly
    unknown = cpu.ternary_module(best, cpu.machine().openmp)

    def refuse(text, *rest):
        if text == unknown:
            raise RuntimeError("LLVM IR parsing error")
        return parse(text, *rest)

    monkeypatch.setattr(llvm, "parse_assembly", refuse)
    cpu.ternary.cache_clear()
    try:
        assert cpu.ternary()[0] != best
    finally:
        monkeypatch.undo()
        cpu.ternary.cache_clear()
