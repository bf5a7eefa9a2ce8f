"""Artifacts, sessions and registries that were damaged: one line, an exit code, and nothing further lost."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest


def newer(path: Path) -> None:
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "schema_version": 99}))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        ("model.safetensors", halve, "model.safetensors: file is truncated or changed"),
        ("model.safetensors", Path.unlink, "model.safetensors: file is missing"),
        ("manifest.json", halve, "manifest.json: not valid JSON"),
        ("manifest.json", newer, "made by a newer version (schema 99, this one reads up to 1); upgrade agent-forge"),
        ("tokenizer.json", halve, "tokenizer.json: file is truncated or changed"),
    ],
)
def test_damaged_artifact_is_named(forge, copy, file: str, damage: Callable[[Path], None], told: str):
    damage(copy.folder("trunk") / file)
    done = forge("--storage", copy.home / "storage", "model", copy.folder("trunk"), "--info")
    assert done.code == 4 and told in done.error and str(copy.folder("trunk")) in done.error
    assert done.out == ""


def test_unfinished_artifact_is_refused(forge, copy):
    (copy.folder("trunk") / "manifest.json").unlink()
    done = forge("--storage", copy.home / "storage", "model", copy.run["results"]["cognate"]["artifacts"]["trunk"])
    assert done.code == 4 and "unfinished artifact" in done.error


def test_chat_with_truncated_weights_is_refused(forge, copy):
    halve(copy.folder("trunk") / "model.safetensors")
    done = forge("--storage", copy.home / "storage", "chat", copy.folder("trunk"), "hello")
    assert done.code == 4 and "model.safetensors: corrupt weights" in done.error and done.out == ""


def registry_of(home: Path) -> Path:
    return home / "storage" / "registry" / "model_registry.db"


@pytest.mark.parametrize("damage", [halve, lambda path: path.write_bytes(b"this is no database" * 1000)])
def test_damaged_registry_is_named_and_its_loss_is_repaired(forge, copy, damage):
    path = registry_of(copy.home)
    damage(path)
    broken = path.read_bytes()
    done = forge("--storage", copy.home / "storage", "models")
    assert done.code == 4 and f"{path}: damaged database" in done.error and "move model_registry.db" in done.error
    assert path.read_bytes() == broken, "a damaged file is evidence: it is not touched"
    for file in path.parent.glob("model_registry.db*"):
        file.rename(copy.home / file.name)
    rows = json.loads(forge("--storage", copy.home / "storage", "models", "--json").out)
    assert {r["model_name"] for r in rows} >= {"trunk", "reasoning"}


def test_registry_of_a_newer_version_is_refused(forge, copy):
    with sqlite3.connect(registry_of(copy.home)) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    done = forge("--storage", copy.home / "storage", "status")
    assert done.code == 4 and "made by a newer version (schema 99" in done.error and "upgrade" in done.error


def test_damaged_result_is_named_when_its_session_is_resumed(forge, copy):
    halve(copy.folder("trunk").parent / "result.json")
    for command in (("run", "--resume", "latest"), ("report", "latest")):
        done = forge("--storage", copy.home / "storage", *command)
        assert done.code == 4 and "result.json: is not JSON" in done.error, command


def test_model_finished_before_a_kill_but_not_registered_is_found_again(copy):
    from agent_forge.pipeline.orchestrator import PipelineOrchestrator

    with sqlite3.connect(registry_of(copy.home)) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("DELETE FROM phase_handoffs")
        connection.execute("DELETE FROM models WHERE model_name = 'champion'")
    connection.close()
    forge = PipelineOrchestrator.resume(copy.session, copy.home / "storage")
    names = {r["model_name"] for r in forge.storage.registry.search_models(session_id=copy.session)}
    forge.logger.close()
    assert "champion" in names


@pytest.mark.parametrize("command", [("run", "--resume"), ("report",), ("logs",), ("status", "--session")])
def test_unknown_session_is_refused(forge, journey, command):
    done = forge("--storage", journey.home / "storage", *command, "00000000")
    assert done.code == 4 and "no session '00000000'; see `agent-forge status`" in done.error


def test_resuming_with_a_phase_that_does_not_exist_leaves_the_session_as_it_was(forge, copy):
    storage = ("--storage", copy.home / "storage")
    done = forge(*storage, "run", "--resume", "latest", "--phase", "bogus")
    assert done.code == 2 and "unknown phase 'bogus'" in done.error
    assert json.loads(forge(*storage, "status", "--json").out)[0]["status"] == "completed"
