"""The command that makes one model small: quantize."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent_forge.cli.shared import print_json, say

if TYPE_CHECKING:
    from agent_forge.pipeline.inputs import Input
    from agent_forge.pipeline.phase import PhaseResult
    from agent_forge.profile import Profile
    from forgekit.store.storage import ModelStorage

PHASE = "bitnet"
METHODS = ("bitnet", "int8", "int4")
USUAL = "nano"
"""The profile for models that no session of this storage made."""
LARGEST_MB = 1e6
"""Weights that are taken in: the user has chosen them."""


def attach(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(quantize)


def quantize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model: name, id or folder, ours or Hugging Face's.")],
    method: Annotated[str, typer.Option("--method", "-m", help="bitnet (weights -1, 0, 1), int8 or int4.")] = PHASE,
    output: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for a copy of the packed model; must not exist.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="File or folder of text to calibrate, train and measure on, divided; repeatable."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="FAMILY:LEVELS", help="A gym skill to keep, as sort:1-3; repeatable; default: its own."),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Train where rounding costs too much, or only round.")
    ] = True,
    profile: Annotated[
        str | None,
        typer.Option("--profile", "-p", help="Settings; default: of the run that made the model, or the phase's."),
    ] = None,
    data: Annotated[str | None, typer.Option(envvar="AGENT_FORGE_DATA", help="Folder with real data sets.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="A setting: phases.bitnet.train.steps=200; repeatable.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make one model small, with the evidence of phase 4: what it weighs, how fast it is, what it still can."""
    from agent_forge.cli.processes import together

    wanted = {"model": model, "method": method, "output": output, "text": text or [], "task": task or []}
    wanted |= {"train": train, "profile": profile, "data": data, "changes": change or []}
    with together() as leads:
        _run(context.obj["storage"], wanted, show=leads and not (quiet or as_json), tell=leads, as_json=as_json)


def _run(storage: str, wanted: dict[str, Any], *, show: bool, tell: bool, as_json: bool) -> None:
    """Phase 4 in a session of its own; ``tell`` is off in all processes but the first."""
    from agent_forge.cli.progress import Bars
    from agent_forge.pipeline.orchestrator import PipelineOrchestrator

    settings = _settings(storage, wanted)
    with Bars(enabled=show) as bars:
        options = {"data": wanted["data"], "show": bars.show}
        forge = PipelineOrchestrator.starting_from([wanted["model"]], settings, storage, PHASE, PHASE, **options)
        if tell and not as_json:
            say(f"session [bold]{forge.session_id}[/]  {wanted['method']}  {wanted['model']}")
        try:
            with forge:
                result = forge.run_single_phase(PHASE)
        except KeyboardInterrupt:
            if tell:
                copy = "; it makes no copy for --out" if wanted["output"] is not None else ""
                say(f"paused; go on with: agent-forge run --resume {forge.session_id[:8]}{copy}", "yellow")
            raise
    if tell:
        _told(forge, result, wanted["output"], as_json)


def _told(forge: Any, result: PhaseResult, output: Path | None, as_json: bool) -> None:
    """Copy the packed model where it is wanted, and say what was made."""
    from rich.markup import escape

    from agent_forge.cli.show import show_results
    from forgekit.store.fsio import tree_bytes, write_folder

    ids = {name: result.artifacts[name] for name in ("packed", "dense")}
    folders = {name: forge.storage.resolve(one) for name, one in ids.items()}
    if output is not None:
        packed = folders["packed"]
        write_folder(output, lambda work: _copy(packed, work), need=tree_bytes(packed))
        folders["packed"] = output
    if as_json:
        paths = {f"{name}_path": str(folder) for name, folder in folders.items()}
        found = {"session_id": forge.session_id, **ids, **paths, "results": {PHASE: result.record()}}
        print_json(found)
        return
    show_results(forge, {PHASE: result})
    names = dict.fromkeys(one["name"] for one in result.artifacts["data"])
    say(f"text: held-out parts of {escape(', '.join(names))}")
    place = escape(str(_short(folders["packed"])))
    say(f"packed: {place}; talk to it: agent-forge chat {place}", "green")


