"""What scores on gym problems mean: accuracy by family and level, and what guessing would reach."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from forgekit.data.gym import FAMILIES, Problem
from forgekit.data.plans import GymMix


def chance_of(mix: Iterable[GymMix], problems: Sequence[Problem]) -> float:
    """Best accuracy without solving: per family and level the larger of the declared chance and the share of
    the most frequent answer, averaged over the problems."""
    groups = defaultdict(list)
    for p in problems:
        groups[p.family, p.level].append(p)
    options = {(part.family, level): part.options for part in mix for level in part.levels}
    rates = [
        max(FAMILIES.get(f).chance(level, **options[f, level]), majority_share(group))
        for (f, level), group in groups.items()
    ]
    return float(np.average(rates, weights=[len(group) for group in groups.values()]))


def by_level(problems: Sequence[Problem], rights: Iterable[float]) -> dict[str, float]:
    """Accuracy by ``family/level``."""
    groups = defaultdict(list)
    for p, right in zip(problems, rights):
        groups[f"{p.family}/{p.level}"].append(right)
    return {name: round(float(np.mean(group)), 4) for name, group in groups.items()}


def majority_share(problems: Sequence[Problem]) -> float:
    """Accuracy of always giving the most frequent answer: what a model could reach without reading."""
    _, counts = np.unique([p.answer for p in problems], return_counts=True)
    return float(counts.max() / len(problems))
