"""Artifact folders: complete or absent, checked file by file, whatever kills the writer."""

import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from forgekit.errors import ArtifactError, ConfigError, ResourceError
from forgekit.store.artifact import SCHEMA_VERSION, Artifact, ArtifactExtras, Manifest, amend_evidence, write_artifact
from forgekit.store.fsio import (
    disk_errors,
    free_bytes,
    make_folder,
    remove_tree,
    sweep_unfinished,
    temporary_for,
    tree_bytes,
    write_atomic,
)
from forgekit.store.names import check_session_id, folder_name, new_model_id, phase_folder, utc_text
from forgekit.store.process import own_process, process_alive

FIELDS = {
    "model_id": "cognate_reasoning_20260102_030405",
    "session_id": "run-1",
    "phase_name": "cognate",
    "model_name": "reasoning",
    "parameters": 12,
}
FLAT = {**FIELDS, "created_at": "2026-01-02T03:04:05", "size_mb": 0.5}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def fill(folder: Path) -> None:
    (folder / "config.json").write_text('{"d": 2}')
    save_file({"w": np.arange(12, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "parts").mkdir()
    (folder / "parts" / "tokenizer.json").write_text("{}")


def write(folder: Path, **changes) -> Artifact:
    return write_artifact(folder, fill, Manifest(**{**FIELDS, **changes}))


@contextmanager
def as_nobody():
    """Permissions do not bind root: give them up for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def kill_at(step: int, work) -> bool:
    """Run ``work`` in a fork that is killed at its ``step``-th system event; True if it ended before that."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event, _):
            nonlocal count
            if event.startswith(("os.", "open", "shutil.")):
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Writing and opening


def test_round_trip(tmp_path):
    extras = ArtifactExtras(metrics={"loss": np.float32(0.5)}, evidence=[{"claim": "x"}], readme="# card é")
    made = write_artifact(tmp_path / "a" / "b", fill, Manifest(**FIELDS, seeds=[42], parents=["p"]), extras)
    found = Artifact.open(tmp_path / "a" / "b")
    assert found == made and found.path == tmp_path / "a" / "b"
    assert set(found.manifest.files) == {
        "config.json", "model.safetensors", "parts/tokenizer.json", "metrics.json", "evidence.json", "README.md",
    }  # fmt: skip
    assert found.manifest.size_mb == (found.path / "model.safetensors").stat().st_size / 1e6
    assert found.metrics == {"loss": 0.5} and found.evidence == [{"claim": "x"}]
    assert (found.path / "README.md").read_text(encoding="utf-8") == "# card é"
    assert json.loads((found.path / "manifest.json").read_text())["schema_version"] == SCHEMA_VERSION


def test_absent_reports_are_none(tmp_path):
    artifact = write(tmp_path / "a")
    assert artifact.metrics is None and artifact.evidence is None


def test_content_hash_follows_the_content_only(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b", model_name="other", seeds=[7])
    third = write_artifact(tmp_path / "c", fill, first.manifest, ArtifactExtras(metrics={}))
    assert first.content_hash == second.content_hash != third.content_hash


def test_an_artifact_is_never_overwritten(tmp_path):
    write(tmp_path / "a")
    with pytest.raises(ArtifactError, match="exists already"):
        write(tmp_path / "a", seeds=[1])
    assert Artifact.open(tmp_path / "a").manifest.seeds == []


def test_failing_fill_leaves_nothing(tmp_path):
    def fails(folder):
        fill(folder)
        raise ValueError("own mistake")

    with pytest.raises(ValueError, match="own mistake"):
        write_artifact(tmp_path / "a", fails, Manifest(**FIELDS))
    assert list(tmp_path.iterdir()) == []


def _edit(**changes):
    def edit(folder):
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


DAMAGES = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "unfinished"),
    "cut manifest": (lambda f: os.truncate(f / "manifest.json", 40), "manifest.json: not valid JSON"),
    "binary manifest": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "list manifest": (lambda f: (f / "manifest.json").write_text("[]"), "holds no manifest"),
    "newer": (_edit(schema_version=SCHEMA_VERSION + 1, surprise=1), "newer version.*upgrade agent-forge"),
    "bad field": (_edit(parameters=0), "parameters value 0 refused"),
    "missing file": (lambda f: (f / "config.json").unlink(), "config.json: file is missing"),
    "truncated file": (lambda f: os.truncate(f / "model.safetensors", 50), "model.safetensors: file is truncated"),
    "changed file": (lambda f: (f / "parts/tokenizer.json").write_text("[]"), "tokenizer.json: file is trunc"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_in_one_line(tmp_path, name):
    damage, message = DAMAGES[name]
    write(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(ArtifactError, match=message) as caught:
        Artifact.open(tmp_path / "a")
    assert "\n" not in str(caught.value) and caught.value.remedy


def test_unverified_open_skips_the_hashes(tmp_path):
    write(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("changed")
    assert Artifact.open(tmp_path / "a", verify=False).manifest.parameters == 12


def test_missing_folder(tmp_path):
    with pytest.raises(ArtifactError, match="no such artifact folder"):
        Artifact.open(tmp_path / "nowhere")


# Kills


@needs_fork
def test_killed_at_any_event_the_artifact_is_complete_or_absent(tmp_path):
    outcomes, step, ended = set(), 0, False
    while not ended:
        step += 1
        root = tmp_path / str(step)
        root.mkdir()
        ended = kill_at(step, lambda root=root: write(root / "a"))
        complete = (root / "a").exists()
        if complete:
            Artifact.open(root / "a")
        left = len(list(root.iterdir())) - complete
        sweep_unfinished(root)
        assert [path.name for path in root.iterdir()] == ["a"] * complete
        outcomes.add((complete, left))
    assert step > 10
    assert outcomes == {(False, 0), (False, 1), (True, 0)}


@needs_fork
def test_killed_at_any_event_write_atomic_keeps_old_or_new(tmp_path):
    path, seen, step, ended = tmp_path / "f", set(), 0, False
    while not ended:
        step += 1
        path.write_bytes(b"old")
        ended = kill_at(step, lambda: write_atomic(path, b"new and longer"))
        seen.add(path.read_bytes())
        sweep_unfinished(tmp_path)
        assert list(tmp_path.iterdir()) == [path]
    assert seen == {b"old", b"new and longer"}


# Evidence that comes later

OLD, NEW = [{"claim": "old", "after": 0.25}], [{"claim": "new and longer", "after": 0.5}, {"claim": "x", "after": 1.0}]


def test_evidence_added_later_belongs_to_the_artifact(tmp_path):
    made = write(tmp_path / "a", seeds=[42])
    for evidence in (OLD, NEW, NEW):
        amended = amend_evidence(tmp_path / "a", evidence)
        found = Artifact.open(tmp_path / "a")
        assert found == amended and found.evidence == evidence
        assert set(found.manifest.files) == {*made.manifest.files, "evidence.json"}
        assert found.manifest.replace(files={}) == made.manifest.replace(files={})
    (tmp_path / "a" / "evidence.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"evidence\.json: file is truncated or changed"):
        Artifact.open(tmp_path / "a")


def test_evidence_is_not_added_to_what_is_unfinished(tmp_path):
    write(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="unfinished"):
        amend_evidence(tmp_path / "a", NEW)
    assert not (tmp_path / "a" / "evidence.json").exists()


@pytest.mark.parametrize(("first", "writes"), [(None, 2), (OLD, 3)])
def test_an_artifact_whose_evidence_could_not_be_written_still_opens(tmp_path, monkeypatch, first, writes):
    real = os.replace
    for allowed in range(writes):
        folder = tmp_path / str(allowed)
        write_artifact(folder, fill, Manifest(**FIELDS), ArtifactExtras(evidence=first))
        left = [allowed]

        def replace(source, target, left=left):
            if not left[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            left[0] -= 1
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(ResourceError, match="disk is full"):
            amend_evidence(folder, NEW)
        monkeypatch.setattr(os, "replace", real)
        assert Artifact.open(folder).evidence == (first if allowed == 0 else None)
        assert amend_evidence(folder, NEW) == Artifact.open(folder) and Artifact.open(folder).evidence == NEW


@needs_fork
def test_killed_at_any_event_an_amended_artifact_opens(tmp_path):
    seen, step, ended = set(), 0, False
    while not ended:
        step += 1
        folder = tmp_path / str(step)
        write_artifact(folder, fill, Manifest(**FIELDS), ArtifactExtras(evidence=OLD))
        ended = kill_at(step, lambda folder=folder: amend_evidence(folder, NEW))
        evidence = Artifact.open(folder).evidence
        assert evidence in (OLD, None, NEW)
        seen.add(json.dumps(evidence))
    assert seen == {json.dumps(OLD), "null", json.dumps(NEW)}


def test_sweep_spares_the_living(tmp_path):
    mine = temporary_for(tmp_path / "deep" / "mine")
    mine.mkdir(parents=True)
    (mine / "x").write_bytes(b"123")
    pid, started = own_process()
    recycled = tmp_path / "deep" / f".old.{pid}-{int(started) - 86_400}-00000000.unfinished"
    recycled.write_bytes(b"12345")
    assert sweep_unfinished(tmp_path) == 5
    assert mine.is_dir() and not recycled.exists()


def test_claiming_a_temporary_does_not_lengthen_its_name(tmp_path):
    once = temporary_for(tmp_path / "name")
    assert len(temporary_for(once).name) == len(once.name)


def test_process_alive_tells_death_and_recycling():
    pid, started = own_process()
    assert process_alive(pid, started)
    assert not process_alive(pid, started - 3600)
    assert not process_alive(None, None)
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    child.stdout.read()  # it closes its output when it ends, and stays as a zombie until it is waited for
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    import psutil

    assert not process_alive(child.pid, psutil.Process(child.pid).create_time())
    child.wait()
    assert not process_alive(child.pid, started)


def test_process_that_may_not_be_looked_at_counts_as_alive(monkeypatch):
    import psutil

    def denied(pid):
        raise psutil.AccessDenied(pid)

    monkeypatch.setattr(psutil, "Process", denied)
    assert process_alive(1, 0.0)


# Disk errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_says_need_and_free(tmp_path):
    def overflow(folder):
        fill(folder)
        with open("/dev/full", "w") as file:
            file.write("x")

    with pytest.raises(
        ResourceError, match=r"disk is full: up to 8\.0 MB needed, [\d.]+ MB free.*clean --all"
    ) as caught:
        write_artifact(tmp_path / "a", overflow, Manifest(**{**FIELDS, "parameters": 2_000_000}))
    assert str(tmp_path) == caught.value.where
    assert list(tmp_path.iterdir()) == []


def test_safetensors_reports_a_missing_permission_too(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ResourceError, match="no permission"), as_nobody(), disk_errors(tmp_path / "locked"):
        save_file({"w": np.zeros(1)}, tmp_path / "locked" / "w.safetensors")


def test_missing_permission_names_the_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ResourceError, match="no permission") as caught, as_nobody():
        write_atomic(tmp_path / "f", b"x")
    assert caught.value.where.startswith(str(tmp_path))


def test_unreadable_artifact(tmp_path):
    write(tmp_path / "a")
    tmp_path.chmod(0o500)
    with pytest.raises(ResourceError, match="no permission"), as_nobody():
        Artifact.open(tmp_path / "a")


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(ResourceError, match="cannot be used"):
        make_folder(tmp_path / "f")
    with pytest.raises(ResourceError, match="cannot be used"):
        write_atomic(tmp_path / "f" / "g", b"x")


def test_our_own_mistakes_stay_visible(tmp_path):
    from safetensors import SafetensorError

    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        open(tmp_path / "nothing")
    with pytest.raises(SafetensorError), disk_errors(tmp_path):
        raise SafetensorError("Error while deserializing header")


def test_failed_replacement_leaves_no_temporary(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(ResourceError, match="disk is full: up to 0.0 MB needed"):
        write_atomic(tmp_path / "f", b"x")
    assert list(tmp_path.iterdir()) == []


def test_sizes(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_bytes(b"12")
    (tmp_path / "d" / "gone").symlink_to(tmp_path / "nothing")
    assert tree_bytes(tmp_path) >= 2
    assert free_bytes(tmp_path / "not" / "yet" / "there") > 0
    assert remove_tree(tmp_path / "d") >= 2 and not (tmp_path / "d").exists()


# Manifest and names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_id": "Cognate_x_20260102_030405"}, "model_id"),
        ({"model_id": "cognate_x_2026"}, "model_id"),
        ({"session_id": "../up"}, "session_id"),
        ({"phase_name": "No Phase"}, "phase_name.*cognate, evomerge"),
        ({"parameters": 0}, "parameters"),
        ({"size_mb": -1.0}, "size_mb"),
        ({"created_at": "yesterday"}, "created_at"),
        ({"specialization": "poetry"}, "poetry.*reasoning, memory_integration"),
        ({"tags": "a,b"}, "tags"),
        ({"tags": ["a,b"]}, "tags"),
        ({"metrics": [1]}, "metrics"),
        ({"metadata": {"parameters": 3}}, "belong beside metadata"),
    ],
)
def test_metadata_schema_refuses(changes, message):
    with pytest.raises(ConfigError, match=message):
        Manifest.from_flat({**FLAT, **changes})


@pytest.mark.parametrize("key", ["model_id", "session_id", "phase_name", "created_at", "parameters", "size_mb"])
def test_metadata_schema_requires(key):
    with pytest.raises(ConfigError, match=f"{key}: missing"):
        Manifest.from_flat({k: v for k, v in FLAT.items() if k != key})


def test_flat_and_back():
    manifest = Manifest.from_flat({**FLAT, "specialization": None, "tags": ["a"], "metrics": {"x": np.arange(2)}})
    assert manifest.metadata == {"specialization": None, "tags": ["a"], "metrics": {"x": [0, 1]}}
    assert manifest.created_at == "2026-01-02T03:04:05.000000+00:00"
    assert Manifest.from_flat(manifest.flat()) == manifest


def test_phase_aliases_and_folders():
    assert Manifest(**{**FIELDS, "phase_name": "forge"}).phase_name == "curriculum"
    names = ("cognate", "forge", "edge", "final_compression", "own")
    expected = ["phase1_cognate", "phase5_curriculum", "phase7_experts", "phase8_compression", "phase_own"]
    assert [phase_folder(name) for name in names] == expected


def test_names():
    moment = utc_text("2026-01-02T05:04:05+02:00")
    assert moment == "2026-01-02T03:04:05.000000+00:00"
    from datetime import datetime

    assert new_model_id("edge", "My-Model 1", datetime.fromisoformat(moment)) == "experts_my_model_1_20260102_030405"
    assert folder_name("../модель") == "model"
    for bad in ("", "..", ".x", "a/b", "a\\b", "x" * 65, "a\n"):
        with pytest.raises(ConfigError, match="session_id"):
            check_session_id(bad)
