"""Commands about models: models, model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from agent_forge.cli.shared import print_json, say, storage_of, table

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def attach(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(models)
    app.command()(model)


def models(
    context: typer.Context,
    phase: Annotated[str | None, typer.Option(help="Models of this phase only.")] = None,
    session: Annotated[str | None, typer.Option(help="Models of this session only.")] = None,
    tag: Annotated[str | None, typer.Option(help="Models with this tag only.")] = None,
    limit: Annotated[int, typer.Option(help="At most this many, newest first.")] = 50,
    as_json: Json = False,
) -> None:
    """List models."""
    from agent_forge.pipeline.orchestrator import find_session

    registry = storage_of(context).registry
    session = find_session(registry, session) if session else None
    rows = registry.search_models(phase=phase, session_id=session, tag=tag, limit=limit)
    if as_json:
        print_json(rows)
    elif not rows:
        say("no models yet; make some with: agent-forge run --until bitnet")
    else:
        cells = [
            [r["model_id"], f"{r['parameters']:,}", f"{r['size_mb']:.2f}", r["created_at"][5:16].replace("T", " ")]
            for r in rows
        ]
        table("models", ["model!", "parameters>", "MB>", "made!"], cells)
        say(f"a name alone means the newest of that name: agent-forge model {rows[0]['model_name']}")


def model(
    context: typer.Context,
    ref: Annotated[str, typer.Argument(help="Model id, its beginning, a name, a folder, or `latest`.")],
    info: Annotated[
        bool, typer.Option("--info", help="Show what it is and where it comes from (the default).")
    ] = False,
    load: Annotated[bool, typer.Option("--load", help="Load it, check every hash and talk to it.")] = False,
    as_json: Json = False,
) -> None:
    """Show a model, or load it."""
    from forgekit.store.artifact import Artifact
    from forgekit.store.packed import dense_copy, is_packed_folder

    storage = storage_of(context)
    artifact = Artifact.open(storage.resolve(ref))
    if load:
        from agent_forge.cli.commands_talk import chat

        return chat(context, str(artifact.path))
    values = artifact.manifest.flat()
    known = storage.registry.get_model(values["model_id"]) is not None
    values["ancestors"] = storage.registry.ancestors(values["model_id"]) if known else values["parents"]
    values["descendants"] = storage.registry.descendants(values["model_id"]) if known else []
    values["path"], values["content_hash"] = str(artifact.path), artifact.content_hash
    values["packed"] = is_packed_folder(artifact.path)
    if values["packed"]:  # it runs; what trains or merges needs floats
        copy = dense_copy(artifact.path)
        values["dense_copy"] = str(copy) if copy else None
    if as_json:
        return print_json(values)
    skip = {"files", "losses", "metrics", "environment"}
    table(values["model_name"], ["field", "value"], [[k, _told(v)] for k, v in values.items() if k not in skip])


def _told(value: Any) -> str:
    """A value for people: numbers in six digits, what is nested in few words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict) and {"family", "levels"} <= value.keys():  # of the gym
        return f"{value['family']} {' '.join(map(str, value['levels']))}"
    if isinstance(value, dict):
        parts = {key: _told(one) for key, one in value.items()}
        return ", ".join(f"{key} {part}" for key, part in parts.items() if part != "-") or "-"
    if isinstance(value, list | tuple):
        nested = any(isinstance(one, dict) for one in value)
        return ("; " if nested else ", ").join(map(_told, value)) or "-"
    return "-" if value is None else str(value)
