"""What phase 4 shows: the verdict, every model before and after, size against skill, the trainings, the levels."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from agent_forge.dashboard import charts, ternary_charts, words
from agent_forge.dashboard import ternary_words as told
from agent_forge.dashboard.charts import Axis, Line
from agent_forge.dashboard.ternary import COPY, ROUNDED, SAME_BYTES
from agent_forge.dashboard.ternary_charts import Spot
from agent_forge.dashboard.tree import Points, Sized, Ternary

POINTS = 60
"""Points of a loss curve at most: a loss of every step is a cloud, its mean over a few steps is a line."""
SPEED = ("tokens per second", "slowest to fastest block")
"""Numbers of a model that was timed."""
DRAWN = "to one scale"
"""Name of a column of drawings."""
LONGEST = 16
"""Characters of a name there."""


def ternary_section(found: Ternary) -> str:
    """Everything about the small model; nothing where a phase left none."""
    if not found.models:
        return ""
    return "".join(
        (_verdict(found), _models(found), _sizes(found), _speed(found), _trainings(found), _levels(found))
        + (_facts(found),)
    )


def _heading(name: str, about: str = "") -> str:
    return f"<h3>{escape(name)}</h3>" + (f"<p class=soft>{escape(about)}</p>" if about else "")


def _verdict(found: Ternary) -> str:
    """The sentence, in the colour of what the gate said; then every part of it with the values before and after."""
    said = told.verdict(found)
    if not said:
        return ""
    kinds = {True: ("improved", "+"), False: ("worse", "−"), None: ("no-signal", "?")}
    kind, mark = kinds[found.gate.passed if found.gate else None]
    box = f'<div class="judged {kind}"><p><i aria-hidden=true>{mark}</i><span>{escape(said)}</span></p></div>'
    tiles = "".join(
        f"<li><strong>{escape(head[0].upper() + head[1:])}</strong><span>{escape(moved)}</span></li>"
        for head, moved in told.glance(found)
    )
    return box + (f"<ul class='tiles plain'>{tiles}</ul>" if tiles else "")


def _models(found: Ternary) -> str:
    """A row per model, what it is below its name."""
    count = told.questions(found)
    caption = f"Before, after, and beside it{f': {count} of the report split, which chose nothing' if count else ''}"
    rows = [_model(found, one, cells) for one, cells in zip(found.models, told.model_rows(found))]
    return _heading("Size, speed and skill") + _stacking(caption, told.MODELS, rows)


def _stacking(caption: str, columns: Sequence[str], rows: Sequence[str]) -> str:
    """A table whose rows become blocks where the page is narrow; the first column is of names."""
    head = "".join(
        f'<th scope=col role=columnheader class="{_look(place, name)}">{escape(name)}</th>'
        for place, name in enumerate(columns)
    )
    return (
        f"<div class=block><table class='forest measures' role=table><caption>{escape(caption)}</caption>"
        f"<thead role=rowgroup><tr role=row>{head}</tr></thead>"
        f"<tbody role=rowgroup>{''.join(rows)}</tbody></table></div>"
    )


def _look(place: int, name: str) -> str:
    return "what" if not place else "draw" if name == DRAWN else "n"


def _row(name: str, about: str, cells: Sequence[tuple[str, str]], lead: bool) -> str:
    """A row of such a table: its name, what that is, (column, cell) pairs; ``lead`` marks what the phase made."""
    aside = f"<small>{escape(about)}</small>" if about else ""
    numbers = "".join(
        f'<td class="n{" empty" * (cell == words.NOTHING)}" role=cell data-name="{escape(column)}">{escape(cell)}</td>'
        for column, cell in cells
    )
    return f"<tr role=row{' class=lead' * lead}><th scope=row role=rowheader>{escape(name)}{aside}</th>{numbers}"


def _model(found: Ternary, one: Sized, cells: Sequence[str]) -> str:
    pairs = list(zip(told.MODELS[1:], cells[1:]))
    return _row(cells[0], told.meaning(found, one), pairs, one.name == found.made) + "</tr>"


def _sizes(found: Ternary) -> str:
    """Bytes against right answers, and the words of this section beside it."""
    terms = "".join(f"<div><dt>{escape(term)}</dt><dd>{escape(about)}</dd></div>" for term, about in told.TERMS)
    explained = f"<dl class=terms>{terms}</dl>"
    spots = [
        Spot(_short(found, one.name), one.bytes, one.accuracy, _series(found, one.name))
        for one in told.different(found)
        if one.bytes is not None and one.accuracy is not None and one.accuracy.value is not None
    ]
    if len(spots) < 2:
        return f"<div class=block>{explained}</div>"
    title = "Bytes against right answers, in per cent"
    left = [words.plain(one.name) for one in found.models if one.bytes is None or one.accuracy is None]
    note = "Left is smaller, up is better; the upright line is the 95 % interval."
    note += f" Not drawn, for want of a number: {'; '.join(left)}." if left else ""
    drawn = charts.figure(title, ternary_charts.size_chart(title, spots), "", note)
    return f"<div class='grid2 block'>{drawn}{explained}</div>"


def _series(found: Ternary, name: str) -> int:
    """The look of a model, the same in every drawing: what was made first, then its parent, then the rest."""
    known = [one.name for one in found.models]
    first = [one for one in (found.made, found.parent, found.rounded, SAME_BYTES) if one in known]
    copy = f"{found.made}, {COPY}"  # the last: it may look like what it is a copy of
    order = dict.fromkeys([*first, *sorted(known, key=lambda one: one == copy)])
    looks = {one: place for place, one in enumerate(order)}
    looks |= {_short(found, one): place for one, place in looks.items() if _short(found, one) not in looks}
    return looks.get(name, len(looks))


def _short(found: Ternary, name: str) -> str:
    """A name for a drawing, where there is little room."""
    own = {found.rounded: ROUNDED, f"{found.made}, {COPY}": COPY, SAME_BYTES: "same bytes"}
    shown = words.plain(own.get(name, name.removesuffix(f", {ROUNDED}")))
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"


def _speed(found: Ternary) -> str:
    """Tokens per second of every model that was timed: the median as a bar, the blocks as a line across its end."""
    timed = [one for one in found.models if one.rate is not None]
    if not timed:
        return ""
    axis = Axis.around([rate for one in timed for rate in (one.rate, *one.blocks)], zero=True)
    rows = [_timed(one, axis, one.name == found.made) for one in timed]
    about = (
        "Tokens per second of one answer, token by token, on the machine that ran this. The models took turns in "
        "blocks; the bar is the median block, the line across its end goes from the slowest to the fastest."
    )
    return _heading("Speed", about) + _stacking("Decoding, one row", ("model", *SPEED, DRAWN), rows)


def _timed(one: Sized, axis: Axis, made: bool) -> str:
    ends = (min(one.blocks), max(one.blocks)) if len(one.blocks) > 1 else None
    span = f"{words.digits(ends[0])} to {words.digits(ends[1])}" if ends else words.NOTHING
    name, rate = words.plain(one.name), words.digits(one.rate)
    drawn = charts.level_mark(axis, one.rate or 0, ends, f"{name}: {rate} tokens per second", "s0" if made else "s1")
    return _row(name, "", list(zip(SPEED, (rate, span))), made) + f"<td class=draw role=cell>{drawn}</td></tr>"


def _trainings(found: Ternary) -> str:
    """What rounding did, what training did, and its loss."""
    lines, drawn = told.rounding(found), _losses(found)
    if not lines and not drawn:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return _heading(told.rounding_title(found)) + (f"<ul>{items}</ul>" if items else "") + drawn


def _losses(found: Ternary) -> str:
    """All trainings in one chart: they learned from the same batches."""
    losses = found.losses
    if not losses:
        return ""
    width = max(1, -(-max(len(points) for points in losses.values()) // POINTS))
    lines = [Line(words.plain(n), _means(points, width), _series(found, n)) for n, points in losses.items()]
    title = "Training loss, nats per token"
    x = Axis(0, max(step for line in lines for step, _ in line.points))
    y = Axis.around([loss for line in lines for _, loss in line.points], zero=True)
    names = charts.legend([(line.series, f"{line.name}, last {words.digits(line.points[-1][1])}") for line in lines])
    note = f"Each point is the mean of {width} steps." if width > 1 else ""
    note = " ".join(filter(None, ("Cross-entropy on the same batches.", note)))
    drawn = charts.line_chart(title, lines, x, y, "training step")
    return f"<div class='roomy block'>{charts.figure(title, drawn, names, note)}</div>"


def _means(points: Points, width: int) -> Points:
    """Means over so many points, each at the last step it holds."""
    parts = (points[i : i + width] for i in range(0, len(points), width))
    return tuple((part[-1][0], sum(value for _, value in part) / len(part)) for part in parts)


def _levels(found: Ternary) -> str:
    """The levels that lost most, and a small chart per task."""
    rows = [charts.row(name, cells) for name, *cells in told.lost_rows(found)]
    drawn = _tasks(found)
    if not rows and not drawn:
        return ""
    shown = _heading("Level by level", " ".join(filter(None, (told.lost_line(found), told.LOST_ABOUT))))
    columns = [(name, "n" if place else "") for place, name in enumerate(told.LOST)]
    shown += charts.data_table("Levels that lost most right answers, in per cent", columns, rows) if rows else ""
    return shown + drawn


def _tasks(found: Ternary) -> str:
    """Right answers by level of the model before, after rounding alone, and after: one chart per task."""
    drawn = {one.name for one in told.different(found)}
    wanted = [name for name in (found.rounded, found.parent, found.made) if name in drawn]  # those behind first
    sides = [(name, _series(found, name), found.levels[name]) for name in wanted if found.levels.get(name)]
    cells = dict.fromkeys(cell for _, _, scores in sides for cell in scores)
    tasks: dict[str, list[str]] = {}
    for cell in cells:
        tasks.setdefault(cell.partition("/")[0], []).append(cell)
    if len(sides) < 2:
        return ""
    charted = "".join(_task(task, sorted(own, key=_order), sides) for task, own in tasks.items())
    names = charts.legend(sorted((series, words.plain(name)) for name, series, _ in sides))
    title = "<figcaption>Right answers in per cent, level by level</figcaption>"
    return f"<div class=block>{title}{names}<div class=smalls>{charted}</div></div>"


def _order(cell: str) -> tuple[int, str]:
    level = cell.partition("/")[2]
    return (int(level) if level.isdecimal() else 0, level)


def _task(task: str, cells: Sequence[str], sides: Sequence[tuple[str, int, dict[str, float]]]) -> str:
    lines = [
        Line(words.plain(name), tuple((i, scores[cell]) for i, cell in enumerate(cells) if cell in scores), series)
        for name, series, scores in sides
    ]
    levels = [cell.partition("/")[2] or words.NOTHING for cell in cells]
    return ternary_charts.level_chart(words.plain(task), levels, [line for line in lines if line.points])


def _facts(found: Ternary) -> str:
    rows, given = told.facts(found), told.outputs(found)
    if not rows and not given:
        return ""
    shown = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in rows)
    shown = f"<div class=block><dl class=facts>{shown}</dl></div>" if rows else ""
    lines = "".join(f"<li>{escape(what)}: <code>{escape(found)}</code></li>" for what, found in given)
    return _heading("Further numbers") + shown + (f"<ul>{lines}</ul>" if lines else "")
