"""One token after another: compiled steps equal torch's, states stay values however they are continued."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCAB, gpt_config, in_threads, made, trm_config

from forgekit.infer import kernels
from forgekit.infer.kernels import cpu, steps
from forgekit.infer.kernels.llvm_attention import attention_bytes
from forgekit.infer.states import join_states, take_rows
from forgekit.models.layers import (
    LEAST_ROOM,
    Attention,
    AttentionShape,
    RMSNorm,
    rope,
    short_conv,
    turned,
    turned_fast,
    turns,
)
from forgekit.models.memory import MemoryShape, MemoryState, TitansMemory, limits, scan_chunks
from forgekit.quant.config import GroupPlan, TernaryPlan
from forgekit.quant.grid import ternarise
from forgekit.quant.groupwise import round_groups
from forgekit.quant.layers import GroupedLinear, PackedLinear, TernaryLinear
from forgekit.quant.model import packed

needs_llvm = pytest.mark.skipif(not cpu.available(), reason="llvmlite is not installed")
quick = settings(max_examples=25, deadline=None, derandomize=True)
WIDTH, HEADS = 64, 2


@pytest.fixture(params=["llvm", "torch"])
def forced(request, monkeypatch):
    """Compiled steps, and torch's."""
    if request.param == "llvm" and not cpu.available():
        pytest.skip("llvmlite is not installed")
    monkeypatch.setenv(kernels.VARIABLE, request.param)
    return request.param


def attention(window: int = 0, qk_norm: bool = True, conv: bool = True) -> Attention:
    """A layer with heads that compiled code takes."""
    torch.manual_seed(0)
    layer = Attention(AttentionShape(WIDTH, HEADS, window, 10000.0, qk_norm, conv)).eval()
    torch.nn.init.normal_(layer.wo.weight, std=0.3)
    if conv:
        torch.nn.init.normal_(layer.conv_CJ)
    return layer


def places(first: int, count: int, batch: int = 1) -> torch.Tensor:
    return torch.arange(first, first + count).expand(batch, count)


def tokens(count: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(seed))


def at_once(layer: Attention, x_BTD: torch.Tensor) -> torch.Tensor:
    """What the last token gets when all are there from the beginning."""
    return layer(x_BTD, places(0, x_BTD.shape[1], len(x_BTD)), None, None)[0][:, -1:]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- states are values


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("window", [0, 1, 2, 5, 40])
@pytest.mark.parametrize("conv, qk_norm", [(True, True), (False, False)])
def test_token_by_token_equals_all_at_once(forced, window, conv, qk_norm, mode):
    layer, x = attention(window, qk_norm, conv), tokens(60, 2)
    with mode():
        out, state = layer(x[:, :3], places(0, 3, 2), layer.initial_state(2, x.device), None)
        for n in range(3, 60):
            out, state = layer(x[:, n : n + 1], places(n, 1, 2), state, None)
            assert state.pos_BP[0].tolist() == list(range(max(0, n + 1 - window) if window else 0, n + 1))
        close(out, at_once(layer, x))
    assert state.whole and state.k_BHPK.shape[2] == (min(window, 60) if window else 60)


@quick
@given(window=st.sampled_from([0, 1, 3, 20]), steps=st.lists(st.integers(0, 50), min_size=1, max_size=40))
def test_every_state_can_be_continued_whenever_and_as_often_as_one_likes(window, steps):
    layer, first = attention(window), tokens(2)
    with torch.inference_mode():
        _, state = layer(first, places(0, 2), layer.initial_state(1, first.device), None)
        states = [(state, first)]
        for number, step in enumerate(steps):
            before, seen = states[step % len(states)]
            new = tokens(1, seed=100 + number)
            out, state = layer(new, places(seen.shape[1], 1), before, None)
            states.append((state, torch.cat([seen, new], 1)))
            close(out, at_once(layer, states[-1][1]))
        for state, seen in states:  # nobody's memory was written over
            new = tokens(1, seed=99)
            close(layer(new, places(seen.shape[1], 1), state, None)[0], at_once(layer, torch.cat([seen, new], 1)))


