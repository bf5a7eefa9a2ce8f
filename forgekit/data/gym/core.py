"""How gym tasks are asked for, split and solved.

A family writes prompts and answers from a seeded generator; its solver reads only the prompt and must arrive
at the same answer, step by step (a test holds the two together). Splits are made by hashing the prompt, so a
prompt belongs to exactly one of train, select and report, whoever generates it and when.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from forgekit.errors import ConfigError, DataError
from forgekit.registry import Registry

LEVELS = range(1, 11)
SPLITS = ("train", "select", "report")
SELECT_SHARE, REPORT_SHARE = 0.1, 0.1


@dataclass(frozen=True)
class Problem:
    """One task: what is asked and the only right answer."""

    family: str
    level: int
    prompt: str
    answer: str


@dataclass(frozen=True)
class Trace:
    """A solution: the intermediate steps in order, and the answer they lead to."""

    steps: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Family:
    """A kind of task.

    Attributes:
        name: registered name.
        write: ``(rng, level, n, **options)`` to n pairs (prompt, answer).
        solve: prompt to :class:`Trace`; raises ``DataError`` on a prompt it cannot read.
        chance: accuracy of the best guess that does not solve the task, by level and generator options.
        meaning: one sentence for people.
        options: names of extra generator options.
    """

    name: str
    write: Callable[..., list[tuple[str, str]]]
    solve: Callable[[str], Trace]
    chance: Callable[..., float]
    meaning: str
    options: tuple[str, ...] = field(default=())


FAMILIES = Registry("gym family")


def family(name: str, solve: Callable[[str], Trace], chance: float | Callable[[int], float]):
    """Decorator: register a generator function, its solver and its chance level as a family."""

    def keep(write: Callable[..., list[tuple[str, str]]]):
        rate = chance if callable(chance) else (lambda level, **options: chance)
        options = tuple(inspect.signature(write).parameters)[3:]
        meaning = inspect.getdoc(write).splitlines()[0]
        FAMILIES.register(name)(Family(name, write, solve, rate, meaning, options))
        return write

    return keep


SPLIT_SALT = b"2026-11-21"
"""Decides which prompts are held out; changes when a report split was looked at while choosing (docs/LOG.md)."""


def split_of(prompt: str) -> str:
    """The one split a prompt belongs to (10 % select, 10 % report, the rest train)."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=4, salt=SPLIT_SALT).digest()
    share = int.from_bytes(digest) / 2**32
    if share < REPORT_SHARE:
        return "report"
    return "select" if share < REPORT_SHARE + SELECT_SHARE else "train"


def generate(name: str, level: int, n: int, *, seed: int, split: str = "train", **options: int) -> list[Problem]:
    """``n`` problems of a family and level from one split.

    Args:
        name: a registered family.
        level: 1 (easiest) to 10.
        n: how many; problems may repeat where the family is small.
        seed: same seed, same problems.
        split: ``train``, ``select`` or ``report``.
        options: what the family's generator offers beyond the level (see :attr:`Family.options`).

    Raises:
        ConfigError: unknown family, split or option, or a level outside 1..10.
        DataError: the family has no prompt in that split at that level.
    """
    kind: Family = FAMILIES.get(name)
    if level not in LEVELS:
        raise ConfigError(f"level {level} is not in 1..10", where=f"gym {name}", remedy="choose a level from 1 to 10")
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}", where=f"gym {name}", remedy=f"choose one of {', '.join(SPLITS)}")
    for option in options:
        if option not in kind.options:
            known = ", ".join(kind.options) or "none"
            raise ConfigError(f"unknown option {option!r}", where=f"gym {name}", remedy=f"its options: {known}")
    rng = np.random.default_rng([seed, level, SPLITS.index(split), *name.encode()])
    found: list[Problem] = []
    for _ in range(200):
        pairs = kind.write(rng, level, max(32, 2 * n), **options)
        found += [Problem(name, level, prompt, answer) for prompt, answer in pairs if split_of(prompt) == split]
        if len(found) >= n:
            return found[:n]
    raise DataError(f"no {split} prompts at level {level}", where=f"gym {name}", remedy="use a higher level")


def solve(problem: Problem | str, name: str | None = None) -> Trace:
    """Solve a prompt step by step with its family's solver, reading nothing but the prompt."""
    if isinstance(problem, Problem):
        return FAMILIES.get(problem.family).solve(problem.prompt)
    return FAMILIES.get(name or problem.split(maxsplit=1)[0]).solve(problem)


from forgekit.data.gym import reasoning, sequences, tools  # noqa: E402,F401  registers the built-in families
