"""Where compiled code must not be called, or not that way: it reads addresses and checks nothing."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from tiny import gpt_config, in_threads, made

from forgekit.data.tokenizer import train_tokenizer
from forgekit.errors import ArtifactError
from forgekit.infer import kernels
from forgekit.infer.kernels import cpu, plain, steps
from forgekit.models.layers import Attention, AttentionShape
from forgekit.models.memory import MemoryShape, TitansMemory
from forgekit.quant.config import GroupPlan, TernaryPlan
from forgekit.quant.files import read_packed, write_packed
from forgekit.quant.groupwise import round_groups
from forgekit.quant.model import packed
from forgekit.quant.pack import pack2

pytestmark = pytest.mark.skipif(not cpu.available(), reason="llvmlite is not installed")


def weights(rows: int = 7, columns: int = 70) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes_RC = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
    return pack2(codes_RC), torch.rand(rows, generator=generator)


def test_threads_that_need_a_step_at_the_same_time_compile_it_once(monkeypatch):
    compiled, gate = [], threading.Barrier(4)

    def slowly(*words):
        compiled.append(words[1])
        time.sleep(0.05)
        return compile_(*words)

    def first(_: int) -> None:
        gate.wait(timeout=30)
        steps.norm()

    compile_ = cpu.compile_text
    monkeypatch.setattr(steps, "compile_text", slowly)
    steps.norm.cache_clear()
    in_threads(4, first)
    assert compiled == ["norm"]


def test_a_function_keeps_its_code():
    call = steps.norm.__wrapped__().call  # whoever made it is gone
    x, gain_C = torch.randn(3, 16), torch.ones(16)
    out = torch.empty_like(x)
    call(x.data_ptr(), gain_C.data_ptr(), out.data_ptr(), 3, 16)
    assert call.engine is not None and torch.allclose(out, steps.rms_norm(x, gain_C))


def test_another_default_device_changes_nothing():
    packed_RP, scale_R = weights()
    x_BC, head = torch.randn(3, 70), round_groups(torch.randn(5, 70), GroupPlan())
    with torch.device("meta"):
        got = kernels.ternary_matmul(packed_RP, scale_R, x_BC, 70)
        scores = kernels.grouped_matmul(head.codes_RC, head.scale_RG, x_BC, 32)
        assert cpu._right(cpu.ternary())
    assert torch.equal(got, plain.ternary_matmul(packed_RP, scale_R, x_BC))
    torch.testing.assert_close(scores, x_BC @ head.dense().T, rtol=1e-4, atol=1e-4)


def test_a_packed_file_is_read_to_the_cpu_whatever_the_default(tmp_path):
    model = packed(made(gpt_config(vocab_size=300)), TernaryPlan(), GroupPlan())
    write_packed(model, train_tokenizer(["a few words and some more of them"] * 5, 300), tmp_path)
    with torch.device("meta"):
        again, _ = read_packed(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in again.state_dict().items())


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_not_a_number_in_every_backend(bad):
    packed_RP, scale_R = weights()
    x_BC = torch.randn(3, 70)
    x_BC[1, 5] = bad
    got, want = kernels.ternary_matmul(packed_RP, scale_R, x_BC, 70), plain.ternary_matmul(packed_RP, scale_R, x_BC)
    assert got[1].isnan().all() and want[1].isnan().all() and torch.equal(got[[0, 2]], want[[0, 2]])


def layer() -> Attention:
    torch.manual_seed(0)
    shape = AttentionShape(width=64, heads=2, window=0, rope_base=1e4, qk_norm=True, conv=True)
    one = Attention(shape).eval().requires_grad_(False)
    torch.nn.init.normal_(one.wo.weight, std=0.3)
    torch.nn.init.normal_(one.conv_CJ)
    return one


def started(one: Attention, batch: int) -> tuple[torch.Tensor, torch.Tensor, object]:
    x_BTD, pos_BT = torch.randn(batch, 6, 64), torch.arange(6).expand(batch, 6)
    _, state = one(x_BTD[:, :5], pos_BT[:, :5], one.initial_state(batch, torch.device("cpu")), None)
    return x_BTD[:, 5:], pos_BT[:, 5:], state


def in_torch(monkeypatch, call):
    with monkeypatch.context() as forced:
        forced.setenv(kernels.VARIABLE, "torch")
        return call()


@torch.no_grad()
def test_a_tail_that_compiled_code_cannot_read_goes_through_torch(monkeypatch):
    one = layer()
    x_B1D, pos_B1, state = started(one, 2)
    wide = torch.stack([state.tail_BJC, state.tail_BJC], -1)[..., 0]
    assert not wide.is_contiguous()
    for tail in (state.tail_BJC.bfloat16(), wide, None):
        odd = replace(state, tail_BJC=tail)
        got, _ = one(x_B1D, pos_B1, odd, None)
        want, _ = in_torch(monkeypatch, lambda odd=odd: one(x_B1D, pos_B1, odd, None))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert want.abs().max() > 0.1


@torch.no_grad()
def test_a_state_of_more_rows_than_the_input_is_an_error():
    one, memory = layer(), TitansMemory(MemoryShape(64, 64, 2, 8, 50, 0.7, 0.9)).eval()
    x_B1D, pos_B1, state = started(one, 4)
    with pytest.raises(RuntimeError):
        one(x_B1D[:1], pos_B1[:1], state, None)
    with pytest.raises(RuntimeError):
        memory(x_B1D[:1], memory.initial_state(4, torch.device("cpu")))


def test_an_llvm_that_makes_products_but_no_steps_is_used_for_products(monkeypatch):
    def refuse(text, name, kinds, compile_=cpu.compile_text):
        if name != "ternary":
            raise RuntimeError(f"LLVM cannot select {name}")
        return compile_(text, name, kinds)

    caches = (cpu.grouped, cpu.digits, steps.norm, steps.attention, steps.memory, steps.compiled)
    for module in (cpu, steps):
        monkeypatch.setattr(module, "compile_text", refuse)
    for one in caches:
        one.cache_clear()
    try:
        assert kernels.backend() == "llvm" and not steps.compiled()
        model = packed(made(gpt_config()), TernaryPlan(), GroupPlan())
        ids = torch.randint(1, 20, (2, 9))
        with torch.no_grad():
            whole, out = model(ids).logits, model(ids[:, :8], model.initial_state(2))
            last = model(ids[:, 8:], out.state).logits
        torch.testing.assert_close(last[:, 0], whole[:, 8], rtol=1e-3, atol=1e-3)
    finally:
        monkeypatch.undo()
        for one in caches:
            one.cache_clear()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_is_traced_holds_no_compiled_calls():
    packed_RP, scale_R = weights()

    def product(x_BC: torch.Tensor) -> torch.Tensor:
        return kernels.ternary_matmul(packed_RP, scale_R, x_BC, 70)

    traced = torch.jit.trace(product, (torch.randn(2, 70),), check_trace=False)
    other = torch.randn(2, 70)
    torch.testing.assert_close(traced(other), product(other), rtol=1e-5, atol=1e-5)


def test_groups_that_cannot_be_are_refused():
    codes_RC, x_BC = torch.ones(3, 8, dtype=torch.int8), torch.randn(2, 8)
    with pytest.raises(ArtifactError, match="do not fit groups of 0"):
        kernels.grouped_matmul(codes_RC, torch.ones(3, 0).half(), x_BC, 0)
    with pytest.raises(ValueError, match="less than"):
        GroupPlan(group=2**31)


def test_a_thread_keeps_little_memory():
    packed_RP, scale_R = weights(4, 4096)
    kernels.ternary_matmul(packed_RP, scale_R, torch.randn(2048, 4096), 4096)
    assert cpu._memory.tensor.numel() <= cpu.KEPT_SCRATCH
