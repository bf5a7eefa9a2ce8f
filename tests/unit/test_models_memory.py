"""The memories: the chunked form is the written-out recurrence, whatever the chunks, cuts and paddings."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from forgekit.models.memory import MOMENTUM, DecayMemory, MemoryShape, MemoryState, TitansMemory, scan_chunks

SHAPE = MemoryShape(width=12, inner=8, heads=2, chunk=4, capacity=1000, surprise_weight=0.5, novelty_weight=0.5)
quick = settings(max_examples=25, deadline=None, derandomize=True)


def naive(qkv, gates, M, S):
    """The four equations of the module docstring, token by token; gates (B, H, T)."""
    (q, k, v), (alpha, eta, theta), reads = qkv, gates, []
    for t in range(q.shape[2]):
        a, n, h = (g[:, :, t, None, None] for g in (alpha, eta, theta))
        error = v[:, :, t] - (M @ k[:, :, t, :, None])[..., 0]
        S = n * S + h * error[..., :, None] * k[:, :, t, None, :]
        M = (1 - a) * M + S
        reads.append((M @ q[:, :, t, :, None])[..., 0])
    return torch.stack(reads, dim=2), M, S


def draw(T: int, seed: int, dtype=torch.float64, K: int = 4):
    """Random unit queries and keys, values, gates over their whole range, and a memory with a past."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 2, T, K, generator=g, dtype=dtype) for _ in range(3))
    gates = tuple(torch.rand(2, 2, T, generator=g, dtype=dtype) * top for top in (0.9, 0.999, 1.0))
    past = [torch.randn(2, 2, K, K, generator=g, dtype=dtype) for _ in range(2)]
    return (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v), gates, MemoryState(*past, None)


def titans(seed: int = 0, **changes) -> TitansMemory:
    """A memory whose gates look at their input (they start constant)."""
    torch.manual_seed(seed)
    memory = TitansMemory(replace(SHAPE, **changes))
    torch.nn.init.normal_(memory.gates.weight, std=0.5)
    return memory


@quick
@given(T=st.integers(1, 23), chunk=st.integers(1, 30), seed=st.integers(0, 9))
def test_chunked_equals_the_written_out_recurrence(T, chunk, seed):
    qkv, gates, state = draw(T, seed)
    for ours, theirs in zip(scan_chunks(qkv, gates, state, chunk), naive(qkv, gates, state.M_BHKK, state.S_BHKK)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_gradients_are_those_of_the_written_out_recurrence(chunk):
    qkv, gates, state = draw(7, seed=3)
    leaves = [x.requires_grad_() for x in (*qkv, *gates, state.M_BHKK, state.S_BHKK)]

    def gradient(result):
        return torch.autograd.grad(sum((x.sin() * (i + 1)).sum() for i, x in enumerate(result)), leaves)

    chunked = gradient(scan_chunks(tuple(leaves[:3]), tuple(leaves[3:6]), state, chunk))
    written = gradient(naive(leaves[:3], leaves[3:6], *leaves[6:]))
    for ours, theirs in zip(chunked, written):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@quick
@given(chunk=st.integers(1, 20))
def test_the_module_does_not_depend_on_its_chunk_length(chunk):
    x = torch.randn(2, 17, SHAPE.width, generator=torch.Generator().manual_seed(1))
    one, other = titans(chunk=1), titans(chunk=chunk)
    (a, state_a), (b, state_b) = one(x, None), other(x, None)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state_a.M_BHKK, state_b.M_BHKK, rtol=1e-4, atol=1e-5)


@quick
@given(cuts=st.lists(st.integers(1, 16), max_size=4), kind=st.sampled_from([titans, lambda: decay()]))
def test_state_carried_across_any_cuts_equals_one_pass(cuts, kind):
    memory, x = kind(), torch.randn(2, 17, SHAPE.width, generator=torch.Generator().manual_seed(2))
    whole, last = memory(x, None)
    state, parts, edges = memory.initial_state(2, x.device), [], [0, *sorted(set(cuts)), 17]
    for a, b in zip(edges, edges[1:]):
        out, state = memory(x[:, a:b], state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.M_BHKK, last.M_BHKK, rtol=1e-4, atol=1e-5)


@quick
@given(lengths=st.lists(st.integers(0, 9), min_size=3, max_size=3), kind=st.sampled_from([titans, lambda: decay()]))
def test_padding_is_neither_written_nor_remembered(lengths, kind):
    memory, g = kind(), torch.Generator().manual_seed(4)
    past, x = torch.randn(3, 5, SHAPE.width, generator=g), torch.randn(3, 9, SHAPE.width, generator=g)
    _, before = memory(past, None)
    out, after = memory(x, before, torch.tensor(lengths))
    for row, n in enumerate(lengths):
        own = before.rows(torch.tensor([row]))
        alone, expected = memory(x[row : row + 1, :n], own) if n else (out[row : row + 1, :0], own)
        torch.testing.assert_close(out[row : row + 1, :n], alone, rtol=1e-4, atol=1e-5)
        for field in ("M_BHKK", "S_BHKK", "tail_BJD"):
            torch.testing.assert_close(
                getattr(after, field)[row : row + 1], getattr(expected, field), rtol=1e-4, atol=1e-5
            )


