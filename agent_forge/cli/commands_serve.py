"""Commands that hand models on: merge, serve."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agent_forge.cli.shared import print_json, say, storage_of, to_talk_to

if TYPE_CHECKING:
    from agent_forge.merging.check import Lookup
    from agent_forge.merging.folders import MergePlan

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
    seed: Annotated[int, typer.Option(help="Seed of methods that draw, and of the problems of --importance auto.")] = 0,
    importance: Annotated[
        list[str] | None,
        typer.Option(
            "--importance",
            help="For fisher and dfs, how much every parameter matters: a safetensors file or folder per model, "
            "repeated; or auto, which measures it on the gym's train problems (auto:FAMILY+FAMILY on these families), "
            "once for all models or once for each.",
        ),
    ] = None,
    problems: Annotated[int, typer.Option(help="Problems that --importance auto takes per model.")] = 64,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Hash every input, for the receipt and to notice damage.")
    ] = True,
    dry: Annotated[bool, typer.Option("--plan", help="Say what would be done, and do nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Merge models into a new one, tensor by tensor."""
    from agent_forge.merging.folders import MergePlan
    from agent_forge.profile import assigned

    storage = storage_of(context)
    folders = [storage.resolve(name) for name in models]
    values = {
        "method": method,
        "models": folders,
        "base": storage.resolve(base) if base else None,
        "output": output,
        "options": dict(assigned(text, "--option") for text in option or []),
        "seed": seed,
        "verify": verify,
    }
    told = (importance or []) * (len(folders) if len(importance or []) == 1 else 1)

    def parents_of(model_id: str) -> list[str] | None:
        row = storage.registry.get_model(model_id)
        return row and row["metadata"].get("parents")

    plan = MergePlan.build(values, "merge")
    receipt = _merged(plan, told, problems, parents_of, (dry, as_json))
    if receipt and as_json:
        print_json(receipt)
    elif receipt:
        say(f"wrote {output} in {receipt['seconds']:.1f} s; talk to it: agent-forge chat {output}", "green")


def _merged(
    plan: MergePlan, told: list[str], problems: int, parents_of: Lookup, how: tuple[bool, bool]
) -> dict[str, Any] | None:
    """Say what is planned, measure importances where asked to, merge; the receipt, or None where only the plan was
    wanted. ``how``: whether only to plan, whether to be silent."""
    from agent_forge.merging.folders import merge_folders, plan_text

    dry, silent = how
    if not told:
        if not silent:
            print(plan_text(plan, parents_of))
        return None if dry else merge_folders(plan, parents_of)
    from agent_forge.merging.operators_importance import MeasureConfig, about, measured, write_measured

    config = MeasureConfig.build({"problems": problems, "seed": plan.seed}, "importance")
    wanted = [measured(text) for text in told]
    # Importances have the names and shapes of the model they belong to: everything else is checked before measuring.
    stand_ins = [Path(t) if w is None else m for t, w, m in zip(told, wanted, plan.models)] + [
        Path(t) for t in told[len(plan.models) :]
    ]
    notes = tuple(f"importances of {m.name}: {about(w, config)}" for w, m in zip(wanted, plan.models) if w is not None)
    planned = plan_text(plan.replace(importances=stand_ins, notes=notes), parents_of)
    if not silent:
        print(planned)
    if dry:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        files, notes = write_measured(plan.models, told, config, Path(scratch))
        return merge_folders(plan.replace(importances=files, notes=notes), parents_of)


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
    think: Annotated[
        Literal["auto", "on", "off"],
        typer.Option(help="Think before a chat's answer where a request does not say; auto leaves it to the model."),
    ] = "auto",
    think_budget: Annotated[
        int,
        typer.Option(help="Longest thought in tokens where a request does not say; 0 is three quarters of its limit."),
    ] = 0,
    log: Annotated[bool, typer.Option("--log", help="Write a line per request.")] = False,
) -> None:
    """Serve models by OpenAI's HTTP interface: /v1/models, /v1/completions, /v1/chat/completions."""
    from agent_forge.serve.app import ServeConfig
    from agent_forge.serve.app import serve as run
    from forgekit.errors import ConfigError

    storage = storage_of(context)
    folders = [to_talk_to(storage, name) for name in models or ["latest"]]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        remedy = "clients name a model by its folder: rename one"
        raise ConfigError(f"two models are called {max(names, key=names.count)}", where="serve", remedy=remedy)
    values = {"host": host, "port": port, "max_tokens": max_tokens, "max_rows": max_rows, "time_limit": time_limit}
    config = ServeConfig.build({**values, "thinking": think, "thinking_budget": think_budget, "log": log}, "serve")
    run(
        dict(zip(names, folders)),
        config,
        lambda server: say(f"{server.url}/v1 serves {', '.join(names)}; Ctrl-C stops", "green"),
    )
