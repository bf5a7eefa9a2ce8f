"""What people see: plans, results, evidence, a short conversation."""

from __future__ import annotations

from typing import Any

from agent_forge.cli.shared import say, table

MARKS = {"improved": "[green]+[/]", "no-difference": "[yellow]=[/]", "worse": "[red]-[/]", "no-signal": "[dim]?[/]"}
LEGEND = "[green]+[/] improved   [yellow]=[/] no difference   [red]-[/] worse   [dim]?[/] no signal: not above chance"
METRICS = {
    "exact_match": "share of exact answers",
    "nats_per_answer_token": "nats per answer token (lower is better)",
    "bits_per_byte": "bits per byte of held-out text (lower is better)",
    "composite_fitness": "composite of text, answers, speed and memory",
    "steps_per_token": "recursion steps per answer token (lower is better)",
}


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
    for metric in dict.fromkeys(e["metric"] for e in records):
        group = [e for e in records if e["metric"] == metric]
        title = f"{name}: {METRICS.get(metric, metric)}, report split"
        columns = ["", "claim", "before>", "after>", "change, 95 %>", "chance>", "n>"]
        table(title, columns, [_evidence_row(e) for e in group])
    say(LEGEND)
    levels = tables.get("levels", {})
    if levels:
        tasks = list(dict.fromkeys(t for scores in levels.values() for t in scores))
        rows = [[t, *(_percent(levels[m].get(t)) for m in levels)] for t in tasks]
        columns = ["family/level", *(f"{m.replace('_', ' ')}>" for m in levels)]
        table(f"{name}: exact answers in per cent", columns, rows)
    histogram = tables.get("act_histogram", {})
    if histogram:
        steps = list(next(iter(histogram.values())))
        rows = [[m.replace("_", " "), *(f"{shares[s]:.0%}" for s in steps)] for m, shares in histogram.items()]
        columns = ["model", *(f"{s} step{'s' * (s != '1')}>" for s in steps)]
        table(f"{name}: share of tokens by recursion steps taken", columns, rows)

    _show_search(name, tables)


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


def _evidence_row(e: dict[str, Any]) -> list[str]:
    interval = f"{e['ci95'][0]:+.2f} {e['ci95'][1]:+.2f}" if e["ci95"] else "-"
    before, after = ("-" if e[k] is None else f"{e[k]:.2f}" for k in ("before", "after"))
    chance = "-" if e["chance"] is None else f"{e['chance']:.2f}"
    return [MARKS[e["verdict"]], e["claim"].replace("_", " "), before, after, interval, chance, str(e["n"])]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"


def show_results(forge, results: dict) -> None:
    """After a run: evidence, gate, a conversation, and what to do next."""
    for name, result in results.items():
        show_evidence(name, [e.model_dump() for e in result.evidence], result.metrics)
        decision = result.artifacts.get("gate")
        if decision:
            word = "[green]passed[/]" if decision["passed"] else "[red]said no[/]"
            say(f"gate {name}: {word}")
            for reason in decision["reasons"]:
                if reason.startswith("no"):
                    say(f"  {reason}", "red")
        say(f"{name}: {result.duration_seconds:.0f} s")
    _conversation(results)
    say(f"next: agent-forge report {forge.session_id[:8]}        agent-forge chat        agent-forge serve latest")


def _conversation(results: dict) -> None:
    """What the last phase's models were asked and answered."""
    rows = []
    for line in list(results.values())[-1].artifacts.get("conversation", []):
        mark = "[green]right[/]" if line["right"] else f"[red]wrong[/], it is {line['expected']}"
        asked = line["asked"] if len(line["asked"]) < 90 else f"{line['asked'][:60]} ... {line['asked'][-22:]}"
        rows.append([line["model"], asked, line["answered"], mark])
    if rows:
        table("a short conversation", ["model", "asked", "answered", ""], rows)
