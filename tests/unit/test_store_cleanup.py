"""Storage and cleanup: models in and out, and old sessions gone as a whole, never a living one."""

import os
import signal
import sqlite3
import sys
from datetime import UTC, datetime, timedelta

import pytest

from forgekit.errors import ArtifactError, ConfigError
from forgekit.store.artifact import Artifact, Manifest, write_artifact
from forgekit.store.cleanup import CleanupPolicy, SessionCleanupManager
from forgekit.store.storage import ModelStorage

NOW = datetime.now(UTC)


@pytest.fixture
def storage(tmp_path):
    storage = ModelStorage(tmp_path / "storage")
    yield storage
    storage.registry.close()


def manager(storage, **policy):
    return SessionCleanupManager(storage.registry, storage, CleanupPolicy(**policy))


def put(storage, session, name="m", phase="cognate", **metadata):
    """A small artifact, registered."""
    metadata = {"parameters": 1, "size_mb": 0.0, **metadata}
    path = storage.model_path(session, phase, name)
    manifest = Manifest.describe(session, phase, name, metadata)
    write_artifact(path, lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 1000), manifest)
    return storage.registry.register_model(manifest, path)


def make(storage, session, status="completed", days=0.0, alive=True):
    """A session with one model that last moved ``days`` ago."""
    storage.registry.create_session({}, session)
    model_id = put(storage, session)
    storage.registry.update_session(session, status=status)
    moment = (NOW - timedelta(days=days)).isoformat()
    query = "UPDATE sessions SET start_time = ?, updated_at = ?, pid_started = pid_started - ? WHERE session_id = ?"
    storage.registry.conn.execute(query, (moment, moment, 0 if alive else 86_400, session))
    return model_id


def left(storage):
    rows = {row["session_id"] for row in storage.registry.get_all_sessions()}
    folders = {path.name for path in (storage.base_path / "sessions").iterdir()}
    assert rows == folders
    return rows


# Cleanup


def test_policy_removes_by_age_and_outcome(storage):
    make(storage, "done-old", days=31)
    make(storage, "done-new", days=29)
    make(storage, "failed-old", "failed", days=8)
    make(storage, "failed-new", "failed", days=6)
    make(storage, "paused-old", "paused", days=400)
    make(storage, "alive-old", "running", days=400)
    make(storage, "dead-old", "running", days=8, alive=False)
    make(storage, "dead-new", "running", days=6, alive=False)
    report = manager(storage).cleanup_old_sessions()
    assert report.removed == {
        "done-old": "completed, 31 days old",
        "failed-old": "failed, 8 days old",
        "dead-old": "failed, 8 days old",
    }
    assert report.bytes_freed > 3 * 1000
    assert left(storage) == {"done-new", "failed-new", "paused-old", "alive-old", "dead-new"}
    assert manager(storage).cleanup_old_sessions() == type(report)()


def test_now_can_be_given(storage):
    make(storage, "a")
    make(storage, "b", "running")
    assert not manager(storage).cleanup_old_sessions(NOW + timedelta(days=29)).removed
    report = manager(storage).cleanup_old_sessions((NOW + timedelta(days=31)).replace(tzinfo=None))
    assert list(report.removed) == ["a"] and left(storage) == {"b"}


def test_age_counts_from_the_last_move(storage):
    make(storage, "long-run", days=90)
    put(storage, "long-run", "another")
    assert not manager(storage).cleanup_old_sessions().removed


def test_count_limit_takes_the_oldest_that_do_not_run(storage):
    for number in range(6):
        make(storage, f"s{number}", "paused", days=10 - number)
    make(storage, "alive", "running", days=20)
    report = manager(storage, max_sessions_total=4).cleanup_old_sessions()
    assert report.removed == dict.fromkeys(["s0", "s1", "s2"], "more than 4 sessions")
    assert left(storage) == {"alive", "s3", "s4", "s5"}
    manager(storage, max_sessions_total=1).cleanup_old_sessions()
    assert left(storage) == {"alive"}


def test_expired_sessions_count_towards_the_limit(storage):
    make(storage, "expired", days=40)
    make(storage, "kept", "paused", days=50)
    assert list(manager(storage, max_sessions_total=1).cleanup_old_sessions().removed) == ["expired"]


def test_clean_failed(storage):
    make(storage, "failed", "failed")
    make(storage, "dead", "running", alive=False)
    make(storage, "alive", "running")
    make(storage, "done", days=400)
    assert set(manager(storage).clean_failed().removed) == {"failed", "dead"}
    assert left(storage) == {"alive", "done"}


def test_clean_all_keeps_the_running_or_else_the_newest(storage):
    make(storage, "a", days=3)
    make(storage, "b", "paused", days=2)
    make(storage, "alive", "running", days=5)
    assert set(manager(storage).clean_all().removed) == {"a", "b"}
    make(storage, "newer", "failed")
    storage.registry.update_session("alive", status="completed")
    assert list(manager(storage).clean_all().removed) == ["alive"] and left(storage) == {"newer"}


