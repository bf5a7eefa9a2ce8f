"""The report as one HTML page that needs nothing else: no network, no scripts, no fonts; charts are inline SVG.

Every text that comes from the session is escaped: models' answers are full of ``<``, ``>`` and ``&``.
"""

from __future__ import annotations

import json
from html import escape

from agent_forge.dashboard import charts, words
from agent_forge.dashboard.phase_section import phase_section
from agent_forge.dashboard.style import CSS
from agent_forge.dashboard.ternary_words import summary
from agent_forge.dashboard.thoughts_section import thought_block
from agent_forge.dashboard.thoughts_words import ANSWERS, judgement
from agent_forge.dashboard.tree import Answer, Model, PhaseReport, SessionReport


def html_page(report: SessionReport) -> str:
    """The whole page."""
    title = f"{words.title(report)} · Agent Forge"
    body = "".join([_header(report), "<main id=main>", *_sections(report), "</main>", _footer(report)])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        # Nothing may be fetched or run, whatever a model's answer holds.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>{body}</body></html>\n"
    )


def _sections(report: SessionReport) -> list[str]:
    phases = [phase_section(phase) for phase in report.phases]
    if not phases:
        phases = ["<section><h2>Phases</h2><p>No phase of this session has left anything yet.</p></section>"]
    return [_glance(report), *phases, _lineage(report), _sizes(report), _talk(report), _refused(report), _again(report)]


def _header(report: SessionReport) -> str:
    facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in words.facts(report))
    links = [("verdicts", "Verdicts"), *((p.name, f"Phase {p.number}: {p.name}") for p in report.phases)]
    links += [("lineage", "Lineage"), ("sizes", "Sizes"), ("conversation", "Conversation"), ("gates", "Gates")]
    links.append(("reproduce", "Reproduce"))
    nav = "".join(f'<a href="#{escape(place)}">{escape(name)}</a>' for place, name in links)
    return (
        f'<a class=skip href="#main">To the report</a><header><p class=eyebrow>Agent Forge, session '
        f"{escape(report.session_id[:8])}</p><h1>{escape(words.title(report))}</h1>"
        f"<p class=lede>{escape(words.lede(report))}</p><dl class=facts>{facts}</dl>{_notes(report)}"
        f"<nav aria-label=Contents>{nav}</nav></header>"
    )


def _notes(report: SessionReport) -> str:
    """What is missing or damaged, before anything else is read."""
    if not report.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return f"<div class=notice role=note><h2>Missing or damaged</h2><ul>{items}</ul></div>"


def _section(place: str, title: str, body: str) -> str:
    return f'<section id="{place}"><h2>{escape(title)}</h2>{body}</section>'


def _glance(report: SessionReport) -> str:
    """Verdicts counted, and every gate with what it lacked."""
    tiles = "".join(
        f"<li class={verdict}><b>{number}</b><strong>{words.VERDICTS[verdict][0]} {words.VERDICTS[verdict][1]}</strong>"
        f"<span>{escape(words.VERDICTS[verdict][2])}</span></li>"
        for verdict, number in words.counts(report).items()
    )
    total = len(report.evidence)
    told = f"{words.several(total, 'claim')} measured." if total else "No claim was measured."
    gates = "".join(map(_gate, report.phases))
    return _section(
        "verdicts", "Verdicts at a glance", f"<p>{told}</p><ul class=tiles>{tiles}</ul><ul class=gates>{gates}</ul>"
    )


def _gate(phase: PhaseReport) -> str:
    head, gate = f"<b>Gate of phase {phase.number}, {escape(phase.name)}</b>", phase.gate
    if gate is None:
        return f"<li>{head}: it has not been asked.</li>"
    kind = "improved" if gate.passed else "worse"
    mark = "+" if gate.passed else "−"
    state = f'<span class="verdict {kind}"><i aria-hidden=true>{mark}</i>{escape(words.gate_line(gate))}</span>'
    lacking = "".join(f"<li>{escape(line)}</li>" for line in words.refusals(phase))
    theater = phase.thinking.theater
    judged = f"<p class=soft>{escape(judgement(theater)[2])}</p>" if theater else ""
    judged += f"<p class=soft>{escape(short)}</p>" if (short := summary(phase.ternary)) else ""
    return f"<li>{head} {state}{f'<ul>{lacking}</ul>' if lacking else ''}{judged}</li>"


def _lineage(report: SessionReport) -> str:
    """The models that were handed on, with all they were made from."""
    drawn, left = drawn_models(report)
    if not drawn:
        return _section("lineage", "Lineage", "<p>No model was finished, so there is no lineage.</p>")
    lead = handed_on(report)
    known = {m.model_id for m in drawn}
    strangers = list(dict.fromkeys(p for m in drawn for p in m.parents if p not in known))
    picture = charts.lineage(drawn, lead, lambda m: [m.phase, words.size(m.weights)])
    notes = ["From top to bottom: made from. A dashed way passes by the rows between."]
    notes += ["A bold frame: handed on by the last finished phase."] if lead & known else []
    notes += [f"Parents from elsewhere: {', '.join(strangers)}."] if strangers else []
    notes += [f"{words.several(left, 'further model')} of this session not drawn."] if left else []
    told = f"<p class=note>{escape(' '.join(notes))}</p>"
    return _section("lineage", "Lineage", picture + told + _handoffs(report))


