"""One phase of the session as a section of the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from agent_forge.dashboard import charts, words
from agent_forge.dashboard.charts import Axis, Line
from agent_forge.dashboard.ternary_section import ternary_section
from agent_forge.dashboard.thoughts_section import thinking_section
from agent_forge.dashboard.tree import Curve, Merge, PhaseReport, Strategy
from forgekit.measure.evidence import Evidence

PARTS = (
    ("perplexity", "perplexity per byte"),
    ("bits_per_byte", "bits per byte"),
    ("accuracy", "accuracy"),
    ("flops_per_token", "FLOP per token"),
    ("bytes", "bytes"),
)
"""Parts of the fitness, as they are named in the table."""
JOINED = "\u2060"
"""Word joiner: a line does not break beside it."""


def phase_section(phase: PhaseReport) -> str:
    """Everything about one phase."""
    about = f"{words.ABOUT.get(phase.name, '')} {words.STATES[phase.state]} {words.what(phase)}"
    parts = [
        f"<h2><small>Phase {phase.number}</small>{escape(phase.name.capitalize())}</h2>",
        f"<p>{escape(about)}</p>",
        f"<p class=notice>{escape(phase.error)}</p>" if phase.error else "",
        _training(phase),
        _search(phase.merge),
        thinking_section(phase.thinking),
        ternary_section(phase.ternary),
        evidence_tables(phase),
        levels_table(phase),
        _halting(phase.halting),
        _data(phase),
    ]
    return f'<section id="{escape(phase.name)}">{"".join(parts)}</section>'


def heading(name: str, about: str = "") -> str:
    """A heading inside a phase, with a sentence on what to look for."""
    return f"<h3>{escape(name)}</h3>" + (f"<p class=soft>{escape(about)}</p>" if about else "")


def _training(phase: PhaseReport) -> str:
    """The trunk beside what was branched from it: their losses are of different data, so they share no axis."""
    losses = phase.losses
    if not losses or phase.thinking.one.losses or phase.ternary.losses:  # drawn with the step they belong to
        return ""
    groups = [[c for c in losses if c.name == "trunk"], [c for c in losses if c.name != "trunk"]]
    titles = ("Trunk: training loss", "Branched models: training loss")
    titles = titles if phase.name == "cognate" else (titles[0], "Training loss")
    drawn = [_loss_chart(title, group) for title, group in zip(titles, groups) if group]
    about = (
        "Nats per token on the batch of each logged step. The models learn different data: compare shapes, not heights."
    )
    return f"{heading('Training', about)}<div class='grid2 block'>{''.join(drawn)}</div>"


def _loss_chart(title: str, curves: Sequence[Curve]) -> str:
    lines = [Line(words.plain(c.name), c.points, i) for i, c in enumerate(curves)]
    x = Axis(0, max(p[0] for line in lines for p in line.points))
    y = Axis.around([p[1] for line in lines for p in line.points], zero=True)
    names = [(line.series, f"{line.name}, last {words.digits(line.points[-1][1])}") for line in lines]
    return charts.figure(title, charts.line_chart(title, lines, x, y, "training step"), charts.legend(names))


def evidence_tables(phase: PhaseReport) -> str:
    """The claims by metric, each with its interval drawn on the scale of its group."""
    if not phase.evidence:
        return heading("Evidence", "No evidence was recorded for this phase: nothing is claimed for it.")
    about = (
        "The bar is the 95 % interval of the change, the mark the change itself, the upright rule no change. "
        "Measured on held-out data; chance is the score of guessing."
    )
    groups: dict[tuple[str, str], list[Evidence]] = {}
    for item in phase.evidence:
        groups.setdefault((item.metric, item.split), []).append(item)
    tables = "".join(_forest(metric, split, items) for (metric, split), items in groups.items())
    return heading("Evidence", about) + tables


def _forest(metric: str, split: str, items: Sequence[Evidence]) -> str:
    ends = [e for item in items if item.ci95 for e in item.ci95]
    share = words.is_share(metric)
    axis = Axis.around(ends, zero=True, scale=100 if share else 1, signed=True) if ends else None
    caption = f"{words.metric_name(metric)}, {split} split"
    change = "change in points" if share else "change"
    columns = (
        ("claim", "what"), ("verdict", "verd"), ("before → after", "n"), (f"{change} (95 % interval)", "n ci"),
        ("interval", "draw"), ("chance", "n"), ("items", "n"),
    )  # fmt: skip
    head = "".join(f'<th scope=col role=columnheader class="{kind}">{name}</th>' for name, kind in columns)
    scale = f"<td class=draw role=cell>{charts.interval_axis(axis)}</td>" if axis else "<td class=draw role=cell></td>"
    return (
        f"<div class=block><table class=forest role=table><caption>{escape(caption)}</caption>"
        f"<thead role=rowgroup><tr role=row>{head}</tr></thead>"
        f"<tbody role=rowgroup>{''.join(_claim(item, axis) for item in items)}</tbody>"
        f"<tfoot role=rowgroup aria-hidden=true><tr role=row><td colspan=4 role=cell></td>{scale}"
        f"<td colspan=2 role=cell></td></tr></tfoot></table></div>"
    )


def _claim(item: Evidence, axis: Axis | None) -> str:
    scores = words.scores(item)
    shift = words.difference(item)
    drawn, numbers = "", "not measured"
    if axis is not None and item.ci95 is not None and shift is not None:
        numbers = f"{words.change(shift, item.metric)} ({words.interval(item)})"
        drawn = charts.interval_mark(axis, shift, item.ci95, item.verdict, f"change {numbers}")
    return (
        f"<tr role=row><th scope=row role=rowheader>{escape(words.plain(item.claim))}</th>"
        f"<td class=verd role=cell>{verdict(item.verdict)}</td><td class=n role=cell>{escape(scores)}</td>"
        f'<td class="n ci" role=cell>{escape(numbers)}</td><td class=draw role=cell>{drawn}</td>'
        f'<td class=n role=cell data-name="chance">{escape(words.value(item.chance, item.metric))}</td>'
        f'<td class=n role=cell data-name="items">{item.n:,}</td></tr>'
    )


def verdict(name: str) -> str:
    """A verdict as a mark and a word."""
    mark, word, _ = words.VERDICTS[name]
    return f'<span class="verdict {name}"><i aria-hidden=true>{mark}</i>{word}</span>'


def levels_table(phase: PhaseReport) -> str:
    """Exact answers by task and level for every model, in two halves where there are many rows."""
    if not phase.levels:
        return ""
    models = list(phase.levels)
    tasks = list(dict.fromkeys(task for scores in phase.levels.values() for task in scores))
    families = list(dict.fromkeys(task.partition("/")[0] for task in tasks))
    rows = [
        (words.plain(family), task.partition("/")[2] or "–", [phase.levels[m].get(task) for m in models])
        for family in families
        for task in sorted(tasks, key=_level)
        if task.partition("/")[0] == family
    ]
    halves = [rows] if len(rows) <= 14 else _halves(rows)
    columns = [words.plain(m) for m in models]
    captions = ["Exact answers in per cent", "Exact answers in per cent, continued"]
    tables = "".join(
        f"<div class=scroll tabindex=0 role=group aria-label='{caption}'>"
        f"{charts.heat_table(caption, columns, half)}</div>"
        for caption, half in zip(captions, halves)
    )
    about = "Report split, by task and difficulty level. A dash: that model was not asked."
    return f"{heading('Accuracy by task', about)}<div class='grid2 block'>{tables}</div>"


def _level(task: str) -> tuple[int, str]:
    """Levels in the order of their numbers."""
    level = task.partition("/")[2]
    return (int(level) if level.isdigit() else 0, level)


def _halves(rows: list[tuple[str, str, list[float | None]]]) -> list[list[tuple[str, str, list[float | None]]]]:
    """Two lists of about one length; the rows of a task stay together."""
    cuts = [i for i in range(1, len(rows)) if rows[i][0] != rows[i - 1][0]] or [len(rows) // 2]
    cut = min(cuts, key=lambda i: abs(i - len(rows) / 2))
    return [rows[:cut], rows[cut:]]


def _halting(halting: dict[str, dict[str, float]]) -> str:
    """Recursion steps taken, as one stacked bar per model and kind of text."""
    if not halting:
        return ""
    rows = []
    for model, shares in halting.items():
        parts = [(words.several(int(steps), "step") if steps.isdigit() else steps, s) for steps, s in shares.items()]
        told = ", ".join(f"{name} {100 * share:.0f} %" for name, share in parts)
        drawn = charts.stacked([share for _, share in parts], f"{words.plain(model)}: {told}")
        rows.append(charts.row(words.plain(model), []) + f"<td>{drawn}<span class=soft>{escape(told)}</span></td>")
    about = "Share of tokens by the recursion steps the model took before it halted."
    columns = (("model and text", ""), ("share of tokens", "wide"))
    return heading("Halting", about) + charts.data_table("Recursion steps per token", columns, rows)


def _data(phase: PhaseReport) -> str:
    """What it learned from, as the phase noted it."""
    if not phase.data_notes:
        return ""
    notes = "".join(f"<li>{escape(note)}</li>" for note in phase.data_notes)
    return f"<details><summary>Data this phase used</summary><ul>{notes}</ul></details>"


def _search(merge: Merge) -> str:
    """Phase 2: the search over generations, its result on both splits, and the strategies beside each other."""
    return _generations(merge) + _fitness(merge) + _kept(merge) + _strategies(merge.strategies)


def _column(merge: Merge, key: str) -> tuple[tuple[float, float], ...]:
    found = ((row.get("generation"), row.get(key)) for row in merge.history)
    return tuple(pair for pair in found if None not in pair)


def _generations(merge: Merge) -> str:
    if not merge.history:
        return ""
    names = (("best", "best_fitness"), ("mean", "avg_fitness"), ("champion so far", "champion_fitness"))
    lines = [Line(name, points, i) for i, (name, key) in enumerate(names) if (points := _column(merge, key))]
    drawn = []
    if lines:
        title = "Composite fitness on the select split"
        y = Axis.around([p[1] for line in lines for p in line.points])
        svg = charts.line_chart(title, lines, _steps(lines), y, "generation")
        drawn.append(charts.figure(title, svg, charts.legend([(line.series, line.name) for line in lines])))
    spread = _column(merge, "diversity_score")
    if spread:
        lines, title = [Line("diversity", spread, 0)], "Diversity of the population"
        floor = [merge.floor] if merge.floor is not None else []
        y = Axis.around([*(p[1] for p in spread), *floor], zero=True)
        svg = charts.line_chart(title, lines, _steps(lines), y, "generation", merge.floor)
        told = f"floor {merge.floor:g}" if floor else ""
        note = "" if floor else "The settings record no floor."
        drawn.append(charts.figure(title, svg, charts.legend([(0, "diversity")], told), note))
    return f"{heading('Search', words.history_start_end(merge))}<div class='grid2 block'>{''.join(drawn)}</div>"


def _steps(lines: Sequence[Line]) -> Axis:
    """From the first to the last step of all lines."""
    return Axis.across([p[0] for line in lines for p in line.points])


def _fitness(merge: Merge) -> str:
    """Composite fitness where it was chosen against where it is reported."""
    if not merge.table and not merge.gains:
        return ""
    about = words.curse(merge)
    told = heading("Fitness: chosen against reported", about)
    if merge.strategy or merge.recipe:
        found = escape(words.plain(merge.strategy) or "not recorded")
        told += f"<p>Search: {found}. Recipe: <code>{escape(merge.recipe) or 'not recorded'}</code></p>"
    return told + _gains(merge.gains) + (_fitness_table(merge.table) if merge.table else "")


def _gains(gains: dict[str, float]) -> str:
    if not gains:
        return ""
    axis = Axis.around(list(gains.values()), zero=True)
    names = {"select": "select split (chose the champion)", "report": "report split (chose nothing)"}
    rows = [
        charts.row(names.get(split, split), [words.change(gain)])
        + f"<td>{charts.signed_bar(axis, gain, f'{split}: {words.change(gain)}', i)}</td>"
        for i, (split, gain) in enumerate(gains.items())
    ]
    columns = (("measured on", ""), ("change", "n"), ("drawn", "wide"))
    return charts.data_table("Champion against the best parent, composite fitness", columns, rows)


def _fitness_table(table: dict[str, dict[str, dict[str, float]]]) -> str:
    rows = [charts.row(words.plain(model), fitness_cells(splits)) for model, splits in table.items()]
    columns = [("model", ""), *((name, "n") for name in fitness_columns())]
    return charts.data_table("Composite fitness on both splits, and its parts on the report split", columns, rows)


def _kept(merge: Merge) -> str:
    """What the champion kept of each speciality."""
    if not merge.kept:
        return ""
    signs = {"kept": ("improved", "+"), "lost": ("worse", "−")}
    rows = []
    for name, *numbers, word in words.kept_rows(merge):
        kind, mark = signs.get(word, ("no-signal", "?"))
        sign = f'<span class="verdict {kind}"><i aria-hidden=true>{mark}</i>{escape(word)}</span>'
        rows.append(charts.row(name, numbers) + f"<td>{sign}</td>")
    columns = [(name, "n" if 0 < place < 4 else "") for place, name in enumerate(words.KEPT)]
    about = heading("Specialities kept", words.kept_about(merge))
    return about + charts.data_table("Exact answers of the specialist and of the champion", columns, rows)


def fitness_columns() -> list[str]:
    """Names of the values that :func:`fitness_cells` gives."""
    return ["select", "report", "report − select", *(name for _, name in PARTS)]


def fitness_cells(splits: dict[str, dict[str, float]]) -> list[str]:
    """One model's composite on both splits, their difference, and the parts on the report split."""
    select, report = splits.get("select", {}), splits.get("report", {})
    a, b = select.get("composite"), report.get("composite")
    cells = [words.digits(a), words.digits(b), words.NOTHING if a is None or b is None else words.change(b - a)]
    for part, _ in PARTS:
        found = report.get(part)
        if part == "bytes":
            cells.append(words.size(found))
        elif part == "flops_per_token":
            cells.append(words.NOTHING if found is None else words.amount(found))
        else:
            cells.append(words.value(found, part))
    return cells