def _short(path: Path) -> Path:
    """The path from here, where it lies below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _copy(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)


def _settings(storage: str, wanted: dict[str, Any]) -> Profile:
    """The profile of the session. What cannot be is refused here, before there is one."""
    import torch

    from agent_forge.pipeline.inputs import find_input
    from agent_forge.pipeline.phase import PHASES
    from agent_forge.profile import with_values
    from forgekit.errors import ArtifactError
    from forgekit.models.config import FAMILIES
    from forgekit.models.io import read_config
    from forgekit.quant.files import read_tokenizer, skeleton
    from forgekit.quant.model import targets
    from forgekit.registry import unknown
    from forgekit.store.storage import ModelStorage

    if wanted["method"] not in METHODS:
        raise unknown("method", wanted["method"], list(METHODS))
    output = wanted["output"]
    if output is not None and (output.exists() or output.is_symlink()):
        raise ArtifactError("exists already", where=str(output), remedy="choose another name: --out")
    store = ModelStorage(storage)
    found = find_input(store, wanted["model"], "quantised again")
    folder = Path(found.path)
    values = read_config(folder)
    with torch.device("meta"):  # its parts are asked for, not its numbers
        plain = skeleton(values, folder)
    targets(plain)
    ours = values.get("model_type") in FAMILIES
    base = _profile(store, found, wanted["profile"], ours)
    phase = _phase_settings(base, wanted, getattr(plain, "context_limit", None))
    changed = {"phases": {PHASE: phase}, "handoffs": _admitted(found.phase)}
    profile = with_values(base.replace(**changed), wanted["changes"])
    PHASES.get(PHASE).check_text(profile.phase(PHASE), read_tokenizer(values, folder))
    return profile


def _profile(store: ModelStorage, found: Input, name: str | None, ours: bool) -> Profile:
    """The profile whose settings count: the one given, or that of the session which made the model.

    Phase 4's settings are the profile's for models of the house; those of others start from the phase's own, since a
    profile's rates are for its own size.
    """
    from agent_forge.profile import Profile, load_profile, profile_names

    if name:
        return load_profile(name)
    row = store.registry.get_model(found.model_id) if found.model_id else None
    plan = store.registry.get_session(row["session_id"])["config"] if row else {}
    if "profile" not in plan or not ours:
        usual = load_profile(USUAL)
        return usual if ours else usual.replace(phases={})
    profile = Profile.build(plan["profile"], f"session {row['session_id']}")
    if PHASE not in profile.phases and profile.name in profile_names():  # a session from before this phase was there
        shipped = load_profile(profile.name).phases
        profile = profile.replace(phases={**profile.phases, **{n: v for n, v in shipped.items() if n == PHASE}})
    return profile


def _phase_settings(profile: Profile, wanted: dict[str, Any], context: int | None) -> dict[str, Any]:
    """All settings of the phase, each with its value, so that ``--set`` changes one of them and leaves the others."""
    from agent_forge.profile import PHASE_CONFIGS

    method, given = wanted["method"], dict(profile.phases.get(PHASE, {}))
    if method != PHASE:
        given.pop("least_ratio", None)  # a profile asks for it of ternary weights
        given["dense"] = "float32"  # float16 does not hold eight bits times a scale exactly
    text = profile.phases.get("cognate", {}).get("text")
    if text:
        given.setdefault("text", text)
    values = PHASE_CONFIGS.get(PHASE).build(given, path=f"phases.{PHASE}").model_dump(mode="json")
    if context:
        values["train"]["seq_len"] = min(values["train"]["seq_len"], context)
        values["evaluation"]["length"] = min(values["evaluation"]["length"], context)
    values["method"] = method
    if wanted["text"]:
        values["own_text"] = {"paths": [str(Path(one).expanduser().absolute()) for one in wanted["text"]]}
    if wanted["task"]:
        values["skills"] = [task_of(one) for one in wanted["task"]]
    if not wanted["train"]:
        values["finetune_above"] = 1.0
    return values


def task_of(text: str) -> dict[str, Any]:
    """A gym skill as settings have it: ``sort`` (its usual levels), ``sort:2``, ``sort:1-3`` or ``sort:1,4,6``.

    Raises:
        ConfigError: not of this form, an unknown family, or a level that no family has.
    """
    from forgekit.data.plans import GymMix
    from forgekit.errors import ConfigError

    family, colon, levels = text.partition(":")
    values: dict[str, Any] = {"family": family}
    if colon:
        spans = [re.fullmatch(r"(\d+)(?:-(\d+))?", part) for part in levels.split(",")]
        ends = [(int(span[1]), int(span[2] or span[1])) for span in spans if span]
        if None in spans or any(first > last for first, last in ends):
            remedy = "write FAMILY:LEVELS, as sort:1-3 or sort:1,4"
            raise ConfigError(f"{text!r} is no skill", where="--task", remedy=remedy)
        values["levels"] = [level for first, last in ends for level in range(first, last + 1)]
    return GymMix.build(values, "--task").model_dump(mode="json")


def _admitted(source: str) -> dict[str, Any]:
    """The contract of this one handoff: the user has chosen the model, so nothing is asked about its past."""
    from agent_forge.pipeline.handoff import CONTRACTS

    key = (source, PHASE)
    waived = CONTRACTS[key].entries() if key in CONTRACTS else []
    return {f"{source}->{PHASE}": {"num_models": 1, "max_total_mb": LARGEST_MB, "waive": waived}}