def test_a_session_resumed_meanwhile_stays(storage):
    make(storage, "a", "failed")
    cleaner = manager(storage)
    stale = storage.registry.get_all_sessions()
    storage.registry.get_all_sessions = lambda: stale  # read before another process resumed it
    storage.registry.update_session("a", status="running")
    assert cleaner.clean_failed().removed == {}
    assert (storage.session_path("a")).is_dir() and storage.registry.get_session("a")


def test_handoffs_to_other_sessions_do_not_hold_a_session_back(storage):
    first, second = make(storage, "a", "failed"), make(storage, "b")
    storage.registry.record_handoff(first, second)
    storage.registry.record_handoff(second, first)
    assert list(manager(storage).clean_failed().removed) == ["a"]
    assert storage.registry.get_handoffs("b") == [] and storage.registry.get_model(second)
    assert storage.registry.conn.execute("PRAGMA foreign_key_check").fetchall() == []


def test_missing_folder_is_no_hindrance(storage):
    make(storage, "a", "failed")
    (storage.session_path("a")).rename(storage.base_path / "elsewhere")
    assert manager(storage).clean_failed().bytes_freed == 0
    assert left(storage) == set()


def test_completion_compacts_and_cleans(storage):
    make(storage, "old", days=31)
    make(storage, "now", "running")
    wal = storage.registry.db_path.with_name("model_registry.db-wal")
    assert not manager(storage, auto_cleanup_enabled=False).auto_cleanup_on_session_complete("now").removed
    assert storage.registry.get_session("now")["status"] == "completed"
    assert wal.stat().st_size > 0, "two completed sessions: not yet time to compact"
    storage.registry.update_session("now", status="running")
    cleaner = manager(storage, checkpoint_every_n_sessions=2)
    sizes = []
    compact = cleaner.checkpoint_and_vacuum
    cleaner.checkpoint_and_vacuum = lambda: sizes.append(compact())
    assert list(cleaner.auto_cleanup_on_session_complete("now").removed) == ["old"]
    assert len(sizes) == 1 and sizes[0].wal_bytes == 0
    with pytest.raises(ArtifactError, match="no session"):
        cleaner.auto_cleanup_on_session_complete("nothing")


def test_compaction_shrinks_the_file(storage):
    storage.registry.create_session({}, "a")
    for number in range(60):
        metadata = {"parameters": 1, "size_mb": 0.0, "notes": "x" * 5000}
        storage.registry.register_model(
            model_path=f"/m{number}", session_id="a", phase_name="cognate", model_name=f"m{number}", metadata=metadata
        )
    cleaner = manager(storage)
    before = cleaner.checkpoint_and_vacuum().main_bytes
    storage.registry.remove_session("a")
    after = cleaner.checkpoint_and_vacuum()
    assert after.pages_freed > 50 and after.main_bytes == before - 4096 * after.pages_freed


def test_policy_refuses_nonsense():
    with pytest.raises(ConfigError, match="max_sessions_total"):
        CleanupPolicy.build({"max_sessions_total": 0})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_a_second_cleanup_leaves_nothing(storage):
    outcomes, step, ended, second = set(), 0, False, make(storage, "b")
    while not ended:
        step += 1
        first = make(storage, "a", "failed")
        storage.registry.record_handoff(first, second)
        ended = clean_and_die(storage, step)
        row, folder = storage.registry.get_session("a"), storage.session_path("a").exists()
        rows = len(storage.registry.search_models(session_id="a"))
        assert bool(row) == bool(rows), "the rows go together"
        assert row or not folder, "a folder without rows would never be found again"
        outcomes.add((bool(row), folder))
        manager(storage).clean_failed()
        assert left(storage) == {"b"}
        assert storage.registry.find_ids() == [second] and storage.registry.get_handoffs("b") == []
    assert outcomes == {(True, True), (True, False), (False, False)}


def clean_and_die(storage, step: int) -> bool:
    """Clean up in a fork that is killed at its ``step``-th file event or SQL statement; True if it ended before."""
    child = os.fork()
    if child == 0:
        count = 0

        def tick(*event):
            nonlocal count
            if len(event) == 1 or event[0] in ("os.rename", "os.remove", "os.rmdir", "os.scandir"):
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            storage.registry.conn.set_trace_callback(lambda statement: tick(statement))
            sys.addaudithook(tick)
            manager(storage).clean_failed()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Storage


@pytest.fixture
def model():
    import torch

    from forgekit.models.config import GPTConfig
    from forgekit.models.io import build_model

    torch.manual_seed(0)
    return build_model(GPTConfig(vocab_size=64, d_model=16, n_layers=1, n_heads=2, max_seq_len=32))


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))


