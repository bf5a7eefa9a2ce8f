"""What people see: plans, results, evidence, a short conversation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agent_forge.cli.shared import say, table

if TYPE_CHECKING:
    from agent_forge.dashboard.tree import Estimate, Ternary, Theater, Thinking

MARKS = {"improved": "[green]+[/]", "no-difference": "[yellow]=[/]", "worse": "[red]-[/]", "no-signal": "[dim]?[/]"}
LEGEND = "[green]+[/] improved   [yellow]=[/] no difference   [red]-[/] worse   [dim]?[/] no signal: not above chance"
METRICS = {
    "exact_match": "share of exact answers",
    "nats_per_answer_token": "nats per answer token (lower is better)",
    "nats_per_token": "validation nats per predicted token (lower is better)",
    "valid_thoughts": "share of valid thoughts",
    "skills_with_grace": "share of exact answers, before lowered by what may be lost",
    "bits_per_token_with_grace": "bits per token of text, before raised by what may be added (lower is better)",
    "bits_per_byte": "bits per byte of held-out text (lower is better)",
    "share of the gain lost by shuffled": "share of the gain that thoughts of other questions lose",
    "share of the gain lost by filler": "share of the gain that filler tokens lose",
    "predictive power": "share of right answers that are likelier after their own thought",
    "point-biserial correlation": "correlation of coherence and right answers",
    "share that is doubted: right steps, then slips": "share of steps that are doubted: right ones, then slips",
    "composite_fitness": "composite of text, answers, speed and memory",
    "steps_per_token": "recursion steps per answer token (lower is better)",
}

SMALL = ("nats_per_token",)
"""Metrics whose changes are so small that three decimals are needed."""
COLOURS = {"improved": "green", "no-difference": "yellow", "worse": "red", "no-signal": "dim"}
EXPLAINED = ("perplexity", "not trained", "with grace")
"""Words of phase 4 that are explained below its tables."""
ROOMY = 90
"""Columns that the table of phase 4's models takes; in fewer, their names are broken behind a comma."""
EXAMPLES = 6
"""Example thoughts that are printed; the report has them all."""


def show_plan(plan: dict[str, Any]) -> None:
    """The forecast of a run."""
    model = plan["model"]
    total = sum(model["split"].values())
    rows = [[part, f"{n:,}", f"{n / total:.1%}"] for part, n in model["split"].items()]
    rows.append(["total", f"{total:,}", f"target {model['target']:,}"])
    table(f"{plan['profile']}: {plan['about']}", ["part", "parameters>", "share>"], rows)
    shape = model["config"]
    keys = (
        "family",
        "d_model",
        "n_layers",
        "n_heads",
        "ffn_hidden",
        "vocab_size",
        "emb_rank",
        "window",
        "max_seq_len",
        "memory",
        "d_mem",
        "t_max",
    )
    say("  ".join(f"{k}={shape[k]}" for k in keys if k in shape) + f"  {model['mflops_per_token']:.2f} MFLOP/token")
    cells = [
        [s["phase"], s["stage"], f"{s['steps']:,}", f"{s['tokens']:,}", f"{s['seconds']:.0f}"] for s in plan["stages"]
    ]
    cells.append(["", "all training", "", "", f"{plan['seconds']:.0f}"])
    table("", ["phase", "stage", "steps>", "tokens>", "seconds, measured here>"], cells)
    for phase, counts in plan["counts"].items():
        say(f"{phase}: " + ", ".join(f"{name} {value:,} at most" for name, value in counts.items()))
    say(f"disk: {plan['disk_bytes'] / 1e6:.0f} MB at the peak")


