"""What phase 4 claims, measured on the report split, which chose nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent_forge.phases.bitnet.config import BitNetConfig
from agent_forge.phases.bitnet.measuring import Reading
from forgekit.data.gym import Problem
from forgekit.data.plans import GymMix
from forgekit.data.problems import REPORT_SEED
from forgekit.measure.evidence import MINIMUM_ITEMS, Evidence, Gate, GateResult
from forgekit.measure.problems import by_level, chance_of
from forgekit.measure.stats import chance_correct, mean_interval

PARENT, TERNARY, SAME_BYTES = "parent", "ternary", "full precision, same bytes"


def untrained(made: str) -> str:
    """The name of a model that was only rounded, to ternary, int8 or int4."""
    return f"{made}, not trained"


UNTRAINED, INT8, INT4 = map(untrained, (TERNARY, "int8", "int4"))
KEPT, SKILLS = "skills, with grace", "skills"
STRONG = "mastered skills, with grace"
TEXT_KEPT, TEXT = "text, with grace", "text"
TRAINED = "training brings back what rounding lost"
WINDOWS, QUESTIONS = "windows of text", "questions"


def in_floats(made: str) -> str:
    """The name of the copy that later phases train: the same weights, activations not rounded."""
    return f"{made}, in floats"


def against(made: str, other: str) -> str:
    """The claim that compares the result with another that was only rounded. Of ternary weights it says so: they are
    not meant to be used without training."""
    return f"{made} against {other if other == UNTRAINED else other.removesuffix(untrained(''))}"


def smaller(made: str, text: bool = False) -> str:
    """The claim that compares the result with a model of the same bytes, by skills or by text. That one began from
    nothing and was trained for as many steps."""
    return f"{made} beats full precision in the same bytes, from nothing{', on text' if text else ''}"


@dataclass(frozen=True)
class Finals:
    """The report's measurements.

    Attributes:
        problems: the questions, none where nobody knows what the parent can do; ``mix`` is what they are of.
        readings: what every model shows, by name; always those of parent, ``made`` and the same without training.
        sizes: bytes of weights on disk, by name; the parent's in float32.
        strong: levels (``family/level``) that the parent has mastered, by the select split.
        trained: whether the low-bit weights were trained after rounding.
        compute: what the phase cost.
        made: what the result is called.
        forgot: whether rounding alone cost more answers than the settings allow (select split); if not, training has
            only text to bring back.
    """

    problems: Sequence[Problem]
    mix: Sequence[GymMix]
    readings: Mapping[str, Reading]
    sizes: Mapping[str, int]
    strong: frozenset[str]
    trained: bool
    compute: dict[str, float]
    made: str = TERNARY
    forgot: bool = True

    @property
    def three(self) -> tuple[Reading, Reading, Reading]:
        """Parent, rounded, and what is handed on."""
        return tuple(self.readings[name] for name in (PARENT, untrained(self.made), self.made))

    @property
    def ratio(self) -> float:
        """Bytes before over bytes after."""
        return self.sizes[PARENT] / self.sizes[self.made]

    @property
    def perplexity_added(self) -> float:
        """Share by which perplexity grew."""
        before, _, after = self.three
        return after.perplexity / before.perplexity - 1

    @property
    def recovery(self) -> float | None:
        """Share of the right answers lost by rounding that training brought back; None where none were lost."""
        return _brought_back(*(one.accuracy for one in self.three)) if self.problems else None

    @property
    def perplexity_recovery(self) -> float | None:
        """The same of perplexity."""
        return _brought_back(*(-one.perplexity for one in self.three))

    @property
    def retention(self) -> float | None:
        """Skill after over skill before, both corrected for chance (DESIGN 7 (9)); 0 where there was none, None where
        nothing was asked."""
        if not self.problems:
            return None
        chance = chance_of(self.mix, self.problems)
        before, _, after = (chance_correct(one.accuracy, chance) for one in self.three)
        return after / before if before > 0 else 0.0


def _brought_back(before: float, rounded: float, after: float) -> float | None:
    return (after - rounded) / (before - rounded) if before > rounded else None


def gate(policy: str, finals: Finals) -> Gate:
    """What phase 4 must show: skills and text that are still there, and training that helped where there was any. What
    was mastered has two points of grace only: too few to be certain of at any number of questions that a run can ask,
    so it must not be certain that more was lost, and :func:`decide` asks for the amount."""
    needs = {KEPT: "improved"} if finals.problems else {}
    needs[TEXT_KEPT] = "improved"
    if finals.strong:
        needs[STRONG] = "not-worse"
    if finals.trained:
        needs[TRAINED] = "improved"
    return Gate(name="bitnet", requires=needs, policy=policy)


def decide(config: BitNetConfig, policy: str, evidence: Sequence[Evidence], finals: Finals) -> GateResult:
    """The gate's decision; every no says by how much."""
    decision = gate(policy, finals).decide(evidence)
    claims = {item.claim: item for item in evidence}
    reasons = []
    if finals.ratio < config.ratio_asked:
        reasons.append(f"no: {finals.ratio:.2f} times smaller than float32, {config.ratio_asked:g} is asked for")
    if finals.perplexity_added > config.most_perplexity:
        told = f"perplexity grew by {100 * finals.perplexity_added:.1f} %"
        reasons.append(f"no: {told}, {100 * config.most_perplexity:g} % is allowed")
    if finals.strong and (lost := claims[STRONG].before + config.grace - claims[STRONG].after) > config.grace:
        told = f"{100 * lost:.1f} points of the mastered skills are lost"
        reasons.append(f"no: {told}, {100 * config.grace:g} are allowed")
    recovery = finals.recovery if finals.forgot else finals.perplexity_recovery
    if finals.trained and recovery is not None and recovery < config.least_recovery:
        told = f"training brought back {100 * recovery:.1f} % of what rounding lost"
        reasons.append(f"no: {told}, {100 * config.least_recovery:g} % is asked for")
    few = [(WINDOWS, claims[TEXT_KEPT].n), *([(QUESTIONS, claims[KEPT].n)] if finals.problems else [])]
    reasons += [f"no: too few {what} to tell: {n}, it takes {MINIMUM_ITEMS}" for what, n in few if n < MINIMUM_ITEMS]
    if finals.problems and claims[SKILLS].verdict == "no-signal" and claims[SKILLS].n >= MINIMUM_ITEMS:
        reasons.append(f"no: {SKILLS}: the parent is not above chance on them, so nothing can be said to be kept")
    return GateResult(passed=decision.passed and not reasons, reasons=(*decision.reasons, *reasons))


