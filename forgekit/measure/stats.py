"""Intervals and tests for paired measurements. numpy only, vectorised, the same numbers for the same seed.

All intervals are two-sided at 95 %. Values are one number per measured item; right/wrong items are 1 and 0.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forgekit.errors import ConfigError, DataError

Z95 = 1.959963984540054
RESAMPLES = 2000
_BLOCK = 2_000_000  # indices drawn at once: bounds the memory of a bootstrap over many items to 16 MB

Interval = tuple[float, float, float]
"""(estimate, low, high)"""


def bootstrap_mean(values: ArrayLike, seed: int = 0, n: int = RESAMPLES) -> Interval:
    """The mean with its percentile bootstrap interval from ``n`` resamples.

    Raises:
        DataError: no values, or one that is not finite.
    """
    items = _items(values, "values")
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // items.size)
    means = np.concatenate(
        [
            items[rng.integers(0, items.size, (min(rows, n - done), items.size))].mean(axis=1)
            for done in range(0, n, rows)
        ]
    )
    low, high = np.percentile(means, (2.5, 97.5))
    return float(items.mean()), float(low), float(high)


def paired_bootstrap(before: ArrayLike, after: ArrayLike, seed: int = 0, n: int = RESAMPLES) -> Interval:
    """The mean of ``after - before`` over the same items with its percentile bootstrap interval.

    Raises:
        DataError: no values, one that is not finite, or not as many before as after.
    """
    first, second = _pairs(before, after)
    return bootstrap_mean(second - first, seed, n)


def paired_difference(before: ArrayLike, after: ArrayLike, seed: int = 0, n: int = RESAMPLES) -> Interval:
    """The mean of ``after - before`` with an interval that does not collapse for right/wrong items.

    A bootstrap of items that are all right, or all wrong, never sees another outcome and claims certainty. For 0/1
    values with such a degenerate side or difference the interval is :func:`newcombe`'s; else the bootstrap's.
    Raises as :func:`paired_bootstrap`.
    """
    first, second = _pairs(before, after)
    if is_binary(first) and is_binary(second) and any(np.ptp(side) == 0 for side in (first, second, second - first)):
        return newcombe(first, second)
    return paired_bootstrap(first, second, seed, n)


def newcombe(before: ArrayLike, after: ArrayLike) -> Interval:
    """The difference of two paired proportions, ``after - before``, with its score interval.

    Wilson limits of both proportions joined through their correlation, with continuity correction.
    Source: R. G. Newcombe, Improved confidence intervals for the difference between binomial proportions based on
    paired data, Statistics in Medicine 17 (1998) 2635-2650, method 10.

    Raises:
        DataError: as :func:`paired_bootstrap`, or a value that is neither 0 nor 1.
    """
    first, second = _pairs(before, after)
    _need_binary(first, "before")
    _need_binary(second, "after")
    n = first.size
    both, only_after, only_before = (int(x.sum()) for x in (first * second, second > first, first > second))
    neither = n - both - only_after - only_before
    p1, l1, u1 = wilson(both + only_after, n)
    p2, l2, u2 = wilson(both + only_before, n)
    phi = _correlation(both, only_after, only_before, neither)
    below = (p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2
    above = (u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2
    difference = (only_after - only_before) / n
    return difference, difference - math.sqrt(max(below, 0.0)), difference + math.sqrt(max(above, 0.0))


def _correlation(both: int, one: int, other: int, neither: int) -> float:
    """Newcombe's phi: of the fourfold table, corrected towards 0 by n/2 where it is positive."""
    product = (both + one) * (other + neither) * (both + other) * (one + neither)
    if product == 0:
        return 0.0
    excess = both * neither - one * other
    if excess > 0:
        excess = max(excess - (both + one + other + neither) / 2, 0)
    return excess / math.sqrt(product)


def wilson(successes: int, n: int) -> Interval:
    """A proportion with its score interval (E. B. Wilson 1927), which stays honest at 0 and 1.

    Raises:
        DataError: ``n`` is 0 or ``successes`` is not between 0 and ``n``.
    """
    if not 0 <= successes <= n or n == 0:
        raise DataError(f"{successes} successes in {n} trials", where="wilson", remedy="count again")
    p = successes / n
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    # At 0 and n the limit is exactly 0 or 1; floating point would leave it 1e-17 off.
    return p, 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half


def proportion(values: ArrayLike) -> Interval:
    """The share of 1 among 0/1 values with its Wilson interval.

    Raises:
        DataError: no values, or one that is neither 0 nor 1.
    """
    items = _items(values, "values")
    _need_binary(items, "values")
    return wilson(int(items.sum()), items.size)


def mean_interval(values: ArrayLike, seed: int = 0, n: int = RESAMPLES) -> Interval:
    """The mean with its interval: Wilson's for 0/1 values, the bootstrap's for others; raises as those."""
    items = _items(values, "values")
    return proportion(items) if is_binary(items) else bootstrap_mean(items, seed, n)


def mcnemar(before: ArrayLike, after: ArrayLike) -> float:
    """Exact two-sided p of McNemar's test: are gains and losses among right/wrong items equally likely?

    1.0 where no item changed. Raises as :func:`newcombe`.
    """
    first, second = _pairs(before, after)
    _need_binary(first, "before")
    _need_binary(second, "after")
    gains, losses = int((second > first).sum()), int((first > second).sum())
    changed, fewer = gains + losses, min(gains, losses)
    tail = term = 1
    for k in range(1, fewer + 1):
        term = term * (changed - k + 1) // k
        tail += term
    return min(1.0, 2 * tail / 2**changed)


def chance_correct(score: float, chance: float, ceiling: float = 1.0) -> float:
    """Skill: 0 at chance, 1 at the ceiling, negative below chance.

    Also for measures where less is better, such as a loss with ``chance`` log V and ``ceiling`` 0.

    Raises:
        ConfigError: chance and ceiling are the same, or a value is not finite.
    """
    if not all(map(math.isfinite, (score, chance, ceiling))) or ceiling == chance:
        values = f"score {score}, chance {chance}, ceiling {ceiling}"
        raise ConfigError(
            f"{values} give no skill", where="chance", remedy="give finite values and a ceiling that is not chance"
        )
    return (score - chance) / (ceiling - chance)


def is_binary(items: NDArray[np.float64]) -> bool:
    """Whether every value is 0 or 1."""
    return bool(np.isin(items, (0.0, 1.0)).all())


def _items(values: ArrayLike, where: str) -> NDArray[np.float64]:
    items = np.asarray(values, dtype=np.float64)
    if items.ndim != 1 or items.size == 0:
        raise DataError(f"shape {items.shape} holds no list of values", where=where, remedy="measure at least one item")
    bad = np.flatnonzero(~np.isfinite(items))
    if bad.size:
        raise DataError(
            f"{bad.size} of {items.size} values not finite, the first ({items[bad[0]]}) at {bad[0]}",
            where=where,
            remedy="find out why before comparing",
        )
    return items


def _pairs(before: ArrayLike, after: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = _items(before, "before"), _items(after, "after")
    if first.size != second.size:
        raise DataError(
            f"{first.size} items before, {second.size} after", where="pairs", remedy="measure the same items"
        )
    return first, second


def _need_binary(items: NDArray[np.float64], where: str) -> None:
    if not is_binary(items):
        raise DataError("values other than 0 and 1", where=where, remedy="give right/wrong items, or use the bootstrap")
