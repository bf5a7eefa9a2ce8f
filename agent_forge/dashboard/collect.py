"""Reads what a session left behind: the registry, the phases' results, the events and the manifests.

Nothing is guessed. What is missing or cannot be read is a sentence in :attr:`SessionReport.notes`, and the rest is
reported all the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from agent_forge.dashboard.ternary import ternary
from agent_forge.dashboard.thoughts import conversation, thinking
from agent_forge.dashboard.tree import Curve, Merge, Model, PhaseReport, SessionReport, Strategy
from agent_forge.dashboard.values import gate, listing, mapping, number, numbers, text
from forgekit.errors import ArtifactError, ConfigError, DataError
from forgekit.measure.evidence import Evidence
from forgekit.store.artifact import MANIFEST, Artifact
from forgekit.store.database import session_alive
from forgekit.store.names import PHASES, phase_folder
from forgekit.store.storage import ModelStorage
from forgekit.tracking.events import Event, read_events


def collect(storage: ModelStorage, session_id: str) -> SessionReport:
    """Read a session, whatever state it is in; loads no model.

    Args:
        storage: the store.
        session_id: a whole id.

    Raises:
        ArtifactError: the registry has no such session, or is damaged.
        ResourceError: the folder cannot be read.
    """
    row = storage.registry.get_session(session_id)
    if row is None:
        raise ArtifactError(f"no session {session_id!r}", where="session", remedy="see `agent-forge status`")
    folder, notes = storage.session_path(session_id), []
    alive = session_alive(row)
    status = "interrupted" if row["status"] == "running" and not alive else row["status"]
    plan = mapping(row["config"])
    settings = mapping(plan.get("profile"))
    if not settings:
        notes.append("The session has no plan: it was restored from its models, so its settings are not known.")
    events = _events(folder / "events.jsonl", notes)
    models = _models(folder, notes)
    planned = [name for name in PHASES if name in mapping(settings.get("phases"))]
    phases = []
    for name in PHASES:
        phase = _phase(folder, name, [e for e in events if e["phase"] == name], settings, notes)
        if phase is not None:
            running = alive and phase.state == "interrupted" and row["current_phase"] == name
            phases.append(_with(phase, state="running") if running else phase)
    until = text(plan.get("until"))
    wanted = planned[: planned.index(until) + 1] if until in planned else planned
    present = {phase.name for phase in phases}
    return SessionReport(
        session_id=session_id,
        status=status,
        started=text(row["start_time"]),
        ended=text(row["end_time"]),
        profile=text(settings.get("name")) or _profile_of(events),
        until=until,
        data=text(plan.get("data")),
        gate_policy=text(settings.get("gate")),
        settings=settings,
        starts=sum(e["kind"] == "session_started" for e in events),
        error=_last_error(events) if status == "failed" else "",
        seconds=_time_at_work(events),
        peak_bytes=_peak(events),
        environments=_environments(events),
        phases=tuple(phases),
        not_run=tuple(name for name in wanted if name not in present),
        models=models,
        handoffs=tuple(storage.registry.get_handoffs(session_id)),
        notes=tuple(notes),
    )


def _with(phase: PhaseReport, **changes: Any) -> PhaseReport:
    return PhaseReport(**{**phase.__dict__, **changes})


def _events(path: Path, notes: list[str]) -> list[Event]:
    try:
        reading = read_events(path)
    except DataError as error:
        notes.append(f"Loss curves and times are missing: {error.what} ({path.name}).")
        return []
    if reading.corrupt:
        lines = ", ".join(map(str, reading.corrupt[:5])) + (" …" if len(reading.corrupt) > 5 else "")
        count = len(reading.corrupt)
        notes.append(f"{count} unreadable line{'s' * (count > 1)} of {path.name} left out (line {lines}).")
    if reading.torn:
        notes.append(f"The last line of {path.name} is not complete; it is left out.")
    return [e for e in reading if isinstance(e["data"], dict) and isinstance(e["phase"], str)]


def _instant(event: Event) -> float | None:
    try:
        return datetime.fromisoformat(event["time"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return None


def _time_at_work(events: list[Event]) -> float | None:
    """Seconds from each start to the last event before the next one: pauses between starts do not count."""
    total, began, last = 0.0, None, None
    for event in events:
        now = _instant(event)
        if now is None:
            continue
        if event["kind"] == "session_started":
            total += (last - began) if began is not None and last is not None else 0.0
            began = now
        last = now
    return total + (last - began) if began is not None and last is not None else None


def _last_error(events: list[Event]) -> str:
    ends = [text(e["data"].get("error")) for e in events if e["kind"] == "session_ended"]
    return ends[-1] if ends else ""


def _peak(events: list[Event]) -> float | None:
    sampled = (number(e["data"].get("process_rss_gb")) for e in events if e["kind"] == "resources")
    return max((1e9 * gb for gb in sampled if gb is not None), default=None)


def _environments(events: list[Event]) -> tuple[dict[str, Any], ...]:
    found = [mapping(e["data"].get("environment")) for e in events if e["kind"] == "session_started"]
    return tuple(one for i, one in enumerate(found) if one and one not in found[:i])


def _profile_of(events: list[Event]) -> str:
    return next((text(e["data"].get("profile")) for e in events if e["kind"] == "session_started"), "")


def _models(folder: Path, notes: list[str]) -> tuple[Model, ...]:
    """The session's artifacts, oldest first; files that are being written or removed are none."""
    found = []
    for path in sorted(folder.glob(f"phase*/*/{MANIFEST}")):
        if path.parent.name.startswith("."):
            continue
        try:
            manifest = Artifact.open(path.parent, verify=False).manifest
        except ArtifactError as error:
            notes.append(f"The model in {path.parent.parent.name}/{path.parent.name} is left out: {error.what}.")
            continue
        sizes = [p.stat().st_size for p in path.parent.glob("*.safetensors")]
        if not sizes:
            notes.append(f"The weights of {manifest.model_name} are gone: {path.parent.name} holds no .safetensors.")
        kept = ("model_id", "parameters", "config_hash", "data_hash", "code_version")
        model = Model(
            name=manifest.model_name,
            phase=manifest.phase_name,
            parents=tuple(manifest.parents),
            weights=sum(sizes) if sizes else None,
            seeds=tuple(manifest.seeds),
            **{key: getattr(manifest, key) for key in kept},
        )
        found.append((manifest.created_at, model))
    return tuple(model for _, model in sorted(found, key=lambda pair: pair[0]))


