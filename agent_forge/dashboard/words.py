"""Names, numbers and sentences that the page and its Markdown share."""

from __future__ import annotations

import re
from collections import Counter
from datetime import datetime
from typing import Any

from agent_forge.dashboard.tree import Gate, Merge, Model, PhaseReport, SessionReport
from forgekit.measure.evidence import Evidence

VERDICTS = {
    "improved": ("+", "improved", "the whole interval lies on the better side of zero"),
    "no-difference": ("=", "no difference", "the interval includes zero"),
    "worse": ("−", "worse", "the whole interval lies on the worse side of zero"),
    "no-signal": ("?", "no signal", "neither side is above chance, or too few items: nothing can be said"),
}
"""Verdict to its mark, its words and its meaning."""

METRICS = {
    "exact_match": ("share of exact answers", "share"),
    "skills_with_grace": ("share of exact answers, before lowered by what may be lost", "share"),
    "bits_per_token_with_grace": ("bits per token of text, before raised by what may be added", "less"),
    "valid_thoughts": ("share of valid thoughts", "share"),
    "accuracy": ("share of exact answers", "share"),
    "share of the gain lost by shuffled": ("share of the gain lost by shuffled thoughts", "share"),
    "share of the gain lost by filler": ("share of the gain lost by filler tokens", "share"),
    "predictive power": ("answers likelier after their own thought than after another's", "share"),
    "share that is doubted: right steps, then slips": ("steps that are doubted: right ones, then slips", "share"),
    "nats_per_answer_token": ("nats per answer token", "less"),
    "nats_per_token": ("validation nats per predicted token", "less"),
    "bits_per_byte": ("bits per byte of held-out text", "less"),
    "perplexity": ("perplexity per byte of held-out text", "less"),
    "steps_per_token": ("recursion steps per answer token", "less"),
    "composite_fitness": ("composite fitness", "more"),
}
"""Metric to its name for people, and whether it is a share, or a number of which more or less is better."""
FINE = ("nats_per_token",)
"""Metrics that change so little that a fourth digit is needed."""

ABOUT = {
    "cognate": (
        "One trunk is trained from nothing; then it is branched into specialists, each trained further on its own "
        "speciality. Every specialist is compared with the trunk, on its own tasks and on the others'."
    ),
    "evomerge": (
        "The specialists are merged again and again. A search keeps the merges with the best composite fitness, "
        "chosen on one split of the tasks; the champion is then measured on another split that chose nothing."
    ),
    "quietstar": (
        "The model learns to think before it answers. Step 1 trains it on written thoughts whose every statement was "
        "checked; step 2 rewards thoughts that make the text after them likelier (Quiet-STaR). Then the same questions "
        "are asked with thoughts, without, and with thoughts that cannot help: only a gain that those controls lose "
        "counts as thinking."
    ),
    "bitnet": (
        "The model is made small: the weights of its linear maps become −1, 0 or 1 times a scale (BitNet; or eight or "
        "four bits, where that was asked for), embedding and head a few bits each. Rounding alone is measured first; "
        "where it costs too much, the model is trained on with the rounding in place to get its skills back."
    ),
}
STATES = {
    "finished": "It finished.",
    "failed": "It failed.",
    "interrupted": "It was interrupted before it finished; what it had measured by then is below.",
    "running": "It is still running; this is what it has written so far.",
    "damaged": "Its result cannot be read; what follows comes from the event log and the models alone.",
}
POLICIES = {
    "fall_back": "go on with the models that the phase was given",
    "stop": "stop the pipeline",
    "accept": "go on with what the phase made all the same",
}
NOTHING = "–"


def plain(name: str) -> str:
    """A name from the code as words."""
    return name.replace("_", " ")


def metric_name(metric: str) -> str:
    """A metric in words, with the direction that is better where that is known."""
    label, kind = METRICS.get(metric, (plain(metric), ""))
    return f"{label} ({kind} is better)" if kind in ("less", "more") else label


def is_share(metric: str) -> bool:
    """Whether values of the metric are shares, shown in per cent."""
    return METRICS.get(metric, ("", ""))[1] == "share"


def value(number: float | None, metric: str = "") -> str:
    """A measured value: per cent for shares, three significant digits otherwise, four where changes are small."""
    if number is None:
        return NOTHING
    return f"{100 * number:.1f} %" if is_share(metric) else digits(number, 4 if metric in FINE else 3)


