"""The seven ways to think that the sources name, each written about a gym question.

What they share are the steps of the solution; a strategy decides what comes before, between and after them. A
strategy that has nothing to say about a family is left out there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from forgekit.data.thoughts.form import DOUBT, EXPERT, FALSIFY, MECE, REASON, STEP, Segment, Thought
from forgekit.data.thoughts.views import View
from forgekit.registry import Registry


@dataclass(frozen=True)
class Strategy:
    """A way to think.

    Attributes:
        name: registered name, which is also the system message that asks for it.
        write: a question's view and a generator to a thought, ``None`` where it has nothing to say.
        meaning: one sentence for people.
    """

    name: str
    write: Callable[[View, np.random.Generator], Thought | None]
    meaning: str


STRATEGIES = Registry("thinking strategy")


def strategy(name: str):
    """Decorator: register a writer as a strategy; its docstring's first line is the meaning."""

    def keep(write: Callable[[View, np.random.Generator], Thought | None]):
        STRATEGIES.register(name)(Strategy(name, write, (write.__doc__ or "").splitlines()[0]))
        return write

    return keep


def _steps(known: View) -> tuple[Segment, ...]:
    return tuple(Segment(STEP, text) for text in known.steps)


@strategy("mece")
def write_mece(known: View, rng: np.random.Generator) -> Thought | None:
    """First the parts, without overlap and without a rest (mutually exclusive, collectively exhaustive)."""
    return Thought((Segment(MECE, known.parts), *_steps(known))) if known.parts else None


@strategy("falsify")
def write_falsify(known: View, rng: np.random.Generator) -> Thought | None:
    """At the end, try to refute the result by undoing what led to it."""
    return Thought((*_steps(known), Segment(FALSIFY, known.inverse))) if known.inverse else None


@strategy("expert")
def write_expert(known: View, rng: np.random.Generator) -> Thought | None:
    """Do as somebody does who does this for a living."""
    return Thought((Segment(EXPERT, known.role), *_steps(known)))


@strategy("orthogonal")
def write_orthogonal(known: View, rng: np.random.Generator) -> Thought | None:
    """Look from elsewhere first: a property the result must have, whatever it is."""
    return Thought((Segment(REASON, known.aside), *_steps(known))) if known.aside else None


@strategy("doubt")
def write_doubt(known: View, rng: np.random.Generator) -> Thought | None:
    """Notice a slip and mend it; the slip itself is shown in training and not learned."""
    at = int(rng.integers(len(known.steps)))
    wrong = _slip(known.steps[at], known, rng)
    if wrong is None:
        return None
    steps = _steps(known)
    mended = (Segment(STEP, wrong, slip=True), Segment(DOUBT, known.steps[at]))
    return Thought((*steps[:at], *mended, *steps[at + 1 :]))


@strategy("bayes")
def write_bayes(known: View, rng: np.random.Generator) -> Thought | None:
    """Say what one would guess, look at the evidence, say what one believes now."""
    if not known.guess:
        return None
    return Thought((Segment(REASON, known.guess), *_steps(known), Segment(REASON, f"now {known.answer}")))


@strategy("domains")
def write_domains(known: View, rng: np.random.Generator) -> Thought | None:
    """Carry the question over to another domain and solve it there."""
    return Thought((Segment(REASON, f"as {known.domain}"), *_steps(known)))


def _slip(step: str, known: View, rng: np.random.Generator) -> str | None:
    """The step with its last symbol wrong; ``None`` where it has none of the kind."""
    last = step[-1]
    if last.isdigit():
        others = [d for d in "0123456789" if d != last]
    elif last.isalpha() and ">" in step:
        others = sorted({text[-1] for text in known.steps} - {last})
    else:
        return None
    return step[:-1] + others[int(rng.integers(len(others)))] if others else None


def strategy_of(text: str) -> str:
    """The strategy that a thought follows, by its markers and words; "steps" where it has none of them."""
    for marker, name in ((DOUBT, "doubt"), (MECE, "mece"), (FALSIFY, "falsify"), (EXPERT, "expert")):
        if marker in text:
            return name
    if REASON not in text:
        return "steps"
    said = text.partition(REASON)[2]
    return "bayes" if said.startswith("guess ") else "domains" if said.startswith("as ") else "orthogonal"