def measure(config: BitNetConfig, finals: Finals) -> list[Evidence]:
    """All claims: about skills where there are questions, about text always."""
    seeds = (config.practice.seed, config.train.seed, REPORT_SEED)
    common = {"split": "report", "seeds": seeds, "compute": finals.compute}
    asked, made = bool(finals.problems), finals.made
    found = [*(_skills(config, finals, common) if asked else ()), *_text(config, finals, common)]
    compare = _between if asked else _bits
    if finals.trained:
        lost = _between if asked and finals.forgot else _bits
        found.append(lost(TRAINED, finals, (untrained(made), made), common))
    for name in (INT8, INT4, UNTRAINED):
        if name in finals.readings and name != untrained(made):
            found.append(compare(against(made, name), finals, (name, made), common))
    if in_floats(made) in finals.readings:
        found.append(
            compare(f"the copy {in_floats(made)} against the packed one", finals, (made, in_floats(made)), common)
        )
    if SAME_BYTES in finals.readings:
        if asked:
            found.append(_between(smaller(made), finals, (SAME_BYTES, made), common))
        found.append(_bits(smaller(made, text=True), finals, (SAME_BYTES, made), common))
    return found


def _skills(config: BitNetConfig, finals: Finals, common: dict[str, Any]) -> list[Evidence]:
    before, _, after = (one.right for one in finals.three)
    question = {"metric": "skills_with_grace", "chance": None, **common}
    found = [Evidence.compare(claim=KEPT, before=config.least_retention * before, after=after, **question)]
    at = [i for i, p in enumerate(finals.problems) if f"{p.family}/{p.level}" in finals.strong]
    if at:
        found.append(Evidence.compare(claim=STRONG, before=before[at] - config.grace, after=after[at], **question))
    small = finals.readings.get(SAME_BYTES)
    question = {"metric": "exact_match", "chance": chance_of(finals.mix, finals.problems), **common}
    baseline = small and small.accuracy
    found.append(Evidence.compare(claim=SKILLS, before=before, after=after, baseline=baseline, **question))
    return found


def _text(config: BitNetConfig, finals: Finals, common: dict[str, Any]) -> list[Evidence]:
    before, _, after = finals.three
    allowed = math.log2(1 + config.most_perplexity)
    kept = Evidence.compare(
        claim=TEXT_KEPT,
        metric="bits_per_token_with_grace",
        before=before.bits_per_token + allowed,
        after=after.bits_per_token,
        chance=None,
        higher_is_better=False,
        **common,
    )
    return [kept, _bits(TEXT, finals, (PARENT, finals.made), common)]


def _between(claim: str, finals: Finals, names: tuple[str, str], common: dict[str, Any]) -> Evidence:
    """Right answers of two models; either may be no better than chance."""
    before, after = (finals.readings[name].right for name in names)
    chance = chance_of(finals.mix, finals.problems)
    question = {"metric": "exact_match", "chance": chance, "parent_must_beat_chance": False, **common}
    return Evidence.compare(claim=claim, before=before, after=after, **question)


def _bits(claim: str, finals: Finals, names: tuple[str, str], common: dict[str, Any]) -> Evidence:
    before, after = (finals.readings[name].text.per_window for name in names)
    question = {"metric": "bits_per_byte", "chance": None, "higher_is_better": False, **common}
    return Evidence.compare(claim=claim, before=before, after=after, **question)


def models(finals: Finals) -> list[dict[str, Any]]:
    """One row per model, for people: bytes, skills with their interval (None where nothing was asked), perplexity, bits
    per byte."""
    rows = []
    for name, reading in finals.readings.items():
        value, low, high = mean_interval(reading.right) if len(reading.right) else (None, None, None)
        row = {"model": name, "bytes": finals.sizes[name], "ratio": finals.sizes[PARENT] / finals.sizes[name]}
        row |= {"accuracy": value, "low": low, "high": high, "n": len(reading.right)}
        rows.append({**row, "perplexity": reading.perplexity, "bits_per_byte": reading.text.bits_per_byte})
    return rows


def levels(finals: Finals) -> dict[str, dict[str, float]]:
    """Exact answers by model and by family and level; empty where nothing was asked."""
    if not finals.problems:
        return {}
    return {
        name: dict(sorted(by_level(finals.problems, reading.right).items()))
        for name, reading in finals.readings.items()
    }


def mastered(problems: Sequence[Problem], right: np.ndarray, least: float) -> frozenset[str]:
    """Levels (``family/level``) with at least so many right answers."""
    return frozenset(cell for cell, share in by_level(problems, right).items() if share >= least)