def _phase(
    folder: Path, name: str, events: list[Event], settings: dict[str, Any], notes: list[str]
) -> PhaseReport | None:
    """One phase, from its result and its events; None if it left neither."""
    path = folder / phase_folder(name) / "result.json"
    result, state = _result(path, notes)
    if result is None and not state and not events:
        return None
    kinds = [e["kind"] for e in events]
    ended = next((k for k in reversed(kinds) if k in ("phase_started", "phase_failed")), "")
    state = state or ("failed" if ended == "phase_failed" else "interrupted")
    result = result or {}
    errors = [text(e["data"].get("error")) for e in events if e["kind"] == "phase_failed"]
    artifacts, metrics = mapping(result.get("artifacts")), mapping(result.get("metrics"))
    names = tuple(text(n) for n in listing(artifacts.get("model_names")))
    made = listing(artifacts.get("all_models")) or [m for m in [result.get("model")] if m]
    plan = mapping(mapping(settings.get("phases")).get(name))
    key = mapping(result.get("key"))
    evidence = _evidence(name, listing(result.get("evidence")), notes)
    return PhaseReport(
        name=name,
        number=PHASES.index(name) + 1,
        state="failed" if result.get("success") is False else state,
        seconds=number(result.get("duration_seconds")),
        starts=kinds.count("phase_started"),
        error=text(result.get("error")) or (errors[-1] if errors and state == "failed" else ""),
        inputs=tuple(map(text, listing(key.get("inputs")))),
        made=tuple(map(text, made)),
        names=names,
        config_hash=text(key.get("config")),
        metrics=metrics,
        evidence=evidence,
        gate=gate(artifacts.get("gate")),
        losses=_losses(events, names or _planned_names(plan)),
        tokens={text(e["data"].get("name")): n for e in events if e["kind"] == "trained" and (n := _tokens(e))},
        data=tuple(d for d in listing(artifacts.get("data")) if isinstance(d, dict)),
        data_notes=tuple(dict.fromkeys(text(e["data"].get("note")) for e in events if e["kind"] == "data")),
        levels={model: found for model, v in mapping(metrics.get("levels")).items() if (found := numbers(v))},
        halting={model: found for model, v in mapping(metrics.get("act_histogram")).items() if (found := numbers(v))},
        conversation=conversation(artifacts.get("conversation")),
        merge=_merge(result, metrics, artifacts, events),
        thinking=thinking(metrics, artifacts),
        ternary=ternary(metrics, artifacts, evidence),
    )


def _result(path: Path, notes: list[str]) -> tuple[dict[str, Any] | None, str]:
    """(the record, ``finished``), (None, ``damaged``), or (None, nothing) when there is no file."""
    if not path.is_file():
        return None, ""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        notes.append(f"{path.parent.name}/{path.name} is not JSON: what this phase measured cannot be told.")
        return None, "damaged"
    if not isinstance(record, dict):
        notes.append(f"{path.parent.name}/{path.name} holds no record: what this phase measured cannot be told.")
        return None, "damaged"
    return record, "finished"


def _tokens(event: Event) -> int:
    return int(number(event["data"].get("tokens")) or 0)