def _handoffs(report: SessionReport) -> str:
    """Which model was handed to which phase, and whether it kept the contract."""
    rows = [charts.row(name, cells, "") for name, *cells in words.handoff_rows(report)]
    columns = [(name, "") for name in words.HANDOFF]
    return charts.data_table("Handed from phase to phase", columns, rows) if rows else ""


def handed_on(report: SessionReport) -> frozenset[str]:
    """Ids that the last finished phase handed on."""
    made = [phase.made for phase in report.phases if phase.state == "finished" and phase.made]
    return frozenset(made[-1]) if made else frozenset()


def drawn_models(report: SessionReport, most: int = 24) -> tuple[list[Model], int]:
    """Models that some phase handed on and their ancestors, else all; and how many are left out."""
    by_id = {m.model_id: m for m in report.models}
    wanted: dict[str, None] = {}
    queue = [model_id for phase in report.phases for model_id in phase.made]
    for model_id in queue:
        if model_id in by_id and model_id not in wanted:
            wanted[model_id] = None
            queue += by_id[model_id].parents
    shown = [m for m in report.models if m.model_id in wanted or not wanted][:most]
    return shown, len(report.models) - len(shown)


def _sizes(report: SessionReport) -> str:
    """Bytes of the weights, drawn to one scale."""
    if not report.models:
        return _section("sizes", "Sizes", "<p>No model was finished.</p>")
    largest = max((m.weights or 0 for m in report.models), default=0) or 1
    rows = [
        charts.row(words.plain(m.name), [f"{m.parameters:,}", words.size(m.weights)])
        + f"<td>{charts.bar((m.weights or 0) / largest, f'{m.name}: {words.size(m.weights)}')}</td>"
        for m in report.models
    ]
    columns = (("model", ""), ("parameters", "n"), ("weights", "n"), ("to one scale", "wide"))
    return _section("sizes", "Sizes", charts.data_table("Weights on disk", columns, rows))


def _talk(report: SessionReport) -> str:
    """What the models were asked, and really said."""
    parts = []
    for phase in report.phases:
        if phase.conversation:
            items = "".join(map(_answer, phase.conversation))
            right = sum(a.right is True for a in phase.conversation)
            head = f"<h3>After phase {phase.number}: {right} of {len(phase.conversation)} right</h3>"
            parts.append(f"{head}<ul class=talk>{items}</ul>")
    if not parts:
        parts = ["<p>No conversation was recorded. Talk to a model yourself: <code>agent-forge chat</code></p>"]
    else:
        parts.insert(0, "<p class=soft>A few questions and what the models really answered: samples, not a score.</p>")
    return _section("conversation", "Sample conversation", "".join(parts))


def _answer(answer: Answer) -> str:
    kind, mark, word = ANSWERS[answer.right]
    expected = ""
    if answer.right is False:
        expected = f"<small>expected: {escape(answer.expected) or 'nothing'}</small>"
    said = escape(answer.answered) or "<em>(an empty answer)</em>"
    return (
        f"<li><p class=who><span>{escape(words.plain(answer.model))}</span>"
        f'<span class="verdict {kind}"><i aria-hidden=true>{mark}</i>{word}</span></p>'
        f"<div class='bubble asked'><small>asked</small>{charts.shortened(answer.asked)}</div>"
        f"{thought_block(answer.thought)}"
        f'<div class="bubble said {kind}"><small>answered</small>{said}{expected}</div></li>'
    )


def _refused(report: SessionReport) -> str:
    """What failed its gate, and what happened then."""
    asked = [p for p in report.phases if p.gate is not None]
    failed = [p for p in asked if not p.gate.passed]
    if not asked:
        body = "<p>No gate has been asked in this session.</p>"
    elif not failed:
        body = f"<p>Nothing: {words.several(len(asked), 'gate')} asked, and passed.</p>"
    else:
        body = "".join(
            f"<h3>Phase {p.number}, {escape(p.name)}</h3><ul>"
            f"{''.join(f'<li>{escape(line)}</li>' for line in words.refusals(p))}</ul>"
            f"<p><b>What happened then:</b> {escape(words.aftermath(report, p))} What it made is kept for study.</p>"
            for p in failed
        )
    return _section("gates", "What failed its gate, and what happened then", body)


def _again(report: SessionReport) -> str:
    """Commands, hashes and seeds: what it takes to make the same again."""
    commands = escape("\n".join(words.commands(report)))
    rows = [charts.row(words.plain(m.name), words.origin(m), "hash") for m in report.models]
    table = charts.data_table("Seeds and hashes", [(name, "") for name in ("model", *words.ORIGIN)], rows)
    settings = escape(json.dumps(report.settings, indent=2, ensure_ascii=False))
    return _section(
        "reproduce",
        "How to reproduce it",
        f"<pre tabindex=0><code>{commands}</code></pre><p class=soft>{escape(words.promise(report))}</p>"
        f"{''.join(f'<p class=soft>{escape(line)}</p>' for line in words.phase_hashes(report))}"
        f"{table if report.models else ''}"
        + (f"<details><summary>All settings of the session</summary><pre><code>{settings}</code></pre></details>"
           if report.settings else ""),
    )  # fmt: skip


def _footer(report: SessionReport) -> str:
    return (
        f"<footer><p>Session {escape(report.session_id)}, {escape(words.date(report.started))}. Every number on this "
        "page was read from what the session recorded; no model was loaded to write it.</p></footer>"
    )
