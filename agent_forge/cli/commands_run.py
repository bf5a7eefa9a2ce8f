"""Commands that run the pipeline: run, plan, status, phases, logs, report."""

from __future__ import annotations

from typing import Annotated

import typer

from agent_forge.cli.shared import print_json, say, storage_of, table

Profile = Annotated[str, typer.Option("--profile", "-p", help="A shipped profile, or a TOML file of your own.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Session = Annotated[str, typer.Argument(help="Session id, its beginning, or `latest`.")]


def attach(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (run, plan, status, phases, logs, report):
        app.command()(command)


def run(
    context: typer.Context,
    profile: Profile = "nano",
    phase: Annotated[str | None, typer.Option(help="Run this one phase only (name or number).")] = None,
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
    wanted |= {"sinks": tuple(sink or ()), "changes": change or []}
    with together() as leads:
        _run(context.obj["storage"], wanted, show=leads and not (yes or as_json), tell=leads, as_json=as_json)


def _run(storage: str, wanted: dict, *, show: bool, tell: bool, as_json: bool) -> None:
    """The run itself; ``tell`` is off in all processes but the first."""
    from agent_forge.cli.progress import Bars
    from agent_forge.cli.show import show_results
    from agent_forge.pipeline.orchestrator import PipelineOrchestrator
    from agent_forge.profile import load_profile, with_values
    from forgekit.errors import ConfigError

    phase, until = wanted["phase"], wanted["until"]
    with Bars(enabled=show) as bars:
        if wanted["resume"]:
            if wanted["changes"]:
                raise ConfigError("a resumed session keeps its settings", where="--set", remedy="start a new run")
            forge = PipelineOrchestrator.resume(wanted["resume"], storage, show=bars.show, sinks=wanted["sinks"])
            _check_phases(forge.profile, phase, until)
        else:
            settings = with_values(load_profile(wanted["profile"]), wanted["changes"])
            _check_phases(settings, phase, until)
            options = {"data": wanted["data"], "show": bars.show, "sinks": wanted["sinks"]}
            forge = PipelineOrchestrator(settings, storage, **options)
        if tell:
            say(f"session [bold]{forge.session_id}[/]  profile {forge.profile.name}")
        try:
            with forge:
                if phase:
                    result = forge.run_single_phase(phase)
                    results = {result.phase_name: result}
                else:
                    results = forge.run_full_pipeline(until)
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


def _check_phases(settings, *names: str | None) -> None:
    """Refuse an unknown phase before a session is touched."""
    from agent_forge.pipeline.orchestrator import phase_name

    for name in filter(None, names):
        settings.phase(phase_name(name))


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
        say("no sessions yet; start one with: agent-forge run --until cognate")
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


def report(context: typer.Context, session: Session = "latest", as_json: Json = False) -> None:
    """Print a session's evidence: every claim with its interval and verdict."""
    from agent_forge.cli.show import show_evidence
    from agent_forge.pipeline.orchestrator import find_session, session_results

    storage = storage_of(context)
    results = session_results(storage, find_session(storage.registry, session))
    if as_json:
        print_json([record for result in results.values() for record in result["evidence"]])
        return
    if not results:
        say("no phase of this session has finished yet")
    for name, result in results.items():
        show_evidence(name, result["evidence"], result["metrics"])