def test_a_token_more_copies_nothing_but_a_quarter_of_the_time():
    layer, x = attention(window=100), tokens(300)
    with torch.inference_mode():
        _, state = layer(x[:, :1], places(0, 1), layer.initial_state(1, x.device), None)
        logs = set()
        for n in range(1, 300):
            _, state = layer(x[:, n : n + 1], places(n, 1), state, None)
            logs.add(id(state.log))
            assert state.log.size <= max(125, 100 + LEAST_ROOM) and state.k_BHPK.shape[2] <= 100
            logs_alive = state.log  # ids must not be used again
    assert len(logs) <= 20 and logs_alive is state.log


def test_states_cross_from_inference_to_other_modes_and_into_training():
    layer, x = attention(window=8), tokens(30)
    with torch.inference_mode():
        state = layer(x[:, :5], places(0, 5), layer.initial_state(1, x.device), None)[1]
        for n in (5, 6):
            state = layer(x[:, n : n + 1], places(n, 1), state, None)[1]
    with torch.no_grad():
        after = layer(x[:, 7:8], places(7, 1), state, None)[1]
        assert not after.k_BHPK.is_inference()
        with torch.inference_mode():
            out, again = layer(x[:, 8:9], places(8, 1), after, None)
        close(out, at_once(layer, x[:, :9]))
        close(layer(x[:, 9:10], places(9, 1), again, None)[0], at_once(layer, x[:, :10]))
    out = layer(x[:, 8:9], places(8, 1), after, None)[0]  # with gradients
    out.sum().backward()
    assert layer.wq.weight.grad.abs().max() > 0
    close(out, at_once(layer, x[:, :9]))


def test_what_autograd_remembers_is_not_written_over():
    layer, x = attention(window=6), tokens(12)
    with torch.no_grad():
        state = layer(x[:, :5], places(0, 5), layer.initial_state(1, x.device), None)[1]
        state = layer(x[:, 5:6], places(5, 1), state, None)[1]
    out, mine = layer(x[:, 6:7], places(6, 1), state, None)
    with torch.no_grad():
        for before in (state, mine):
            layer(x[:, 7:8], places(7, 1), before, None)
    out.sum().backward()


def test_threads_that_continue_the_same_state_do_not_meet():
    layer, x = attention(window=50), tokens(40)
    right, wrong = {}, []
    with torch.inference_mode():
        state = layer(x, places(0, 40), layer.initial_state(1, x.device), None)[1]
        state = layer(tokens(1, seed=7), places(40, 1), state, None)[1]
        base = torch.cat([x, tokens(1, seed=7)], 1)
        for seed in range(4):
            right[seed] = at_once(layer, torch.cat([base, tokens(12, seed=50 + seed)], 1))

    def work(seed: int) -> None:
        with torch.inference_mode():
            for _ in range(20):
                mine, new = state, tokens(12, seed=50 + seed)
                for n in range(12):
                    out, mine = layer(new[:, n : n + 1], places(41 + n, 1), mine, None)
                if not torch.allclose(out, right[seed], rtol=1e-4, atol=1e-5):
                    wrong.append(seed)

    in_threads(4, work)
    assert not wrong


