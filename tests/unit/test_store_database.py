"""The registry: real files, real processes, nothing lost."""

import multiprocessing
import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from forgekit.errors import ArtifactError, ConfigError, ForgeError, ResourceError
from forgekit.store.artifact import Manifest
from forgekit.store.connection import _patiently
from forgekit.store.database import ModelRegistry, session_alive
from forgekit.store.migrations import MIGRATIONS, backup_path

META = {"parameters": 10, "size_mb": 0.1}


@pytest.fixture
def registry(tmp_path):
    with ModelRegistry(tmp_path / "registry" / "r.db") as registry:
        registry.create_session({"profile": "pico"}, "s")
        yield registry


def add(registry, name, session="s", phase="cognate", second=0, **metadata):
    metadata = {**META, "created_at": f"2026-01-01T00:00:{second:02d}", **metadata}
    path = registry.db_path.parent.parent / "sessions" / session / name
    return registry.register_model(
        model_path=path, session_id=session, phase_name=phase, model_name=name, metadata=metadata
    )


def names(rows):
    return [row["model_name"] for row in rows]


# The file


def test_pragmas_and_columns(registry):
    def pragma(name):
        return registry.conn.execute(f"PRAGMA {name}").fetchone()[0]

    expected = {"journal_mode": "wal", "synchronous": 1, "cache_size": 10000, "temp_store": 2, "page_size": 4096}
    expected |= {"auto_vacuum": 2, "foreign_keys": 1, "busy_timeout": 30_000, "mmap_size": 268435456}
    assert {name: pragma(name) for name in expected} == expected
    columns = {
        table: {row[1] for row in registry.conn.execute(f"PRAGMA table_info({table})")}
        for table in ("models", "phase_handoffs", "sessions")
    }
    spec = "session_id pipeline_config_json start_time end_time status current_phase progress_percent"
    assert columns["sessions"] == {*spec.split(), "pid", "pid_started", "updated_at"}
    spec = "model_id session_id phase_name model_name model_path size_mb parameters created_at metadata_json tags"
    assert columns["models"] == set(spec.split())
    assert "validation_metrics_json" in columns["phase_handoffs"] and len(columns["phase_handoffs"]) == 8


def first_version(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    old = sqlite3.connect(path)
    for statement in MIGRATIONS[0]:
        old.execute(statement)
    old.execute("INSERT INTO sessions (session_id, status) VALUES ('old', 'completed')")
    old.execute(
        "INSERT INTO models (model_id, session_id, phase_name, model_name, model_path, metadata_json, tags) "
        "VALUES ('cognate_a_20250101_000000', 'old', 'cognate', 'a', '/elsewhere/model.pt', '{}', 'x,y')"
    )
    old.commit()
    old.close()


def test_migration_keeps_the_data_and_a_backup(tmp_path):
    path = tmp_path / "registry" / "r.db"
    first_version(path)
    with ModelRegistry(path) as registry:
        assert not registry.was_empty
        assert registry.get_session("old")["pid"] is None
        model = registry.get_model("cognate_a_20250101_000000")
        assert model["model_path"] == "/elsewhere/model.pt" and model["tags"] == ["x", "y"]
        assert registry.conn.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS)
    backup = sqlite3.connect(backup_path(path, 0))
    assert backup.execute("SELECT session_id FROM sessions").fetchall() == [("old",)]
    assert "pid" not in {row[1] for row in backup.execute("PRAGMA table_info(sessions)")}
    assert backup.execute("PRAGMA user_version").fetchone()[0] == 0
    backup.close()
    before = backup_path(path, 0).stat().st_mtime_ns
    ModelRegistry(path).close()
    assert backup_path(path, 0).stat().st_mtime_ns == before
    assert not [name for name in os.listdir(path.parent) if name.endswith(".unfinished")]


def test_failed_migration_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "registry" / "r.db"
    first_version(path)
    monkeypatch.setattr("forgekit.store.migrations.MIGRATIONS", (*MIGRATIONS, ("CREATE TABLE t (x)", "NONSENSE")))
    with pytest.raises(sqlite3.OperationalError, match="NONSENSE"):
        ModelRegistry(path)
    plain = sqlite3.connect(path)
    assert plain.execute("PRAGMA user_version").fetchone()[0] == 0
    assert plain.execute("SELECT count(*) FROM sqlite_master WHERE name = 't'").fetchone()[0] == 0
    plain.close()


