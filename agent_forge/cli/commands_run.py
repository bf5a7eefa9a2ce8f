"""Commands that run the pipeline: run, pause, plan, status, phases, logs."""

from __future__ import annotations

from typing import Annotated

import typer

from agent_forge.cli.shared import print_json, say, storage_of, table

Profile = Annotated[str, typer.Option("--profile", "-p", help="A shipped profile, or a TOML file of your own.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Session = Annotated[str, typer.Argument(help="Session id, its beginning, or `latest`.")]


def attach(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (run, pause, plan, status, phases, logs):
        app.command()(command)


def run(
    context: typer.Context,
    profile: Profile = "nano",
    models: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    start_from: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="MODEL", help="Start from these models: ids or folders, Hugging Face's too."),
    ] = None,
    phase: Annotated[
        str | None, typer.Option(help="Run this one phase only (name or number); with --until, start at it.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this phase.")] = None,
    resume: Annotated[str | None, typer.Option(help="Go on with this session (`latest` works).")] = None,
    data: Annotated[str | None, typer.Option(envvar="AGENT_FORGE_DATA", help="Folder with real data sets.")] = None,
    sink: Annotated[list[str] | None, typer.Option(help="Also send metrics to `wandb` or `mlflow`.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting: phases.cognate.ablate=true; repeatable.")
    ] = None,
    yes: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
    as_json: Json = False,
) -> None:
    """Make models: run the pipeline, or one phase of it."""
    from agent_forge.cli.processes import together

    wanted = {"profile": profile, "phase": phase, "until": until, "resume": resume, "data": data}
    wanted |= {"sinks": tuple(sink or ()), "changes": change or [], "from": start_from or [], "more": models or []}
    with together() as leads:
        _run(context.obj["storage"], wanted, show=leads and not (yes or as_json), tell=leads, as_json=as_json)


def _run(storage: str, wanted: dict, *, show: bool, tell: bool, as_json: bool) -> None:
    """The run itself; ``tell`` is off in all processes but the first."""
    from agent_forge.cli.progress import Bars
    from agent_forge.cli.show import show_results

    phase, until = wanted["phase"], wanted["until"]
    with Bars(enabled=show) as bars:
        forge = _forge(storage, wanted, {"show": bars.show, "sinks": wanted["sinks"]})
        if tell:
            say(f"session [bold]{forge.session_id}[/]  profile {forge.profile.name}")
        try:
            with forge:
                if phase and not until:
                    result = forge.run_single_phase(phase)
                    results = {result.phase_name: result}
                else:
                    results = forge.run_full_pipeline(until, start=phase)
        except KeyboardInterrupt:
            if tell:
                say(f"paused; go on with: agent-forge run --resume {forge.session_id[:8]}", "yellow")
            raise
    if not tell:
        return
    if as_json:
        print_json({"session_id": forge.session_id, "results": {n: r.record() for n, r in results.items()}})
    else:
        show_results(forge, results)


def _forge(storage: str, wanted: dict, options: dict):
    """The session that the options ask for. What cannot be is refused before a session is touched."""
    from agent_forge.pipeline.orchestrator import PipelineOrchestrator, phases_to_run
    from agent_forge.profile import load_profile, with_values
    from forgekit.errors import ConfigError

    phase, until, given = wanted["phase"], wanted["until"], [*wanted["from"], *wanted["more"]]
    if wanted["more"] and not wanted["from"]:
        remedy = "models to start from follow --from"
        raise ConfigError(f"unexpected {wanted['more'][0]!r}", where="run", remedy=remedy)
    if wanted["resume"]:
        for option, values in (("--set", wanted["changes"]), ("--from", given)):
            if values:
                kept = "settings" if option == "--set" else "models"
                raise ConfigError(f"a resumed session keeps its {kept}", where=option, remedy="start a new run")
        forge = PipelineOrchestrator.resume(wanted["resume"], storage, **options)
        phases_to_run(forge.profile, phase, until)
        return forge
    settings = with_values(load_profile(wanted["profile"]), wanted["changes"])
    options |= {"data": wanted["data"]}
    if given:
        last = until or phase  # so that a resumed session does not go further than this one was asked to
        return PipelineOrchestrator.starting_from(given, settings, storage, phase, last, **options)
    first = phases_to_run(settings, phase, until)[0]
    if first != "cognate":
        remedy = "give them with --from MODEL, or go on with a session: --resume ID"
        raise ConfigError(f"{first} needs models to start from", where="run", remedy=remedy)
    return PipelineOrchestrator(settings, storage, **options)


def pause(
    context: typer.Context,
    session: Annotated[str | None, typer.Argument(help="Session id or its beginning; the running one.")] = None,
    wait: Annotated[float, typer.Option(min=0.0, help="Seconds to wait until it has stopped.")] = 60.0,
    as_json: Json = False,
) -> None:
    """Stop a running session at its next safe point, to be resumed later."""
    import time

    from agent_forge.pipeline.orchestrator import find_session
    from forgekit.store.database import session_alive

    registry = storage_of(context).registry
    running = registry.get_current_session()
    session_id = running["session_id"] if running and session is None else find_session(registry, session or "latest")
    registry.interrupt_session(session_id)
    deadline = time.monotonic() + wait
    while session_alive(row := registry.get_session(session_id)) and time.monotonic() < deadline:
        time.sleep(0.05)
    stopped, again = not session_alive(row), f"agent-forge run --resume {session_id[:8]}"
    if as_json:
        print_json({"session_id": session_id, "pid": row["pid"], "stopped": stopped, "status": row["status"]})
    elif stopped:
        say(f"{row['status']}; go on with: {again}")
    else:
        say(f"asked process {row['pid']}, which has not stopped yet; when it has, go on with: {again}", "yellow")


def plan(
    profile: Profile = "nano",
    until: Annotated[str | None, typer.Option(help="Stop after this phase.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a run would do, its sizes, time and disk, before anything starts."""
    from agent_forge.cli.show import show_plan
    from agent_forge.pipeline.plan import forecast_run
    from agent_forge.profile import load_profile

    forecast = forecast_run(load_profile(profile), until)
    if as_json:
        print_json(forecast)
    else:
        show_plan(forecast)


def status(
    context: typer.Context,
    session: Annotated[str | None, typer.Option(help="One session only.")] = None,
    as_json: Json = False,
) -> None:
    """Show sessions, or the phases of one."""
    from agent_forge.pipeline.orchestrator import find_session
    from forgekit.store.database import session_alive

    registry = storage_of(context).registry
    if session:
        rows = registry.get_all_phases(find_session(registry, session))
        if as_json:
            print_json(rows)
        else:
            table(
                f"session {session}",
                ["phase", "status", "models>"],
                [[r["phase_name"], r["status"], r["models"]] for r in rows],
            )
        return
    rows = registry.get_all_sessions()
    for row in rows:
        if row["status"] == "running" and not session_alive(row):
            row["status"] = "interrupted"
    if as_json:
        print_json(rows)
    elif not rows:
        say("no sessions yet; start one with: agent-forge run --until bitnet")
    else:
        cells = [
            [
                r["session_id"][:8],
                r["status"],
                r["current_phase"] or "-",
                f"{r['progress_percent']:.0f} %",
                r["start_time"][:16],
            ]
            for r in rows
        ]
        table("sessions", ["session", "status", "phase", "done>", "started"], cells)


def phases(as_json: Json = False) -> None:
    """List the eight phases and which profiles run them."""
    from agent_forge.pipeline.phase import PHASES
    from agent_forge.profile import load_profile, profile_names
    from forgekit.store.names import PHASES as ORDER

    ready = {name: load_profile(name).phases for name in profile_names()}
    rows = [
        {
            "number": i,
            "phase": name,
            "built": name in PHASES,
            "profiles": [p for p, has in ready.items() if name in has],
        }
        for i, name in enumerate(ORDER, 1)
    ]
    if as_json:
        print_json(rows)
    else:
        cells = [
            [r["number"], r["phase"], "yes" if r["built"] else "not yet", ", ".join(r["profiles"]) or "-"] for r in rows
        ]
        table("phases", ["#>", "phase", "built", "profiles"], cells)


def logs(
    context: typer.Context,
    session: Session = "latest",
    phase: Annotated[str | None, typer.Option(help="Events of this phase only.")] = None,
    kind: Annotated[str | None, typer.Option(help="Events of this kind only.")] = None,
    tail: Annotated[int, typer.Option(help="Last events only; 0 shows all.")] = 40,
    as_json: Json = False,
) -> None:
    """Show a session's events."""
    import json

    from agent_forge.pipeline.orchestrator import find_session
    from forgekit.tracking.events import read_events

    storage = storage_of(context)
    path = storage.session_path(find_session(storage.registry, session)) / "events.jsonl"
    reading = read_events(path, kind=kind, phase=phase, tail=tail or None)
    for event in reading:
        if as_json:
            print(json.dumps(event))
        else:
            print(event["time"], event["phase"] or "-", event["kind"], json.dumps(event["data"])[:200])
    if reading.corrupt:
        say(f"{len(reading.corrupt)} unreadable lines in {path}", "yellow")