@pytest.mark.parametrize(
    "config", [gpt_config(d_model=64, window=5), trm_config(d_model=64, d_mem=32)], ids=["gpt", "trm"]
)
def test_rows_leave_and_enter_between_tokens(forced, config):
    model = made(config, stir=0.1).eval()
    ids = torch.randint(VOCAB, (3, 24), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        state = model(ids[:2, :7], model.initial_state(2)).state
        for n in range(7, 10):
            state = model(ids[:2, n : n + 1], state).state
        other = model(ids[2:, :4], model.initial_state(1)).state
        state = join_states([take_rows(state, torch.tensor([1])), other])
        rows = [ids[1, :10].tolist(), ids[2, :4].tolist()]
        for n in range(12):
            new = ids[[0, 1], n : n + 1]
            out = model(new, state)
            state, rows = out.state, [row + [int(t)] for row, t in zip(rows, new)]
            for i, row in enumerate(rows):
                close(out.logits[i, -1], model(torch.tensor([row])).logits[0, -1])
            if n == 5:  # and a copy goes its own way
                aside = copy.deepcopy(state)
                model(ids[[2, 2], :1], aside)


# ---- compiled steps


def cached(shape: tuple[int, int, int, int], end: int) -> tuple:
    """Inputs of an attention step: keys and values (B, H, L, K) and what is new."""
    B, H, _, K = shape
    generator = torch.Generator().manual_seed(end)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    qkv = 3 * torch.randn(B, 1, 3 * H * K, generator=generator)
    conv = torch.randn(3 * H * K, 4, generator=generator), torch.randn(B, 3, 3 * H * K, generator=generator)
    return keys, values, qkv, conv, 8 * torch.rand(H, generator=generator), torch.randint(0, 2 * end + 1, (B, 1))


def in_torch(inputs: tuple, span: tuple[int, int], conv: bool, gained: bool) -> tuple:
    """The step written out: outputs, keys, values, the convolution's last inputs."""
    keys, values, x, (taps, tail), gain_H, pos = inputs
    (B, H, _, K), (start, end), after = keys.shape, span, None
    if conv:
        x, after = short_conv(x, tail, taps, None)
    q, k, v = (y.unsqueeze(2) for y in x.view(B, 3, H, K).unbind(1))
    if gained:
        q, k = F.normalize(q, dim=-1) * gain_H[:, None, None], F.normalize(k, dim=-1)
    q, k = (rope(y, pos, 1e4) for y in (q, k))
    keys, values = keys.clone(), values.clone()
    keys[:, :, end : end + 1], values[:, :, end : end + 1] = k, v
    seen = slice(start, end + 1)
    scores = q @ keys[:, :, seen].mT * (1.0 if gained else K**-0.5)
    there = torch.arange(start, end + 1) >= end - pos  # a row has no more tokens than its position says
    scores = scores.masked_fill(~there[:, None, None], -math.inf)
    return (scores.softmax(-1) @ values[:, :, seen]).reshape(B, 1, H * K), keys, values, after


@needs_llvm
@pytest.mark.parametrize("conv, gained", [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize(
    "shape, start, end",
    [((1, 2, 40, 32), 0, 0), ((3, 4, 60, 64), 5, 20), ((2, 2, 33, 96), 0, 32), ((1, 1, 300, 32), 17, 271)],
    ids=str,
)
def test_compiled_attention_is_the_written_out_formula(shape, start, end, conv, gained, monkeypatch):
    inputs = cached(shape, end)
    want, keys, values, after = in_torch(inputs, (start, end), conv, gained)
    for shared in (1 << 20, 0):
        monkeypatch.setattr(steps, "SHARED", shared)
        before, threads = (inputs[0].clone(), inputs[1].clone()), torch.get_num_threads()
        torch.set_num_threads(3)
        token = kernels.Token(start, end, inputs[5], inputs[3] if conv else None, inputs[4] if gained else None)
        got, tail = kernels.attend(inputs[2], token, turns(inputs[5], shape[3], 1e4), before)
        torch.set_num_threads(threads)
        close(got, want)
        close(before[0], keys)
        close(before[1], values)  # also: nothing but the slot was written
        assert after is tail is None or torch.equal(after, tail)


@needs_llvm
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_attention_does_not_hide_what_is_not_finite(bad, part):
    keys, values, qkv, _, gain_H, pos = cached((2, 2, 20, 32), 9)
    qkv.view(2, 3, 2, 32)[1, part, 0, 5] = bad
    out, _ = kernels.attend(qkv, kernels.Token(0, 9, pos, None, gain_H), turns(pos, 32, 1e4), (keys, values))
    assert out[0].isfinite().all() and out[1, 0, 32:].isfinite().all()
    assert not out[1, 0, :32].isfinite().all()


@needs_llvm
def test_attention_with_scores_far_apart():
    keys, values, qkv, _, _, pos = cached((1, 1, 40, 32), 30)
    keys *= 1000
    want = in_torch((keys, values, qkv, (None, None), None, pos), (0, 30), False, False)[0]
    got, _ = kernels.attend(qkv, kernels.Token(0, 30, pos, None, None), turns(pos, 32, 1e4), (keys, values))
    close(got, want)


@needs_llvm
@pytest.mark.parametrize("conv", [False, True])
def test_attention_writes_nothing_outside(conv):
    keys, values, qkv, convolution, gain_H, pos = cached((2, 3, 50, 32), 40)
    scratch = torch.full((attention_bytes((2, 3, 32), 37, conv) + 64,), 9, dtype=torch.uint8)
    out, after = torch.full((2 * 96 + 32,), 7.0), torch.full((2 * 3 * 288 + 32,), 7.0)
    cos, sin = turns(pos, 32, 1e4)
    tail = [convolution[0], convolution[1], after[16:]] if conv else [None] * 3
    pointers = [qkv, *tail, gain_H, cos, sin, pos, keys, values, out[16:], scratch[32:]]
    steps.attention().call(*[0 if x is None else x.data_ptr() for x in pointers], 2, 3, 32, 50, 4, 40, 1)
    for edge in (out[:16], out[-16:], *((after[:16], after[-16:]) if conv else ())):
        assert (edge == 7).all()
    assert (scratch[:32] == 9).all() and (scratch[-32:] == 9).all() and not (out[16:-16] == 7).any()


@needs_llvm
@pytest.mark.parametrize("heads, width, batch", [(4, 64, 1), (2, 16, 3), (1, 48, 2)])
def test_a_compiled_memory_is_the_recurrence(heads, width, batch, monkeypatch):
    torch.manual_seed(0)
    memory = TitansMemory(MemoryShape(40, heads * width, heads, 8, 50, 0.7, 0.9)).eval()
    with torch.no_grad():
        for p in memory.parameters():
            p.add_(torch.randn_like(p))
        state = MemoryState(
            *(torch.randn(batch, heads, width, width) for _ in "MS"), torch.randn(batch, 3, 3 * heads * width)
        )
        x = 3 * torch.randn(batch, 1, 40)
        qkv, logits = memory.wqkv(x), memory.gates(x)
        q, k, v, tail = memory._keys(qkv, state.tail_BJD, None)
        reads, M, S = scan_chunks((q, k, v), memory._gates(logits), state, 8)
        want = memory.norm(reads).transpose(1, 2).flatten(2)
        writing = kernels.Writing(memory.conv_CJ, limits(memory.shape), memory.norm.weight)
        before = (state.M_BHKK, state.S_BHKK, state.tail_BJD)
        kept = [x.clone() for x in before]
        for shared in (1 << 20, 0):
            monkeypatch.setattr(steps, "SHARED", shared)
            got, after = kernels.remember(qkv, logits, before, writing)
            for a, b in zip((got, *after), (want, M, S, tail)):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(before, kept))


@needs_llvm
@pytest.mark.parametrize("shape", [(1, 1, 512), (2, 3, 37), (1, 5), (4, 16)], ids=str)
def test_a_compiled_norm_is_torchs(shape):
    norm, x = RMSNorm(shape[-1]), 10 * torch.randn(shape)
    torch.nn.init.normal_(norm.weight)
    with torch.no_grad():
        torch.testing.assert_close(norm.one_token(x), norm(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.one_token(x * 1e-5), norm(x * 1e-5), rtol=1e-5, atol=1e-6)
        assert torch.equal(norm.one_token(x.double()), norm(x.double()))


def test_the_fast_rotation_gives_the_same_bits():
    x, pos = torch.randn(2, 3, 5, 8), torch.randint(0, 999, (2, 5))
    by = turns(pos, 8, 100.0)
    assert torch.equal(turned(x, by), turned_fast(x, by)) and torch.equal(turned(x, by), rope(x, pos, 100.0))


# ---- packed maps


def maps(*rows: int, columns: int = 70, bias: bool = False) -> list[PackedLinear]:
    found = [torch.nn.Linear(columns, r, bias=bias) for r in rows]
    return [PackedLinear.from_ternary(ternarise(m.weight, TernaryPlan()), m.bias, TernaryPlan()) for m in found]


def test_maps_side_by_side_give_the_bits_of_each(forced):
    found, x = maps(5, 12, 1), torch.randn(4, 70)
    with torch.inference_mode():
        for shape in ((4, 70), (2, 2, 70), (1, 4, 70)):
            got = PackedLinear.side_by_side(found, x.view(shape))
            assert got.shape == (*shape[:-1], 18)
            assert torch.equal(got, torch.cat([one(x.view(shape)) for one in found], -1))
        again = PackedLinear.side_by_side(found[:2], x)
        assert torch.equal(again, torch.cat([one(x) for one in found[:2]], -1))


def test_a_norm_in_front_is_the_norm(forced):
    found, x, norm = maps(50, 30), torch.randn(6, 70), RMSNorm(70)
    torch.nn.init.normal_(norm.weight)
    with torch.inference_mode():
        got, want = PackedLinear.side_by_side(found, x, norm), torch.cat([one(norm(x)) for one in found], -1)
        # The last digit of a float may decide between two neighbours of the 255 codes: a step of one input.
        step = norm(x).abs().amax(1, keepdim=True) / 127 * max(one.scale.max() for one in found)
        assert ((got - want).abs() <= 2 * step + 1e-5).all() and (got - want).abs().median() < 1e-5
        gained = copy.deepcopy(found[0])
        gained.gain = norm.weight.detach().clone()
        assert ((gained(x) - want[:, :50]).abs() <= 2 * step + 1e-5).all()


@pytest.mark.parametrize("kind", ["bias", "gain", "grouped", "plain", "floats"])
def test_maps_that_are_more_than_a_product_are_done_one_by_one(forced, kind):
    first, second, third = maps(5, 6, 7)
    x, norm = torch.randn(3, 70), RMSNorm(70)
    if kind == "bias":
        second = maps(6, bias=True)[0]
    elif kind == "gain":
        second.gain = torch.rand(70)
    elif kind == "grouped":
        second = GroupedLinear(round_groups(torch.randn(6, 70), GroupPlan()))
    elif kind == "plain":
        second = torch.nn.Linear(70, 6)
    else:
        second.plan = TernaryPlan(activation_bits=0)
    with torch.inference_mode():
        got = PackedLinear.side_by_side((first, second, third), x, norm)
        assert torch.equal(got, torch.cat([one(norm(x)) for one in (first, second, third)], -1))


def test_copies_and_new_weights_are_noticed(forced):
    one, other = maps(20, 20)
    x = torch.randn(3, 70)
    with torch.inference_mode():
        before, there = one(x), other(x)
        copies = [copy.deepcopy(one), pickle.loads(pickle.dumps(one))]
        one.codes.copy_(other.codes)  # in place
        one.scale = other.scale.clone()  # a new tensor
        assert torch.equal(one(x), there)
        assert all(torch.equal(c(x), before) for c in copies)
        one.share_memory()  # moves it
        assert torch.equal(one(x), there)
        assert torch.equal(one.bfloat16()(x), one(x))
        loaded = maps(20)[0]
        loaded(x)
        loaded.load_state_dict(other.state_dict())
        assert torch.equal(loaded(x), there)


def test_training_maps_stand_side_by_side_too():
    linear = torch.nn.Linear(16, 8, bias=False)
    fake, x = TernaryLinear(linear, TernaryPlan()), torch.randn(2, 16)
    (one,) = maps(8, columns=16)
    assert torch.equal(PackedLinear.side_by_side((one, fake), x)[:, 8:], fake(x))


# ---- whole models


@pytest.mark.parametrize("window", [6, 0])
@pytest.mark.parametrize("family", ["gpt", "trm"])
def test_packed_models_decode_what_they_score(forced, family, window):
    shape = {"d_model": 64, "vocab_size": 40, "emb_rank": 24, "window": window or 100}
    config = gpt_config(**{**shape, "window": window}) if family == "gpt" else trm_config(**shape, d_mem=32, t_max=0)
    model = packed(made(config, stir=0.1), TernaryPlan(), GroupPlan())
    ids = torch.randint(40, (2, 40), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        whole = model(ids).logits
        out = model(ids[:, :3], model.initial_state(2))
        parts = [out.logits]
        for n in range(3, 40):
            out = model(ids[:, n : n + 1], out.state)
            parts.append(out.logits)
        apart = (torch.cat(parts, 1) - whole).abs().amax(-1)
        # A rounded activation may tip over to its neighbour (see test_quant_model.agree).
        assert apart.median() < 1e-4 and apart.max() < 0.05 * whole.abs().max()
