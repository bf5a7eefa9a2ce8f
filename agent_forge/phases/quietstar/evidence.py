"""What phase 3 claims, measured on the report split, which chose nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent_forge.phases.quietstar.config import QuietStarConfig
from agent_forge.phases.quietstar.watching import Watched
from forgekit.data.gym import Problem
from forgekit.data.plans import GymMix
from forgekit.data.problems import REPORT_SEED
from forgekit.measure.evidence import Evidence, Gate, GateResult
from forgekit.measure.problems import by_level, chance_of
from forgekit.measure.scores import TextScores
from forgekit.measure.theater import TheaterReport
from forgekit.measure.theater import evidence as theater_evidence

BELOW = "thoughts help where the parent could not"
KEPT = "the parent's other skills, with grace"
SKILLS = "the parent's other skills"
KNOWN = "what the parent could do of the same questions, with grace"
VALID = "thoughts are valid"
SLIPS = "slips are noticed"
TEXT = "text against the parent's"
STEP_TWO = "step 2 lowers the validation loss"
STEP_TWO_EQUAL = "step 2 beats ordinary training at equal compute"
STEP_TWO_SKILL = "step 2 answers better than step 1"
CONDITIONS = {
    "with": ("with thoughts", "it thinks, then answers"),
    "without": ("without thoughts", "thinking is off"),
    "shuffled": ("shuffled thoughts", "another question's thoughts"),
    "filler": ("filler tokens", "as many tokens, all alike"),
    "no_thought": ("trained without thoughts", "same compute, answers only"),
    "parent": ("parent", "as it was before"),
}


@dataclass(frozen=True)
class Finals:
    """The report's measurements.

    Attributes:
        theater: thoughts against their controls.
        watched: the thoughts and their coherence.
        below: levels (``family/level``) that the parent cannot do, by the select split.
        skills: problems of the parent's other skills; ``kept`` (2, N): right before and after; ``skill_mix``.
        text: bits per byte before and after.
        slips: doubts after right steps and after slips.
        quiet: validation nats per row: of step 1, step 2 with thoughts, ordinary training; None without step 2.
        steps: right answers with thoughts after step 1 and after step 2; None without step 2.
        compute: what the phase cost.
    """

    theater: TheaterReport
    watched: Watched
    below: frozenset[str]
    skills: Sequence[Problem]
    kept: np.ndarray
    skill_mix: Sequence[GymMix]
    text: tuple[TextScores, TextScores]
    slips: tuple[np.ndarray, np.ndarray]
    quiet: Mapping[str, np.ndarray] | None
    steps: tuple[np.ndarray, np.ndarray] | None
    compute: dict[str, float]


def gate(policy: str, known: bool) -> Gate:
    """What phase 3 must show: thoughts that carry the answers, and skills that are still there.

    Args:
        policy: what happens when it says no.
        known: whether the parent could do some of the questions that are thought about.
    """
    needs = {
        BELOW: "improved",
        "thoughts beat the parent": "improved",
        "thoughts beat equal compute": "improved",
        "shuffled thoughts lose the gain": "improved",
        "filler thoughts lose the gain": "improved",
        VALID: "not-worse",
        KEPT: "improved",
    }
    if known:
        needs[KNOWN] = "not-worse"  # often a few dozen questions: too few to be certain; the amount counts as well
    return Gate(name="quietstar", requires=needs, policy=policy)


def decide(config: QuietStarConfig, policy: str, evidence: Sequence[Evidence], theater: TheaterReport) -> GateResult:
    """The gate's decision. Detected theater is a no of its own, and so are means that miss what the settings ask for:
    a verdict tells the side of an interval, not how far."""
    claims = {item.claim: item for item in evidence}
    decision = gate(policy, KNOWN in claims).decide(evidence)
    reasons = [f"no: theater detected: {f.reason}" for f in theater.findings if f.passed is False]
    gain, valid, skills = (claims.get(name) for name in (BELOW, VALID, SKILLS))
    if gain and None not in (gain.before, gain.after) and gain.after - gain.before < config.least_gain:
        reasons.append(f"no: {BELOW} by {gain.after - gain.before:.3f}, {config.least_gain:g} is asked for")
    if valid and valid.after is not None and valid.after < config.least_valid:
        reasons.append(f"no: {VALID}: {valid.after:.3f}, {config.least_valid:g} is asked for")
    if (known := claims.get(KNOWN)) and None not in (known.before, known.after) and known.after < known.before:
        lost = known.before + config.grace - known.after
        reasons.append(f"no: {KNOWN}: {lost:.3f} lost, {config.grace:g} is allowed")
    if skills and skills.verdict == "no-signal":
        reasons.append(f"no: {SKILLS}: the parent is not above chance on them, so nothing can be said to be kept")
    return GateResult(passed=decision.passed and not reasons, reasons=(*decision.reasons, *reasons))


def measure(config: QuietStarConfig, finals: Finals) -> list[Evidence]:
    """All claims."""
    seeds = (config.teach.train.seed, config.quiet.train.seed, REPORT_SEED)
    common = {"split": "report", "seeds": seeds, "compute": finals.compute}
    problems, rights = finals.theater.problems, finals.theater.rights
    chance = chance_of(config.traces.mix, problems)
    found = [_below(config, finals, common)]
    for item in theater_evidence(finals.theater, split="report", chance=chance, seeds=seeds, compute=finals.compute):
        found.append(item.replace(metric="exact_match") if item.metric.startswith("accuracy") else item)
    for name in dict.fromkeys(problem.family for problem in problems):
        at = [i for i, problem in enumerate(problems) if problem.family == name]
        asked = [problems[i] for i in at]
        found.append(
            Evidence.compare(
                claim=f"thoughts on {name}",
                metric="exact_match",
                before=rights["parent"][at],
                after=rights["with"][at],
                chance=chance_of(config.traces.mix, asked),
                baseline=float(rights["no_thought"][at].mean()),
                parent_must_beat_chance=False,
                **common,
            )
        )
    return [*found, *_kept(config, finals, common), *_thoughts(config, finals, common), *_step_two(finals, common)]


def _below(config: QuietStarConfig, finals: Finals, common: dict[str, Any]) -> Evidence:
    """The levels were chosen on the select split, before anything of the report split was seen."""
    problems, rights = finals.theater.problems, finals.theater.rights
    at = [i for i, p in enumerate(problems) if f"{p.family}/{p.level}" in finals.below]
    question = {"claim": BELOW, "metric": "exact_match", "parent_must_beat_chance": False, **common}
    if not at:
        return Evidence.compare(before=None, after=None, chance=None, **question)
    chance = chance_of(config.traces.mix, [problems[i] for i in at])
    return Evidence.compare(before=rights["parent"][at], after=rights["with"][at], chance=chance, **question)


def _kept(config: QuietStarConfig, finals: Finals, common: dict[str, Any]) -> list[Evidence]:
    before, after = finals.kept
    claims = [
        Evidence.compare(
            claim=KEPT,
            metric="skills_with_grace",
            before=before - config.grace,
            after=after,
            chance=None,
            **common,
        )
    ]
    question = {"metric": "exact_match", "chance": chance_of(finals.skill_mix, finals.skills), **common}
    claims.append(Evidence.compare(claim=SKILLS, before=before, after=after, **question))
    problems, rights = finals.theater.problems, finals.theater.rights
    at = [i for i, p in enumerate(problems) if f"{p.family}/{p.level}" not in finals.below]
    if at:
        known, now = rights["parent"][at] - config.grace, rights["with"][at]
        question = {"metric": "skills_with_grace", "chance": None, **common}
        claims.append(Evidence.compare(claim=KNOWN, before=known, after=now, **question))
    old, new = finals.text
    question = {"claim": TEXT, "metric": "bits_per_byte", "chance": None, "higher_is_better": False, **common}
    claims.append(Evidence.compare(before=old.per_window, after=new.per_window, **question))
    return claims


def _thoughts(config: QuietStarConfig, finals: Finals, common: dict[str, Any]) -> list[Evidence]:
    valid, (right, slipped) = finals.watched.valid, finals.slips
    required = np.full(len(valid), config.least_valid)
    return [
        Evidence.compare(claim=VALID, metric="valid_thoughts", before=required, after=valid, chance=None, **common),
        Evidence.compare(
            claim=SLIPS,
            metric="share that is doubted: right steps, then slips",
            before=right,
            after=slipped,
            chance=None,
            **common,
        ),
    ]


def _step_two(finals: Finals, common: dict[str, Any]) -> list[Evidence]:
    if finals.quiet is None or finals.steps is None:
        return []
    nats = {"metric": "nats_per_token", "chance": None, "higher_is_better": False, **common}
    after = finals.quiet["quiet"]
    return [
        Evidence.compare(claim=STEP_TWO, before=finals.quiet["step 1"], after=after, **nats),
        Evidence.compare(claim=STEP_TWO_EQUAL, before=finals.quiet["continued"], after=after, **nats),
        Evidence.compare(
            claim=STEP_TWO_SKILL,
            metric="exact_match",
            before=finals.steps[0],
            after=finals.steps[1],
            chance=None,
            **common,
        ),
    ]


def controls(theater: TheaterReport) -> list[dict[str, Any]]:
    """One row per condition, for people."""
    rows = []
    for name, (told, meaning) in CONDITIONS.items():
        if name not in theater.accuracy:
            continue
        value, low, high = theater.accuracy[name]
        lost = theater.lost.get(name)
        lost_values = dict(zip(("lost", "lost_low", "lost_high"), lost or (None, None, None)))
        row = {"condition": told, "accuracy": value, "low": low, "high": high, "n": len(theater.problems)}
        rows.append({**row, **lost_values, "meaning": meaning})
    return rows


def theater_table(theater: TheaterReport) -> dict[str, Any]:
    """Verdict, reasons, and the two statistics that are no accuracy."""

    def told(interval: Any, note: str = "") -> dict[str, Any]:
        value, low, high = interval or (None, None, None)
        return {"value": value, "low": low, "high": high, "note": note}

    why = next((f.reason for f in theater.findings if f.passed is None and f.name == "coherence correlation"), "")
    return {
        "detected": theater.theater_detected,
        "reasons": list(theater.reasons),
        "predictive_power": told(theater.power),
        "correlation": told(theater.correlation, why),
    }


def levels(finals: Finals, thinker: str) -> dict[str, dict[str, float]]:
    """Exact answers by family and level: the questions of the traces, then the parent's other skills."""
    problems, rights = finals.theater.problems, finals.theater.rights
    table = {
        "parent": by_level(problems, rights["parent"]) | by_level(finals.skills, finals.kept[0]),
        thinker: by_level(problems, rights["with"]) | by_level(finals.skills, finals.kept[1]),
        "no thoughts": by_level(problems, rights["no_thought"]),
    }
    return {name: dict(sorted(cells.items())) for name, cells in table.items()}
