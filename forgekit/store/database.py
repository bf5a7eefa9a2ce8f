"""The model registry: sessions, models, lineage and handoffs in one SQLite file that many processes may use at once."""

from __future__ import annotations

import difflib
import json
import os
import signal
import sqlite3
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forgekit.errors import ArtifactError, ConfigError, ResourceError
from forgekit.store.artifact import Manifest
from forgekit.store.connection import connect, corrupt, database_errors
from forgekit.store.fsio import make_folder
from forgekit.store.migrations import migrate
from forgekit.store.names import PHASES, canonical_phase, check_session_id, utc_text
from forgekit.store.process import own_process, process_alive

STATUSES = ("running", "completed", "failed", "paused")
VALIDATIONS = ("passed", "failed", "pending")
Row = dict[str, Any]


class ModelRegistry:
    """Sessions, models, lineage and handoffs.

    Safe to share between threads and to use after a fork: each (process, thread) has its own connection. Rows are plain
    dicts of the columns; a model's row also has ``metadata``, ``metrics`` and ``tags`` decoded, and an absolute
    ``model_path``. Paths below the storage folder are stored relative to it, so the folder can be moved.

    Args:
        db_path: the file, ``<storage>/registry/model_registry.db``; created when missing.

    Raises:
        ArtifactError: the file is damaged, or made by a newer version.
        ResourceError: it cannot be opened or written.
    """

    def __init__(self, db_path: Path | str = "./storage/registry/model_registry.db") -> None:
        self.db_path = Path(db_path).absolute()
        self._base = self.db_path.parent.parent
        self._connections: dict[tuple[int, int], sqlite3.Connection] = {}
        make_folder(self.db_path.parent)
        with database_errors(self.db_path):
            self.was_empty = migrate(self.conn, self.db_path)
            damage = self.conn.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise corrupt(self.db_path, damage)

    @property
    def conn(self) -> sqlite3.Connection:
        """This thread's connection, in autocommit mode."""
        # A connection inherited by a fork stays in the table unused: closing it here would disturb the parent's.
        key = (os.getpid(), threading.get_ident())
        if key not in self._connections:
            with database_errors(self.db_path):
                self._connections[key] = connect(self.db_path)
        return self._connections[key]

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing: one write transaction, joined when this thread is already in one."""
        with database_errors(self.db_path):
            connection = self.conn
            if connection.in_transaction:
                yield connection
                return
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close this process's connections; a later call opens new ones."""
        for key in [key for key in self._connections if key[0] == os.getpid()]:
            self._connections.pop(key).close()

    def __enter__(self) -> ModelRegistry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Sessions

    def create_session(self, config: dict[str, Any], session_id: str | None = None) -> str:
        """Open a session owned by this process; returns its id, a new UUID unless one is given.

        Raises:
            ArtifactError: the id is taken.
            ConfigError: the id cannot be a folder name.
        """
        session_id = check_session_id(session_id) if session_id is not None else str(uuid.uuid4())
        now, (pid, started) = utc_text(), own_process()
        with self.transaction() as connection:
            if self.get_session(session_id):
                raise ArtifactError(f"session {session_id} exists already", remedy="resume it, or choose another id")
            connection.execute(
                "INSERT INTO sessions (session_id, pipeline_config_json, start_time, status, progress_percent, pid, "
                "pid_started, updated_at) VALUES (?, ?, ?, 'running', 0.0, ?, ?, ?)",
                (session_id, json.dumps(config, default=str), now, pid, started, now),
            )
        return session_id

    def update_session(
        self,
        session_id: str,
        *,
        status: str | None = None,
        current_phase: str | None = None,
        progress_percent: float | None = None,
        plan: dict[str, Any] | None = None,
    ) -> None:
        """Change what is given. Setting ``running`` makes this process the owner; ending a session sets its end time.

        Raises:
            ArtifactError: no such session.
            ConfigError: unknown status, or progress outside 0 to 100.
        """
        changes: Row = {"updated_at": utc_text()}
        if status is not None:
            _one_of("status", status, STATUSES)
            ended = status in ("completed", "failed")
            changes |= {"status": status, "end_time": changes["updated_at"] if ended else None}
        if status == "running":
            changes["pid"], changes["pid_started"] = own_process()
        if current_phase is not None:
            changes["current_phase"] = canonical_phase(current_phase)
        if progress_percent is not None:
            if not 0 <= progress_percent <= 100:
                what, remedy = f"value {progress_percent!r} refused", "give a percentage from 0 to 100"
                raise ConfigError(what, where="progress_percent", remedy=remedy)
            changes["progress_percent"] = progress_percent
        if plan is not None:
            changes["pipeline_config_json"] = json.dumps(plan, default=str)
        sets = ", ".join(f"{column} = ?" for column in changes)
        with self.transaction() as connection:
            query = f"UPDATE sessions SET {sets} WHERE session_id = ?"
            if connection.execute(query, (*changes.values(), session_id)).rowcount == 0:
                raise self._no_session(session_id)

    def claim_session(self, session_id: str) -> None:
        """Make this process the owner of a session that no living process is running.

        Raises:
            ArtifactError: no such session, or another process is running it; of two that ask at once one is refused.
        """
        with self.transaction():
            row = self.get_session(session_id)
            if row is None:
                raise self._no_session(session_id)
            if row["status"] == "running" and session_alive(row):
                what = f"is running in process {row['pid']}"
                raise ArtifactError(what, where=f"session {session_id}", remedy="wait, or stop it first")
            self.update_session(session_id, status="running")

    def get_session(self, session_id: str) -> Row | None:
        """The session's row with ``config`` decoded; None if there is none."""
        rows = self._rows("SELECT * FROM sessions WHERE session_id = ?", session_id)
        return {**rows[0], "config": json.loads(rows[0]["pipeline_config_json"] or "{}")} if rows else None

    def get_all_sessions(self) -> list[Row]:
        """Every session's row, newest first."""
        return self._rows("SELECT * FROM sessions ORDER BY start_time DESC, rowid DESC")

    def get_current_session(self) -> Row | None:
        """The newest session whose process is alive, else the newest of all; None if there is none."""
        running = self._rows("SELECT * FROM sessions WHERE status = 'running' ORDER BY start_time DESC, rowid DESC")
        alive = (row["session_id"] for row in running if session_alive(row))
        newest = self._rows("SELECT session_id FROM sessions ORDER BY start_time DESC, rowid DESC LIMIT 1")
        session_id = next(alive, newest[0]["session_id"] if newest else None)
        return self.get_session(session_id) if session_id else None

    def get_all_phases(self, session_id: str) -> list[Row]:
        """One row per phase in pipeline order, the eight built-in ones first.

        Keys: ``phase_name``, ``status`` (completed, pending, or the session's own for its current phase), ``models``
        (how many), ``model_id`` (the newest), ``duration_seconds`` and ``metrics`` from that model's metadata.

        Raises:
            ArtifactError: no such session.
        """
        session = self.get_session(session_id)
        if session is None:
            raise self._no_session(session_id)
        newest = self._rows(
            "SELECT m.*, count(*) AS models, max(created_at) FROM models m WHERE session_id = ? GROUP BY phase_name",
            session_id,
        )
        made = {row["phase_name"]: self._model(row) for row in newest}
        current = session["current_phase"]
        names = dict.fromkeys([*PHASES, *made, *([current] if current else [])])
        return [_phase_row(name, made.get(name), session) for name in names]

    def interrupt_session(self, session_id: str) -> int:
        """Send the process that runs a session what Ctrl-C sends; returns its pid. It stops at its next safe point.

        Raises:
            ArtifactError: no such session, or no living process runs it.
            ResourceError: the process belongs to another user.
        """
        row = self.get_session(session_id)
        if row is None:
            raise self._no_session(session_id)
        where, remedy = f"session {session_id}", f"go on with: agent-forge run --resume {session_id[:8]}"
        if not session_alive(row):
            raise ArtifactError("is not running", where=where, remedy=remedy)
        try:
            os.kill(row["pid"], signal.SIGINT)
        except ProcessLookupError:
            raise ArtifactError("is not running any more", where=where, remedy=remedy) from None
        except PermissionError:
            what = f"process {row['pid']} belongs to another user"
            raise ResourceError(what, where=where, remedy="ask its owner to pause it") from None
        return row["pid"]

    def remove_session(self, session_id: str) -> None:
        """Delete a session's rows: handoffs that touch its models, the models, then the session. Files stay."""
        mine = "(SELECT model_id FROM models WHERE session_id = ?)"
        with self.transaction() as connection:
            connection.execute(f"DELETE FROM phase_handoffs WHERE source_model_id IN {mine}", (session_id,))
            connection.execute(f"DELETE FROM phase_handoffs WHERE target_model_id IN {mine}", (session_id,))
            connection.execute("DELETE FROM models WHERE session_id = ?", (session_id,))
            connection.execute("DELETE FROM sessions WHERE session_id = ?", (session_id,))

    # Models

    def register_model(
        self,
        manifest: Manifest | None = None,
        model_path: Path | str = "",
        *,
        session_id: str = "",
        phase_name: str = "",
        model_name: str = "",
        metadata: dict[str, Any] | None = None,
    ) -> str:
        """Enter a model, from its manifest or from the four fields; the session must exist.

        Registering the same folder again changes nothing. An id that is taken gets ``_2``, ``_3`` ….

        Returns:
            The model's id.

        Raises:
            ArtifactError: no such session.
            ConfigError: the metadata lacks a required key or a value is refused.
        """
        if not str(model_path):
            raise ConfigError("missing", where="model_path", remedy="give the folder of the model")
        manifest = manifest or Manifest.describe(session_id, phase_name, model_name, metadata or {})
        path = self._stored_path(model_path)
        with self.transaction() as connection:
            known = "SELECT model_id FROM models WHERE model_path = ? AND created_at = ?"
            if same := self._rows(known, path, manifest.created_at):
                return same[0]["model_id"]
            if not self._rows("SELECT 1 FROM sessions WHERE session_id = ?", manifest.session_id):
                raise self._no_session(manifest.session_id)
            manifest = manifest.replace(model_id=self._free_id(manifest.model_id))
            self._insert(connection, manifest, path)
        return manifest.model_id

    def get_model(
        self, model_id: str | None = None, session_id: str | None = None, phase_name: str | None = None
    ) -> Row | None:
        """The model with this id, or the newest of a session and phase; None if there is none."""
        if model_id is None and session_id is None and phase_name is None:
            raise ConfigError("no model named", where="model_id", remedy="give model_id, or session_id and phase_name")
        phase = canonical_phase(phase_name) if phase_name is not None else None
        rows = self._select({"m.model_id = ?": model_id, "session_id = ?": session_id, "phase_name = ?": phase}, 1)
        return rows[0] if rows else None

    def search_models(
        self,
        phase: str | None = None,
        session_id: str | None = None,
        tag: str | None = None,
        name: str | None = None,
        limit: int = 100,
    ) -> list[Row]:
        """Models that satisfy everything given, newest first.

        Args:
            phase: phase name or alias.
            session_id: the session's id.
            tag: one whole tag.
            name: part of the model's name, in any case.
            limit: at most so many.
        """
        wanted = {
            "phase_name = ?": canonical_phase(phase) if phase is not None else None,
            "session_id = ?": session_id,
            "instr(lower(model_name), lower(?)) > 0": name,
        }
        return self._select(wanted, limit, tag)

    def find_ids(self, prefix: str = "", limit: int = -1) -> list[str]:
        """Ids that begin with ``prefix``, in alphabetical order; all when ``limit`` is negative."""
        query = "SELECT model_id FROM models WHERE model_id >= ? AND model_id < ? ORDER BY model_id LIMIT ?"
        with database_errors(self.db_path):
            return [row[0] for row in self.conn.execute(query, (prefix, prefix + "\U0010ffff", limit))]

    # Lineage

    def ancestors(self, model_id: str) -> list[str]:
        """Ids of the models it was made from, parents first, then theirs; ids of removed models included."""
        return self._walk(model_id, "model_id", "parent_id")

    def descendants(self, model_id: str) -> list[str]:
        """Ids of the models made from it, children first, then theirs."""
        return self._walk(model_id, "parent_id", "model_id")

    def record_handoff(
        self,
        source_model_id: str,
        target_model_id: str,
        *,
        target_phase: str | None = None,
        validation_status: str = "pending",
        validation_metrics: dict[str, Any] | None = None,
        handoff_id: str | None = None,
    ) -> str:
        """Record that a model was handed to a phase; returns the handoff's id.

        Args:
            source_model_id: the model handed over.
            target_model_id: what the phase made of it; the source itself if nothing was made, as after a failed check.
            target_phase: the receiving phase; the target model's own when omitted.
            validation_status: passed, failed or pending.
            validation_metrics: what the validation measured.
            handoff_id: an id of the caller's, whose earlier row is replaced; a new one when omitted.

        Raises:
            ArtifactError: one of the models is not registered.
            ConfigError: unknown status.
        """
        _one_of("validation_status", validation_status, VALIDATIONS)
        handoff_id = handoff_id or str(uuid.uuid4())
        with self.transaction() as connection:
            source, target = (self._known_model(model_id) for model_id in (source_model_id, target_model_id))
            phase = canonical_phase(target_phase) if target_phase is not None else target["phase_name"]
            values = (handoff_id, source["phase_name"], phase, source_model_id, target_model_id, utc_text())
            metrics = json.dumps(validation_metrics or {}, default=str)
            insert = "INSERT OR REPLACE INTO phase_handoffs VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
            connection.execute(insert, (*values, validation_status, metrics))
        return handoff_id

    def complete_handoff(self, handoff_id: str, target_model_id: str) -> None:
        """Enter what a phase made of a model that was handed to it; an unknown id is passed over.

        Raises:
            ArtifactError: the model is not registered.
        """
        with self.transaction() as connection:
            self._known_model(target_model_id)
            change = "UPDATE phase_handoffs SET target_model_id = ? WHERE handoff_id = ?"
            connection.execute(change, (target_model_id, handoff_id))

    def get_handoffs(self, session_id: str) -> list[Row]:
        """Handoffs from or to models of the session, oldest first, with ``validation_metrics`` decoded."""
        mine = "(SELECT model_id FROM models WHERE session_id = ?)"
        rows = self._rows(
            f"SELECT * FROM phase_handoffs WHERE source_model_id IN {mine} UNION "
            f"SELECT * FROM phase_handoffs WHERE target_model_id IN {mine} ORDER BY handoff_timestamp",
            session_id,
            session_id,
        )
        return [{**row, "validation_metrics": json.loads(row["validation_metrics_json"] or "{}")} for row in rows]

    # Upkeep

    def checkpoint_wal(self) -> bool:
        """Move the write-ahead log into the database and empty it; False if a reader held part of it back."""
        return self._rows("PRAGMA wal_checkpoint(TRUNCATE)")[0]["busy"] == 0

    def vacuum_incremental(self, pages: int = 100) -> int:
        """Give up to ``pages`` free pages (4 KiB each) back to the disk; returns how many."""
        before = self._rows("PRAGMA freelist_count")[0]["freelist_count"]
        with database_errors(self.db_path):  # a page goes per step, and `execute` takes only one step here
            self.conn.executescript(f"PRAGMA incremental_vacuum({int(pages)})")
        return before - self._rows("PRAGMA freelist_count")[0]["freelist_count"]

    # Inside

    def _rows(self, query: str, *values: Any) -> list[Row]:
        with database_errors(self.db_path):
            return [dict(row) for row in self.conn.execute(query, values).fetchall()]

    def _select(self, wanted: dict[str, Any], limit: int, tag: str | None = None) -> list[Row]:
        """Models by condition, newest first; conditions whose value is None do not apply."""
        given = {condition: value for condition, value in wanted.items() if value is not None}
        tables, order = "models m", "m.created_at DESC, m.rowid DESC"
        if tag is not None:
            # CROSS fixes the order of the loops: the tag's own index is walked from the newest until the limit.
            tables, order = "model_tags t CROSS JOIN models m ON m.model_id = t.model_id", "t.created_at DESC"
            given = {"t.tag = ?": tag, **given}
        where = f"WHERE {' AND '.join(given)}" if given else ""
        # Find narrow rows first, then fetch the wide ones: their metadata need not pass through the sorter.
        found = f"SELECT m.rowid FROM {tables} {where} ORDER BY {order} LIMIT ?"
        query = f"SELECT * FROM models WHERE rowid IN ({found}) ORDER BY created_at DESC, rowid DESC"
        return [self._model(row) for row in self._rows(query, *given.values(), limit)]

    def _model(self, row: Row) -> Row:
        metadata = json.loads(row["metadata_json"] or "{}")
        tags = row["tags"].split(",") if row["tags"] else []
        path = str(self._base / row["model_path"])
        return {**row, "model_path": path, "metadata": metadata, "metrics": metadata.get("metrics", {}), "tags": tags}

    def _insert(self, connection: sqlite3.Connection, manifest: Manifest, path: str) -> None:
        model_id, tags = manifest.model_id, list(dict.fromkeys(manifest.metadata.get("tags", [])))
        connection.execute(
            "INSERT INTO models VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (model_id, manifest.session_id, manifest.phase_name, manifest.model_name, path, manifest.size_mb,
             manifest.parameters, manifest.created_at, json.dumps(manifest.flat(), default=str), ",".join(tags)),
        )  # fmt: skip
        edges = [(model_id, parent, place) for place, parent in enumerate(dict.fromkeys(manifest.parents))]
        connection.executemany("INSERT INTO parents VALUES (?, ?, ?)", edges)
        marks = [(tag, manifest.created_at, model_id) for tag in tags]
        connection.executemany("INSERT INTO model_tags VALUES (?, ?, ?)", marks)
        connection.execute("UPDATE sessions SET updated_at = ? WHERE session_id = ?", (utc_text(), manifest.session_id))

    def _stored_path(self, path: Path | str) -> str:
        path = Path(path).absolute()
        return path.relative_to(self._base).as_posix() if path.is_relative_to(self._base) else str(path)

    def _free_id(self, model_id: str) -> str:
        taken, number, free = set(self.find_ids(model_id)), 1, model_id
        while free in taken:
            number += 1
            free = f"{model_id}_{number}"
        return free

    def _walk(self, model_id: str, here: str, there: str) -> list[str]:
        """Breadth first along the lineage from column ``here`` to column ``there``; cycles end by themselves."""
        edges = self._rows(
            f"WITH RECURSIVE line(id) AS (SELECT ? UNION SELECT {there} FROM parents JOIN line ON {here} = line.id) "
            f"SELECT {here} AS here, {there} AS there FROM parents JOIN line ON {here} = line.id "
            f"ORDER BY parents.model_id, position",
            model_id,
        )
        steps: dict[str, list[str]] = {}
        for edge in edges:
            steps.setdefault(edge["here"], []).append(edge["there"])
        order = {model_id: None}
        queue = [model_id]
        for current in queue:
            fresh = [other for other in steps.get(current, []) if other not in order]
            order |= dict.fromkeys(fresh)
            queue += fresh
        return queue[1:]

    def _known_model(self, model_id: str) -> Row:
        rows = self._rows("SELECT phase_name FROM models WHERE model_id = ?", model_id)
        if not rows:
            raise self.no_model(model_id)
        return rows[0]

    def no_model(self, model_id: str) -> ArtifactError:
        """The error for a model that is not registered, naming the nearest ids."""
        return _not_found("model", model_id, self.find_ids(), "see `agent-forge models`")

    def _no_session(self, session_id: str) -> ArtifactError:
        ids = [row["session_id"] for row in self.get_all_sessions()]
        return _not_found("session", session_id, ids, "create it first, or see `agent-forge status`")


def session_alive(session: Row) -> bool:
    """True if the session is running and the process that runs it is there; False also when that process died."""
    return session["status"] == "running" and process_alive(session["pid"], session["pid_started"])


def _phase_row(name: str, newest: Row | None, session: Row) -> Row:
    status = "completed" if newest else "pending"
    if name == session["current_phase"] and session["status"] != "completed":
        died = session["status"] == "running" and not session_alive(session)
        status = "failed" if died else session["status"]
    return {
        "phase_name": name,
        "status": status,
        "models": newest["models"] if newest else 0,
        "model_id": newest["model_id"] if newest else None,
        "duration_seconds": newest["metadata"].get("duration_seconds") if newest else None,
        "metrics": newest["metrics"] if newest else {},
    }


def _one_of(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"value {value!r} refused", where=field, remedy=f"choose one of {', '.join(choices)}")


def _not_found(kind: str, name: str, ids: list[str], otherwise: str) -> ArtifactError:
    near = difflib.get_close_matches(name, ids, n=3, cutoff=0.5)
    return ArtifactError(f"no {kind} {name!r}", remedy=f"did you mean {' or '.join(near)}?" if near else otherwise)
