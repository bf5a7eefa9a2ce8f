"""Which statements of a thought hold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from forgekit.data.thoughts.form import DOUBT, STEP, Thought, parse
from forgekit.data.thoughts.views import WORDS, View, view


@dataclass(frozen=True)
class Check:
    """What was found in a thought.

    Attributes:
        well_formed: it opens, closes, and every piece has a marker.
        statements: pieces that can be right or wrong.
        true: of these, the ones that hold.
        mended: of these, the false ones that a doubt corrects at once.
        unchecked: pieces that cannot be right or wrong, or that nobody here can judge.
        complete: its steps lead to the right answer; taken as true where that cannot be read.
    """

    well_formed: bool
    statements: int = 0
    true: int = 0
    mended: int = 0
    unchecked: int = 0
    complete: bool = True

    @property
    def false(self) -> int:
        """Statements that do not hold and were left standing."""
        return self.statements - self.true - self.mended

    @property
    def valid(self) -> bool:
        """Whether it is well formed, says something, and nothing false is left."""
        return self.well_formed and not self.false and self.statements + self.unchecked > 0

    @property
    def sound(self) -> bool:
        """Whether it is valid and leads to the right answer: words that say nothing wrong are not enough."""
        return self.valid and self.complete


def _complete(prompt: str, thought: Thought, known: View | None, true: int) -> bool:
    if known is None:
        return True
    led_to = conclusion(prompt, thought)
    return true > 0 if led_to is None else led_to == known.answer


def check(prompt: str, text: str | Thought) -> Check:
    """Check a thought against its question.

    A gym question is solved by its own solver: a statement holds if it is one of those that can be made *of this
    question* (``2+2=4`` is false where nobody asked for it). Of other texts, every equation between numbers is
    computed, and the rest is left unchecked.

    Args:
        prompt: the question.
        text: the thought, outer pair included.
    """
    thought = parse(text) if isinstance(text, str) else text
    if thought is None:
        return Check(False)
    known = view(prompt)
    found = [_holds(segment.text.strip(), known) for segment in thought.segments]
    mended = sum(
        found[i] is False and found[i + 1] is True and thought.segments[i + 1].marker == DOUBT
        for i in range(len(found) - 1)
    )
    true, silent = found.count(True), found.count(None)
    return Check(True, len(found) - silent, true, mended, silent, _complete(prompt, thought, known, true))


def _holds(text: str, known: View | None) -> bool | None:
    """True or false; ``None`` where that cannot be said."""
    if known is not None:
        # A guess is what one would say before knowing: it may be off, and what follows it is checked.
        said = text in WORDS or text.removeprefix("as ") in WORDS or _GUESS.fullmatch(text)
        return None if said else text in known.facts
    equations = [found[0] for found in _EQUATION.finditer(text) if _begins(text, found)]
    return all(map(_equal, equations)) if equations else None


_GUESS = re.compile(r"guess \w+")
# A few dozen digits and terms: more cost time and are never meant. Not the rest of `1.5`, `(2)` or `1,000`, and
# not the beginning of `3.5`, `3x`, `1,001` or `4+1`.
_NUMBER = r"-?\d{1,40}"
_EQUATION = re.compile(
    rf"(?<![\w.)\]%^])(?!(?<=\d,)\d{{3}}(?!\d)){_NUMBER}(?:\s*[-+*/]\s*{_NUMBER}){{1,40}}\s*=\s*{_NUMBER}"
    r"(?!\w|\(|\.\d|,\d{3}(?!\d)|\s*(?!->|=>)[-+*/=^%])",
    re.ASCII,
)
# What stands before an equation and belongs to it: `x - ` of `x - 2+3=1`, `1+1=` of `1+1=2+1=3`. A name and an equals
# sign do not: `x = 2+3 = 5` says that 2+3 is 5.
_GOES_ON = re.compile(r"[-+*/^%]\s*$|(?<![A-Za-z_])[^A-Za-z_\s]\s*=\s*$|\d\s+$", re.ASCII)
_OPERAND = re.compile(r"[\w)\]]\s*$", re.ASCII)
_FIRST = re.compile(rf"()({_NUMBER})", re.ASCII)
_TERM = re.compile(rf"([-+*/]?)({_NUMBER})", re.ASCII)


def _begins(text: str, found: re.Match[str]) -> bool:
    """Whether an equation begins where it was found and is not the rest of a longer one."""
    before = text[max(0, found.start() - 20) : found.start()]
    return not _GOES_ON.search(before) and not (found[0].startswith("-") and _OPERAND.search(before))


def _equal(equation: str) -> bool:
    """Whether sums, differences, products and quotients of whole numbers are what is claimed; products first."""
    left, _, right = re.sub(r"\s", "", equation).rpartition("=")
    terms: list[Fraction] = []
    at = 0
    while at < len(left):
        match = _TERM.match(left, at) if at else _FIRST.match(left)
        if match is None:
            return False
        sign, number = match[1], Fraction(match[2])
        if sign == "*":
            terms[-1] *= number
        elif sign == "/":
            if not number:
                return False
            terms[-1] /= number
        else:
            terms.append(-number if sign == "-" else number)
        at = match.end()
    return sum(terms) == Fraction(right)


def conclusion(prompt: str, text: str | Thought) -> str | None:
    """The answer that a thought's own steps lead to, whether they hold or not; ``None`` where that cannot be read.

    Only gym families with a notation of their own can be read.
    """
    thought, known = parse(text) if isinstance(text, str) else text, view(prompt)
    if thought is None or known is None:
        return None
    last: list[str] = []
    for segment in thought.segments:
        if segment.marker == STEP:
            last.append(segment.text)
        elif segment.marker == DOUBT and last:
            last[-1] = segment.text
    if not last:
        return None
    if known.family == "lookup":
        return last[-1].rpartition(">")[2].strip()
    if known.family in ("state", "words", "program"):
        return last[-1].rpartition("=")[2].strip()
    if known.family == "add":
        totals = [step.rpartition("=")[2].strip() for step in last]
        if not all(total.isdigit() for total in totals):
            return None
        return totals[-1] + "".join(total[-1] for total in reversed(totals[:-1]))
    return None