def show_evidence(name: str, records: list[dict[str, Any]], tables: dict[str, Any]) -> None:
    """Every claim with its numbers and verdict, grouped by metric, then the tables."""
    from agent_forge.dashboard.values import mapping, numbers

    for metric in dict.fromkeys(e["metric"] for e in records):
        group = [e for e in records if e["metric"] == metric]
        title = f"{name}: {METRICS.get(metric, metric)}, report split"
        columns = ["", "claim", "before>", "after>", "change, 95 %>", "chance>", "n>"]
        table(title, columns, [_evidence_row(e) for e in group])
    say(LEGEND)
    _show_levels(name, {model: numbers(found) for model, found in mapping(tables.get("levels")).items()})
    histogram = tables.get("act_histogram", {})
    if histogram:
        steps = list(next(iter(histogram.values())))
        rows = [[m.replace("_", " "), *(f"{shares[s]:.0%}" for s in steps)] for m, shares in histogram.items()]
        columns = ["model", *(f"{s} step{'s' * (s != '1')}>" for s in steps)]
        table(f"{name}: share of tokens by recursion steps taken", columns, rows)

    _show_search(name, tables)


def _show_levels(name: str, levels: dict[str, dict[str, float]]) -> None:
    """Exact answers by level, of as many models as the terminal has room for; the others are named."""
    from agent_forge.dashboard.ternary import COPY

    if not levels:
        return
    levels = {model: levels[model] for model in sorted(levels, key=lambda one: one.endswith(COPY))}  # tells least
    tasks = list(dict.fromkeys(t for scores in levels.values() for t in scores))
    names, shown = {model: model.replace("_", " ") for model in levels}, []
    whole = left = _width() - max(map(len, ("family/level", *tasks))) - 2
    for model, told in names.items():
        left -= max(map(len, [*told.split(), "100"])) + 2
        if left < 0 and shown:
            break
        shown.append(model)
    broken = sum(len(names[model]) + 1 for model in shown) > whole  # a word per line, or rich cuts words
    heads = ["\n".join(names[model].split()) if broken else names[model] for model in shown]
    rows = [[t, *(_percent(levels[m].get(t)) for m in shown)] for t in tasks]
    table(f"{name}: exact answers in per cent", ["family/level!", *(f"{head}>" for head in heads)], rows)
    rest = [told for model, told in names.items() if model not in shown]
    if rest:
        _plain(f"no room here for {'; '.join(rest)}: in the report", "dim")


def _width() -> int:
    """Columns of the terminal."""
    from rich.console import Console

    return Console().width


def _show_search(name: str, tables: dict[str, Any]) -> None:
    """What a merge search leaves: fitness on both splits, which specialities were kept, strategies compared."""
    fitness = tables.get("fitness_table", {})
    if fitness:
        rows = [
            [
                model.replace("_", " "),
                *(f"{row[split]['composite']:.4f}" for split in ("select", "report")),
                f"{100 * row['report']['accuracy']:.1f}",
                f"{row['report']['bits_per_byte']:.3f}",
                f"{row['report']['flops_per_token'] / 1e6:.2f}",
            ]
            for model, row in fitness.items()
        ]
        columns = ["model", "select>", "report>", "answers, %>", "bits per byte>", "MFLOPs per token>"]
        table(f"{name}: composite fitness, chosen on select, told on report", columns, rows)
        gains = tables["gains"]
        curse = gains["select"] - gains["report"]
        say(
            f"gain over the best parent: {gains['select']:+.4f} on the split that chose, {gains['report']:+.4f} on the "
            f"one that did not; the difference of {curse:+.4f} is the winner's curse"
        )
    kept = tables.get("kept", {})
    if kept:
        rows = [
            [
                speciality.replace("_", " "),
                _percent(row["before"]),
                _percent(row["after"]),
                "yes" if row["kept"] else "no",
            ]
            for speciality, row in kept.items()
        ]
        table(f"{name}: specialities kept", ["speciality of", "specialist, %>", "champion, %>", "kept"], rows)
    compared = tables.get("strategy_table", [])
    if compared:
        rows = [
            [
                row["strategy"],
                f"{row['select']:.4f}",
                f"{row['report']:.4f}",
                f"{row['report_min']:.4f} to {row['report_max']:.4f}",
            ]
            for row in compared
        ]
        title = f"{name}: strategies, {compared[0]['evaluations']} candidates each, {compared[0]['seeds']} seeds"
        table(title, ["strategy", "select>", "report>", "range"], rows)


