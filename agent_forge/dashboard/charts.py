"""Charts as inline SVG. Horizontal places are in per cent: a chart fills any width while its text keeps its size.

No colour is the only sign of anything: lines differ in dashes, verdicts in marks, and every chart has a title in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from agent_forge.dashboard import words
from agent_forge.dashboard.tree import Model, Points

SERIES = 6
"""Lines with looks of their own; further ones repeat them."""
LEFT, RIGHT = 11.0, 97.0
LONG = 130
"""Characters of a question that are shown at once."""
TOP, BOTTOM, HEIGHT = 10, 190, 228


@dataclass(frozen=True)
class Line:
    """One line of a chart; ``series`` gives its look, ``thin`` lines stand back."""

    name: str
    points: Points
    series: int
    thin: bool = False


@dataclass(frozen=True)
class Axis:
    """One direction of a chart: its range, and how numbers on it are written.

    Attributes:
        scale: what numbers are multiplied with before they are written, 100 for per cent.
        signed: write a plus before numbers above zero.
    """

    low: float
    high: float
    scale: float = 1.0
    signed: bool = False

    @classmethod
    def around(cls, values: Sequence[float], zero: bool = False, scale: float = 1.0, signed: bool = False) -> Axis:
        """An axis that holds all values, and zero if asked for, with ends at round numbers."""
        inside = [*values, 0.0] if zero else list(values)
        low, high = min(inside), max(inside)
        if low == high:
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        step = _step(high - low)
        return cls(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, scale, signed)

    @classmethod
    def across(cls, values: Sequence[float]) -> Axis:
        """An axis that ends where the values end."""
        low, high = min(values), max(values)
        return cls(low, high) if low < high else cls(low - 0.5, high + 0.5)

    def ticks(self) -> list[float]:
        """Round numbers from end to end."""
        step = _step(self.high - self.low)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def label(self, tick: float) -> str:
        """A tick as text, with as many decimals as the distance of two ticks needs."""
        step = _step(self.high - self.low) * self.scale
        decimals = next((d for d in range(12) if math.isclose(step, round(step, d), rel_tol=1e-6)), 12)
        shown = f"{tick * self.scale:{'+' if self.signed and tick else ''},.{decimals}f}"
        return "0" if not tick else shown.replace("-", "−")

    def share(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1; values outside stop at the ends."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


def _step(span: float) -> float:
    """A round step that cuts a span into about four."""
    rough = span / 4
    scale = 10.0 ** math.floor(math.log10(rough))
    return next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= rough * 0.999)


def figure(title: str, svg: str, legend: str = "", note: str = "") -> str:
    """A chart with its heading above, and legend and note below."""
    below = f"{legend}{f'<p class=note>{escape(note)}</p>' if note else ''}"
    return f"<figure class=chart><figcaption>{escape(title)}</figcaption>{svg}{below}</figure>"


def data_table(caption: str, columns: Sequence[tuple[str, str]], rows: Sequence[str], kind: str = "") -> str:
    """A table with a caption, which scrolls in its own place where the page is too narrow for it.

    Args:
        caption: what is shown.
        columns: (name, class) of each.
        rows: the cells of each, as HTML.
        kind: a class of the table.
    """
    head = "".join(f'<th scope=col class="{look}">{escape(name)}</th>' for name, look in columns)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="scroll block" tabindex=0 role=group aria-label="{escape(caption)}">'
        f'<table class="{kind}"><caption>'
        f"<span>{escape(caption)}</span></caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def row(name: str, cells: Sequence[str], kind: str = "n") -> str:
    """The cells of a row of plain text: its name, then cells of one class."""
    shown = "".join(f'<td class="{kind}">{escape(cell)}</td>' for cell in cells)
    return f"<th scope=row>{escape(name)}</th>{shown}"


def shortened(question: str) -> str:
    """A question as HTML; a long one with its middle left out, and the whole of it to unfold."""
    if len(question) <= LONG:
        return escape(question)
    short = escape(f"{question[: LONG - 60]} … {question[-50:]}")
    return f"{short}<details><summary>the whole question</summary>{escape(question)}</details>"


def svg(body: str, title: str, height: int, kind: str = "") -> str:
    """An SVG that is as wide as its place, named for those who do not see it."""
    return (
        f'<svg class="{kind}" role="img" width="100%" height="{height}" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


def legend(names: Sequence[tuple[int, str]], rule: str = "") -> str:
    """Which line is which, as (series, name); ``rule`` is the name of the level drawn across."""
    looks = [(f"s{series % SERIES}", name) for series, name in names] + ([("rule", rule)] if rule else [])
    items = (
        f'<li><svg width="30" height="10" aria-hidden="true"><line class="line {look}" x1="1" x2="29" y1="5" y2="5"/>'
        f"</svg>{escape(name)}</li>"
        for look, name in looks
    )
    return f"<ul class=legend>{''.join(items)}</ul>"


def line_chart(title: str, lines: Sequence[Line], x: Axis, y: Axis, x_name: str, rule: float | None = None) -> str:
    """Lines over steps, generations or evaluations; ``rule`` is a level drawn across."""
    names = [line.name for line in lines if not line.thin]
    body = [grid(x, y, x_name)]
    if rule is not None:
        level = down(y, rule)
        body.append(f'<line class="line rule" x1="{LEFT}%" x2="{RIGHT}%" y1="{level:.1f}" y2="{level:.1f}"/>')
    plot = f'x="{LEFT}%" y="{TOP}" width="{RIGHT - LEFT}%" height="{BOTTOM - TOP}" viewBox="0 0 1000 1000"'
    drawn = "".join(polyline(x, y, line) for line in lines)
    body.append(f'<svg {plot} preserveAspectRatio="none" overflow="visible">{drawn}</svg>')
    for line in lines:
        if line.points and not line.thin:
            place = f'cx="{across(x, line.points[-1][0]):.2f}%" cy="{down(y, line.points[-1][1]):.1f}"'
            told = f"{line.name}: {words.digits(line.points[-1][1])} at {words.digits(line.points[-1][0])}"
            body.append(
                f'<circle class="dot s{line.series % SERIES}" {place} r="4"><title>{escape(told)}</title></circle>'
            )
    return svg("".join(body), f"{title}. Lines: {', '.join(names)}.", HEIGHT, "plot")


def polyline(x: Axis, y: Axis, line: Line) -> str:
    """A line in a plot whose sides are 1000 units long."""
    places = " ".join(f"{1000 * x.share(a):.1f},{1000 * (1 - y.share(b)):.1f}" for a, b in line.points)
    return f'<polyline class="line s{line.series % SERIES}{" thin" * line.thin}" points="{places}"/>'


def across(x: Axis, value: float) -> float:
    """Per cent from the left of a chart."""
    return LEFT + (RIGHT - LEFT) * x.share(value)


def down(y: Axis, value: float) -> float:
    """Pixels from the top of a chart."""
    return BOTTOM - (BOTTOM - TOP) * y.share(value)


def grid(x: Axis, y: Axis, x_name: str) -> str:
    """Rules and numbers of both axes, and what the lower one counts."""
    parts = []
    for tick in y.ticks():
        level = down(y, tick)
        parts.append(f'<line class=grid x1="{LEFT}%" x2="{RIGHT}%" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(f'<text x="{LEFT - 1.5}%" y="{level + 4:.1f}" text-anchor=end>{escape(y.label(tick))}</text>')
    for tick in x.ticks():
        anchor = "end" if tick >= x.high else "middle"
        at = f'x="{across(x, tick):.2f}%" y="{BOTTOM + 17}"'
        parts.append(f"<text {at} text-anchor={anchor}>{escape(x.label(tick))}</text>")
    parts.append(f'<text x="{RIGHT}%" y="{BOTTOM + 34}" text-anchor=end>{escape(x_name)}</text>')
    return "".join(parts)


def interval_mark(axis: Axis, change: float, ends: tuple[float, float], verdict: str, told: str) -> str:
    """One row of a forest plot: the interval as a bar, the change as a mark, zero as a rule."""
    low, high, at, zero = (f"{_inset(axis, v):.2f}%" for v in (*ends, change, 0.0))
    body = (
        f'<line class=zero x1="{zero}" x2="{zero}" y1="0" y2="26"/>'
        f'<g class="mark {escape(verdict)}"><line x1="{low}" x2="{high}" y1="13" y2="13"/>'
        f'<line x1="{low}" x2="{low}" y1="8" y2="18"/><line x1="{high}" x2="{high}" y1="8" y2="18"/>'
        f'<circle cx="{at}" cy="13" r="4.5"/></g>'
    )
    return svg(body, told, 26, "forest-row")


def level_mark(
    axis: Axis, value: float, ends: tuple[float, float] | None, told: str, kind: str = "s0", rule: float | None = None
) -> str:
    """One row of bars from zero: the value as a bar, its interval as a line across the end, ``rule`` as a rule."""
    zero, at = _inset(axis, 0.0), _inset(axis, value)
    body = f'<rect class="fill {kind}" x="{zero:.2f}%" width="{max(0.0, at - zero):.2f}%" y="6" height="14" rx="2"/>'
    if rule is not None:
        place = f"{_inset(axis, rule):.2f}%"
        body += f'<line class=zero x1="{place}" x2="{place}" y1="0" y2="26"/>'
    if ends is not None:
        low, high = (f"{_inset(axis, end):.2f}%" for end in ends)
        body += f'<g class=span><line x1="{low}" x2="{high}" y1="13" y2="13"/>'
        body += "".join(f'<line x1="{end}" x2="{end}" y1="8" y2="18"/>' for end in (low, high)) + "</g>"
    return svg(body, told, 26, "forest-row")


def interval_axis(axis: Axis) -> str:
    """The scale below the rows of a forest plot."""
    parts = ['<line class=grid x1="0" x2="100%" y1="1" y2="1"/>']
    for tick in axis.ticks():
        at = f"{_inset(axis, tick):.2f}%"
        kind = "zero" if tick == 0 else "grid"
        parts.append(f'<line class={kind} x1="{at}" x2="{at}" y1="0" y2="6"/>')
        parts.append(f'<text x="{at}" y="19" text-anchor=middle>{escape(axis.label(tick))}</text>')
    return f'<svg class="forest-axis" width="100%" height="24" aria-hidden="true">{"".join(parts)}</svg>'


def _inset(axis: Axis, value: float) -> float:
    """Per cent from the left, with room for half a mark or number at both ends."""
    return 7 + 86 * axis.share(value)


def bar(share: float, told: str, series: int = 0) -> str:
    """A horizontal bar of a share of the width, 0 to 1."""
    width = 100 * min(1.0, max(0.0, share))
    body = f'<rect class=track width="100%" height="12" rx="3"/><rect class="fill s{series}" width="{width:.2f}%"'
    return svg(f'{body} height="12" rx="3"/>', told, 12, "bar")


def signed_bar(axis: Axis, value: float, told: str, series: int = 0) -> str:
    """A bar from zero to a value that may be negative."""
    zero, end = _inset(axis, 0.0), _inset(axis, value)
    place = f'x="{min(zero, end):.2f}%" width="{abs(end - zero):.2f}%"'
    body = (
        f'<rect class="fill s{series}" {place} y="5" height="16" rx="2"/>'
        f'<line class=zero x1="{zero:.2f}%" x2="{zero:.2f}%" y1="0" y2="26"/>'
    )
    return svg(body, told, 26, "forest-row")


def stacked(shares: Sequence[float], told: str) -> str:
    """Shares side by side, each with its per cent where there is room; they should add up to one."""
    parts, left = [], 0.0
    for place, share in enumerate(shares):
        parts.append(f'<rect class="part p{place % 4}" x="{100 * left:.2f}%" width="{100 * share:.2f}%" height="24"/>')
        if share >= 0.12:
            at = f'x="{100 * (left + share / 2):.2f}%" y="16"'
            parts.append(f'<text class="p{place % 4}" {at} text-anchor=middle>{100 * share:.0f} %</text>')
        left += share
    return svg("".join(parts), told, 24, "stacked")


ROW, GAP, MARGIN = 76, 40, 4
"""Heights in the lineage picture: a box, the room between two rows of boxes, the room at the edges."""


def lineage(models: Sequence[Model], lead: frozenset[str], notes: Callable[[Model], list[str]]) -> str:
    """Models as boxes in rows by generation, oldest on top, joined to what was made from them.

    Args:
        models: what is drawn; parents that are not among them are left out.
        lead: ids with a bold frame.
        notes: the lines below the name in a box.
    """
    rows = _rows(models)
    spots: dict[str, tuple[float, float, float]] = {}
    for level, row in enumerate(rows):
        width = min(30.0, 92.0 / len(row))
        for place, model in enumerate(row):
            spots[model.model_id] = (100 * (place + 0.5) / len(row), MARGIN + level * (ROW + GAP), width)
    level_of = {m.model_id: i for i, row in enumerate(rows) for m in row}
    edges = [_edge(spots[p], spots[m.model_id], level_of[m.model_id] - level_of[p] > 1)
             for m in models for p in m.parents if p in spots]  # fmt: skip
    boxes = [_box(m, spots[m.model_id], m.model_id in lead, notes(m)) for m in models]
    height = len(rows) * ROW + (len(rows) - 1) * GAP + 2 * MARGIN
    known = {m.model_id: m.name for m in models}
    made = [f"{m.name} from {' and '.join(known.get(p, p) for p in m.parents) or 'nothing'}" for m in models]
    return svg("".join(edges + boxes), f"Lineage: {'; '.join(made)}.", height, "lineage")


def _rows(models: Sequence[Model], widest: int = 4) -> list[list[Model]]:
    """Models by the longest way to one without parents, at most ``widest`` in a row."""
    known = {m.model_id: m for m in models}
    depth: dict[str, int] = {}
    for _ in models:  # a way has at most as many steps as there are models
        depth = {m.model_id: 1 + max((depth.get(p, 0) for p in m.parents if p in known), default=-1) for m in models}
    found = []
    for level in sorted(set(depth.values())):
        row = [m for m in models if depth[m.model_id] == level]
        found += [row[i : i + widest] for i in range(0, len(row), widest)]
    return found


def _edge(parent: tuple[float, float, float], child: tuple[float, float, float], skips: bool) -> str:
    """A line down to the next row; around the edge where rows lie between."""
    (px, py, width), (cx, cy, wide) = parent, child
    if not skips:
        return f'<line class=edge x1="{px:.2f}%" y1="{py + ROW}" x2="{cx:.2f}%" y2="{cy}"/>'
    start, end = py + ROW / 2, cy + ROW / 2
    return "".join(
        f'<line class="edge base" x1="{a:.2f}%" y1="{b}" x2="{c:.2f}%" y2="{d}"/>'
        for a, b, c, d in (
            (px - width / 2, start, 0.6, start),
            (0.6, start, 0.6, end),
            (0.6, end, cx - wide / 2, end),
        )
    )


def _box(model: Model, spot: tuple[float, float, float], lead: bool, notes: list[str]) -> str:
    x, y, width = spot
    frame = f'x="{x - width / 2:.2f}%" y="{y}" width="{width:.2f}%" height="{ROW}" rx="8"'
    lines = [("name", line) for line in two_lines(model.name)] + [("sub", note) for note in notes]
    top = y + ROW / 2 - 7.5 * len(lines) + 11.5
    texts = "".join(
        f'<text class={kind} x="{x:.2f}%" y="{top + 15 * place:.1f}" text-anchor=middle>{escape(line)}</text>'
        for place, (kind, line) in enumerate(lines)
    )
    return f'<g class="box{" lead" * lead}"><title>{escape(model.model_id)}</title><rect {frame}/>{texts}</g>'


def two_lines(name: str, width: int = 14) -> list[str]:
    """A name for a narrow box: broken once between words, shortened where it is still too long."""
    words, lines = name.replace("_", " ").split(), [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width and len(lines) < 2:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines if line]


def heat_table(caption: str, columns: Sequence[str], rows: Sequence[tuple[str, str, Sequence[float | None]]]) -> str:
    """Shares as a table whose cells are tinted by value.

    Args:
        caption: what is shown.
        columns: one name per value.
        rows: (group, name, shares 0 to 1); rows of one group stand together, None is not measured.
    """
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in columns)
    body, groups = [], [group for group, _, _ in rows]
    for place, (group, name, values) in enumerate(rows):
        first = place == 0 or groups[place - 1] != group
        span = f'<th scope=rowgroup rowspan="{groups.count(group)}">{escape(group)}</th>' if first else ""
        cells = "".join(
            "<td class=none>–</td>" if v is None else f'<td style="--v:{min(1, max(0, v)):.2f}">{100 * v:.0f}</td>'
            for v in values
        )
        opens = " class=first" if first else ""
        body.append(f"<tr{opens}>{span}<th scope=row>{escape(name)}</th>{cells}</tr>")
    return (
        f"<table class=heat><caption><span>{escape(caption)}</span></caption><thead><tr><th scope=col>task</th>"
        f"<th scope=col>level</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    )
