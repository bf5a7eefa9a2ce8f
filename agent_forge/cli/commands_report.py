"""The command that tells what a session made: evidence in the terminal, one page to read, Markdown, JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agent_forge.cli.shared import print_json, say, storage_of


def attach(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(report)


def report(
    context: typer.Context,
    session: Annotated[str, typer.Argument(help="Session id, its beginning, or `latest`.")] = "latest",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page's file; `report.html` in the session's folder.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write Markdown to this file as well; `-` prints it and nothing else.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the evidence as JSON; no page unless -o.")] = False,
) -> None:
    """Tell what a session made: every claim with its interval and verdict, and a page to read."""
    from agent_forge.dashboard.collect import collect
    from agent_forge.dashboard.markdown import markdown as as_markdown
    from agent_forge.dashboard.page import html_page
    from agent_forge.pipeline.orchestrator import find_session, session_results

    storage = storage_of(context)
    session_id = find_session(storage.registry, session)
    if as_json:
        results = session_results(storage, session_id)
        print_json([record for result in results.values() for record in result["evidence"]])
        if out is None and markdown is None:
            return
    found = collect(storage, session_id)
    printed = markdown == Path("-")
    if printed and not as_json:
        typer.echo(as_markdown(found), nl=False)
    elif markdown is not None and not printed:
        _write(markdown, as_markdown(found), "Markdown")
    if out is None and (printed or as_json):
        return
    if not as_json and not printed:
        _show_evidence(found)
    page = out or storage.session_path(session_id) / "report.html"
    _write(page, html_page(found), "report")
    if show:
        typer.launch(str(page))
    session_results(storage, session_id)  # a damaged result is told on the page, and is an error all the same


def _show_evidence(found) -> None:
    """The claims and tables of every phase, as after a run."""
    from agent_forge.cli.show import show_evidence, show_thinking
    from agent_forge.dashboard.tree import Thinking

    shown = [phase for phase in found.phases if phase.evidence or phase.levels or phase.thinking != Thinking()]
    if not shown:
        say("no phase of this session has finished yet")
    for phase in shown:
        records = [item.model_dump(mode="json") for item in phase.evidence]
        show_evidence(phase.name, records, {"levels": phase.levels, "act_histogram": phase.halting})
        show_thinking(phase.name, phase.thinking)


def _write(path: Path, text: str, what: str) -> None:
    """Write the file and say where it is.

    Raises:
        ResourceError: ``path`` is a folder, or cannot be written.
    """
    from forgekit.errors import ResourceError
    from forgekit.store.fsio import write_atomic

    if path.is_dir():
        raise ResourceError("is a folder", where=str(path), remedy="give a file name")
    write_atomic(path, text.encode("utf-8", "replace"))
    typer.echo(f"{what}: {path}", err=True)
