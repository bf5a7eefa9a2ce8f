"""What phase 3 shows of its thoughts: the controls, the judgement, examples, and how the model learned to think."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from agent_forge.dashboard import charts, words
from agent_forge.dashboard import thoughts_words as told
from agent_forge.dashboard.charts import Axis, Line
from agent_forge.dashboard.thoughts import segments
from agent_forge.dashboard.tree import Condition, Example, FirstStep, Points, Theater, Thinking

WHOLE = Axis(0, 1, 100)
"""Accuracies are drawn from nothing to all: a gain must not look larger than it is."""


def thinking_section(thinking: Thinking) -> str:
    """Everything about thoughts; nothing where a phase left none."""
    return "".join(
        (_controls(thinking), _theater(thinking.theater), _examples(thinking.examples), _thoughts(thinking))
        + (_first(thinking), _second(thinking))
    )


def thought_block(thought: str, state: str = "") -> str:
    """A thought apart from the answer: one line per marker, ``state`` beside its name; nothing for none."""
    lines = "".join(
        f"<li><em>{escape(name) or '·'}</em><span>{escape(said)}</span></li>" for name, said in segments(thought)
    )
    name = f"thought, {state}" if state else "thought"
    return f"<div class=thought><small>{escape(name)}</small><ul>{lines}</ul></div>" if lines else ""


def _heading(name: str, about: str = "") -> str:
    return f"<h3>{escape(name)}</h3>" + (f"<p class=soft>{escape(about)}</p>" if about else "")


def _controls(thinking: Thinking) -> str:
    """Accuracy under every condition, drawn on one scale, with the accuracy without thoughts as a rule."""
    if not thinking.conditions:
        return ""
    base = told.without(thinking)
    rule = base.accuracy.value if base else None
    about = told.CONTROLS_ABOUT
    about += " The bar is the accuracy, the line across its end the 95 % interval"
    about += ", the upright rule the accuracy without thoughts." if rule is not None else "."
    looks = ("what", "n", "n", "n", "draw")
    names = [*told.CONTROLS[:4], "accuracy"]
    head = "".join(
        f'<th scope=col role=columnheader class="{look}">{escape(name)}</th>' for look, name in zip(looks, names)
    )
    rows = zip(thinking.conditions, told.control_rows(thinking))
    body = "".join(_condition(one, cells, rule) for one, cells in rows)
    return (
        f"{_heading('Do the thoughts carry the answers?', about)}"
        "<div class=block><table class='forest controls' role=table><caption>Right answers by condition"
        f"</caption><thead role=rowgroup><tr role=row>{head}</tr></thead><tbody role=rowgroup>{body}</tbody>"
        f"<tfoot role=rowgroup aria-hidden=true><tr role=row><td colspan=4 role=cell></td>"
        f"<td class=draw role=cell>{charts.interval_axis(WHOLE)}</td></tr></tfoot></table></div>"
    )


def _condition(one: Condition, cells: Sequence[str], rule: float | None) -> str:
    name, right, lost, count, meaning = cells
    drawn = ""
    if one.accuracy.value is not None:
        ends = None if None in (one.accuracy.low, one.accuracy.high) else (one.accuracy.low, one.accuracy.high)
        kind = "s0" if one.name == "with thoughts" else "s1"
        drawn = charts.level_mark(WHOLE, one.accuracy.value, ends, f"{name}: {right}", kind, rule)
    aside = f"<small>{escape(meaning)}</small>" if meaning else ""
    return (
        f"<tr role=row><th scope=row role=rowheader>{escape(name)}{aside}</th>"
        f'<td class=n role=cell data-name="right">{escape(right)}</td>'
        f'<td class="n{" empty" * (one.lost is None)}" role=cell data-name="gain lost">{escape(lost)}</td>'
        f'<td class=n role=cell data-name="questions">{escape(count)}</td><td class=draw role=cell>{drawn}</td></tr>'
    )


def _theater(theater: Theater | None) -> str:
    """The judgement with every requirement, and the measures beside the controls."""
    if theater is None:
        return ""
    kind, mark, said = told.judgement(theater)
    items = "".join(_requirement(reason) for reason in theater.reasons)
    box = f'<div class="judged {kind}"><p><i aria-hidden=true>{mark}</i>{escape(said)}</p>'
    box += f"<ul>{items}</ul></div>" if items else "</div>"
    rows = [
        f"<th scope=row>{escape(name)}<small>{escape(about)}</small></th><td class=n>{escape(shown)}</td>"
        for name, shown, about in told.measures(theater)
    ]
    columns = (("measure", ""), ("value (95 %)", "n"))
    return box + (charts.data_table("Measured beside the controls", columns, rows, "measures") if rows else "")


def _requirement(reason: str) -> str:
    met, said = told.requirement(reason)
    kind, mark, word = told.STATES[met]
    sign = f'<span class="verdict {kind}"><i aria-hidden=true>{mark}</i>{word}</span>'
    return f"<li>{sign}<span>{escape(said)}</span></li>"


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    items = "".join(map(_example, examples))
    return f"{_heading('Example thoughts', told.EXAMPLES_ABOUT)}<div class=block><ul class=talk>{items}</ul></div>"


def _example(example: Example) -> str:
    kind, mark, word = told.ANSWERS[example.right]
    expected = f"<small>expected: {escape(example.expected) or 'nothing'}</small>" if example.right is False else ""
    said = escape(example.answered) or "<em>(an empty answer)</em>"
    note = f"<p class=note>{escape(example.note)}</p>" if example.note else ""
    return (
        f"<li><p class=who><span>{escape(words.plain(example.strategy)) or 'no strategy named'}</span>"
        f'<span class="verdict {kind}"><i aria-hidden=true>{mark}</i>{word}</span></p>'
        f"<div class='bubble asked'><small>asked</small>{charts.shortened(example.asked)}</div>"
        f"{thought_block(example.thought, told.VALID[example.valid])}"
        f'<div class="bubble said {kind}"><small>answered</small>{said}{expected}</div>{note}</li>'
    )


def _thoughts(thinking: Thinking) -> str:
    """All thoughts together, by strategy and by task."""
    facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in told.totals(thinking))
    tables = ""
    for caption, columns, rows in (
        ("By strategy", told.STRATEGIES, told.strategy_rows(thinking)),
        ("By task", told.FAMILIES, told.family_rows(thinking)),
    ):
        looks = [(name, "n" if place else "") for place, name in enumerate(columns)]
        tables += charts.data_table(caption, looks, [charts.row(row[0], row[1:]) for row in rows]) if rows else ""
    if not facts and not tables:
        return ""
    shown = f"<div class=block><dl class=facts>{facts}</dl></div>" if facts else ""
    shown += f"<div class='grid2 block'>{tables}</div>" if tables else ""
    return _heading("What the thoughts are like", told.THOUGHTS_ABOUT) + shown


def _first(thinking: Thinking) -> str:
    said, one = told.first_step(thinking), thinking.one
    if not said and one == FirstStep():
        return ""
    drawn = _curve("Training loss on written thoughts", one.losses, "nats per token")
    charted = f"<div class='alone block'>{drawn}</div>" if drawn else ""
    return _heading("Step 1: learning to think from written thoughts", said) + charted


def _second(thinking: Thinking) -> str:
    """Step 2: the validation loss, what was kept, and how the training went."""
    two, said = thinking.two, told.second_step(thinking)
    drawn = _curve("Reward of the thoughts", two.rewards, "nats, mean over all thoughts, negative ones as 0", 0)
    drawn += _curve("Weight given to the thoughts", two.listening, "0: not listened to, 1: nothing else", 1)
    if not said and not drawn:
        return ""
    lines = "".join(f"<li>{escape(line)}</li>" for line in said)
    lines = f"<ul>{lines}</ul>" if lines else ""
    about = "Short thoughts at single positions of running text, rewarded where the text after them gets likelier."
    charted = f"<div class='grid2 block'>{drawn}</div>" if drawn else ""
    return _heading("Step 2: Quiet-STaR", about) + lines + charted


def _curve(title: str, found: Points, unit: str, series: int = 0) -> str:
    """One line over training steps; nothing without points."""
    if not found:
        return ""
    line = Line(title.lower(), found, series)
    y = Axis.around([value for _, value in found], zero=True)
    x = Axis(0, max(max(step for step, _ in found), 1))
    names = charts.legend([(series, f"{unit}, last {words.digits(found[-1][1])}")])
    return charts.figure(title, charts.line_chart(title, [line], x, y, "training step"), names)
