"""What phase 2 claims, measured on the report split, which chose nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent_forge.phases.evomerge.config import EvoMergeConfig
from agent_forge.phases.evomerge.fitness import Marks, Reference, composite_change, parts
from forgekit.data.gym import Problem
from forgekit.data.plans import GymMix
from forgekit.data.problems import REPORT_SEED
from forgekit.measure.evidence import Evidence, Gate
from forgekit.measure.problems import by_level, chance_of

BEST_PARENT = "the champion beats the best parent"
FIRST_BEST = "the champion beats generation 0's best"
RANDOM = "random"
ANCESTOR = "the champion beats the common ancestor"


@dataclass(frozen=True)
class Finals:
    """The report's measurements.

    Attributes:
        marks: of the base, the parents, generation 0's best and the champion, by name.
        problems: by speciality, in the order of the marks.
        mixes: of each speciality.
        parents: names; ``base``: the common ancestor's; ``best``: the parent whose composite is highest on select.
        reference: what costs are measured against.
        compute: what the search cost.
    """

    marks: Mapping[str, Marks]
    problems: Mapping[str, list[Problem]]
    mixes: Mapping[str, tuple[GymMix, ...]]
    parents: tuple[str, ...]
    base: str
    best: str
    reference: Reference
    compute: dict[str, float]


def kept_claim(name: str) -> str:
    """The claim about one speciality."""
    return f"the champion on the speciality of {name}"


def gate(policy: str) -> Gate:
    """What phase 2 must show: one model that is better than the best of its parents."""
    return Gate(name="evomerge", requires={BEST_PARENT: "improved"}, policy=policy)


def measure(config: EvoMergeConfig, finals: Finals) -> tuple[list[Evidence], dict[str, Any]]:
    """The claims, and tables: accuracies by family and level, and which specialities were kept."""
    common = {"split": "report", "seeds": (config.seed, REPORT_SEED), "compute": finals.compute}
    found = [
        _composite(config, finals, finals.best, BEST_PARENT, common),
        _composite(config, finals, "generation 0 best", FIRST_BEST, common),
        _composite(config, finals, finals.base, ANCESTOR, common),
    ]
    kept: dict[str, dict[str, Any]] = {}
    champion = finals.marks["champion"]
    for name, problems in finals.problems.items():
        own = finals.marks[name]
        evidence = Evidence.compare(
            claim=kept_claim(name),
            metric="exact_match",
            before=own.right[name],
            after=champion.right[name],
            chance=chance_of(finals.mixes[name], problems),
            **common,
        )
        found.append(evidence)
        lost = evidence.before - evidence.after
        within = bool(lost <= config.kept_within + 1e-9)  # a point estimate; its interval is the evidence's
        kept[name] = {"before": evidence.before, "after": evidence.after, "kept": within}
    found.append(_text(finals, common))
    levels = {
        model: {
            cell: value
            for name, problems in finals.problems.items()
            for cell, value in by_level(problems, finals.marks[model].right[name]).items()
        }
        for model in (*finals.parents, "champion")
    }
    return found, {"levels": levels, "kept": kept}


def _composite(config: EvoMergeConfig, finals: Finals, rival: str, claim: str, common: dict[str, Any]) -> Evidence:
    sides = [finals.marks[rival]], [finals.marks["champion"]]
    return compared(config, finals.reference, sides, claim=claim, **common)


def compared(
    config: EvoMergeConfig, reference: Reference, sides: tuple[list[Marks], list[Marks]], **question: Any
) -> Evidence:
    """Evidence on the composite of two sides, each a mean over its models."""
    change = composite_change(*sides, config.fitness, reference)
    before, after = (
        float(np.mean([parts(marks, config.fitness, reference)["composite"] for marks in side])) for side in sides
    )
    return Evidence.of_statistic(
        metric="composite_fitness",
        before=before,
        after=after,
        change=change,
        n=sum(len(right) for right in sides[0][0].right.values()) + len(sides[0][0].bits),
        chance=None,
        **question,
    )


def _text(finals: Finals, common: dict[str, Any]) -> Evidence:
    before, after = finals.marks[finals.best], finals.marks["champion"]
    return Evidence.compare(
        claim="the champion's text against the best parent's",
        metric="bits_per_byte",
        before=before.bits / before.bytes,
        after=after.bits / after.bytes,
        chance=None,
        higher_is_better=False,
        **common,
    )


def strategy_claims(config: EvoMergeConfig, reference: Reference, marks: Mapping[str, list[Marks]]) -> list[Evidence]:
    """Every strategy against random search, at equal evaluations; each side is a mean over its seeds' champions."""
    plan = config.compare
    seeds = tuple(config.seed + number for number in range(plan.seeds))
    whose = "champion beats" if plan.seeds == 1 else f"{plan.seeds} champions beat"
    common = {"split": "report", "seeds": (*seeds, REPORT_SEED), "compute": {"evaluations": plan.evaluations}}
    return [
        compared(
            config,
            reference,
            (marks[RANDOM], found),
            claim=f"{name}: its {whose} random search's, {plan.evaluations} candidates each",
            **common,
        )
        for name, found in marks.items()
        if name != RANDOM and RANDOM in marks
    ]


def strategy_table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Strategies at equal evaluations: mean and range over seeds of the report composite of each one's champion."""
    table = []
    for name in dict.fromkeys(run["strategy"] for run in runs):
        own = [run for run in runs if run["strategy"] == name]
        report, select = (np.array([run[split] for run in own]) for split in ("report", "select"))
        table.append(
            {
                "strategy": name,
                "seeds": len(own),
                "evaluations": own[0]["evaluations"],
                "select": float(select.mean()),
                "report": float(report.mean()),
                "report_min": float(report.min()),
                "report_max": float(report.max()),
            }
        )
    return table