def show_thinking(name: str, thinking: Thinking) -> None:
    """What phase 3 measured: examples, the thoughts, the two steps; last, beside the gate, the controls, judged.

    Args:
        name: of the phase.
        thinking: as :func:`agent_forge.dashboard.thoughts.thinking` reads it; prints nothing of what is not there.
    """
    from agent_forge.dashboard import thoughts_words as told

    _show_examples(name, thinking)
    columns = [told.STRATEGIES[0], *(f"{c}>" for c in told.STRATEGIES[1:])]
    if thinking.strategies:
        table(f"{name}: thoughts by strategy", columns, told.strategy_rows(thinking))
    totals = told.totals_line(thinking)
    lines = [("thoughts", [totals]), ("step 1", [told.first_step(thinking)]), ("step 2", told.second_step(thinking))]
    for label, found in lines:
        for line in filter(None, found):
            _plain(f"{label}: {line}")
    if thinking.conditions:
        counts = " to ".join(f"{n:,}" for n in sorted({one.n for one in thinking.conditions if one.n is not None}))
        columns = ["condition", "right, %>", "95 %!", "gain lost, %>", "95 %!", "what was done"]
        rows = [[one.name, *_shares(one.accuracy), *_shares(one.lost), one.meaning] for one in thinking.conditions]
        table(f"{name}: do the thoughts carry the answers? {counts and f'{counts} questions'}", columns, rows)
    if thinking.theater is not None:
        _show_theater(thinking.theater)


def show_ternary(name: str, found: Ternary) -> None:
    """What phase 4 measured: the verdict in a sentence, every model, what rounding and training did, what was lost.

    Args:
        name: of the phase.
        found: as :func:`agent_forge.dashboard.ternary.ternary` reads it; prints nothing of what is not there.
    """
    from agent_forge.dashboard import ternary_words as told

    if not found.models:
        return
    if said := told.verdict(found):
        _plain(f"{name}: {said}", "bold")
    columns = ["model!", "weights>", "times\nsmaller>", "right,\n%>", "95 %!", "perplexity>", "tokens/s>"]
    rows = []
    for one, (model, *cells) in zip(found.models, told.model_rows(found)):
        broken = model.replace(", ", ",\n") if _width() < ROOMY else model
        rows.append([broken, *cells[:2], *_shares(one.accuracy), *cells[3:]])
    count = told.questions(found)
    table(f"{name}: size, speed and skill{f', {count} of the report split' if count else ''}", columns, rows)
    for line in told.rounding(found):
        _plain(line)
    lost = told.lost_rows(found)
    if lost:
        columns = [told.LOST[0], *(f"{column}>" for column in told.LOST[1:])]
        table(f"{name}: levels that lost most, in per cent", columns, lost)
    if line := told.lost_line(found):
        _plain(line)
    for what, model_id in told.outputs(found):
        _plain(f"{what}: {model_id}")
    for term, about in told.TERMS:
        if term in EXPLAINED:
            _plain(f"{term}: {about}", "dim")


def _shares(found: Estimate | None) -> tuple[str, str]:
    """A share in per cent, and the ends of its interval."""
    if found is None or found.value is None:
        return "-", ""
    ends = [f"{100 * end:.1f}" for end in (found.low, found.high) if end is not None]
    return f"{100 * found.value:.1f}", " to ".join(ends)


def _show_theater(theater: Theater) -> None:
    """The judgement, and every requirement with its mark."""
    from agent_forge.dashboard import thoughts_words as told

    kind, _, said = told.judgement(theater)
    _plain(said, COLOURS[kind])
    for reason in theater.reasons:
        met, what = told.requirement(reason)
        kind, mark, word = told.STATES[met]
        _plain(f"  {mark} {word}: {what}", "" if met else COLOURS[kind])
    for label, shown, about in told.measures(theater):
        _plain(f"  {label} {shown}: {about}")


