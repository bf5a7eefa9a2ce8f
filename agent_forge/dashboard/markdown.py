"""The report as Markdown: the same facts as the page, tables in place of drawings."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from agent_forge.dashboard import ternary_words, thoughts_words, words
from agent_forge.dashboard.page import drawn_models, handed_on
from agent_forge.dashboard.phase_section import fitness_cells, fitness_columns, strategies_by_name, strategy_rows
from agent_forge.dashboard.tree import Answer, Example, Merge, PhaseReport, SessionReport, Ternary, Theater, Thinking
from forgekit.measure.evidence import Evidence

_SPECIAL = re.compile(r"([\\`*_\[\]#|~])")
_MARKUP = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def markdown(report: SessionReport) -> str:
    """The whole report."""
    parts = [f"# {safe(words.title(report))}", safe(words.lede(report)), table(("", ""), words.facts(report))]
    if report.notes:
        parts += ["## Missing or damaged", items(report.notes)]
    parts += ["## Verdicts at a glance", _glance(report)]
    for phase in report.phases:
        parts += _phase(phase)
    parts += ["## Lineage", _lineage(report), "## Sizes", _sizes(report), "## Sample conversation", *_talk(report)]
    parts += ["## What failed its gate, and what happened then", *_refused(report)]
    parts += ["## How to reproduce it", *_again(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def safe(text: str) -> str:
    """Text as it is, whatever Markdown or HTML would make of it; line breaks become spaces."""
    quiet = _SPECIAL.sub(r"\\\1", " ".join(text.split()))
    return "".join(_MARKUP.get(c, c) for c in quiet)


def code(text: str) -> str:
    """Text in backticks; a longer fence where the text has backticks of its own."""
    line = " ".join(text.split()).replace("|", "\\|") or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def items(lines: Sequence[str]) -> str:
    """A list."""
    return "\n".join(f"- {safe(line)}" for line in lines)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], raw: bool = False) -> str:
    """A table; ``raw`` cells are Markdown already."""
    show = str if raw else safe
    lines = [columns, ["---"] * len(columns), *([show(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _glance(report: SessionReport) -> str:
    rows = [(words.VERDICTS[v][1], str(n), words.VERDICTS[v][2]) for v, n in words.counts(report).items()]
    gates = [
        f"Gate of phase {p.number}, {p.name}: {words.gate_line(p.gate) if p.gate else 'it has not been asked'}"
        for p in report.phases
    ]
    return f"{table(('verdict', 'claims', 'meaning'), rows)}\n\n{items(gates)}"


def _phase(phase: PhaseReport) -> list[str]:
    about = f"{words.ABOUT.get(phase.name, '')} {words.STATES[phase.state]} {words.what(phase)}"
    parts = [f"## Phase {phase.number}: {phase.name}", safe(about.strip()), safe(phase.error)]
    if phase.losses and not phase.thinking.one.losses and not phase.ternary.losses:
        rows = [
            (words.plain(c.name), f"{c.points[-1][0]:,.0f}", *(words.digits(c.points[i][1]) for i in (0, -1)))
            for c in phase.losses
        ]
        parts += ["### Training loss", table(("model", "last step", "first logged", "last logged"), rows)]
    parts += _search(phase.merge)
    parts += _thinking(phase.thinking)
    parts += _ternary(phase.ternary)
    parts.append("### Evidence")
    for metric in dict.fromkeys(item.metric for item in phase.evidence):
        columns = ("claim", "verdict", "before → after", "change, 95 % interval", "chance", "items")
        rows = [_claim(item) for item in phase.evidence if item.metric == metric]
        parts += [f"**{safe(words.metric_name(metric))}**", table(columns, rows)]
    if not phase.evidence:
        parts.append("No evidence was recorded for this phase: nothing is claimed for it.")
    if phase.levels:
        tasks = sorted({t for found in phase.levels.values() for t in found})
        cells = [[t, *(words.percent(found.get(t)) for found in phase.levels.values())] for t in tasks]
        parts += ["### Accuracy by task", table(("family/level", *map(words.plain, phase.levels)), cells)]
    if phase.halting:
        steps = list(dict.fromkeys(s for found in phase.halting.values() for s in found))
        cells = [[words.plain(m), *(words.percent(found.get(s)) for s in steps)] for m, found in phase.halting.items()]
        parts += ["### Halting: share of tokens by recursion steps", table(("model and text", *steps), cells)]
    return parts


def _claim(item: Evidence) -> tuple[str, ...]:
    moved = f"{words.change(words.difference(item), item.metric)} ({words.interval(item)})"
    told = (words.plain(item.claim), words.VERDICTS[item.verdict][1], words.scores(item), moved)
    return *told, words.value(item.chance, item.metric), f"{item.n:,}"


def _search(merge: Merge) -> list[str]:
    parts = []
    if merge.history:
        names = {
            "generation": "generation", "best_fitness": "best", "avg_fitness": "mean",
            "champion_fitness": "champion so far", "diversity_score": "diversity",
        }  # fmt: skip
        rows = [[words.digits(row.get(key)) for key in names] for row in merge.history]
        floor = "The settings record no floor of diversity."
        floor = floor if merge.floor is None else f"Floor of diversity: {merge.floor:g}."
        told = safe(f"{words.history_start_end(merge)} {floor}")
        parts += ["### Search", told, table(tuple(names.values()), rows)]
    if merge.table or merge.gains:
        parts += ["### Fitness: chosen against reported", safe(words.curse(merge))]
        parts.append(
            f"Search: {safe(words.plain(merge.strategy) or 'not recorded')}. Recipe: {code(merge.recipe or '–')}"
        )
        rows = [(words.plain(name), *fitness_cells(splits)) for name, splits in merge.table.items()]
        parts.append(table(("model", *fitness_columns()), rows) if rows else "")
    if merge.kept:
        parts += ["### Specialities kept", words.kept_about(merge), table(words.KEPT, words.kept_rows(merge))]
    if merge.strategies:
        columns = ("strategy", "seeds", "evaluations", "select", "report")
        parts += ["### Strategies compared", table(columns, strategy_rows(strategies_by_name(merge.strategies)))]
    return parts


def _thinking(thinking: Thinking) -> list[str]:
    """What phase 3 measured of its thoughts."""
    parts = []
    if thinking.conditions:
        parts += ["### Do the thoughts carry the answers?", thoughts_words.CONTROLS_ABOUT]
        parts.append(table(thoughts_words.CONTROLS, thoughts_words.control_rows(thinking)))
    if thinking.theater is not None:
        parts += _judged(thinking.theater)
    if thinking.examples:
        parts += ["### Example thoughts", thoughts_words.EXAMPLES_ABOUT]
        columns = ("strategy", "asked", "thought", "answered", "", "note")
        parts.append(table(columns, [_example(one) for one in thinking.examples], raw=True))
    measured = []
    for columns, rows in (
        (("thoughts", ""), thoughts_words.totals(thinking)),
        (thoughts_words.STRATEGIES, thoughts_words.strategy_rows(thinking)),
        (thoughts_words.FAMILIES, thoughts_words.family_rows(thinking)),
    ):
        measured += [table(columns, rows)] if rows else []
    if measured:
        parts += ["### What the thoughts are like", thoughts_words.THOUGHTS_ABOUT, *measured]
    steps = [("1: learning to think from written thoughts", [thoughts_words.first_step(thinking)])]
    for name, lines in (*steps, ("2: Quiet-STaR", thoughts_words.second_step(thinking))):
        if any(lines):
            parts += [f"### Step {name}", *map(safe, lines)]
    return parts


def _judged(theater: Theater) -> list[str]:
    """The judgement with every requirement, and the measures beside the controls."""
    found = [thoughts_words.requirement(reason) for reason in theater.reasons]
    lines = [f"{thoughts_words.STATES[met][2]}: {said}" for met, said in found]
    rows = thoughts_words.measures(theater)
    measured = table(("measure", "value (95 %)", "what it is"), rows) if rows else ""
    return [f"**{safe(thoughts_words.judgement(theater)[2])}**", items(lines), measured]


def _example(one: Example) -> tuple[str, ...]:
    """The cells of an example, as Markdown."""
    state = _state(one.right, one.expected)
    said = code(one.answered) if one.answered else "(an empty answer)"
    note = safe("; ".join(thoughts_words.remarks(one)))
    return safe(words.plain(one.strategy)), code(one.asked), _thought(one.thought), said, state, note


def _state(right: bool | None, expected: str) -> str:
    return f"wrong, expected {code(expected)}" if right is False else thoughts_words.ANSWERS[right][2]


def _thought(thought: str) -> str:
    """A thought in one line, its parts joined by arrows."""
    lines = thoughts_words.thought_lines(thought)
    return code(" → ".join(lines)) if lines else ""


def _ternary(found: Ternary) -> list[str]:
    """What phase 4 measured: the sentence first, then the models, speed, trainings and levels."""
    if not found.models:
        return []
    said, count = ternary_words.verdict(found), ternary_words.questions(found)
    parts = [f"**{safe(said)}**"] if said else []
    glance = [f"{head}: {moved}" for head, moved in ternary_words.glance(found) if moved]
    parts += [items(glance), "### Size, speed and skill", f"{count}, report split." if count else ""]
    rows = [
        [*cells, ternary_words.meaning(found, one)] for one, cells in zip(found.models, ternary_words.model_rows(found))
    ]
    parts += [table((*ternary_words.MODELS, "what it is"), rows)]
    parts += [items([f"{term}: {about}" for term, about in ternary_words.TERMS])]
    lines, losses = ternary_words.rounding(found), ternary_words.loss_rows(found)
    if lines or losses:
        parts += [f"### {ternary_words.rounding_title(found)}", items(lines)]
        parts += [table(ternary_words.LOSSES, losses)] if losses else []
    rows, told = ternary_words.lost_rows(found), ternary_words.lost_line(found)
    if told:
        parts += ["### Levels that lost most right answers, in per cent", f"{told} {ternary_words.LOST_ABOUT}"]
        parts += [table(ternary_words.LOST, rows)] if rows else []
    rows = [*ternary_words.facts(found), *ternary_words.outputs(found)]
    return parts + (["### Further numbers", table(("", ""), rows)] if rows else [])


def _lineage(report: SessionReport) -> str:
    drawn, left = drawn_models(report)
    if not drawn:
        return "No model was finished, so there is no lineage."
    names, lead = {m.model_id: m.name for m in report.models}, handed_on(report)
    lines = [
        f"{m.name} ({m.phase}) from {', '.join(names.get(p, p) for p in m.parents) or 'nothing'}"
        + ("; handed on by the last finished phase" if m.model_id in lead else "")
        for m in drawn
    ]
    told = items(lines + ([f"{words.several(left, 'further model')} not listed"] if left else []))
    rows = words.handoff_rows(report)
    return f"{told}\n\nHanded from phase to phase:\n\n{table(words.HANDOFF, rows)}" if rows else told


def _sizes(report: SessionReport) -> str:
    rows = [(words.plain(m.name), f"{m.parameters:,}", words.size(m.weights)) for m in report.models]
    return table(("model", "parameters", "weights on disk"), rows) if rows else "No model was finished."


def _talk(report: SessionReport) -> list[str]:
    parts = []
    for phase in report.phases:
        if phase.conversation:
            thought = any(a.thought for a in phase.conversation)
            columns = ("model", "asked", *(["thought"] if thought else []), "answered", "")
            rows = [_answer(a, thought) for a in phase.conversation]
            parts += [f"### After phase {phase.number}", table(columns, rows, raw=True)]
    return parts or ["No conversation was recorded. Talk to a model yourself: `agent-forge chat`"]


def _answer(a: Answer, thought: bool) -> tuple[str, ...]:
    """The cells of an answer, as Markdown; ``thought``: the table has a column for thoughts."""
    said = code(a.answered) if a.answered else "(an empty answer)"
    own = (_thought(a.thought),) if thought else ()
    return (safe(words.plain(a.model)), code(a.asked), *own, said, _state(a.right, a.expected))


def _refused(report: SessionReport) -> list[str]:
    asked = [p for p in report.phases if p.gate is not None]
    failed = [p for p in asked if not p.gate.passed]
    if not asked:
        return ["No gate has been asked in this session."]
    if not failed:
        return [f"Nothing: {words.several(len(asked), 'gate')} asked, and passed."]
    parts = []
    for phase in failed:
        happened = f"What happened then: {words.aftermath(report, phase)} What it made is kept for study."
        parts += [f"### Phase {phase.number}, {phase.name}", items(words.refusals(phase)), safe(happened)]
    return parts


def _again(report: SessionReport) -> list[str]:
    commands = "\n".join(words.commands(report))
    rows = [(words.plain(m.name), *words.origin(m)) for m in report.models]
    return [
        f"```sh\n{commands}\n```",
        safe(words.promise(report)),
        items(words.phase_hashes(report)),
        table(("model", *words.ORIGIN), rows) if rows else "",
        f"Settings of the session:\n\n```json\n{json.dumps(report.settings, indent=2)}\n```" if report.settings else "",
    ]
