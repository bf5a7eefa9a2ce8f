"""Families that need several steps: add, state, lookup, words, program."""

from __future__ import annotations

import re

import numpy as np

from forgekit.data.gym.core import Trace, family
from forgekit.data.gym.sequences import LETTERS, argument
from forgekit.errors import DataError

NAMES = ("Tom", "Ann", "Ben", "Eva", "Max", "Lea")
THINGS = ("apples", "coins", "books", "pens")


def _solve_add(prompt: str) -> Trace:
    match = re.fullmatch(r"add (\d+) (\d+)", prompt)
    if not match:
        raise DataError(f"{prompt[:40]!r} is not an addition", where="gym add", remedy="write `add 12 30`")
    a, b = match.groups()
    width, carry, out, steps = max(len(a), len(b)), 0, "", []
    for x, y in zip(reversed(a.zfill(width)), reversed(b.zfill(width))):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total}, write {total % 10}, carry {total // 10}")
        out, carry = f"{total % 10}{out}", total // 10
    return Trace(tuple(steps), f"1{out}" if carry else out)


def _sum_chance(level: int) -> float:
    return 1 / (2 * 10 ** ((level + 2) // 2))


@family("add", _solve_add, _sum_chance)
def write_add(rng: np.random.Generator, level: int, n: int) -> list[tuple[str, str]]:
    """Add two numbers; odd levels up to 3 need no carry, digits grow every second level."""
    big = (level + 3) // 2
    small = big if level % 2 == 0 or level > 3 else big - 1
    a = rng.integers(0, 10, size=(n, big))
    b = rng.integers(0, 10, size=(n, small))
    a[:, 0], b[:, 0] = np.maximum(a[:, 0], 1), np.maximum(b[:, 0], 1)
    if level in (1, 3):
        b = np.minimum(b, 9 - a[:, big - small :])
    place_a, place_b = 10 ** np.arange(big - 1, -1, -1), 10 ** np.arange(small - 1, -1, -1)
    return [(f"add {x} {y}", str(x + y)) for x, y in zip((a @ place_a).tolist(), (b @ place_b).tolist())]


def _solve_state(prompt: str) -> Trace:
    start, *moves = argument(prompt, "track").split()
    value, steps = int(start), []
    for move in moves:
        value = (value + int(move)) % 10
        steps.append(f"{move} gives {value}")
    return Trace(tuple(steps), str(value))


@family("state", _solve_state, 0.1)
def write_state(rng: np.random.Generator, level: int, n: int) -> list[tuple[str, str]]:
    """Follow a digit through plus and minus steps, keeping the last digit only."""
    start = rng.integers(0, 10, size=n)
    moves = rng.integers(1, 10, size=(n, level)) * rng.choice([-1, 1], size=(n, level))
    ends = (start + moves.sum(axis=1)) % 10
    return [(f"track {s} {' '.join(f'{m:+d}' for m in row)}", str(e)) for s, row, e in zip(start, moves, ends)]


def _solve_lookup(prompt: str) -> Trace:
    links, _, query = argument(prompt, "follow").rpartition(" ? ")
    start, hops = query.split()
    table = dict(link.split(">") for link in links.split())
    here, steps = start, []
    for _ in range(int(hops)):
        if here not in table:
            raise DataError(f"no link leaves {here!r}", where="gym lookup", remedy="give every letter a link")
        steps.append(f"{here} leads to {table[here]}")
        here = table[here]
    return Trace(tuple(steps), here)


def _nodes(level: int) -> int:
    return min(3 + level // 2, 8)


@family("lookup", _solve_lookup, lambda level: 1 / (_nodes(level) - 1))
def write_lookup(rng: np.random.Generator, level: int, n: int) -> list[tuple[str, str]]:
    """Follow links from letter to letter: two hops at levels 1 to 4, three up to 7, then four."""
    count, hops = _nodes(level), 2 + (level > 4) + (level > 7)
    ring = LETTERS[rng.random((n, 26)).argsort(axis=1)[:, :count]]
    order = rng.random((n, count)).argsort(axis=1)
    start = rng.integers(0, count, size=n)
    rows = []
    for nodes, shown, s in zip(ring, order, start):
        links = " ".join(f"{nodes[i]}>{nodes[(i + 1) % count]}" for i in shown)
        rows.append((f"follow {links} ? {nodes[s]} {hops}", str(nodes[(s + hops) % count])))
    return rows


_STORY = re.compile(r"(\w+) has (\d+) (\w+)\.((?: \w+ (?:gets|loses) \d+\.)*) How many\?")


def _solve_words(prompt: str) -> Trace:
    match = _STORY.fullmatch(prompt)
    if not match:
        raise DataError(f"{prompt[:40]!r} is not a word problem", where="gym words", remedy="use its sentence forms")
    name, start, thing, moves = match.groups()
    value, steps = int(start), [f"{name} starts with {start} {thing}"]
    for verb, amount in re.findall(r"(gets|loses) (\d+)", moves):
        value += int(amount) if verb == "gets" else -int(amount)
        steps.append(f"{verb} {amount}, has {value}")
    return Trace(tuple(steps), str(value))


@family("words", _solve_words, 0.05)
def write_words(rng: np.random.Generator, level: int, n: int) -> list[tuple[str, str]]:
    """A short story of things won and lost; one event at levels 1 and 2, one more every second level."""
    rows, events = [], (level + 1) // 2
    for name, thing, value in zip(rng.choice(NAMES, n), rng.choice(THINGS, n), rng.integers(2, 10, size=n).tolist()):
        story, has = f"{name} has {value} {thing}.", value
        for gain, draw in zip(rng.random(events) < 0.5, rng.integers(1, 10, size=events).tolist()):
            amount = draw if gain or has == 0 else min(draw, has)
            gain = gain or has == 0
            has += amount if gain else -amount
            story += f" {name} {'gets' if gain else 'loses'} {amount}."
        rows.append((f"{story} How many?", str(has)))
    return rows


_LINE = re.compile(r"([xyz]) = (?:([xyz]) ([+*-]) )?(\d+)")


def _solve_program(prompt: str) -> Trace:
    *lines, last = argument(prompt, "run").split("; ")
    names: dict[str, int] = {}
    steps = []
    for line in lines:
        match = _LINE.fullmatch(line)
        if not match:
            raise DataError(f"cannot read {line!r}", where="gym program", remedy="write lines like `y = x + 3`")
        target, source, sign, number = match.groups()
        left = names[source] if source else 0
        names[target] = {"+": left + int(number), "-": left - int(number), "*": left * int(number)}[sign or "+"]
        steps.append(f"{target} is {names[target]}")
    return Trace(tuple(steps), str(names[last.removeprefix("print ")]))


@family("program", _solve_program, 0.05)
def write_program(rng: np.random.Generator, level: int, n: int) -> list[tuple[str, str]]:
    """Say what a straight-line program prints; two lines at level 1, one more every second level."""
    rows, count = [], 2 + level // 2
    for _ in range(n):
        values = {"x": int(rng.integers(1, 10))}
        lines = [f"x = {values['x']}"]
        for _ in range(count - 1):
            source = str(rng.choice(list(values)))
            target, number = str(rng.choice(["x", "y", "z"])), int(rng.integers(1, 5))
            sign = str(rng.choice(["+", "-"] if abs(values[source]) > 9 else ["+", "-", "*"]))
            values[target] = {"+": 1, "-": -1}.get(sign, 0) * number + values[source]
            if sign == "*":
                values[target] = values[source] * number
            lines.append(f"{target} = {source} {sign} {number}")
        rows.append((f"run {'; '.join(lines)}; print {target}", str(values[target])))
    return rows
