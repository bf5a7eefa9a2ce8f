"""Families that move symbols: copy, reverse, sort, recall, far_recall, compare.

Symbols are digits (single tokens in every tokenizer the Forge trains) and single letters after a space.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from forgekit.data.gym.core import Trace, family
from forgekit.errors import DataError

LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))
FILLER = np.array(["the", "and", "of", "to", "in", "that", "is", "it"])


def length(level: int) -> int:
    """Symbols in a sequence task: 3 at level 1, 12 at level 10."""
    return level + 2


def _digits(rng: np.random.Generator, n: int, width: int) -> list[str]:
    table = rng.integers(0, 10, size=(n, width), dtype=np.uint8) + ord("0")
    return [row.tobytes().decode() for row in table]


def argument(prompt: str, word: str) -> str:
    """What follows the command word of a prompt."""
    head, _, rest = prompt.partition(" ")
    if head != word or not rest:
        raise DataError(f"{prompt[:40]!r} is not a {word} task", where="gym", remedy=f"write `{word} ...`")
    return rest


def _solve_copy(prompt: str) -> Trace:
    text = argument(prompt, "copy")
    return Trace(tuple(f"symbol {i} is {c}" for i, c in enumerate(text, 1)), text)


def _solve_reverse(prompt: str) -> Trace:
    text = argument(prompt, "reverse")
    steps, out = [], ""
    for c in reversed(text):
        out += c
        steps.append(f"take {c} from the end: {out}")
    return Trace(tuple(steps), out)


def _solve_sort(prompt: str) -> Trace:
    rest, out, steps = list(argument(prompt, "sort")), "", []
    while rest:
        least = min(rest)
        rest.remove(least)
        out += least
        steps.append(f"smallest is {least}, left {''.join(rest) or 'nothing'}")
    return Trace(tuple(steps), out)


@family("copy", _solve_copy, lambda level: 10.0 ** -length(level))
def write_copy(rng: np.random.Generator, level: int, n: int) -> list[tuple[str, str]]:
    """Write the same digits again."""
    return [(f"copy {s}", s) for s in _digits(rng, n, length(level))]


@family("reverse", _solve_reverse, lambda level: 10.0 ** -length(level))
def write_reverse(rng: np.random.Generator, level: int, n: int) -> list[tuple[str, str]]:
    """Write the digits from last to first."""
    return [(f"reverse {s}", s[::-1]) for s in _digits(rng, n, length(level))]


@family("sort", _solve_sort, lambda level: 10.0 ** -length(level))
def write_sort(rng: np.random.Generator, level: int, n: int) -> list[tuple[str, str]]:
    """Write the digits in rising order."""
    return [(f"sort {s}", "".join(sorted(s))) for s in _digits(rng, n, length(level))]


def _solve_recall(prompt: str) -> Trace:
    word = prompt.split(" ", 1)[0]
    pairs, _, key = argument(prompt, word).rpartition(" ? ")
    for item in pairs.split():
        if item[0] == key and item[1:].isdigit():
            return Trace((f"{key} stands with {item[1:]}",), item[1:])
    raise DataError(f"{key!r} is not among the pairs", where="gym recall", remedy="ask for a key that is given")


def _pairs(rng: np.random.Generator, n: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n rows of ``count`` distinct letters, a digit for each, and which one is asked."""
    keys = LETTERS[rng.random((n, 26)).argsort(axis=1)[:, :count]]
    return keys, rng.integers(0, 10, size=(n, count)), rng.integers(0, count, size=n)


@lru_cache(maxsize=64)
def guess_shown(pairs: int) -> float:
    """Accuracy of the best guess that ignores the key: the digit shown most often.

    The expected share of the most frequent of ``pairs`` uniform digits, by a fixed simulation (error below 0.003).
    """
    draws = np.random.default_rng(0).integers(0, 10, size=(20_000, pairs))
    counts = np.stack([(draws == digit).sum(axis=1) for digit in range(10)])
    return float(counts.max(axis=0).mean() / pairs)


@family("recall", _solve_recall, lambda level: guess_shown(min(level + 1, 12)))
def write_recall(rng: np.random.Generator, level: int, n: int) -> list[tuple[str, str]]:
    """Name the digit that stood beside a letter."""
    keys, values, asked = _pairs(rng, n, min(level + 1, 12))
    return [
        (f"recall {' '.join(f'{k}{v}' for k, v in zip(key, value))} ? {key[a]}", str(value[a]))
        for key, value, a in zip(keys, values, asked)
    ]


@family("far_recall", _solve_recall, lambda level, gap=0, pairs=0: guess_shown(pairs or 4))
def write_far_recall(
    rng: np.random.Generator, level: int, n: int, gap: int = 0, pairs: int = 0
) -> list[tuple[str, str]]:
    """Name the digit that stood beside a letter, many filler words ago (16 per level)."""
    keys, values, asked = _pairs(rng, n, pairs or 4)
    filler = FILLER[rng.integers(0, len(FILLER), size=(n, gap or 16 * level))]
    return [
        (f"recall {' '.join(f'{k}{v}' for k, v in zip(key, value))} {' '.join(words)} ? {key[a]}", str(value[a]))
        for key, value, words, a in zip(keys, values, filler, asked)
    ]


def _solve_compare(prompt: str) -> Trace:
    a, b = argument(prompt, "larger").split()
    for i, (x, y) in enumerate(zip(a, b), 1):
        if x != y:
            best = max(a, b)
            return Trace((f"digit {i} differs: {x} and {y}", f"{best} is larger"), best)
    return Trace(("all digits agree",), a)


@family("compare", _solve_compare, 0.5)
def write_compare(rng: np.random.Generator, level: int, n: int) -> list[tuple[str, str]]:
    """Name the larger of two numbers of equal length."""
    width = level + 1
    left, right = _digits(rng, n, width), _digits(rng, n, width)
    # Half of the pairs share a prefix, so that the first digit alone does not decide.
    shared = rng.integers(0, width, size=n) * rng.integers(0, 2, size=n)
    right = [a[:s] + b[s:] for a, b, s in zip(left, right, shared)]
    return [(f"larger {a} {b}", max(a, b)) for a, b in zip(left, right)]