def _show_examples(name: str, thinking: Thinking) -> None:
    """A few thoughts, wrong ones among them where there are any, each apart from its answer."""
    from agent_forge.dashboard import thoughts_words as told

    rows = []
    wrong = [one for one in thinking.examples if one.right is False][: EXAMPLES // 2]
    others = [one for one in thinking.examples if one.right is not False][: EXAMPLES - len(wrong)]
    for one in (*others, *wrong):
        state = "\n".join((_right(one.right, one.expected), *map(_quiet, told.remarks(one))))
        rows.append([one.strategy.replace("_", " "), _short(one.asked), _thought(one.thought), one.answered, state])
    if rows:
        left = len(thinking.examples) - len(rows)
        more = f" ({len(rows)} of {len(thinking.examples)}, all of them in the report)" if left else ""
        table(f"{name}: example thoughts{more}", ["strategy", "asked", "thought", "answered", ""], rows)


def _right(right: bool | None, expected: str) -> str:
    """Whether an answer is right, for a cell."""
    marks = {True: "[green]right[/]", None: "[dim]not marked[/]"}
    return marks.get(right, f"[red]wrong[/], it is {_quiet(expected)}")


def _thought(thought: str) -> str:
    """A thought for a cell: dim, a line per marker."""
    from agent_forge.dashboard.thoughts_words import thought_lines

    lines = "\n".join(thought_lines(thought))
    return f"[dim]{_quiet(lines)}[/]" if lines else ""


def _quiet(text: str) -> str:
    """Text inside markup as it is."""
    from rich.markup import escape

    return escape(text)


def _plain(text: str, style: str = "") -> None:
    """A line of text as it is, whatever brackets it has."""
    say(_quiet(text), style)


def _short(question: str) -> str:
    """A question with its middle left out where it is long."""
    return question if len(question) < 90 else f"{question[:60]} ... {question[-22:]}"


def _evidence_row(e: dict[str, Any]) -> list[str]:
    places = 3 if e["metric"] in SMALL else 2
    interval = f"{e['ci95'][0]:+.{places}f} {e['ci95'][1]:+.{places}f}" if e["ci95"] else "-"
    before, after = ("-" if e[k] is None else f"{e[k]:.{places}f}" for k in ("before", "after"))
    chance = "-" if e["chance"] is None else f"{e['chance']:.2f}"
    return [MARKS[e["verdict"]], e["claim"].replace("_", " "), before, after, interval, chance, str(e["n"])]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"


def show_results(forge, results: dict) -> None:
    """After a run: evidence, gate, a conversation, and what to do next."""
    from agent_forge.dashboard.ternary import ternary
    from agent_forge.dashboard.thoughts import thinking
    from agent_forge.dashboard.values import listing, mapping, text

    for name, result in results.items():
        show_evidence(name, [e.model_dump() for e in result.evidence], result.metrics)
        show_thinking(name, thinking(result.metrics, result.artifacts))
        show_ternary(name, ternary(result.metrics, result.artifacts, result.evidence))
        decision = mapping(result.artifacts.get("gate"))
        if decision:
            word = "[green]passed[/]" if decision.get("passed") is True else "[red]said no[/]"
            say(f"gate {name}: {word}")
            for reason in map(text, listing(decision.get("reasons"))):
                if reason.startswith("no"):
                    _plain(f"  {reason}", "red")
        say(f"{name}: {result.duration_seconds:.0f} s")
    _conversation(results)
    say(f"next: agent-forge report {forge.session_id[:8]}        agent-forge chat        agent-forge serve latest")


def _conversation(results: dict) -> None:
    """What the last phase's models were asked, thought and answered."""
    from agent_forge.dashboard.thoughts import conversation

    said = conversation(list(results.values())[-1].artifacts.get("conversation")) or ()
    thought = any(line.thought for line in said)
    rows = []
    for line in said:
        own = [_thought(line.thought)] if thought else []
        rows.append([line.model, _short(line.asked), *own, line.answered, _right(line.right, line.expected)])
    if rows:
        columns = ["model", "asked", *(["thought"] if thought else []), "answered", ""]
        table("a short conversation", columns, rows)
