"""Commands that keep the house: config, clean, vacuum, validate, doctor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from agent_forge.cli.shared import print_json, say, storage_of, table

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def attach(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (config, clean, vacuum, validate, doctor):
        app.command()(command)


def config(
    profile: Annotated[str, typer.Option("--profile", "-p", help="Profile to show.")] = "nano",
    validate: Annotated[str | None, typer.Option(help="Check this file; exit 2 if a value is refused.")] = None,
    edit: Annotated[str | None, typer.Option(help="Edit a copy of the profile in this file ($EDITOR).")] = None,
    describe: Annotated[str | None, typer.Option(help="Explain a field, such as phases.cognate.trunk.steps.")] = None,
    as_json: Json = False,
) -> None:
    """Show, check, edit or explain a configuration."""
    from agent_forge.profile import load_profile

    if validate:
        checked = load_profile(validate if validate.endswith((".toml", ".json")) else f"./{validate}.toml")
        return say(f"{validate} is valid: {checked.name}, {checked.model.solve().parameters:,} parameters", "green")
    if describe:
        from agent_forge.cli.describe import describe_field

        return print(describe_field(describe))
    if edit:
        return _edit(profile, edit)
    chosen = load_profile(profile)
    if as_json:
        phases = {name: chosen.phase(name).model_dump(mode="json") for name in chosen.phases}
        return print_json({**chosen.model_dump(mode="json"), "phases": phases})
    print(_profile_path(profile).read_text(encoding="utf-8"), end="")


def _profile_path(profile: str) -> Path:
    """The file of a profile that was already read: shipped under a name, or the user's own."""
    from agent_forge.profile import profile_folder

    own = profile.endswith((".toml", ".json"))
    return Path(profile) if own else profile_folder() / f"{profile}.toml"


def _edit(profile: str, target: str) -> None:
    """Copy the profile if the file is new, open the editor, check the result."""
    import shlex
    import subprocess

    from agent_forge.profile import load_profile
    from forgekit.errors import ConfigError
    from forgekit.store.fsio import write_atomic

    path = Path(target)
    if path.suffix != ".toml":
        raise ConfigError(f"{target!r} is not a .toml file", where="--edit", remedy="name the copy, e.g. mine.toml")
    if not path.exists():
        load_profile(profile)
        write_atomic(path, _profile_path(profile).read_bytes())
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not editor:
        raise ConfigError("no editor is set", where="$EDITOR", remedy=f"set it, or edit {path} and use --validate")
    try:
        subprocess.run([*shlex.split(editor), str(path)], check=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{editor!r} cannot be run ({error})", where="$EDITOR", remedy="set another editor") from None
    say(f"{path} is valid: {load_profile(str(path)).name}", "green")


def clean(
    context: typer.Context,
    age: Annotated[int | None, typer.Option(help="Remove sessions older than this many days.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Remove all failed sessions.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Remove all sessions but the newest and running ones.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove old sessions: by the policy (30 days, 7 when failed, 100 at most), or as told. Running ones stay."""
    from forgekit.store.cleanup import CleanupPolicy, SessionCleanupManager

    storage = storage_of(context)
    policy = (
        CleanupPolicy()
        if age is None
        else CleanupPolicy.build({"max_session_age_days": age, "max_failed_session_age_days": age}, "--age")
    )
    manager = SessionCleanupManager(storage.registry, storage, policy)
    done = manager.clean_all() if everything else manager.clean_failed() if failed else manager.cleanup_old_sessions()
    if as_json:
        return print_json(done.__dict__)
    say(f"removed {len(done.removed)} sessions, {done.bytes_freed / 1e6:.1f} MB freed")


def vacuum(context: typer.Context, as_json: Json = False) -> None:
    """Fold the write-ahead log into the registry and give freed pages back."""
    from forgekit.store.cleanup import SessionCleanupManager

    storage = storage_of(context)
    size = SessionCleanupManager(storage.registry, storage).checkpoint_and_vacuum()
    if as_json:
        return print_json(size.__dict__)
    sizes = f"{size.main_bytes / 1e6:.2f} MB, log {size.wal_bytes / 1e6:.2f} MB"
    say(f"registry: {sizes}, {size.pages_freed} pages given back")


def validate(
    context: typer.Context,
    determinism: Annotated[bool, typer.Option("--determinism", help="Compare this machine with the models'.")] = False,
    as_json: Json = False,
) -> None:
    """Check every artifact's hashes; with --determinism, say whether the same bits can be expected here."""
    from forgekit.compute.device import environment
    from forgekit.errors import ArtifactError
    from forgekit.store.artifact import Artifact

    storage, rows, here = storage_of(context), [], environment()
    for row in storage.registry.search_models(limit=100_000):
        try:
            artifact = Artifact.open(row["model_path"])
            made = artifact.manifest.environment
            differs = [k for k in ("torch", "cpu_capability", "threads") if made.get(k) != here.get(k)]
            note = f"differs here: {', '.join(differs)}" if determinism and differs else "ok"
        except ArtifactError as error:
            note = str(error)
        rows.append({"model": row["model_id"], "result": note})
    bad = [r for r in rows if r["result"] != "ok"]
    print_json(rows) if as_json else table("artifacts", ["model", "result"], [list(r.values()) for r in rows])
    if bad:
        raise typer.Exit(4)


def doctor(context: typer.Context, as_json: Json = False) -> None:
    """Check the machine: Python, memory, disk, torch, speed of a matrix product."""
    from agent_forge.cli.doctor import examine

    rows = examine(context.obj["storage"])
    if as_json:
        print_json(rows)
    else:
        table("doctor", ["check", "result", "advice"], [[r["check"], r["result"], r["advice"]] for r in rows])
    if any(r["advice"].startswith("must") for r in rows):
        raise typer.Exit(5)