def scores(item: Evidence) -> str:
    """Before and after."""
    before, after = value(item.before, item.metric), value(item.after, item.metric)
    return f"{before.removesuffix(' %') if after.endswith('%') else before} → {after}"


def change(number: float | None, metric: str = "") -> str:
    """A signed change: percentage points for shares."""
    if number is None:
        return NOTHING
    return _minus(f"{100 * number:+.1f}") if is_share(metric) else _minus(f"{number:+.3g}")


def interval(item: Evidence) -> str:
    """The 95 % interval of the change."""
    if item.ci95 is None:
        return NOTHING
    return " to ".join(change(end, item.metric) for end in item.ci95)


def difference(item: Evidence) -> float | None:
    """``after - before``; None when a side was not measured."""
    return None if item.before is None or item.after is None else item.after - item.before


def digits(number: float | None, places: int = 3) -> str:
    """``places`` significant digits, thousands grouped, no exponent between 0.001 and a million."""
    if number is None:
        return NOTHING
    size = abs(number)
    if size and (size < 1e-3 or size >= 1e6):
        return _minus(f"{number:.{places}g}")
    decimals = 0 if size >= 10**places or number == int(number) else max(0, places - 1 - _exponent(size))
    return _minus(f"{number:,.{decimals}f}")


def _exponent(size: float) -> int:
    return int(f"{size:e}".partition("e")[2]) if size else 0


def _minus(shown: str) -> str:
    return shown.replace("-", "−") if not re.search(r"e-", shown) else shown


def percent(share: float | None) -> str:
    """A share in whole per cent."""
    return NOTHING if share is None else _minus(f"{100 * share:.0f} %")


