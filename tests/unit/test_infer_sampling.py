"""Every filter does exactly what it says, and a row's draws are its own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgekit.errors import ConfigError
from forgekit.infer.sampling import (
    SamplingConfig,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repeats,
    row_generator,
    sample,
)

# Few distinct values, so that ties are common.
logit = st.one_of(st.sampled_from([-2.0, 0.0, 1.0]), st.floats(-8, 8, width=32))
rows = st.integers(2, 12).flatmap(lambda v: st.lists(st.lists(logit, min_size=v, max_size=v), min_size=1, max_size=3))
logits_of = rows.map(lambda r: torch.tensor(r, dtype=torch.float32))
quick = settings(max_examples=60, deadline=None)


def kept(logits):
    return logits > -math.inf


def assert_only_masks(before, after):
    assert torch.equal(after[kept(after)], before[kept(after)])
    best = before.argmax(-1)
    assert kept(after)[torch.arange(len(before)), best].all(), "the most likely token was ruled out"


@quick
@given(logits_of, st.integers(1, 14))
def test_top_k_keeps_exactly_k_and_prefers_low_ids_among_equals(logits, k):
    after = keep_top_k(logits, k)
    assert_only_masks(logits, after)
    for row, mask in zip(logits.tolist(), kept(after).tolist()):
        want = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
        assert sorted(want) == [i for i, m in enumerate(mask) if m]


@quick
@given(logits_of, st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_sufficient_set(logits, p):
    after = keep_top_p(logits, p)
    assert_only_masks(logits, after)
    probs = logits.double().softmax(-1)
    for row, mask in zip(probs, kept(after)):
        inside = row[mask]
        assert inside.sum() >= p - 1e-5
        assert inside.sum() - inside.min() < p + 1e-5, "a smaller set would do"
        assert mask.all() or inside.min() >= row[~mask].max() - 1e-12, "a likelier token was left out"


def test_top_p_counts_low_ids_first_among_equals():
    assert kept(keep_top_p(torch.zeros(1, 4), 0.5)).tolist() == [[True, True, False, False]]


@quick
@given(logits_of, st.floats(0.01, 1.0))
def test_min_p_is_relative_to_the_most_likely(logits, share):
    after = keep_min_p(logits, share)
    assert_only_masks(logits, after)
    probs = logits.double().softmax(-1)
    ratio = probs / probs.amax(-1, keepdim=True)
    clear = (ratio - share).abs() > 1e-5
    assert torch.equal(kept(after)[clear], (ratio >= share)[clear])


def test_repetition_penalty_weakens_what_was_seen_whatever_its_sign():
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0], [2.0, -2.0, 1.0, 0.0]])
    after = penalise_repeats(logits, [[0, 1, 1], []], 2.0)
    assert after.tolist() == [[1.0, -4.0, 1.0, 0.0], [2.0, -2.0, 1.0, 0.0]]
    assert logits[0, 0] == 2.0, "the argument was changed"


@quick
@given(logits_of, st.integers(0, 5))
def test_a_ruled_out_token_is_never_drawn(logits, seed):
    logits = keep_top_k(logits, 1)
    ids = draw(logits, [row_generator(seed, b) for b in range(len(logits))])
    assert torch.equal(ids, logits.argmax(-1))


def test_draws_follow_the_probabilities():
    probs = torch.tensor([[0.5, 0.0, 0.3, 0.2]])
    generator = row_generator(1, 0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[draw(probs.log(), [generator])] += 1
    # Three standard deviations of a share of 4000 draws are below 0.024.
    assert (counts / 4000 - probs[0]).abs().max() < 0.03
    assert counts[1] == 0


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-53])
def test_extreme_uniforms_stay_on_possible_tokens(edge, monkeypatch):
    logits = torch.tensor([[-math.inf, 0.1, 0.2, 0.3, -math.inf]])
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([edge], dtype=torch.float64))
    assert draw(logits, [None]).item() == (1 if edge == 0 else 3)


def test_a_rows_draws_do_not_depend_on_its_neighbours():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    config = SamplingConfig(temperature=1.0, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
    together = sample(logits, config, [row_generator(7, b) for b in range(3)], [[1], [2], [3]])
    alone = [sample(logits[b : b + 1], config, [row_generator(7, b)], [[b + 1]]).item() for b in range(3)]
    assert together.tolist() == alone
    assert len({row_generator(7, b).initial_seed() for b in range(100)}) == 100
    assert row_generator(7, 0).initial_seed() != row_generator(8, 0).initial_seed()


def test_temperature_zero_is_greedy_and_near_zero_does_not_overflow():
    logits = torch.tensor([[1e4, 3e4, -1e4]])
    assert sample(logits, SamplingConfig(), [], [[]]).tolist() == [1]
    assert sample(logits, SamplingConfig(temperature=1e-38), [row_generator(0, 0)], [[]]).tolist() == [1]
    assert sample(logits, SamplingConfig(repetition_penalty=5.0), [], [[1]]).tolist() == [0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_p": 0},
        {"min_p": 2},
        {"top_k": -1},
        {"stop": [""]},
        {"max_tokens": 0},
        {"repetition_penalty": 0},
        {"top_q": 1},
    ],
)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplingConfig.build(wrong)


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-46])
def test_next_to_nothing_is_greedy(temperature):
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    config = SamplingConfig(temperature=temperature)
    assert sample(logits, config, [row_generator(0, 0)], [[]]).tolist() == [1]
