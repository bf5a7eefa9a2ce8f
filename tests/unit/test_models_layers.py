"""Attention and embedding: every path through the attention gives what the masked full attention gives."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from forgekit.models import layers
from forgekit.models.layers import (
    EMPTY,
    Attention,
    AttentionShape,
    Embedding,
    SquaredReLU,
    attend_blocks,
    attend_masked,
    linear,
    rope,
    select_rows,
)

quick = settings(max_examples=25, deadline=None, derandomize=True)


def attention(window: int = 0, qk_norm: bool = True, width: int = 16, conv: bool = False) -> Attention:
    torch.manual_seed(0)
    layer = Attention(AttentionShape(width, 2, window, 10000.0, qk_norm, conv))
    torch.nn.init.normal_(layer.wo.weight, std=0.3)
    if conv:
        torch.nn.init.normal_(layer.conv_CJ)
    return layer


def tokens(batch: int, T: int, width: int = 16) -> torch.Tensor:
    return torch.randn(batch, T, width, generator=torch.Generator().manual_seed(T))


def places(batch: int, T: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + T).expand(batch, T)


def reference(layer: Attention, x: torch.Tensor) -> torch.Tensor:
    """Written-out attention: scores, mask, softmax."""
    B, T, D = x.shape
    H = layer.shape.heads
    parts = [w(x) for w in (layer.wq, layer.wk, layer.wv)]
    if layer.conv_CJ is not None:
        taps = layer.conv_CJ.chunk(3)
        parts = [F.conv1d(F.pad(y.mT, (3, 0)), c[:, None], groups=D).mT for y, c in zip(parts, taps)]
    q, k, v = (y.reshape(B, T, H, -1).transpose(1, 2) for y in parts)
    if layer.gain_H is not None:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    q, k = (rope(y, places(B, T), 10000.0) for y in (q, k))
    scores = q @ k.mT * (layer.gain_H[:, None, None] if layer.gain_H is not None else q.shape[-1] ** -0.5)
    gap = torch.arange(T)[:, None] - torch.arange(T)
    seen = (gap >= 0) & (gap < (layer.shape.window or T))
    out = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
    return layer.wo(out.transpose(1, 2).reshape(B, T, D))


@quick
@given(window=st.integers(0, 9), T=st.integers(1, 20), qk_norm=st.booleans(), conv=st.booleans())
def test_attention_is_the_written_out_formula(window, T, qk_norm, conv):
    layer, x = attention(window, qk_norm, conv=conv), tokens(2, T)
    out, state = layer(x, places(2, T), None, None)
    assert state is None
    torch.testing.assert_close(out, reference(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("small", [0, 64], ids=["fused", "written out"])
@pytest.mark.parametrize("W, n", [(1, 5), (3, 2), (4, 4)])
def test_attention_in_blocks_equals_masked_full_attention_with_its_gradients(W, n, small, monkeypatch):
    monkeypatch.setattr(layers, "SMALL_WINDOW", small)
    q, k, v = (torch.randn(2, 3, W * n, 4, requires_grad=True) for _ in range(3))
    gap = torch.arange(W * n)[:, None] - torch.arange(W * n)
    full = F.scaled_dot_product_attention(q, k, v, attn_mask=(gap >= 0) & (gap < W))
    blocks = attend_blocks(q, k, v, W)
    torch.testing.assert_close(blocks, full)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), (q, k, v)) for y in (blocks, full))):
        torch.testing.assert_close(a, b)


@quick
@given(window=st.sampled_from([0, 1, 3, 5]), cuts=st.lists(st.integers(1, 14), max_size=5), conv=st.booleans())
def test_any_mix_of_segments_and_single_tokens_equals_one_pass(window, cuts, conv):
    layer, x = attention(window, conv=conv), tokens(2, 15)
    state, parts, edges = layer.initial_state(2, x.device), [], [0, *sorted(set(cuts)), 15]
    for a, b in zip(edges, edges[1:]):
        out, state = layer(x[:, a:b], places(2, b - a, a), state, None)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), reference(layer, x), rtol=1e-4, atol=1e-5)
    assert window == 0 or state.pos_BP.shape[1] == window


@quick
@given(
    window=st.sampled_from([0, 2, 4]),
    lengths=st.tuples(*[st.integers(0, 6)] * 3),
    follow=st.integers(1, 3),
    conv=st.booleans(),
)
def test_ragged_rows_go_on_as_if_each_were_alone(window, lengths, follow, conv):
    layer, x = attention(window, conv=conv), tokens(3, 6 + follow)
    _, state = layer(x[:, :6], places(3, 6), layer.initial_state(3, x.device), torch.tensor(lengths))
    for step in range(follow):
        pos = torch.tensor([[n + step] for n in lengths])
        out, state = layer(x[:, 6 + step : 7 + step], pos, state, None)
    for row, n in enumerate(lengths):
        own = torch.cat([x[row : row + 1, :n], x[row : row + 1, 6:]], dim=1)
        torch.testing.assert_close(out[row : row + 1], reference(layer, own)[:, -1:], rtol=1e-4, atol=1e-5)


def test_squared_relu_is_the_square_with_its_gradient():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.equal(SquaredReLU.apply(x), F.relu(x).square())
    assert torch.autograd.gradcheck(SquaredReLU.apply, x + 0.1 * x.sign().detach())


def test_rows_that_see_nothing_give_zeros():
    q = torch.randn(1, 1, 2, 4)
    seen = torch.tensor([[[True], [False]]])
    out = attend_masked(q, q[:, :, :1], q[:, :, :1], seen)
    assert out[0, 0, 0].abs().max() > 0 and torch.equal(out[0, 0, 1], torch.zeros(4))


def test_select_rows_repeats_and_reorders():
    layer = attention(3, conv=True)
    _, state = layer(tokens(2, 5), places(2, 5), layer.initial_state(2, torch.device("cpu")), torch.tensor([5, 1]))
    twice = select_rows(state, torch.tensor([1, 1, 0]))
    assert twice.pos_BP.tolist() == [[EMPTY, EMPTY, 0]] * 2 + [[2, 3, 4]]
    assert torch.equal(twice.k_BHPK[2], state.k_BHPK[0])
    assert torch.equal(twice.tail_BJC, state.tail_BJC[[1, 1, 0]]) and twice.tail_BJC.abs().max() > 0


@pytest.mark.parametrize("qk_norm", [True, False])
def test_qk_clip_brings_the_largest_logit_under_the_threshold(qk_norm):
    layer, x = attention(qk_norm=qk_norm).train(), 5 * tokens(2, 8)
    with torch.no_grad():
        if qk_norm:
            layer.gain_H.copy_(torch.tensor([20.0, 1.0]))
        else:
            layer.wq.weight[:8] *= 6
    layer(x, places(2, 8), None, None)
    before = layer.logit_bound_H.clone()
    factor = layer.clip_logits(10.0)
    assert before[0] > 10 and factor[0] < 1
    assert bool((layer.logit_bound_H == 0).all())
    layer(x, places(2, 8), None, None)
    expected = torch.where(before > 10, 10.0, before)
    torch.testing.assert_close(layer.logit_bound_H, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.clip_logits(1e9), torch.ones(2))


def test_the_bound_is_a_bound_and_covers_every_micro_batch_since_the_last_clip():
    layer, x = attention(qk_norm=False).train(), tokens(6, 8)
    layer(x, places(6, 8), None, None)
    at_once = layer.logit_bound_H.clone()
    q, k, *_ = layer.project(x, places(6, 8), None, None)
    logits = q @ k.mT * q.shape[-1] ** -0.5
    assert bool((logits.abs().amax((0, 2, 3)) <= at_once + 1e-5).all())
    layer.longest_2H.zero_()
    parts = []
    for part in x.split(2):
        layer(part, places(2, 8), None, None)
        parts.append(layer.logit_bound_H.clone())
    assert bool((parts[0] <= parts[1]).all() and (parts[1] <= parts[2]).all()) and torch.equal(parts[2], at_once)
    layer.eval()(10 * x, places(6, 8), None, None)
    assert torch.equal(layer.logit_bound_H, parts[2])


def test_rotation_depends_on_distance_only():
    q, k = (torch.randn(1, 1, 1, 8).expand(1, 1, 30, 8) for _ in range(2))
    q, k = (rope(y, places(1, 30), 10000.0) for y in (q, k))
    dots = (q @ k.mT)[0, 0]
    for distance in (0, 3, 11):
        torch.testing.assert_close(dots.diagonal(-distance), dots[distance, 0].expand(30 - distance))


@pytest.mark.parametrize("rank", [0, 4])
def test_embedding_is_tied_and_factorised(rank):
    layer = Embedding(10, 8, rank)
    assert sum(p.numel() for p in layer.parameters()) == (10 * 8 if not rank else 10 * 4 + 2 * 8 * 4)
    x = layer.embed(torch.tensor([[3, 1]]))
    logits = layer.unembed(x)
    assert x.shape == (1, 2, 8) and logits.shape == (1, 2, 10)
    if not rank:
        torch.testing.assert_close(logits, x @ layer.table.weight.T)


def test_linear_starts_as_asked():
    torch.manual_seed(0)
    assert float(linear(400, 400).weight.detach().std()) == pytest.approx(1 / 20, rel=0.05)
    assert linear(4, 4, std=0.0).weight.abs().max() == 0
