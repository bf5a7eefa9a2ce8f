"""Reads what a phase left about thoughts: controls, judgement, examples, and the thoughts in its conversation.

Works on the record itself, so the terminal after a run and the page of a stored session read the same.
"""

from __future__ import annotations

import re
from typing import Any

from agent_forge.dashboard.tree import (
    Answer,
    Condition,
    Estimate,
    Example,
    FirstStep,
    SecondStep,
    Theater,
    Thinking,
)
from agent_forge.dashboard.values import count, estimate, flag, listing, mapping, numbers, points, text
from forgekit.data.tokenizer import THINKING

OPEN, CLOSE = THINKING[:2]
_MARKER = re.compile("|".join(map(re.escape, THINKING[2:])))


def thinking(metrics: dict[str, Any], artifacts: dict[str, Any]) -> Thinking:
    """What phase 3 measured, from its result; empty where there is nothing of the kind."""
    thoughts, steps = mapping(metrics.get("thoughts")), mapping(metrics.get("steps"))
    return Thinking(
        conditions=tuple(_condition(row) for row in map(mapping, listing(metrics.get("controls"))) if row),
        theater=_theater(mapping(metrics.get("theater"))),
        totals=numbers(thoughts),
        strategies=_table(thoughts.get("by_strategy")),
        families=_table(thoughts.get("by_family")),
        one=_first(mapping(steps.get("one"))),
        two=_second(mapping(steps.get("two"))),
        examples=tuple(_example(row) for row in map(mapping, listing(artifacts.get("examples"))) if row),
    )


def conversation(records: Any) -> tuple[Answer, ...] | None:
    """The questions and answers of a phase; None where it left no conversation at all."""
    if not isinstance(records, list):
        return None
    return tuple(
        Answer(
            *(text(row.get(key)) for key in ("model", "asked", "answered", "expected")),
            right=flag(row.get("right")),
            thought=text(row.get("thought")),
        )
        for row in map(mapping, records)
        if row
    )


def segments(thought: str) -> list[tuple[str, str]]:
    """A thought as (marker, text) pairs; the marker is a word, empty for text before the first one.

    The outer pair of markers is left off. Whatever a model wrote gives a list: a thought need not be well formed.
    """
    inside = thought.strip().removeprefix(OPEN).removesuffix(CLOSE)
    names = ["", *(marker[1:-1] for marker in _MARKER.findall(inside))]
    pairs = zip(names, (" ".join(piece.split()) for piece in _MARKER.split(inside)), strict=True)
    return [(name, said) for name, said in pairs if name or said]


def _condition(row: dict[str, Any]) -> Condition:
    return Condition(
        name=text(row.get("condition")),
        accuracy=estimate(row, "accuracy") or Estimate(None),
        lost=estimate(row, "lost", "lost_low", "lost_high"),
        n=count(row.get("n")),
        meaning=text(row.get("meaning")),
    )


def _theater(record: dict[str, Any]) -> Theater | None:
    if not record:
        return None
    return Theater(
        detected=flag(record.get("detected")),
        reasons=tuple(text(reason) for reason in listing(record.get("reasons"))),
        power=estimate(record.get("predictive_power")),
        correlation=estimate(record.get("correlation")),
        note=text(mapping(record.get("correlation")).get("note")),
    )


def _table(value: Any) -> dict[str, dict[str, float]]:
    return {name: found for name, row in mapping(value).items() if (found := numbers(row))}


def _first(record: dict[str, Any]) -> FirstStep:
    return FirstStep(numbers(record), flag(record.get("converged")), points(record.get("losses")))


def _second(record: dict[str, Any]) -> SecondStep:
    return SecondStep(
        chosen=text(record.get("chosen")),
        why=text(record.get("why")),
        nats=numbers(record.get("nats")),
        select=numbers(record.get("select")),
        rewards=points(record.get("rewards")),
        listening=points(record.get("listening")),
    )


def _example(row: dict[str, Any]) -> Example:
    asked, thought, answered, expected, strategy, note = (
        text(row.get(key)) for key in ("asked", "thought", "answered", "expected", "strategy", "note")
    )
    return Example(asked, thought, answered, expected, flag(row.get("right")), flag(row.get("valid")), strategy, note)
