"""What can be said about a gym question: its steps in a short notation, and other ways to look at it.

Every text is computed from the question alone, so the same code that writes traces says which statements of a model's
thought hold. The notation is short because small models attend to a few dozen tokens: ``8+5+0=13`` is one column of an
addition with the carry that came in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from forgekit.data.gym import FAMILIES
from forgekit.errors import DataError


@dataclass(frozen=True)
class View:
    """What holds of one question.

    Attributes:
        family: its gym family.
        steps: the solution, one statement each.
        parts: the question taken apart without overlap and without a rest.
        inverse: the last step undone, or the sum taken apart again.
        aside: a property of the result seen from elsewhere: a parity, a count.
        guess: what one would say before working it out.
        answer: the result.
        role: who does this for a living.
        domain: what the question is like elsewhere.
    """

    family: str
    steps: tuple[str, ...]
    answer: str
    parts: str = ""
    inverse: str = ""
    aside: str = ""
    guess: str = ""
    role: str = "solver"
    domain: str = "a game"

    @cached_property
    def facts(self) -> frozenset[str]:
        """Every statement that may be made of the question, blanks at the ends left off."""
        said = (*self.steps, self.parts, self.inverse, self.aside, self.guess, f"now {self.answer}")
        return frozenset(text.strip() for text in said if text)


ROLES = ("solver", "clerk", "clock", "guide", "cashier", "computer")
DOMAINS = ("a game", "coins", "hours", "roads", "money", "boxes")
WORDS = frozenset((*ROLES, *DOMAINS))
"""Roles and domains: they say how one goes about it, and cannot be right or wrong."""


def parity(number: int) -> str:
    """``odd`` or ``even``."""
    return "odd" if number % 2 else "even"


def _add(prompt: str) -> View:
    a, b = prompt.split()[1:]
    width, carry, steps = max(len(a), len(b)), 0, []
    columns = list(zip(reversed(a.zfill(width)), reversed(b.zfill(width))))
    for x, y in columns:
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    total = int(a) + int(b)
    rough = (int(a[0]) * 10 ** (len(a) - 1)) + int(b[0]) * 10 ** (len(b) - 1)
    return View(
        "add",
        tuple(steps),
        str(total),
        parts=",".join(f"{x}+{y}" for x, y in columns),
        inverse=f"{total}-{b}={a}",
        aside=f"{parity(int(a))}+{parity(int(b))}={parity(total)}",
        guess=f"guess {rough}",
        role="clerk",
        domain="coins",
    )


def _moves(family: str, start: int, moves: Sequence[int], wrap: int) -> View:
    """A number that goes up and down; ``wrap`` 10 keeps its last digit."""
    values, steps = [start], []
    for move in moves:
        after = values[-1] + move
        values.append(after % wrap if wrap else after)
        steps.append(f"{values[-2]}{move:+d}={values[-1]}")
    ups, downs = ("".join(f"{m:+d}" for m in moves if (m > 0) is up) for up in (True, False))
    odd = sum(m % 2 for m in moves)
    return View(
        family,
        tuple(steps),
        str(values[-1]),
        parts=",".join(part for part in (ups, downs) if part),
        inverse=f"{values[-1]}{-moves[-1]:+d}={values[-2]}" if moves else "",
        aside=f"{parity(start)},{odd} odd={parity(values[-1])}",
        guess=f"guess {start}",
        role="clock" if wrap else "cashier",
        domain="hours" if wrap else "money",
    )


def _state(prompt: str) -> View:
    start, *moves = prompt.split()[1:]
    return _moves("state", int(start), [int(move) for move in moves], 10)


def _words(prompt: str) -> View:
    start = int(re.search(r"has (\d+)", prompt)[1])
    found = re.findall(r"(gets|loses) (\d+)", prompt)
    return _moves("words", start, [int(n) if verb == "gets" else -int(n) for verb, n in found], 0)


def _lookup(prompt: str) -> View:
    links, _, query = prompt.removeprefix("follow ").rpartition(" ? ")
    here, hops = query.split()
    table, steps, first, before = dict(link.split(">") for link in links.split()), [], here, here
    for _ in range(int(hops)):
        steps.append(f" {here}>{table[here]}")
        before, here = here, table[here]
    return View(
        "lookup",
        tuple(steps),
        here,
        parts=",".join(str(i + 1) for i in range(int(hops))),
        inverse=f"{here}<{before}",
        aside=f"{len(table)} links",
        guess=f"guess {table[first]}",
        role="guide",
        domain="roads",
    )


def _program(prompt: str) -> View:
    *lines, last = prompt.removeprefix("run ").split("; ")
    names: dict[str, int] = {}
    steps, inverse = [], ""
    for line in lines:
        target, _, rest = line.partition(" = ")
        source, *operation = rest.split(" ")
        if not operation:
            names[target] = int(source)
            steps.append(f" {target}={names[target]}")
            continue
        sign, number = operation
        left, right = names[source], int(number)
        value = {"+": left + right, "-": left - right, "*": left * right}[sign]
        steps.append(f" {target}={left}{sign}{right}={value}")
        inverse = f"{value}{ {'+': '-', '-': '+', '*': '/'}[sign] }{right}={left}"
        names[target] = value
    return View(
        "program",
        tuple(steps),
        str(names[last.removeprefix("print ")]),
        parts=",".join(line[0] for line in lines),
        inverse=inverse,
        aside=f"{len(lines)} lines",
        guess=f"guess {lines[0].rpartition(' ')[2]}",
        role="computer",
        domain="boxes",
    )


_VIEWS: dict[str, Callable[[str], View]] = {
    "add": _add,
    "state": _state,
    "words": _words,
    "lookup": _lookup,
    "program": _program,
}
_COMMANDS = {"add": "add", "track": "state", "follow": "lookup", "run": "program"}
_COMMANDS |= {"copy": "copy", "reverse": "reverse", "sort": "sort", "recall": "recall", "larger": "compare"}
_COMMANDS |= {"tool:": "tool"}


LONGEST = 2000
"""Characters of a question that is looked at: solvers take time, and none of the gym's is as long but those that hide
a pair far away."""
FARTHEST = 50_000
"""The same for these."""
HOPS = 100
"""Links that are followed at most, for the same reason."""


def family_of(prompt: str) -> str | None:
    """The gym family of a question, ``None`` where :func:`view` has nothing to say."""
    known = view(prompt)
    return known and known.family


def _number(text: str) -> int:
    """A short whole number; 0 for anything else."""
    return int(text) if text.isdecimal() and len(text) < 9 else 0


@lru_cache(maxsize=8192)
def view(prompt: str) -> View | None:
    """What can be said of a gym question; ``None`` for any other text, and where there is nothing to work out.

    Families without a notation of their own have the steps that their solver writes, and no other views.
    """
    story = "words" if prompt.endswith("How many?") else None
    name = _COMMANDS.get(prompt.split(" ", 1)[0], story)
    if name is None or len(prompt) > (FARTHEST if name == "recall" else LONGEST):
        return None
    if name == "lookup" and not 0 < _number(prompt.rpartition(" ")[2]) <= HOPS:
        return None
    try:
        solved = FAMILIES.get(name).solve(prompt)
    except (DataError, ValueError, LookupError):
        return None
    known = _VIEWS[name](prompt) if name in _VIEWS else View(name, solved.steps, solved.answer)
    return known if known.steps else None
