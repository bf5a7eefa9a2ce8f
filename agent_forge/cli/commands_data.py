"""Commands about data: data list, data show, data check."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from agent_forge.cli.shared import print_json, say, table

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Folder = Annotated[str | None, typer.Option("--data", envvar="AGENT_FORGE_DATA", help="Folder with data sets.")]
app_data = typer.Typer(help="Data sets: what is there, what it looks like, whether it leaks.", no_args_is_help=True)


def attach(app: typer.Typer) -> None:
    """Add the command group."""
    app.add_typer(app_data, name="data")


@app_data.command("list")
def list_(data: Folder = None, as_json: Json = False) -> None:
    """List the catalogue: every set, and where it is or why it is not."""
    from forgekit.data.catalogue import available

    rows = available(data)
    if as_json:
        print_json([dataclasses.asdict(r) for r in rows])
    else:
        table(
            "data sets",
            ["name", "kind", "found", "where", "licence"],
            [[r.name, r.kind, "yes" if r.found else "no", r.where, r.license] for r in rows],
        )


@app_data.command()
def show(
    name: Annotated[str, typer.Argument(help="A data set, or gym:FAMILY.")],
    split: Annotated[str, typer.Option(help="train, valid or bench.")] = "train",
    rows: Annotated[int, typer.Option(help="How many rows.")] = 5,
    level: Annotated[int, typer.Option(help="Level of a gym family.")] = 1,
    data: Folder = None,
    as_json: Json = False,
) -> None:
    """Show the first rows of a set and where they came from."""
    if name.startswith("gym:"):
        from forgekit.data.gym import generate, solve

        problems = generate(name[4:], level, rows, seed=0)
        found = [{**dataclasses.asdict(p), "solution": list(solve(p).steps)} for p in problems]
        note = "generated"
    else:
        from forgekit.data.catalogue import load

        loaded = load(name, split, folder=data)
        found, note = loaded.rows[:rows], f"{loaded.row_count:,} rows, {loaded.note}, sha256 {loaded.sha256[:12]}"
    if as_json:
        return print_json({"name": name, "note": note, "rows": found})
    say(f"[bold]{name}[/]  {note}")
    for row in found:
        table("", ["field", "value"], [[k, str(v)[:400]] for k, v in row.items()])


@app_data.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(help="Training sets; all that are there unless named.")] = None,
    data: Folder = None,
    as_json: Json = False,
) -> None:
    """Look for benchmark items inside training sets (13 words in a row)."""
    from forgekit.data.catalogue import available
    from forgekit.data.contamination import check_catalogue
    from forgekit.errors import DataError

    if data is None:
        raise DataError("no data folder", where="--data", remedy="give the folder that holds bench/")
    names = list(names or [s.name for s in available(data) if s.found and "train:" in s.where])
    rows = check_catalogue(data, names)
    if as_json:
        return print_json([dataclasses.asdict(r) for r in rows])
    cells = [
        [r.name, r.benchmark, f"{r.overlap.hits} of {r.overlap.items}" if r.overlap else "-", r.reason]
        for r in rows
        if r.overlap is None or r.overlap.hits
    ]
    if not cells:
        say("no benchmark item was found in these sets")
    else:
        table("overlap with benchmarks", ["set", "benchmark", "items found>", "note"], cells)
