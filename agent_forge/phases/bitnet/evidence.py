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
from forgekit.measure.evidence import Evidence, Gate, GateResult
from forgekit.measure.problems import by_level, chance_of
from forgekit.measure.stats import chance_correct, mean_interval

PARENT, TERNARY, UNTRAINED, INT8, INT4, SAME_BYTES = (
    "parent",
    "ternary",
    "ternary, not trained",
    "int8, not trained",
    "int4, not trained",
    "full precision, same bytes",
)
KEPT, SKILLS = "skills, with grace", "skills"
STRONG = "mastered skills, with grace"
TEXT_KEPT, TEXT = "text, with grace", "text"
TRAINED = "training brings back what rounding lost"
SMALL, SMALL_TEXT = "ternary beats full precision in the same bytes", "the same on text"
AGAINST = {INT8: "ternary against int8", INT4: "ternary against int4"}


@dataclass(frozen=True)
class Finals:
    """The report's measurements.

    Attributes:
        problems: the questions; ``mix`` is what they are of.
        readings: what every model shows, by name; always those of parent and ternary.
        sizes: bytes of weights on disk, by name; the parent's in float32.
        strong: levels (``family/level``) that the parent has mastered, by the select split.
        trained: whether the ternary weights were trained after rounding.
        compute: what the phase cost.
    """

    problems: Sequence[Problem]
    mix: Sequence[GymMix]
    readings: Mapping[str, Reading]
    sizes: Mapping[str, int]
    strong: frozenset[str]
    trained: bool
    compute: dict[str, float]

    @property
    def ratio(self) -> float:
        """Bytes before over bytes after."""
        return self.sizes[PARENT] / self.sizes[TERNARY]

    @property
    def perplexity_added(self) -> float:
        """Share by which perplexity grew."""
        return self.readings[TERNARY].perplexity / self.readings[PARENT].perplexity - 1

    @property
    def recovery(self) -> float | None:
        """Share of the right answers lost by rounding that training brought back; None where none were lost."""
        return _brought_back(*(self.readings[name].accuracy for name in (PARENT, UNTRAINED, TERNARY)))

    @property
    def perplexity_recovery(self) -> float | None:
        """The same of perplexity."""
        return _brought_back(*(-self.readings[name].perplexity for name in (PARENT, UNTRAINED, TERNARY)))

    @property
    def retention(self) -> float:
        """Skill after over skill before, both corrected for chance (DESIGN 7 (9)); 0 where there was none."""
        chance = chance_of(self.mix, self.problems)
        before, after = (chance_correct(self.readings[n].accuracy, chance) for n in (PARENT, TERNARY))
        return after / before if before > 0 else 0.0


def _brought_back(before: float, rounded: float, after: float) -> float | None:
    return (after - rounded) / (before - rounded) if before > rounded else None


def gate(policy: str, finals: Finals) -> Gate:
    """What phase 4 must show: skills and text that are still there, and training that helped where there was any."""
    needs = {KEPT: "improved", TEXT_KEPT: "improved"}
    if finals.strong:
        needs[STRONG] = "improved"
    if finals.trained:
        needs[TRAINED] = "improved"
    return Gate(name="bitnet", requires=needs, policy=policy)


def decide(config: BitNetConfig, policy: str, evidence: Sequence[Evidence], finals: Finals) -> GateResult:
    """The gate's decision; every no says by how much."""
    decision = gate(policy, finals).decide(evidence)
    claims = {item.claim: item for item in evidence}
    reasons = []
    if finals.ratio < config.least_ratio:
        reasons.append(f"no: {finals.ratio:.2f} times smaller than float32, {config.least_ratio:g} is asked for")
    if finals.perplexity_added > config.most_perplexity:
        told = f"perplexity grew by {100 * finals.perplexity_added:.1f} %"
        reasons.append(f"no: {told}, {100 * config.most_perplexity:g} % is allowed")
    recovery = finals.recovery if finals.trained else None
    if recovery is not None and recovery < config.least_recovery:
        told = f"training brought back {100 * recovery:.1f} % of what rounding lost"
        reasons.append(f"no: {told}, {100 * config.least_recovery:g} % is asked for")
    if claims[SKILLS].verdict == "no-signal":
        reasons.append(f"no: {SKILLS}: the parent is not above chance on them, so nothing can be said to be kept")
    return GateResult(passed=decision.passed and not reasons, reasons=(*decision.reasons, *reasons))


def measure(config: BitNetConfig, finals: Finals) -> list[Evidence]:
    """All claims."""
    seeds = (config.practice.seed, config.train.seed, REPORT_SEED)
    common = {"split": "report", "seeds": seeds, "compute": finals.compute}
    found = [*_skills(config, finals, common), *_text(config, finals, common)]
    if finals.trained:
        found.append(_between(TRAINED, finals, (UNTRAINED, TERNARY), common))
    for name, claim in AGAINST.items():
        if name in finals.readings:
            found.append(_between(claim, finals, (name, TERNARY), common))
    if SAME_BYTES in finals.readings:
        found.append(_between(SMALL, finals, (SAME_BYTES, TERNARY), common))
        found.append(_bits(SMALL_TEXT, finals, (SAME_BYTES, TERNARY), common))
    return found


def _skills(config: BitNetConfig, finals: Finals, common: dict[str, Any]) -> list[Evidence]:
    before, after = (finals.readings[name].right for name in (PARENT, TERNARY))
    question = {"metric": "skills_with_grace", "chance": None, **common}
    found = [Evidence.compare(claim=KEPT, before=before - config.grace, after=after, **question)]
    at = [i for i, p in enumerate(finals.problems) if f"{p.family}/{p.level}" in finals.strong]
    if at:
        found.append(Evidence.compare(claim=STRONG, before=before[at] - config.grace, after=after[at], **question))
    small = finals.readings.get(SAME_BYTES)
    question = {"metric": "exact_match", "chance": chance_of(finals.mix, finals.problems), **common}
    baseline = small and small.accuracy
    found.append(Evidence.compare(claim=SKILLS, before=before, after=after, baseline=baseline, **question))
    return found


def _text(config: BitNetConfig, finals: Finals, common: dict[str, Any]) -> list[Evidence]:
    before, after = (finals.readings[name] for name in (PARENT, TERNARY))
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
    return [kept, _bits(TEXT, finals, (PARENT, TERNARY), common)]


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
    """One row per model, for people: bytes, skills with their interval, perplexity, bits per byte."""
    rows = []
    for name, reading in finals.readings.items():
        value, low, high = mean_interval(reading.right)
        row = {"model": name, "bytes": finals.sizes[name], "ratio": finals.sizes[PARENT] / finals.sizes[name]}
        row |= {"accuracy": value, "low": low, "high": high, "n": len(reading.right)}
        rows.append({**row, "perplexity": reading.perplexity, "bits_per_byte": reading.text.bits_per_byte})
    return rows


def levels(finals: Finals) -> dict[str, dict[str, float]]:
    """Exact answers by model and by family and level."""
    return {
        name: dict(sorted(by_level(finals.problems, reading.right).items()))
        for name, reading in finals.readings.items()
    }


def mastered(problems: Sequence[Problem], right: np.ndarray, least: float) -> frozenset[str]:
    """Levels (``family/level``) with at least so many right answers."""
    return frozenset(cell for cell, share in by_level(problems, right).items() if share >= least)
