"""Evidence for a claim, and gates that can say no.

Nothing is claimed that evidence does not carry: a comparison on too few items, with a parent that is not better
than guessing, or with a side that was not measured, is ``no-signal``, and no-signal never passes a gate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from numpy.typing import ArrayLike
from pydantic import Field, FiniteFloat, NonNegativeInt, model_validator

from forgekit.config import Config
from forgekit.measure.stats import Interval, chance_correct, mean_interval, paired_difference

Verdict = Literal["improved", "no-difference", "worse", "no-signal"]
Need = Literal["improved", "not-worse"]
Name = Annotated[str, Field(min_length=1)]

MINIMUM_ITEMS = 20
"""Fewer paired items than this carry no verdict."""

skill = chance_correct


class Question(Config):
    """What is compared, fixed before the numbers are seen."""

    claim: Name
    """The sentence the evidence is for."""
    metric: Name
    """What was measured per item."""
    chance: FiniteFloat | None
    """The score of guessing; None for a metric without one."""
    split: Name
    """The data the items come from; selection, calibration and report splits are disjoint."""
    seeds: tuple[int, ...]
    """Training and evaluation seeds behind the numbers."""
    compute: dict[str, FiniteFloat]
    """What it cost, such as flops, tokens, seconds."""
    higher_is_better: bool = True
    """False for losses, errors and bytes."""
    baseline: FiniteFloat | None = None
    """The score of the plain alternative at matched compute, where there is one."""
    parent_must_beat_chance: bool = True
    """False only for a skill the parent is not expected to have; the result must then beat chance."""


class Evidence(Config):
    """A measured answer to one claim."""

    claim: Name
    """The sentence the evidence is for."""
    metric: Name
    """What was measured per item."""
    before: FiniteFloat | None
    """Mean over the items before; None when it was not measured."""
    after: FiniteFloat | None
    """Mean over the same items after; None when it was not measured."""
    baseline: FiniteFloat | None
    """The score of the plain alternative at matched compute, where there is one."""
    ci95: tuple[FiniteFloat, FiniteFloat] | None
    """95 % interval of ``after - before``; below zero is better where less is better."""
    n: NonNegativeInt
    """Paired items."""
    seeds: tuple[int, ...]
    """Training and evaluation seeds behind the numbers."""
    split: Name
    """The data the items come from."""
    chance: FiniteFloat | None
    """The score of guessing; None for a metric without one."""
    compute: dict[str, FiniteFloat]
    """What it cost, such as flops, tokens, seconds."""
    verdict: Verdict
    """improved, no-difference, worse or no-signal."""

    @model_validator(mode="after")
    def _consistent(self) -> Evidence:
        if self.ci95 is not None and self.ci95[0] > self.ci95[1]:
            raise ValueError(f"ci95 {self.ci95} has its low end above its high end")
        if self.verdict != "no-signal" and None in (self.before, self.after, self.ci95):
            raise ValueError(f"verdict {self.verdict!r} without before, after and ci95")
        return self

    @classmethod
    def compare(cls, *, before: ArrayLike | None, after: ArrayLike | None, **question: Any) -> Evidence:
        """Compare two measurements of the same items.

        Args:
            before: one score per item; None or empty when it was not measured.
            after: one score per item, in the same order.
            question: the fields of :class:`Question`.

        Raises:
            ConfigError: a field of the question is missing, unknown or not valid.
            DataError: a score is not finite, or there are not as many before as after.
        """
        return judge(before, after, Question.build(question, "evidence"))

    @classmethod
    def of_statistic(cls, *, before: float, after: float, change: Interval, n: int, **question: Any) -> Evidence:
        """Compare two values of a statistic that is no mean over items, such as a composite of several scores.

        Args:
            before: its value before.
            after: its value after.
            change: ``after - before`` with its 95 % interval, from resampling the items both share.
            n: paired items behind it.
            question: the fields of :class:`Question`.

        Raises:
            ConfigError: a field of the question is missing, unknown or not valid.
        """
        asked = Question.build(question, "evidence")
        values = asked.model_dump(exclude={"higher_is_better", "parent_must_beat_chance"})
        low, high = change[1:] if asked.higher_is_better else (-change[2], -change[1])
        verdict = "improved" if low > 0 else "worse" if high < 0 else "no-difference"
        values |= {"before": before, "after": after, "ci95": change[1:], "n": n}
        return cls.build({**values, "verdict": verdict if n >= MINIMUM_ITEMS else "no-signal"}, "evidence")

    def __str__(self) -> str:
        if self.before is None or self.after is None or self.ci95 is None:
            return f"{self.claim}: {self.verdict} ({self.metric} not measured on both sides)"
        means = f"{self.metric} {self.before:.4g} to {self.after:.4g}"
        interval = f"95 % interval of the change [{self.ci95[0]:+.4g}, {self.ci95[1]:+.4g}]"
        return f"{self.claim}: {self.verdict} ({means}, {interval}, n={self.n})"


def judge(before: ArrayLike | None, after: ArrayLike | None, question: Question) -> Evidence:
    """Answer a question from the scores of the same items before and after; raises as :meth:`Evidence.compare`."""
    measured = [side is not None and len(side) > 0 for side in (before, after)]
    difference = paired_difference(before, after) if all(measured) else None
    sides = [mean_interval(side) if there else None for side, there in zip((before, after), measured)]
    n = 0 if difference is None else len(before)
    values = question.model_dump(exclude={"higher_is_better", "parent_must_beat_chance"})
    values |= {
        "before": sides[0] and sides[0][0],
        "after": sides[1] and sides[1][0],
        "ci95": difference and difference[1:],
        "n": n,
        "verdict": "no-signal" if difference is None else _verdict(sides[0], sides[1], difference, n, question),
    }
    return Evidence.build(values, "evidence")


def _verdict(before: Interval, after: Interval, difference: Interval, n: int, question: Question) -> Verdict:
    carries = _beats_chance(before, question)
    if not question.parent_must_beat_chance:
        carries = carries or _beats_chance(after, question)
    if n < MINIMUM_ITEMS or not carries:
        return "no-signal"
    _, low, high = difference
    if not question.higher_is_better:
        low, high = -high, -low
    return "improved" if low > 0 else "worse" if high < 0 else "no-difference"


def _beats_chance(score: Interval, question: Question) -> bool:
    if question.chance is None:
        return True
    return score[1] > question.chance if question.higher_is_better else score[2] < question.chance


class GateResult(Config):
    """What a gate decided, with one line per requirement."""

    passed: bool
    """Whether every requirement was met."""
    reasons: tuple[str, ...]
    """For each requirement, the evidence that met it or what was lacking."""


class Gate(Config):
    """What evidence a phase must show, and what happens when it does not."""

    name: Name
    """The gate, for messages."""
    requires: dict[Name, Need] = Field(min_length=1)
    """Claim or metric to the verdict it needs: ``improved``, or ``not-worse`` (improved or no-difference)."""
    policy: Literal["stop", "fall_back", "accept"] = "fall_back"
    """When it says no: stop the pipeline, go on with the parent, or go on with the result nevertheless."""

    def decide(self, evidence: Iterable[Evidence]) -> GateResult:
        """Pass only if every requirement has evidence and all evidence for it has the verdict it needs."""
        given = list(evidence)
        passed, reasons = True, []
        for key, need in self.requires.items():
            found = [item for item in given if key in (item.claim, item.metric)]
            if not found:
                passed = False
                reasons.append(f"no: {key} needs {need}, there is no evidence for it")
            for item in found:
                met = item.verdict == "improved" or (need == "not-worse" and item.verdict == "no-difference")
                passed = passed and met
                reasons.append(f"{'yes' if met else 'no'}: {key} needs {need}; {item}")
        return GateResult(passed=passed, reasons=tuple(reasons))