def test_no_room_for_the_backup(tmp_path, monkeypatch):
    path = tmp_path / "registry" / "r.db"
    first_version(path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ResourceError, match="disk is full"):
        ModelRegistry(path)
    assert not backup_path(path, 0).exists()
    assert not [name for name in os.listdir(path.parent) if name.endswith(".unfinished")]


def test_newer_version(tmp_path):
    path = tmp_path / "registry" / "r.db"
    ModelRegistry(path).close()
    plain = sqlite3.connect(path)
    plain.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    plain.close()
    with pytest.raises(ArtifactError, match=r"r\.db: made by a newer version.*upgrade"):
        ModelRegistry(path)


def filled(path: Path, models: int = 60) -> None:
    with ModelRegistry(path) as registry:
        registry.create_session({}, "s")
        for number in range(models):
            add(registry, f"m{number}", notes="x" * 2000)
        registry.checkpoint_wal()


def overwrite(path: Path, start: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(data)


@pytest.mark.parametrize("damage", ["half", "header", "middle"])
def test_damaged_file_is_named_with_a_remedy(tmp_path, damage):
    path = tmp_path / "registry" / "r.db"
    filled(path)
    size = path.stat().st_size
    assert size > 100_000
    if damage == "half":
        os.truncate(path, size // 2 + 100)
    elif damage == "header":
        overwrite(path, 0, b"not a database at all")
    else:
        overwrite(path, size // 8, os.urandom(size // 2))
    with pytest.raises(ArtifactError, match=r"r\.db: damaged database.*move r\.db, r\.db-wal.*indexed anew") as caught:
        ModelRegistry(path)
    assert "\n" not in str(caught.value)
    backup_path(path, 0).write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"rename r\.db\.v0\.backup to r\.db"):
        ModelRegistry(path)


def test_file_cut_to_nothing_is_known_as_empty(tmp_path):
    path = tmp_path / "registry" / "r.db"
    filled(path, 1)
    os.truncate(path, 0)
    with ModelRegistry(path) as registry:
        assert registry.was_empty and registry.get_all_sessions() == []


def test_folder_instead_of_a_file(tmp_path):
    (tmp_path / "r.db").mkdir()
    with pytest.raises(ResourceError, match=r"r\.db: cannot be used"):
        ModelRegistry(tmp_path / "r.db")


def test_full_disk(registry):
    pages = registry.conn.execute("PRAGMA page_count").fetchone()[0]
    registry.conn.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(ResourceError, match="disk is full"):
        for number in range(50):
            add(registry, f"m{number}", notes="x" * 3000)
    registry.conn.execute("PRAGMA max_page_count = 100000")
    assert add(registry, "after")


def test_locked_by_another(registry):
    other = sqlite3.connect(registry.db_path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    registry.conn.execute("PRAGMA busy_timeout = 20")
    with pytest.raises(ResourceError, match="another process has held the database"):
        registry.update_session("s", progress_percent=1)
    assert registry.get_session("s")["progress_percent"] == 0
    other.execute("ROLLBACK")
    other.close()


def test_opening_waits_where_sqlite_itself_does_not(tmp_path, monkeypatch):
    """Two processes that turn one new file into WAL mode: about one in 500 fails at once, unless it tries again."""
    path = tmp_path / "r.db"
    first_version(path)
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    opener = sqlite3.connect(path, timeout=0)  # SQLite's own waiting is off, as it is in that race
    with monkeypatch.context() as patch, pytest.raises(sqlite3.OperationalError, match="locked"):
        patch.setattr("forgekit.store.connection.BUSY_SECONDS", 0.05)
        _patiently(opener, "PRAGMA journal_mode = WAL")
    release = threading.Timer(0.2, holder.close)
    release.start()
    _patiently(opener, "PRAGMA journal_mode = WAL")
    assert opener.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    release.join()
    opener.close()


def test_half_opened_connection_is_closed(tmp_path):
    (tmp_path / "r.db").write_bytes(b"no database " * 1000)
    with pytest.raises(ArtifactError, match="damaged database"):
        ModelRegistry(tmp_path / "r.db")
    assert not [fd for fd in Path("/proc/self/fd").glob("*") if os.path.realpath(fd) == str(tmp_path / "r.db")]


def test_vacuum_and_checkpoint(registry):
    for number in range(100):
        add(registry, f"m{number}", notes="x" * 2000)
    registry.remove_session("s")
    assert registry.vacuum_incremental(pages=7) == 7
    assert registry.vacuum_incremental(pages=10_000) > 30
    wal = registry.db_path.with_name("r.db-wal")
    assert wal.stat().st_size > 0
    reader = sqlite3.connect(registry.db_path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM sessions").fetchone()
    registry.create_session({}, "later")
    registry.conn.execute("PRAGMA busy_timeout = 20")
    assert registry.checkpoint_wal() is False
    reader.close()
    assert registry.checkpoint_wal() is True
    assert wal.stat().st_size == 0


# Many at once


def write_many(path: str, gate, count: int) -> None:
    with ModelRegistry(path) as registry:
        gate.wait()
        registry.create_session({}, "shared")
        for number in range(count):
            add(registry, f"m{number}", "shared", parents=[f"parent_{number}"])
            registry.update_session("shared", progress_percent=number / 2)


def read_many(path: str, gate, results) -> None:
    with ModelRegistry(path) as registry:
        gate.wait()
        seen = [0]
        deadline = time.monotonic() + 20
        while seen[-1] < 150 and time.monotonic() < deadline:
            rows = registry.search_models(session_id="shared", limit=1000)
            assert all(row["metadata"]["parameters"] == 10 for row in rows)
            session = registry.get_current_session()
            assert session is None or session["status"] == "running"
            seen.append(len(rows))
        results.put(seen)


def test_one_writer_and_eight_readers_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    path, gate, results = str(tmp_path / "registry" / "r.db"), context.Barrier(9), context.Queue()
    workers = [context.Process(target=write_many, args=(path, gate, 150))]
    workers += [context.Process(target=read_many, args=(path, gate, results)) for _ in range(8)]
    for worker in workers:
        worker.start()
    counts = [results.get(timeout=60) for _ in range(8)]
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 9
    assert all(seen == sorted(seen) and seen[-1] == 150 for seen in counts)
    with ModelRegistry(path) as registry:
        assert len(registry.find_ids()) == 150
        assert registry.get_session("shared")["progress_percent"] == 74.5


def test_threads_have_their_own_connections_and_lose_nothing(registry):
    failures, connections, gate = [], set(), threading.Barrier(6)

    def work(thread):
        try:
            connections.add(id(registry.conn))
            gate.wait()
            for number in range(10):
                add(registry, f"t{thread}_{number}")
        except (ForgeError, sqlite3.Error) as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and len(connections) == 6
    assert len(registry.find_ids()) == 60


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_opens_its_own_connection(registry):
    parents = registry.conn
    child = os.fork()
    if child == 0:
        try:
            good = registry.conn is not parents and add(registry, "child")
            registry.close()
            os._exit(0 if good else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert registry.conn is parents
    add(registry, "parent")
    assert set(names(registry.search_models())) == {"child", "parent"}


def test_a_transaction_is_all_or_nothing(registry):
    with pytest.raises(ZeroDivisionError), registry.transaction():
        add(registry, "lost")
        raise ZeroDivisionError
    assert registry.find_ids() == []


# Sessions


def test_session_life(registry):
    row = registry.get_session("s")
    assert row["config"] == {"profile": "pico"} and row["status"] == "running" and row["progress_percent"] == 0
    assert row["pid"] == os.getpid() and session_alive(row)
    registry.update_session("s", current_phase="forge", progress_percent=12.5)
    row = registry.get_session("s")
    assert (row["current_phase"], row["progress_percent"], row["end_time"]) == ("curriculum", 12.5, None)
    registry.update_session("s", status="failed")
    assert registry.get_session("s")["end_time"] and not session_alive(registry.get_session("s"))
    registry.update_session("s", status="running")
    assert registry.get_session("s")["end_time"] is None
    registry.update_session("s", status="paused")
    assert registry.get_session("s")["end_time"] is None
    assert registry.get_session("nothing") is None


def test_resuming_makes_the_caller_the_owner(registry):
    script = (
        "import sys; from forgekit.store.database import ModelRegistry as R; R(sys.argv[1]).create_session({}, 'dead')"
    )
    subprocess.run([sys.executable, "-c", script, registry.db_path], check=True)
    assert not session_alive(registry.get_session("dead"))
    registry.update_session("dead", progress_percent=1)
    assert not session_alive(registry.get_session("dead"))
    registry.update_session("dead", status="running")
    assert session_alive(registry.get_session("dead"))


class Hesitant(ModelRegistry):
    """Lets time pass between looking at a session and changing it: whoever does not lock first loses here."""

    def get_session(self, session_id):
        row = super().get_session(session_id)
        time.sleep(0.2)
        return row


def claim(registry, gate, session: str) -> str:
    gate.wait(30)
    try:
        registry.claim_session(session)
        return "mine"
    except ArtifactError as error:
        return str(error)


def claim_elsewhere(path: str, gate, results) -> None:
    with Hesitant(path) as registry:
        results.put((os.getpid(), claim(registry, gate, "s")))
        gate.wait(30)  # the owner stays alive until everyone was answered


def test_of_processes_that_claim_a_session_at_once_one_gets_it(registry):
    registry.update_session("s", status="paused")
    context = multiprocessing.get_context("spawn")
    gate, results = context.Barrier(3), context.Queue()
    workers = [context.Process(target=claim_elsewhere, args=(str(registry.db_path), gate, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    answers = dict(results.get(timeout=30) for _ in workers)
    for worker in workers:
        worker.join(30)
    (owner,) = [pid for pid, answer in answers.items() if answer == "mine"]
    told = f"session s: is running in process {owner}; wait, or stop it first"
    assert sorted(answers.values()) == sorted(["mine", told, told])
    assert registry.get_session("s")["pid"] == owner and not session_alive(registry.get_session("s"))


def test_of_threads_that_claim_a_session_at_once_one_gets_it(registry):
    registry.update_session("s", status="paused")
    gate, answers = threading.Barrier(3), []
    with Hesitant(registry.db_path) as other:
        threads = [threading.Thread(target=lambda: answers.append(claim(other, gate, "s"))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(answer == "mine" for answer in answers) == [False, False, True]


@pytest.mark.parametrize("status", ["running", "paused", "failed", "completed"])
def test_a_session_whose_owner_is_gone_can_be_claimed(registry, status):
    registry.update_session("s", status=status)
    registry.conn.execute("UPDATE sessions SET pid_started = 1")
    registry.claim_session("s")
    row = registry.get_session("s")
    assert row["status"] == "running" and row["pid"] == os.getpid() and session_alive(row) and row["end_time"] is None
    with pytest.raises(ArtifactError, match="is running in process"):
        registry.claim_session("s")
    with pytest.raises(ArtifactError, match="no session 'nothing'"):
        registry.claim_session("nothing")


def test_current_session_is_the_newest_alive_else_the_newest(registry):
    registry.create_session({}, "t")
    registry.create_session({}, "u")
    registry.update_session("u", status="completed")
    assert registry.get_current_session()["session_id"] == "t"
    registry.conn.execute("UPDATE sessions SET pid_started = 1")
    assert registry.get_current_session()["session_id"] == "u"
    assert [row["session_id"] for row in registry.get_all_sessions()] == ["u", "t", "s"]
    for session in "stu":
        registry.remove_session(session)
    assert registry.get_current_session() is None


def test_session_refusals(registry):
    assert len(registry.create_session({})) == 36
    with pytest.raises(ArtifactError, match="session s exists already"):
        registry.create_session({}, "s")
    with pytest.raises(ConfigError, match="session_id"):
        registry.create_session({}, "../s")
    with pytest.raises(ConfigError, match="status: value 'done' refused; choose one of running"):
        registry.update_session("s", status="done")
    with pytest.raises(ConfigError, match="progress_percent"):
        registry.update_session("s", progress_percent=101)
    registry.create_session({}, "session-one")
    with pytest.raises(ArtifactError, match="no session 'session-on'; did you mean session-one"):
        registry.update_session("session-on", progress_percent=1)


def test_phases_of_a_session(registry):
    add(registry, "a", second=1, metrics={"loss": 2.0})
    newest = add(registry, "b", second=2, metrics={"loss": 1.0}, duration_seconds=3.5)
    add(registry, "o", phase="own")
    registry.update_session("s", current_phase="evomerge")
    rows = {row["phase_name"]: row for row in registry.get_all_phases("s")}
    assert list(rows)[:3] == ["cognate", "evomerge", "quietstar"] and list(rows)[-1] == "own" and len(rows) == 9
    assert rows["cognate"] == {
        "phase_name": "cognate", "status": "completed", "models": 2, "model_id": newest, "duration_seconds": 3.5,
        "metrics": {"loss": 1.0},
    }  # fmt: skip
    assert rows["evomerge"]["status"] == "running" and rows["quietstar"]["status"] == "pending"
    registry.conn.execute("UPDATE sessions SET pid_started = 1")
    assert registry.get_all_phases("s")[1]["status"] == "failed"
    with pytest.raises(ArtifactError, match="no session"):
        registry.get_all_phases("nothing")


# Models


def test_model_row(registry):
    model_id = add(registry, "Big-One", phase="edge", tags=["a", "b"], metrics={"loss": 1.5})
    row = registry.get_model(model_id)
    assert model_id.startswith("experts_big_one_20")
    assert (row["phase_name"], row["parameters"], row["size_mb"]) == ("experts", 10, 0.1)
    assert row["tags"] == ["a", "b"] and row["metrics"] == {"loss": 1.5}
    assert row["metadata"]["model_id"] == model_id
    assert row["model_path"] == str(registry.db_path.parent.parent / "sessions" / "s" / "Big-One")


def test_moved_storage_finds_its_models(registry, tmp_path):
    model_id = add(registry, "a")
    elsewhere = registry.register_model(
        model_path="/elsewhere/m", session_id="s", phase_name="cognate", model_name="b", metadata=META
    )
    registry.checkpoint_wal()
    registry.close()
    (tmp_path / "registry").rename(tmp_path / "moved")
    (tmp_path / "new").mkdir()
    (tmp_path / "moved").rename(tmp_path / "new" / "registry")
    with ModelRegistry(tmp_path / "new" / "registry" / "r.db") as moved:
        assert moved.get_model(model_id)["model_path"] == str(tmp_path / "new" / "sessions" / "s" / "a")
        assert moved.get_model(elsewhere)["model_path"] == "/elsewhere/m"


def test_taken_ids_get_a_number_and_the_same_folder_stays_one(registry):
    fields = {"session_id": "s", "phase_name": "cognate", "model_name": "m", "parameters": 1}
    manifest = Manifest(model_id="cognate_m_20260101_000000", created_at="2026-01-01", **fields)
    ids = [registry.register_model(manifest, f"/m{number}") for number in (1, 2, 3, 2)]
    first = "cognate_m_20260101_000000"
    assert ids == [first, f"{first}_2", f"{first}_3", f"{first}_2"]
    assert len(registry.find_ids()) == 3
    assert registry.get_model(f"{first}_2")["metadata"]["model_id"] == f"{first}_2"


def test_register_refusals(registry):
    with pytest.raises(ConfigError, match="model_path: missing"):
        registry.register_model(session_id="s", phase_name="cognate", model_name="m", metadata=META)
    with pytest.raises(ConfigError, match="parameters: missing"):
        registry.register_model(model_path="/m", session_id="s", phase_name="cognate", model_name="m")
    with pytest.raises(ArtifactError, match="no session 'nothing'.*create it first"):
        add(registry, "m", session="nothing")
    with pytest.raises(ConfigError, match="give model_id"):
        registry.get_model()
    assert registry.find_ids() == []


def test_get_model_newest_of_session_and_phase(registry):
    registry.create_session({}, "t")
    add(registry, "late", second=9)
    add(registry, "early", second=1)
    add(registry, "other", phase="baking", second=30)
    add(registry, "theirs", session="t", second=50)
    assert registry.get_model(session_id="s", phase_name="cognate")["model_name"] == "late"
    assert registry.get_model(session_id="s")["model_name"] == "other"
    assert registry.get_model(session_id="s", phase_name="evomerge") is None
    assert registry.get_model("nothing") is None


def test_search(registry):
    registry.create_session({}, "t")
    add(registry, "Alpha", tags=["x", "y"], second=1)
    add(registry, "beta", tags=["x"], phase="forge", second=2)
    add(registry, "alphabet", session="t", tags=["xy"], second=3)
    add(registry, "100%", session="t", second=4)
    search = registry.search_models
    assert names(search()) == ["100%", "alphabet", "beta", "Alpha"]
    assert names(search(limit=2)) == ["100%", "alphabet"]
    assert names(search(tag="x")) == ["beta", "Alpha"] and names(search(tag="x", limit=1)) == ["beta"]
    assert names(search(tag="x", phase="curriculum")) == names(search(phase="forge")) == ["beta"]
    assert names(search(name="ALPHA")) == ["alphabet", "Alpha"] and names(search(name="%")) == ["100%"]
    assert names(search(session_id="t", name="alpha")) == ["alphabet"]
    assert search(tag="nothing") == [] and search(name="a", tag="x", session_id="t") == []


def test_find_ids_by_prefix(registry):
    first, second = add(registry, "a"), add(registry, "b")
    assert registry.find_ids() == registry.find_ids("cognate_") == [first, second]
    assert registry.find_ids("cognate_b") == [second] and registry.find_ids("x") == []
    assert registry.find_ids("", limit=1) == [first]


# Lineage and handoffs


def test_lineage_breadth_first_without_repeats(registry):
    trunk = add(registry, "trunk")
    left, right = add(registry, "left", parents=[trunk]), add(registry, "right", parents=[trunk])
    merged = add(registry, "merged", parents=[right, left, right], phase="evomerge")
    final = add(registry, "final", parents=[merged, "gone_model"], phase="baking")
    assert registry.ancestors(final) == [merged, "gone_model", right, left, trunk]
    assert registry.descendants(trunk) == [left, right, merged, final]
    assert registry.ancestors(trunk) == registry.descendants(final) == registry.ancestors("nothing") == []
    registry.conn.execute("INSERT INTO parents VALUES (?, ?, 0)", (trunk, final))
    assert registry.ancestors(trunk) == [final, merged, "gone_model", right, left]
    assert set(registry.descendants(trunk)) == {left, right, merged, final}


def test_handoffs(registry):
    registry.create_session({}, "t")
    source, target = add(registry, "a"), add(registry, "b", phase="evomerge")
    foreign = add(registry, "c", session="t", phase="baking")
    registry.record_handoff(source, target, validation_status="passed", validation_metrics={"models": 3})
    registry.record_handoff(target, target, target_phase="quietstar", validation_status="failed")
    registry.record_handoff(target, foreign)
    rows = registry.get_handoffs("s")
    assert [(row["source_phase"], row["target_phase"], row["validation_status"]) for row in rows] == [
        ("cognate", "evomerge", "passed"), ("evomerge", "quietstar", "failed"), ("evomerge", "baking", "pending"),
    ]  # fmt: skip
    assert rows[0]["validation_metrics"] == {"models": 3}
    assert len(registry.get_handoffs("t")) == 1 and registry.get_handoffs("nothing") == []
    with pytest.raises(ArtifactError, match=r"no model 'cognate_a_x'; did you mean cognate_a_"):
        registry.record_handoff("cognate_a_x", target)
    with pytest.raises(ConfigError, match="validation_status"):
        registry.record_handoff(source, target, validation_status="fine")


def test_removing_a_session_takes_its_rows_only(registry):
    registry.create_session({}, "t")
    mine, theirs = add(registry, "a", tags=["x"]), add(registry, "b", session="t", tags=["x"])
    child = add(registry, "c", session="t", parents=[mine, theirs])
    registry.record_handoff(mine, theirs)
    registry.record_handoff(theirs, mine)
    registry.record_handoff(theirs, child)
    registry.remove_session("s")
    assert registry.find_ids() == [theirs, child] and registry.get_session("s") is None
    assert len(registry.get_handoffs("t")) == 1
    assert names(registry.search_models(tag="x")) == ["b"]
    assert registry.ancestors(child) == [mine, theirs], "lineage outlives the removed parent"
    assert registry.conn.execute("PRAGMA foreign_key_check").fetchall() == []
