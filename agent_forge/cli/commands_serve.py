"""Commands that hand models on: merge, serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agent_forge.cli.shared import print_json, say, storage_of

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def attach(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (merge, serve):
        app.command()(command)


def merge(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(help="Models: names, ids or folders, ours or Hugging Face's.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the result; must not exist.")],
    method: Annotated[
        str, typer.Option("--method", "-m", help="A merge method: linear, slerp, ties, dare, …")
    ] = "ties",
    base: Annotated[str | None, typer.Option("--base", help="The common ancestor.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="An option of the method, as density=0.3; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of methods that draw.")] = 0,
    dry: Annotated[bool, typer.Option("--plan", help="Say what would be done, and do nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Merge models into a new one, tensor by tensor."""
    from agent_forge.merging.folders import MergePlan, merge_folders, plan_text
    from agent_forge.profile import assigned

    storage = storage_of(context)
    values = {
        "method": method,
        "models": [storage.resolve(name) for name in models],
        "base": storage.resolve(base) if base else None,
        "output": output,
        "options": dict(assigned(text, "--option") for text in option or []),
        "seed": seed,
    }
    plan = MergePlan.build(values, "merge")

    def parents_of(model_id: str) -> list[str] | None:
        row = storage.registry.get_model(model_id)
        return row and row["metadata"].get("parents")

    if not as_json:
        print(plan_text(plan, parents_of))
    if dry:
        return
    receipt = merge_folders(plan, parents_of)
    if as_json:
        print_json(receipt)
    else:
        say(f"wrote {output} in {receipt['seconds']:.1f} s; talk to it: agent-forge chat {output}", "green")


def serve(
    context: typer.Context,
    models: Annotated[
        list[str] | None, typer.Argument(help="Models: names, ids or folders; default: the newest.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; the default is reached from this machine only.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    max_tokens: Annotated[int, typer.Option(help="Longest answer where a request names none.")] = 512,
    max_rows: Annotated[int, typer.Option(help="Answers generated at the same time.")] = 32,
    time_limit: Annotated[float, typer.Option(help="Longest seconds for a request, waiting included.")] = 120.0,
    log: Annotated[bool, typer.Option("--log", help="Write a line per request.")] = False,
) -> None:
    """Serve models by OpenAI's HTTP interface: /v1/models, /v1/completions, /v1/chat/completions."""
    from agent_forge.serve.app import ServeConfig
    from agent_forge.serve.app import serve as run
    from forgekit.errors import ConfigError

    storage = storage_of(context)
    folders = [storage.resolve(name) for name in models or ["latest"]]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        remedy = "clients name a model by its folder: rename one"
        raise ConfigError(f"two models are called {max(names, key=names.count)}", where="serve", remedy=remedy)
    values = {"host": host, "port": port, "max_tokens": max_tokens, "max_rows": max_rows, "time_limit": time_limit}
    config = ServeConfig.build({**values, "log": log}, "serve")
    run(
        dict(zip(names, folders)),
        config,
        lambda server: say(f"{server.url}/v1 serves {', '.join(names)}; Ctrl-C stops", "green"),
    )
