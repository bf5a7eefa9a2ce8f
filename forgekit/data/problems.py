"""Sets of gym problems from a mix of families and levels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from forgekit.data.gym import Problem, generate
from forgekit.data.plans import GymMix

REPORT_SEED = 20_000
"""Seed of the report problems; the split itself is decided by hashing each prompt."""


def draw(mix: Iterable[GymMix], per_level: int, seed: int, split: str = "train") -> list[Problem]:
    """``per_level`` problems (times the part's weight when training) of every family and level of a mix."""
    problems = []
    for part in mix:
        count = round(per_level * part.weight) if split == "train" else per_level
        for level in part.levels:
            problems += generate(part.family, level, count, seed=seed, split=split, **part.options)
    return problems


def held_out(mix: Iterable[GymMix], count: int, split: str = "report") -> list[Problem]:
    """Up to ``count`` *distinct* held-out problems of every family and level of a mix.

    Repeats would count one answer several times and make intervals too narrow; small families have fewer.
    """
    drawn = draw(mix, 3 * count, REPORT_SEED, split=split)
    groups = defaultdict(dict)
    for problem in drawn:
        groups[problem.family, problem.level].setdefault(problem.prompt, problem)
    return [problem for group in groups.values() for problem in list(group.values())[:count]]