def scan(keys, values, alpha=0.0, eta=0.0, theta=1.0, queries=None):
    """Reads of a memory of one head that starts empty, with constant gates."""
    k, v = (torch.tensor(x, dtype=torch.float64)[None, None] for x in (keys, values))
    q = k if queries is None else torch.tensor(queries, dtype=torch.float64)[None, None]
    gates = tuple(torch.full((1, 1, k.shape[2]), x, dtype=torch.float64) for x in (alpha, eta, theta))
    zero = torch.zeros(1, 1, k.shape[3], k.shape[3], dtype=torch.float64)
    reads, M, S = scan_chunks((q, k, v), gates, MemoryState(zero, zero.clone(), None), 3)
    return reads[0, 0], M[0, 0], S[0, 0]


A, B = [1.0, 0.0], [0.0, 1.0]


def test_a_full_step_writes_exactly_and_overwrites_exactly():
    reads, _, _ = scan([A, B, A, A], [[3.0, 1.0], [5.0, 2.0], [7.0, 0.0], [7.0, 0.0]], queries=[A, A, B, A])
    torch.testing.assert_close(reads, torch.tensor([[3.0, 1.0], [3.0, 1.0], [5.0, 2.0], [7.0, 0.0]]).double())


def test_what_is_known_already_is_no_surprise():
    _, once, _ = scan([A], [[3.0, 1.0]])
    _, twice, S = scan([A, A], [[3.0, 1.0]] * 2)
    torch.testing.assert_close(once, twice)
    assert S.abs().max() < 1e-8


def test_forgetting_fades_by_alpha_per_token():
    reads, _, _ = scan([A, B, B, B], [[8.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], alpha=0.5, queries=[A] * 4)
    torch.testing.assert_close(reads[:, 0], torch.tensor([8.0, 4.0, 2.0, 1.0]).double())


def test_momentum_goes_on_writing_what_surprised():
    reads, _, _ = scan([A, B, B], [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], eta=0.5, queries=[A] * 3)
    torch.testing.assert_close(reads[:, 0], torch.tensor([1.0, 1.5, 1.75]).double())


def test_capacity_surprise_and_novelty_set_the_gates():
    logits = torch.full((1, 1, 6), -20.0)
    alpha, eta, theta = titans(capacity=50)._gates(logits)
    assert float(alpha.max()) == pytest.approx(1 / 50) and float(eta.max()) < 1e-8 and float(theta.max()) < 1e-8
    zero = torch.zeros(1, 1, 6)
    for weight, factor in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 2.0)):
        alpha, _, theta = titans(novelty_weight=weight, surprise_weight=weight)._gates(zero)
        assert float(theta[0, 0, 0]) == pytest.approx(0.5 * factor)
        assert float(alpha[0, 0, 0]) == pytest.approx(min(0.999, 0.5 * factor + 1 / 1000))


@pytest.mark.parametrize("order", ["one key", "in turn", "random"])
def test_two_thousand_tokens_stay_finite_with_every_gate_wide_open(order):
    # Without the ceiling on momentum the last two end in NaN: every visit overshoots further.
    g = torch.Generator().manual_seed(0)
    T, K = 2000, 8
    memory = TitansMemory(replace(SHAPE, inner=K, heads=1, surprise_weight=1.0))
    alpha, eta, theta = memory._gates(torch.tensor([-9.0, 9.0, 9.0]).expand(1, T, 3))
    k = {
        "one key": torch.eye(K)[:1].expand(T, K),
        "in turn": torch.eye(K)[torch.arange(T) % K],
        "random": F.normalize(torch.randn(T, K, generator=g), dim=-1),
    }[order][None, None]
    v = torch.randn(1, 1, T, K, generator=g)
    reads, M, _ = scan_chunks((k, k, v), (alpha, eta, theta), memory.initial_state(1, k.device), 32)
    assert float(eta.max()) == MOMENTUM and reads.abs().max() < 1e3 and M.abs().max() < 1e3


def test_every_parameter_learns_and_the_state_is_differentiable():
    memory, x = titans(), torch.randn(2, 9, SHAPE.width)
    out, state = memory(x, None)
    (out.square().sum() + state.M_BHKK.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in memory.parameters())


def decay() -> DecayMemory:
    torch.manual_seed(0)
    return DecayMemory(SHAPE)


def test_decay_memory_is_its_recurrence():
    memory, x = decay(), torch.randn(2, 40, SHAPE.width)
    out, state = memory(x, None)
    m, rows = torch.zeros(2, SHAPE.inner), []
    for t in range(40):
        m = 0.99 * m + 0.01 * memory.down(x[:, t])
        rows.append(memory.up(memory.norm(m)))
    torch.testing.assert_close(out, torch.stack(rows, dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.M_BHKK[:, 0, 0], m)


def test_memories_work_under_bfloat16_autocast():
    x = torch.randn(2, 9, SHAPE.width)
    for memory in (titans(), decay()):
        exact, _ = memory(x, None)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough, state = memory(x, None)
        assert state.M_BHKK.dtype == torch.float32
        torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1)


def test_a_state_gives_rows_in_any_order_and_keeps_no_segment_alive():
    x = torch.randn(3, 500, SHAPE.width)
    _, state = titans()(x, None)
    picked = state.rows(torch.tensor([2, 0, 0]))
    assert torch.equal(picked.M_BHKK[1], state.M_BHKK[0]) and torch.equal(picked.tail_BJD[0], state.tail_BJD[2])
    assert state.tail_BJD.untyped_storage().nbytes() == state.tail_BJD.numel() * 4
