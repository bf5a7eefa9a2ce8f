"""Tool calls: turn a request into the one right call of the one right tool, as JSON."""

from __future__ import annotations

import json
import re

import numpy as np

from forgekit.data.gym.core import Trace, family
from forgekit.errors import DataError

UNITS = ("km", "kg", "h")
CITIES = ("Rome", "Oslo", "Lima", "Cairo", "Paris", "Delhi")


def call(name: str, **arguments: object) -> str:
    """The canonical spelling of a tool call."""
    return json.dumps({"name": name, "arguments": arguments}, separators=(",", ":"))


def _request(kind: int, rng: np.random.Generator, digits: int) -> tuple[str, str]:
    a, b = (int(rng.integers(10 ** (digits - 1), 10**digits)) for _ in range(2))
    if kind == 0:
        sign, verb = (("+", "plus"), ("-", "minus"), ("*", "times"))[int(rng.integers(3))]
        return f"tool: what is {a} {verb} {b}?", call("calculator", expression=f"{a}{sign}{b}")
    if kind == 1:
        city = CITIES[int(rng.integers(len(CITIES)))]
        return f"tool: weather in {city} in {a} days?", call("weather", city=city, days=a)
    unit = UNITS[int(rng.integers(len(UNITS)))]
    return f"tool: remember {a} {unit} as {b}", call("store", key=str(b), value=f"{a} {unit}")


_SIGNS = {"plus": "+", "minus": "-", "times": "*"}


def _solve_tool(prompt: str) -> Trace:
    if match := re.fullmatch(r"tool: what is (\d+) (plus|minus|times) (\d+)\?", prompt):
        a, verb, b = match.groups()
        return Trace(("a sum: use the calculator",), call("calculator", expression=f"{a}{_SIGNS[verb]}{b}"))
    if match := re.fullmatch(r"tool: weather in (\w+) in (\d+) days\?", prompt):
        return Trace(("asks for weather", f"city {match[1]}"), call("weather", city=match[1], days=int(match[2])))
    if match := re.fullmatch(r"tool: remember (\d+ \w+) as (\d+)", prompt):
        return Trace(("asks to keep something",), call("store", key=match[2], value=match[1]))
    raise DataError(f"{prompt[:40]!r} fits no tool", where="gym tool", remedy="use its sentence forms")


@family("tool", _solve_tool, 0.0)
def write_tool(rng: np.random.Generator, level: int, n: int) -> list[tuple[str, str]]:
    """Answer a request with a JSON call; one tool at levels 1 to 3, two up to 6, then three; numbers grow."""
    kinds, digits = 1 + (level > 3) + (level > 6), 1 + (level + 1) // 2
    return [_request(int(kind), rng, digits) for kind in rng.integers(0, kinds, size=n)]