def test_save_and_load(storage, model, tokenizer):
    import torch

    session = storage.registry.create_session({})
    metadata = {"seeds": [42], "tags": ["small"], "metrics": {"loss": 1.5}, "specialization": "reasoning"}
    model_id = storage.save_model(model, session, "forge", "Small one", metadata, tokenizer=tokenizer)
    row = storage.registry.get_model(model_id)
    folder = storage.base_path / "sessions" / session / "phase5_curriculum" / "Small_one"
    assert row["model_path"] == str(folder) and row["tags"] == ["small"]
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    assert row["size_mb"] == (folder / "model.safetensors").stat().st_size / 1e6
    artifact = Artifact.open(folder)
    assert artifact.metrics == {"loss": 1.5} and artifact.manifest.model_id == model_id
    assert artifact.manifest.environment["torch"] == str(torch.__version__)
    assert artifact.manifest.environment["threads"] == torch.get_num_threads()
    loaded, flat = storage.load_model(model_id)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert (flat["seeds"], flat["specialization"], flat["phase_name"]) == ([42], "reasoning", "curriculum")
    assert storage.load_model(session_id=session, phase_name="curriculum")[1]["model_id"] == model_id
    again = storage.save_model(
        loaded, session, "forge", "Small one", {**flat, "parents": [model_id]}, tokenizer=tokenizer
    )
    assert again != model_id and storage.registry.ancestors(again) == [model_id]
    assert storage.resolve(again) == folder.with_name("Small_one_2")
    assert Artifact.open(storage.resolve(again)).manifest.model_id == again


def test_saving_into_an_unknown_session_writes_nothing(storage, model):
    with pytest.raises(ArtifactError, match="no session"):
        storage.save_model(model, "nothing", "cognate", "m", {})
    assert not (storage.base_path / "sessions").exists()


def test_loading_what_is_not_there(storage):
    storage.registry.create_session({}, "s")
    model_id = put(storage, "s")
    with pytest.raises(ArtifactError, match=f"did you mean {model_id}"):
        storage.load_model(model_id[:-1])
    with pytest.raises(ArtifactError, match="no model 's/baking'"):
        storage.load_model(session_id="s", phase_name="baking")


def test_resolve(storage, tmp_path):
    with pytest.raises(ArtifactError, match="no models yet"):
        storage.resolve("latest")
    storage.registry.create_session({}, "s")
    put(storage, "s", "one", created_at="2026-01-01", model_id="cognate_one_20260101_000000")
    put(storage, "s", "two", created_at="2026-01-02", model_id="cognate_two_20260102_000000")
    put(storage, "s", "one", created_at="2026-01-01T01", model_id="cognate_one_20260101_000000")
    folder = storage.session_path("s") / "phase1_cognate"
    assert storage.resolve("latest") == storage.resolve("cognate_tw") == folder / "two"
    assert storage.resolve("two") == folder / "two", "a name means the newest model that has it"
    assert storage.resolve("cognate_one_20260101_000000") == folder / "one"
    assert storage.resolve("cognate_one_20260101_000000_2") == folder / "one_2"
    assert storage.resolve(folder / "two") == folder / "two"
    assert storage.resolve(tmp_path) == tmp_path
    with pytest.raises(ArtifactError, match="means more than one model: cognate_one_20260101_000000, "):
        storage.resolve("cognate_one")
    with pytest.raises(ArtifactError, match="did you mean cognate_two_20260102_000000"):
        storage.resolve("cognate_too_20260102_000000")
    with pytest.raises(ArtifactError, match="no model ''"):
        storage.resolve("")


def test_lost_registry_is_filled_from_the_folders(storage):
    storage.registry.create_session({}, "s")
    ids = [put(storage, "s", name, created_at="2026-01-01", parents=["p"]) for name in ("a", "b")]
    (storage.session_path("s") / "phase1_cognate" / "torn").mkdir()
    (storage.session_path("s") / "phase1_cognate" / "torn" / "manifest.json").write_text("{")
    hidden = storage.session_path("s") / "phase1_cognate" / ".b.1-1-00000000.unfinished"
    hidden.mkdir()
    (hidden / "manifest.json").write_bytes((storage.resolve(ids[1]) / "manifest.json").read_bytes())
    storage.registry.close()
    for path in storage.registry.db_path.parent.iterdir():
        path.unlink()
    again = ModelStorage(storage.base_path)
    assert again.registry.find_ids() == ids and again.registry.ancestors(ids[0]) == ["p"]
    assert again.registry.get_session("s")["status"] == "paused"
    assert again.reindex() == ids and again.registry.find_ids() == ids
    again.registry.close()


def test_a_model_that_was_written_but_not_registered_is_found(storage):
    storage.registry.create_session({}, "s")
    first = put(storage, "s", "a", model_id="cognate_a_20260101_000000", created_at="2026-01-01")
    orphan = storage.model_path("s", "cognate", "b")
    manifest = Artifact.open(storage.resolve(first)).manifest.replace(model_name="b", created_at="2026-01-02")
    write_artifact(orphan, lambda folder: None, manifest)
    assert storage.reindex() == [first, f"{first}_2"]
    assert Artifact.open(orphan).manifest.model_id == f"{first}_2", "the folder and the registry agree on the id"


def test_storage_opens_without_torch(tmp_path):
    import subprocess

    script = "import sys; from forgekit import ModelStorage as S; S(sys.argv[1]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True)
    with sqlite3.connect(tmp_path / "registry" / "model_registry.db") as plain:
        assert plain.execute("PRAGMA journal_mode").fetchone() == ("wal",)