def strategies_by_name(strategies: Sequence[Strategy]) -> dict[str, list[Strategy]]:
    """The runs of each strategy, in the order they were recorded."""
    found: dict[str, list[Strategy]] = {}
    for one in strategies:
        found.setdefault(one.name, []).append(one)
    return found


def _strategies(strategies: Sequence[Strategy]) -> str:
    """Searches beside each other: the mean over seeds in front, every seed behind it."""
    if not strategies:
        return ""
    groups = strategies_by_name(strategies)
    lines = []
    for place, (name, runs) in enumerate(groups.items()):
        lines += [
            Line(f"{name} {run.seed}", run.curve, place, thin=True) for run in runs if len(runs) > 1 and run.curve
        ]
        if mean := _mean_curve([run.curve for run in runs if run.curve]):
            lines.append(Line(words.plain(name), mean, place))
    drawn = ""
    if lines:
        title = "Best composite on the select split so far"
        y = Axis.around([p[1] for line in lines for p in line.points])
        svg = charts.line_chart(title, lines, _steps(lines), y, "evaluations")
        names = charts.legend([(i, words.plain(name)) for i, name in enumerate(groups)])
        drawn = charts.figure(title, svg, names, "Thick: mean over seeds. Thin: each seed.")
    rows = [charts.row(name, cells) for name, *cells in strategy_rows(groups)]
    columns = [("strategy", ""), *((name, "n") for name in ("seeds", "evaluations", "select", "report"))]
    table = charts.data_table("After all evaluations, mean over seeds (lowest to highest)", columns, rows, "wrap")
    return f"{heading('Strategies compared')}<div class=grid2>{drawn}{table}</div>"