def _evidence(phase: str, records: Iterable[Any], notes: list[str]) -> tuple[Evidence, ...]:
    found = []
    for place, record in enumerate(records, 1):
        try:
            found.append(Evidence.build(mapping(record), f"evidence {place}"))
        except ConfigError as error:
            notes.append(f"Evidence {place} of {phase} is left out: {error.where} {error.what}.")
    return tuple(found)


def _planned_names(plan: dict[str, Any]) -> tuple[str, ...]:
    return tuple(text(mapping(one).get("name")) for one in listing(plan.get("specialists")))


def _losses(events: list[Event], names: tuple[str, ...]) -> tuple[Curve, ...]:
    """Training losses by step. A resumed run logs some steps twice: the later one counts."""
    found: dict[str, dict[float, float]] = {}
    for event in events:
        data = event["data"]
        step = number(data.get("step"))
        if step is None:
            continue
        if event["kind"] == "trunk_metrics":
            values = {"trunk": data.get("train/loss")}
        elif event["kind"] == "bitnet_step":
            values = {text(data.get("name")): data.get("loss")}
        elif event["kind"] == "metrics":
            values = {_of_model(k, names): v for k, v in mapping(data.get("values")).items() if _is_loss(k)}
        else:
            continue
        for name, value in values.items():
            if number(value) is not None:
                found.setdefault(name, {})[step] = value
    return tuple(Curve(name, tuple(sorted(points.items()))) for name, points in found.items())


def _is_loss(metric: str) -> bool:
    model, _, rest = metric.partition("/")
    return rest == "train/loss" and model.removeprefix("model_").isdigit()


def _of_model(metric: str, names: tuple[str, ...]) -> str:
    place = int(metric.partition("/")[0].removeprefix("model_"))
    return names[place - 1] if 0 < place <= len(names) and names[place - 1] else f"model {place}"


def _merge(result: dict[str, Any], metrics: dict, artifacts: dict, events: list[Event]) -> Merge:
    table = {
        model: {split: numbers(parts) for split, parts in mapping(splits).items()}
        for model, splits in mapping(metrics.get("fitness_table")).items()
    }
    rows = [numbers(row) for row in listing(metrics.get("fitness_history"))]
    history = [row for row in rows if "generation" in row]
    return Merge(
        history=tuple(history) or _logged_history(events),
        floor=_diversity_floor(mapping(result.get("config"))),
        table=table,
        gains=numbers(metrics.get("gains")),
        strategies=tuple(_strategy(mapping(s)) for s in listing(metrics.get("strategies")) if isinstance(s, dict)),
        kept={name: _kept(mapping(found)) for name, found in mapping(metrics.get("kept")).items()},
        kept_within=number(mapping(result.get("config")).get("kept_within")),
        stopped=text(artifacts.get("stopped")),
        recipe=text(metrics.get("phase/champion_recipe")) or text(artifacts.get("recipe")),
        strategy=text(artifacts.get("strategy")),
    )


def _kept(found: dict[str, Any]) -> dict[str, float]:
    """The numbers, and ``kept`` as 1 or 0."""
    kept = {"kept": int(found["kept"])} if isinstance(found.get("kept"), bool) else {}
    return {**numbers(found), **kept}


def _logged_history(events: list[Event]) -> tuple[dict[str, float], ...]:
    """Rows by generation from the events, for a search that was interrupted before it wrote its result.

    They stand there as events of kind ``generation``, and as metrics ``generation/…`` or ``generation_3/…``.
    """
    rows: dict[float, dict[str, float]] = {}
    for event in events:
        data = event["data"]
        if event["kind"] == "generation":
            step, own = number(data.get("generation")), numbers(data)
        elif event["kind"] == "metrics":
            parts = {tuple(k.split("/", 1)): v for k, v in numbers(data.get("values")).items() if "/" in k}
            own = {name: v for (group, name), v in parts.items() if re.fullmatch(r"generation(_\d+)?", group)}
            step = number(data.get("step"))
        else:
            continue
        if own and step is not None:
            rows.setdefault(step, {"generation": step}).update(own)
    return tuple(rows[step] for step in sorted(rows))


def _diversity_floor(config: dict[str, Any], above: str = "") -> float | None:
    """The setting that holds diversity up: its dotted name has ``diversity``, and ``floor`` or ``min`` in it."""
    for name, value in config.items():
        path = f"{above}.{name.lower()}"
        if "diversity" in path and ("floor" in path or "min" in path) and number(value) is not None:
            return value
        inner = _diversity_floor(mapping(value), path)
        if inner is not None:
            return inner
    return None


def _strategy(record: dict[str, Any]) -> Strategy:
    values = [number(v) for v in listing(record.get("curve"))]
    evaluations = number(record.get("evaluations"))
    return Strategy(
        name=text(record.get("strategy")),
        seed=text(record.get("seed")),
        evaluations=None if evaluations is None else int(evaluations),
        curve=tuple((i, v) for i, v in enumerate(values, 1) if v is not None),
        select=number(record.get("select")),
        report=number(record.get("report")),
    )
