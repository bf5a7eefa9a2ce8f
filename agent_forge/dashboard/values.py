"""Values of a record that may be damaged. One of the wrong kind is taken as absent: it must not spoil the rest."""

from __future__ import annotations

import json
import sys
from typing import Any

from agent_forge.dashboard.tree import Estimate, Gate, Points


def mapping(value: Any) -> dict[str, Any]:
    """``value`` if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def listing(value: Any) -> list[Any]:
    """``value`` if it is a list or a tuple, else an empty one."""
    return list(value) if isinstance(value, list | tuple) else []


def number(value: Any) -> float | None:
    """A finite number, or None; true and false are no numbers, nor is an integer that no float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= sys.float_info.max else None  # not a number compares as false


def flag(value: Any) -> bool | None:
    """True or false, or None for anything else."""
    return value if isinstance(value, bool) else None


def text(value: Any) -> str:
    """A string as it is, nothing for None, anything else as JSON."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def numbers(value: Any) -> dict[str, float]:
    """The finite numbers of a dict."""
    return {key: n for key, v in mapping(value).items() if (n := number(v)) is not None}


def points(value: Any) -> Points:
    """Pairs of step and value in the order of the steps; anything else in the list is left out."""
    pairs = [[number(one) for one in listing(pair)] for pair in listing(value)]
    return tuple(sorted((pair[0], pair[1]) for pair in pairs if len(pair) == 2 and None not in pair))


def count(value: Any) -> int | None:
    """A finite number as a whole one, or None."""
    found = number(value)
    return None if found is None else int(found)


def estimate(record: Any, value: str = "value", low: str = "low", high: str = "high") -> Estimate | None:
    """None where the value is missing; an interval with one end is none."""
    found = [number(mapping(record).get(key)) for key in (value, low, high)]
    if found[0] is None:
        return None
    return Estimate(found[0]) if None in found else Estimate(*found)


def gate(record: Any) -> Gate | None:
    """A gate's decision; None where it was not recorded."""
    record = mapping(record)
    if flag(record.get("passed")) is None:
        return None
    return Gate(record["passed"], tuple(map(text, listing(record.get("reasons")))))
