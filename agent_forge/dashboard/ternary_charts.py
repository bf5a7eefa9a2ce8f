"""Drawings of phase 4: bytes against right answers, and right answers by level, one small chart per task."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from agent_forge.dashboard import charts, words
from agent_forge.dashboard.charts import Axis, Line
from agent_forge.dashboard.tree import Estimate

WHOLE = Axis(0, 1, 100)
"""Shares of right answers are drawn from nothing to all: a loss must look as large as it is."""
SMALL_TOP, SMALL_BOTTOM, SMALL_HEIGHT, SMALL_LEFT = 8, 92, 112, 16.0
"""Places in a small chart: the plot's ends and the height in pixels, its left end in per cent."""
LINE, LETTER = 14, 0.023
"""Pixels between two names that would lie on each other; width of a letter as a share of the plot of a phone."""
LEFTWARDS = 0.6
"""From this share of the width on, names stand on the left of their marks."""


@dataclass(frozen=True)
class Spot:
    """One model in the chart of sizes; ``name`` is short, ``series`` gives its look."""

    name: str
    bytes: float
    accuracy: Estimate
    series: int


@dataclass(frozen=True)
class ByteAxis:
    """Bytes by factors, not by differences: twice as many are as far apart everywhere."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Sequence[float]) -> ByteAxis:
        """An axis that holds all values, with room at both ends."""
        low, high = min(values), max(values)
        apart = min(high / low, 1e6)
        room = max(apart**0.08, 2 / apart**0.5)  # a factor of four has a tick in it wherever it begins
        return cls(max(low / room, sys.float_info.min), min(high * room, sys.float_info.max))

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten; powers alone where those are many."""
        first, last = (math.floor(math.log10(end)) for end in (self.low, self.high))
        for steps in ((1, 2, 5), (1,)):
            found = [m * 10.0**power for power in range(first, last + 1) for m in steps]
            found = [tick for tick in found if self.low <= tick <= self.high]
            if len(found) <= 5:
                break
        return found[:: max(1, -(-len(found) // 5))]

    def label(self, tick: float) -> str:
        """A tick as text."""
        return words.size(tick)

    def share(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1."""
        return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))


def size_chart(title: str, spots: Sequence[Spot]) -> str:
    """Models by their bytes and their right answers, each with its name and the interval as an upright line."""
    x = ByteAxis.around([spot.bytes for spot in spots])
    body = [charts.grid(x, WHOLE, "bytes of weights, by factors")]
    body += [_spot(spot, x, drop) for spot, drop in zip(spots, _drops(spots, x))]
    told = "; ".join(_told(spot) for spot in spots)
    return charts.svg("".join(body), f"{title}. {told}.", charts.HEIGHT, "plot spots")


def _told(spot: Spot) -> str:
    ends = [end for end in (spot.accuracy.low, spot.accuracy.high) if end is not None]
    span = f", interval {' to '.join(f'{100 * end:.1f}' for end in ends)}" if ends else ""
    return f"{spot.name}: {words.size(spot.bytes)}, {100 * (spot.accuracy.value or 0):.1f} % right{span}"


def _spot(spot: Spot, x: ByteAxis, drop: int) -> str:
    """A mark; its parts are measured in pixels from the mark's own place."""
    found = spot.accuracy
    at = charts.down(WHOLE, found.value or 0)
    parts = [f"<title>{escape(_told(spot))}</title>"]
    if None not in (found.low, found.high):
        low, high = (charts.down(WHOLE, end) for end in (found.low, found.high))
        parts.append(f'<line x1="0" x2="0" y1="{low:.1f}" y2="{high:.1f}"/>')
        parts += [f'<line x1="-4" x2="4" y1="{end:.1f}" y2="{end:.1f}"/>' for end in (low, high)]
    parts.append(f'<circle cx="0" cy="{at:.1f}" r="4.5"/>')
    beside = 'x="-10" text-anchor=end' if x.share(spot.bytes) > LEFTWARDS else 'x="10"'
    parts.append(f'<text {beside} y="{at + 4 + drop:.1f}">{escape(spot.name)}</text>')
    place = f'x="{charts.across(x, spot.bytes):.2f}%" overflow="visible"'
    return f'<svg {place} class="spot s{spot.series % charts.SERIES}">{"".join(parts)}</svg>'


def _drops(spots: Sequence[Spot], x: ByteAxis) -> list[int]:
    """Pixels by which each name is moved down, so that none lies on one above it."""
    placed: list[tuple[tuple[float, float], float]] = []
    drops = [0] * len(spots)
    for i in sorted(range(len(spots)), key=lambda i: -(spots[i].accuracy.value or 0)):
        own = level = charts.down(WHOLE, spots[i].accuracy.value or 0)
        left, right = _reach(spots[i], x)
        for (start, end), taken in sorted(placed, key=lambda name: name[1]):
            if left < end and start < right and own < taken + LINE:
                own = taken + LINE
        drops[i] = round(own - level)
        placed.append(((left, right), own))
    return drops


def _reach(spot: Spot, x: ByteAxis) -> tuple[float, float]:
    """Where a name begins and ends, as shares of the plot of a phone."""
    at, long = x.share(spot.bytes), 0.05 + LETTER * len(spot.name)
    return (at - long, at) if at > LEFTWARDS else (at, at + long)


def level_chart(task: str, levels: Sequence[str], lines: Sequence[Line]) -> str:
    """A small chart of one task: right answers of a few models, level by level.

    Args:
        task: its name.
        levels: names of the levels in their order; the points of the lines stand at their numbers, from 0 on.
        lines: one per model, those in front last.
    """
    x = Axis(0, max(1, len(levels) - 1))
    body = [_small_grid(levels, x)]
    plot = f'x="{SMALL_LEFT}%" y="{SMALL_TOP}" width="{98 - SMALL_LEFT}%" height="{SMALL_BOTTOM - SMALL_TOP}"'
    drawn = "".join(charts.polyline(x, WHOLE, line) for line in lines)
    body.append(f'<svg {plot} viewBox="0 0 1000 1000" preserveAspectRatio="none" overflow="visible">{drawn}</svg>')
    for line in lines:
        for place, share in line.points:
            at = f'cx="{_small_across(x, place):.2f}%" cy="{_small_down(share):.1f}"'
            body.append(f'<circle class="dot s{line.series % charts.SERIES}" {at} r="2.5"/>')
    told = "; ".join(
        f"{line.name} {', '.join(f'{levels[int(place)]}: {100 * share:.0f}' for place, share in line.points)}"
        for line in lines
    )
    drawing = charts.svg("".join(body), f"{task}, right answers in per cent by level. {told}.", SMALL_HEIGHT, "plot")
    return f"<figure class=small><figcaption>{escape(task)}</figcaption>{drawing}</figure>"


def _small_across(x: Axis, place: float) -> float:
    return SMALL_LEFT + (98 - SMALL_LEFT) * x.share(place)


def _small_down(share: float) -> float:
    return SMALL_BOTTOM - (SMALL_BOTTOM - SMALL_TOP) * WHOLE.share(share)


def _small_grid(levels: Sequence[str], x: Axis) -> str:
    parts = []
    for share in (0.0, 0.5, 1.0):
        level = _small_down(share)
        parts.append(f'<line class=grid x1="{SMALL_LEFT}%" x2="98%" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(f'<text x="{SMALL_LEFT - 3}%" y="{level + 4:.1f}" text-anchor=end>{100 * share:.0f}</text>')
    for place, name in enumerate(levels):
        at = f'x="{_small_across(x, place):.2f}%" y="{SMALL_BOTTOM + 17}"'
        parts.append(f"<text {at} text-anchor=middle>{escape(name)}</text>")
    return "".join(parts)
