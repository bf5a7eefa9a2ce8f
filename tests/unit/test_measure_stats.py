import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgekit.errors import ConfigError, DataError
from forgekit.measure.stats import (
    bootstrap_mean,
    chance_correct,
    mcnemar,
    mean_interval,
    newcombe,
    paired_bootstrap,
    paired_difference,
    proportion,
    wilson,
)


def table(both, only_after, only_before, neither):
    """(before, after) of a fourfold table."""
    before = [1] * both + [0] * only_after + [1] * only_before + [0] * neither
    after = [1] * both + [1] * only_after + [0] * only_before + [0] * neither
    return before, after


def test_bootstrap_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(200):
        _, low, high = bootstrap_mean(rng.normal(3.0, 1.0, 100), seed=trial, n=400)
        hits += low <= 3.0 <= high
    assert 180 <= hits <= 199


def test_bootstrap_is_close_to_the_normal_interval_and_deterministic():
    values = np.random.default_rng(0).normal(0, 1, 1000)
    mean, low, high = bootstrap_mean(values, seed=1)
    error = 1.96 * values.std() / math.sqrt(1000)
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - error, abs=0.01) and high == pytest.approx(mean + error, abs=0.01)
    assert bootstrap_mean(values, seed=1) == (mean, low, high) != bootstrap_mean(values, seed=2)


def test_bootstrap_of_many_items_is_drawn_in_blocks():
    values = np.arange(3_000_000) % 2
    mean, low, high = bootstrap_mean(values, n=3)
    assert mean == 0.5 and low < high < 0.51


def test_paired_bootstrap_uses_the_pairing():
    rng = np.random.default_rng(0)
    before = rng.normal(0, 10, 200)
    after = before + 0.5 + rng.normal(0, 0.1, 200)
    difference, low, high = paired_bootstrap(before, after)
    assert 0.45 < low < difference < high < 0.55
    assert paired_difference(before, after) == (difference, low, high)
    assert paired_bootstrap(after, before)[0] == pytest.approx(-difference)


@pytest.mark.parametrize(
    "call",
    [bootstrap_mean, proportion, mean_interval, lambda v: paired_bootstrap(v, v), lambda v: mcnemar(v, v)],
)
@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 0.0], [[0.0, 1.0]], 1.0])
def test_bad_values_are_refused_in_one_line(call, values):
    with pytest.raises(DataError) as caught:
        call(values)
    assert "\n" not in str(caught.value) and caught.value.remedy


def test_unpaired_and_not_binary_values_are_refused():
    with pytest.raises(DataError, match="2 items before, 1 after"):
        paired_difference([0, 1], [1])
    for call in (newcombe, mcnemar):
        with pytest.raises(DataError, match="before: values other than 0 and 1"):
            call([0.5], [1])
        with pytest.raises(DataError, match="after: values other than 0 and 1"):
            call([1], [0.5])
    with pytest.raises(DataError, match="other than 0 and 1"):
        proportion([2])


def test_wilson_against_published_values():
    # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3.
    published = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
    for successes, n, low, high in published:
        assert wilson(successes, n) == pytest.approx((successes / n, low, high), abs=5e-5)
    assert wilson(20, 20) == pytest.approx((1.0, 1 - 0.1611, 1.0), abs=5e-5)


@pytest.mark.parametrize("successes, n", [(1, 0), (0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(DataError):
        wilson(successes, n)


def test_a_perfect_score_is_not_certain():
    assert bootstrap_mean([1] * 30)[1:] == (1.0, 1.0)
    mean, low, high = proportion([True] * 30)
    assert (mean, high) == (1.0, 1.0) and low == pytest.approx(0.8865, abs=1e-4)
    assert mean_interval([1] * 30) == (mean, low, high) and mean_interval([0.5] * 30) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "cells, expected",
    [
        # Bentur et al. 2009 as analysed by Fagerland, Lydersen and Laake (2014): -0.507 to -0.026.
        ((1, 1, 7, 12), (-0.2857, -0.5069, -0.0256)),
        # Altman et al., Statistics with Confidence (2000), table 6.2: 0.011 to 0.226.
        ((14, 5, 0, 22), (0.1220, 0.0115, 0.2265)),
    ],
)
def test_newcombe_against_published_values(cells, expected):
    assert newcombe(*table(*cells)) == pytest.approx(expected, abs=5e-5)


@given(st.tuples(*[st.integers(0, 40)] * 4).filter(any))
def test_newcombe_contains_the_difference_and_mirrors(cells):
    before, after = table(*cells)
    difference, low, high = newcombe(before, after)
    assert -1 - 1e-9 <= low <= difference <= high <= 1 + 1e-9
    assert newcombe(after, before) == pytest.approx((-difference, -high, -low))


def test_degenerate_pairs_keep_their_uncertainty():
    before, after = table(0, 25, 0, 0)
    assert paired_bootstrap(before, after)[1:] == (1.0, 1.0)
    difference, low, high = paired_difference(before, after)
    assert difference == 1.0 and 0.7 < low < 0.9
    same = table(30, 0, 0, 0)
    assert paired_difference(*same)[1] < 0 < paired_difference(*same)[2]
    # Both sides vary but no item changed: only the difference is degenerate.
    unchanged = table(20, 0, 0, 20)
    assert paired_difference(*unchanged) == newcombe(*unchanged)
    mixed = table(20, 10, 5, 20)
    assert paired_difference(*mixed) == paired_bootstrap(*mixed)


@pytest.mark.parametrize(
    "gains, losses, p", [(10, 2, 158 / 4096), (0, 5, 0.0625), (3, 3, 1.0), (0, 0, 1.0), (1, 2, 1.0)]
)
def test_mcnemar_is_exact(gains, losses, p):
    assert mcnemar(*table(4, gains, losses, 3)) == pytest.approx(p, rel=1e-12)
    assert mcnemar(*table(4, losses, gains, 3)) == pytest.approx(p, rel=1e-12)


def test_mcnemar_of_thousands():
    assert mcnemar(*table(0, 2600, 2400, 0)) == pytest.approx(0.00488, abs=1e-4)


def test_skill_is_zero_at_chance_and_one_at_the_ceiling():
    assert chance_correct(0.25, 0.25) == 0.0 and chance_correct(1.0, 0.25) == 1.0
    assert chance_correct(0.1, 0.25) == pytest.approx(-0.2)
    assert chance_correct(1.0, chance=2.0, ceiling=0.0) == 0.5
    for arguments in [(0.5, 1.0), (math.nan, 0.1), (0.5, math.inf)]:
        with pytest.raises(ConfigError, match="give no skill"):
            chance_correct(*arguments)