def size(count: float | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return NOTHING
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{digits(count / scale)} {unit}"
    return f"{count:.0f} bytes"


def amount(count: float) -> str:
    """A large count, such as parameters: 885 thousand, 24.9 million."""
    for unit, scale in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if count >= scale:
            return f"{digits(count / scale)} {unit}"
    return f"{count:.0f}"


def several(count: int, noun: str, more: str = "") -> str:
    """``1 model``, ``3 models``."""
    return f"{count:,} {noun if count == 1 else more or noun + 's'}"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds is None:
        return "an unknown time"
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def date(instant: str) -> str:
    """An ISO instant as ``21 November 2026, 13:26 UTC``; as it is when it is none."""
    try:
        moment = datetime.fromisoformat(instant)
    except ValueError:
        return instant or "an unknown date"
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


def title(report: SessionReport) -> str:
    """What was made, in one line."""
    if not report.models:
        return "No model was finished"
    counts = sorted({m.parameters for m in report.models})
    each = amount(counts[0]) if len(counts) == 1 else f"{amount(counts[0])} to {amount(counts[-1])}"
    every = " each" if len(report.models) > 1 and len(counts) == 1 else ""
    return f"{several(len(report.models), 'model')} of {each} parameters{every}"


def lede(report: SessionReport) -> str:
    """One or two sentences under the title."""
    done = [f"{p.number} ({p.name})" for p in report.phases if p.state == "finished"]
    several_of = " and ".join(filter(None, (", ".join(done[:-1]), *done[-1:])))
    phases = f"Finished: phase{'s' * (len(done) > 1)} {several_of}." if done else "No phase has finished."
    ends = {
        "completed": "The session is complete.",
        "failed": f"The session failed: {report.error}." if report.error else "The session failed.",
        "paused": "The session was paused; it can be resumed.",
        "running": "The session is still running.",
        "interrupted": "The session was interrupted; it can be resumed.",
    }
    missing = f" Planned and not run: {', '.join(report.not_run)}." if report.not_run else ""
    return f"{phases} {ends.get(report.status, report.status)}{missing}"


def what(phase: PhaseReport) -> str:
    """Time, models and tokens, as far as they were recorded."""
    told = []
    if phase.seconds is not None:
        told.append(f"It took {duration(phase.seconds)}{' after its last start' * (phase.starts > 1)}.")
    if phase.names:
        told.append(f"It handed on {', '.join(map(plain, phase.names))}.")
    if phase.tokens:
        told.append(f"It trained on {amount(sum(phase.tokens.values()))} tokens in all.")
    return " ".join(told)


def facts(report: SessionReport) -> list[tuple[str, str]]:
    """What the session was, as pairs of label and value."""
    weights = [m.weights for m in report.models if m.weights is not None]
    rows = [
        ("Profile", report.profile or "not recorded"),
        ("Started", date(report.started)),
        ("Time at work", duration(report.seconds)),
        ("Models", str(len(report.models))),
        ("Parameters, all models", f"{sum(m.parameters for m in report.models):,}"),
        ("Weights on disk", size(sum(weights)) if weights else NOTHING),
        ("Peak memory, sampled", size(report.peak_bytes)),
        ("Machine", " / ".join(machine(env) for env in report.environments) or "not recorded"),
    ]
    return rows + ([("Starts", f"{report.starts}: it was resumed")] if report.starts > 1 else [])


def machine(environment: dict[str, Any]) -> str:
    """What a start recorded about the machine, in one line."""
    device = environment.get("device_name") or environment.get("device")
    threads = environment.get("threads")
    parts = [device, environment.get("cpu_capability"), f"{threads} threads" if threads else None]
    parts.append(f"torch {environment['torch']}" if environment.get("torch") else None)
    return ", ".join(str(part) for part in parts if part)


def counts(report: SessionReport) -> dict[str, int]:
    """Number of claims by verdict, all four named."""
    found = Counter(item.verdict for item in report.evidence)
    return {verdict: found[verdict] for verdict in VERDICTS}


def gate_line(gate: Gate) -> str:
    """How many of a gate's requirements were met."""
    met = sum(reason.startswith("yes") for reason in gate.reasons)
    total = several(len(gate.reasons), "requirement")
    return f"{'passed' if gate.passed else 'said no'}: {met} of {total} met"


def refusals(phase: PhaseReport) -> list[str]:
    """The requirements of a phase's gate that were not met, in plain words."""
    known = {str(item): item for item in phase.evidence}
    lacking = [r.partition(": ")[2] for r in phase.gate.reasons if r.startswith("no")] if phase.gate else []
    return [in_words(reason, known) for reason in lacking]


def in_words(reason: str, known: dict[str, Evidence]) -> str:
    """``X needs improved; <evidence>`` as a sentence; anything else as it is.

    Args:
        reason: one line of a gate.
        known: evidence by its text, as gates write it.
    """
    found = re.fullmatch(r"(?P<what>.+?) needs (?P<need>improved|not-worse)(?P<rest>[,;].*)", reason, re.DOTALL)
    if not found:
        return plain(reason)
    need = {"improved": "had to be shown to improve", "not-worse": "had to be shown not to get worse"}[found["need"]]
    if found["rest"].startswith(","):
        return f"“{plain(found['what'])}” {need}, and there is no evidence for it."
    told = found["rest"].lstrip("; ")
    item = known.get(told)
    measured = plain(told) if item is None else verdict_line(item)
    return f"“{plain(found['what'])}” {need}. Measured: {measured}."


def verdict_line(item: Evidence) -> str:
    """``worse, 19.7 → 18.0 %, change −1.7 points (−3.1 to −0.4)``."""
    word = VERDICTS[item.verdict][1]
    if item.ci95 is None:
        return f"{word}, not measured on both sides"
    points = " points" if is_share(item.metric) else ""
    moved = f"{scores(item)}, change {change(difference(item), item.metric)}{points} ({interval(item)})"
    guess = "" if item.chance is None else f", chance {value(item.chance, item.metric)}"
    return f"{word}, {metric_name(item.metric)} {moved}{guess}, {item.n:,} items"


def aftermath(report: SessionReport, phase: PhaseReport) -> str:
    """What happened after a gate said no: what the next phase was given, else what the settings ask for."""
    later = next((p for p in report.phases if p.number > phase.number and p.state in ("finished", "failed")), None)
    if later is not None and later.inputs:
        if set(later.inputs) & set(phase.made):
            return f"Phase {later.number} ({later.name}) went on with what this phase made all the same."
        return f"Phase {later.number} ({later.name}) went on with the models this phase had been given instead."
    policy = POLICIES.get(report.gate_policy)
    if policy is None:
        return "The settings do not say what was to happen then, and no later phase has run."
    told = f"The settings ask to {policy} (gate = {report.gate_policy}); no later phase has run in this session."
    if report.gate_policy == "fall_back" and not phase.inputs:
        told += " This phase was given none, so its own models would be handed on."
    return told


def curse(merge: Merge) -> str:
    """What the two gains say about the winner's curse; nothing when one of them is missing."""
    select, kept = merge.gains.get("select"), merge.gains.get("report")
    if select is None or kept is None:
        return ""
    lost = select - kept
    told = f"Composite fitness against the best parent: {change(select)} on the split that chose the champion, "
    told += f"{change(kept)} on the report split, which chose nothing. "
    if lost > 0:
        return told + f"The difference, {digits(lost)}, is the winner's curse: the luck in choosing the best of many."
    return told + "The gain on the report split is no smaller, so choosing did not flatter the champion here."


def history_start_end(merge: Merge) -> str:
    """The search in one sentence; nothing without a history."""
    if not merge.history:
        return ""
    first, last = merge.history[0], merge.history[-1]
    best = [row.get("best_fitness") for row in (first, last)]
    told = f"{several(len(merge.history), 'generation')} recorded"
    if None not in best:
        told += f"; best fitness on the select split {digits(best[0])} in the first and {digits(best[1])} in the last"
    stopped = f" It stopped because {merge.stopped}." if merge.stopped else ""
    return f"{told}.{stopped}"


def kept_rows(merge: Merge) -> list[list[str]]:
    """What the champion kept of every speciality: its specialist's score, its own, points lost, kept or lost."""
    rows = []
    for name, found in merge.kept.items():
        before, after = found.get("before"), found.get("after")
        moved = None if before is None or after is None else after - before
        shown = [value(before, "exact_match"), value(after, "exact_match"), change(moved, "exact_match")]
        rows.append([plain(name), *shown, {1: "kept", 0: "lost"}.get(found.get("kept"), NOTHING)])
    return rows


KEPT = ("speciality", "its specialist", "champion", "points", "")
"""Names of what :func:`kept_rows` gives."""


def kept_about(merge: Merge) -> str:
    """What counts as kept."""
    if merge.kept_within is None:
        return "Specialities on the report split."
    return f"Kept means at most {digits(100 * merge.kept_within)} points below the specialist, on the report split."


def commands(report: SessionReport) -> list[str]:
    """What to type to make the session again, and to look at it."""
    run = ["agent-forge run", f"--profile {report.profile}" if report.profile else ""]
    run += [f"--until {report.until}" if report.until else "", f"--data {report.data}" if report.data else ""]
    short = report.session_id[:8]
    return [
        " ".join(word for word in run if word),
        "# the evidence as data, every event, and whether the same bits can be expected here:",
        f"agent-forge report {short} --json",
        f"agent-forge logs {short} --tail 0",
        "agent-forge validate --determinism",
    ]


def promise(report: SessionReport) -> str:
    """What "the same" means."""
    told = "The same bits are promised for the same torch build, CPU capability and number of threads"
    versions = sorted({m.code_version for m in report.models})
    told += f", with agent-forge {' and '.join(versions)}." if versions else "."
    if len(report.environments) > 1:
        told += " This session was started on machines or builds that differ, so no single one gives its bits."
    return f"{told} The settings of the session are below; changes made with --set are in them, not in the command."


def phase_hashes(report: SessionReport) -> list[str]:
    """Fingerprints of each phase's settings."""
    return [f"Settings of phase {p.number} ({p.name}): {p.config_hash}" for p in report.phases if p.config_hash]


ORIGIN = ("seeds", "settings hash", "data hash", "code version")
"""Names of what :func:`origin` gives."""


def origin(model: Model) -> list[str]:
    """What a model was made with; hashes by their first 12 digits."""
    seeds = ", ".join(map(str, model.seeds))
    return [seeds or "none", model.config_hash[:12] or NOTHING, model.data_hash[:12] or NOTHING, model.code_version]


HANDOFF = ("model", "handed to", "check", "found")
"""Names of what :func:`handoff_rows` gives."""


def handoff_rows(report: SessionReport) -> list[list[str]]:
    """Models handed to a phase, and whether they kept its contract, oldest first."""
    names = {m.model_id: plain(m.name) for m in report.models}
    return [
        [
            names.get(row["source_model_id"], row["source_model_id"]),
            row["target_phase"],
            row["validation_status"],
            "; ".join(f"{plain(str(k))}: {v}" for k, v in row["validation_metrics"].items()) or NOTHING,
        ]
        for row in report.handoffs
    ]
