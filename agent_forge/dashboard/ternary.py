"""Reads what phase 4 left: every model with its bytes, skills and speed, the trainings, what was chosen.

Works on the record itself, so the terminal after a run and the page of a stored session read the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from agent_forge.dashboard.tree import Points, Sized, Ternary
from agent_forge.dashboard.values import count, estimate, flag, gate, listing, mapping, number, numbers, text
from forgekit.measure.evidence import Evidence

PARENT, TERNARY, ROUNDED = "parent", "ternary", "not trained"
"""How phase 4 names its models: the parent, what it made, and the end of the name of one that was only rounded."""
COPY, SAME_BYTES = "in floats", "full precision, same bytes"
"""The end of the name of the copy that later phases train; its comparison that no grid rounds."""
SKILLS = "skills"
"""Its claim about all skills, without grace: no signal where the parent is not above chance."""


def ternary(metrics: dict[str, Any], artifacts: dict[str, Any], evidence: Iterable[Evidence] = ()) -> Ternary:
    """What phase 4 measured, from its result; empty where there is no table of models."""
    speed = mapping(metrics.get("speed"))
    models = tuple(_sized(row, speed) for row in map(mapping, listing(metrics.get("models"))) if text(row.get("model")))
    if not models:
        return Ternary()
    parent, made = _ends([one.name for one in models], text(artifacts.get("chosen")))
    losses = {name: found for name, row in mapping(metrics.get("losses")).items() if (found := _steps(row))}
    names = [one.name for one in models]
    rounded = f"{made}, {ROUNDED}"
    return Ternary(
        models=models,
        parent=parent,
        made=made,
        rounded=rounded if rounded in names else "",
        trained=flag(metrics.get("phase/finetuned")),
        skilled=not any(one.claim == SKILLS and one.verdict == "no-signal" for one in evidence),
        losses=losses,
        select=numbers(metrics.get("select")),
        recovery=numbers(metrics.get("recovery")),
        levels={name: found for name, row in mapping(metrics.get("levels")).items() if (found := numbers(row))},
        facts={name: value for name, value in numbers(metrics).items() if "/" in name},
        packed=text(artifacts.get("packed")),
        dense=text(artifacts.get("dense")),
        gate=gate(artifacts.get("gate")),
    )


def _ends(names: Sequence[str], chosen: str) -> tuple[str, str]:
    """The model that was made small, and what was made of it: by their names, else the first two of the table.

    Args:
        names: of the table.
        chosen: the name that the phase chose: of what it made, or of the same without training.
    """
    parent = PARENT if PARENT in names else names[0]
    others = [name for name in names if name != parent]
    wanted = (chosen.removesuffix(f", {ROUNDED}"), chosen, TERNARY, *others[:1])
    return parent, next((name for name in wanted if name in others), "")


def _sized(row: dict[str, Any], speed: dict[str, Any]) -> Sized:
    name = text(row.get("model"))
    timed = mapping(speed.get(name))
    blocks = (number(rate) for rate in listing(timed.get("blocks")))
    return Sized(
        name=name,
        accuracy=estimate(row, "accuracy"),
        n=count(row.get("n")),
        rate=_positive(timed.get("tokens_per_second")),
        blocks=tuple(rate for rate in blocks if rate is not None and rate > 0),
        **{key: _positive(row.get(key)) for key in ("bytes", "ratio", "perplexity")},
    )


def _positive(value: Any) -> float | None:
    """A number above zero: bytes, rates and perplexities are, so anything else is damage."""
    found = number(value)
    return found if found is not None and found > 0 else None


def _steps(values: Any) -> Points:
    """A loss per step as points; steps without a number are left out."""
    found = ((step, number(value)) for step, value in enumerate(listing(values), 1))
    return tuple((step, value) for step, value in found if value is not None)