def _mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[tuple[float, float], ...]:
    """The mean at every evaluation that all runs reached."""
    shared = set.intersection(*({x for x, _ in curve} for curve in curves)) if curves else set()
    values = [dict(curve) for curve in curves]
    return tuple((x, sum(v[x] for v in values) / len(values)) for x in sorted(shared))


def strategy_rows(groups: dict[str, list[Strategy]]) -> list[list[str]]:
    """Name, seeds, evaluations, and both splits as mean (lowest to highest)."""
    rows = []
    for name, runs in groups.items():
        evaluations = sorted({run.evaluations for run in runs if run.evaluations is not None})
        spread = [_spread([getattr(run, split) for run in runs]) for split in ("select", "report")]
        rows.append(
            [
                words.plain(name),
                str(len(runs)),
                " to ".join(f"{e:,}" for e in evaluations[:: max(1, len(evaluations) - 1)]),
                *spread,
            ]
        )
    return rows


def _spread(values: Sequence[float | None]) -> str:
    found = [v for v in values if v is not None]
    if not found:
        return words.NOTHING
    mean = words.digits(sum(found) / len(found))
    return (
        mean if len(found) == 1 else f"{mean} ({words.digits(min(found))}{JOINED}–{JOINED}{words.digits(max(found))})"
    )
