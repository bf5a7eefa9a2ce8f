"""The registry's schema as numbered steps. Append only: a step that was released is never edited."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from forgekit.errors import ArtifactError
from forgekit.store.fsio import disk_errors, fsync_dir, sync_file, temporary_for

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE IF NOT EXISTS models (
            model_id TEXT PRIMARY KEY,
            session_id TEXT NOT NULL,
            phase_name TEXT NOT NULL,
            model_name TEXT NOT NULL,
            model_path TEXT NOT NULL,
            size_mb REAL,
            parameters INTEGER,
            created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
            metadata_json TEXT,
            tags TEXT
        )""",
        "CREATE INDEX IF NOT EXISTS idx_session ON models(session_id)",
        "CREATE INDEX IF NOT EXISTS idx_phase ON models(phase_name)",
        "CREATE INDEX IF NOT EXISTS idx_created ON models(created_at)",
        """CREATE TABLE IF NOT EXISTS phase_handoffs (
            handoff_id TEXT PRIMARY KEY,
            source_phase TEXT NOT NULL,
            target_phase TEXT NOT NULL,
            source_model_id TEXT NOT NULL,
            target_model_id TEXT NOT NULL,
            handoff_timestamp TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
            validation_status TEXT,
            validation_metrics_json TEXT,
            FOREIGN KEY (source_model_id) REFERENCES models(model_id),
            FOREIGN KEY (target_model_id) REFERENCES models(model_id)
        )""",
        """CREATE TABLE IF NOT EXISTS sessions (
            session_id TEXT PRIMARY KEY,
            pipeline_config_json TEXT,
            start_time TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
            end_time TIMESTAMP,
            status TEXT,
            current_phase TEXT,
            progress_percent REAL
        )""",
    ),
    (
        # Who runs a session, so that "running" can be told from "died", and when it last moved.
        "ALTER TABLE sessions ADD COLUMN pid INTEGER",
        "ALTER TABLE sessions ADD COLUMN pid_started REAL",
        "ALTER TABLE sessions ADD COLUMN updated_at TIMESTAMP",
        # A parent may belong to a session that was cleaned up since: its id stays, so it is no foreign key.
        """CREATE TABLE parents (
            model_id TEXT NOT NULL REFERENCES models(model_id) ON DELETE CASCADE,
            parent_id TEXT NOT NULL,
            position INTEGER NOT NULL,
            PRIMARY KEY (model_id, parent_id)
        ) WITHOUT ROWID""",
        """CREATE TABLE model_tags (
            tag TEXT NOT NULL,
            created_at TIMESTAMP NOT NULL,
            model_id TEXT NOT NULL REFERENCES models(model_id) ON DELETE CASCADE,
            PRIMARY KEY (tag, created_at, model_id)
        ) WITHOUT ROWID""",
        "DROP INDEX idx_session",
        "DROP INDEX idx_phase",
        "CREATE INDEX idx_session_phase ON models(session_id, phase_name, created_at)",
        "CREATE INDEX idx_phase_created ON models(phase_name, created_at)",
        "CREATE INDEX idx_name ON models(created_at, model_name)",
        "CREATE INDEX idx_cover ON models(model_id, phase_name, session_id, model_name)",
        "CREATE INDEX idx_path ON models(model_path, created_at)",
        "CREATE INDEX idx_tag_model ON model_tags(model_id)",
        "CREATE INDEX idx_child ON parents(parent_id, model_id)",
        "CREATE INDEX idx_handoff_source ON phase_handoffs(source_model_id)",
        "CREATE INDEX idx_handoff_target ON phase_handoffs(target_model_id)",
        "CREATE INDEX idx_session_start ON sessions(start_time)",
    ),
)


def migrate(connection: sqlite3.Connection, path: Path) -> bool:
    """Bring the database up to date in one transaction, after a backup copy if it holds anything.

    Returns:
        True if the database was empty before: new, moved away, or truncated to nothing.

    Raises:
        ArtifactError: the database was made by a newer version.
        ResourceError: no room or no permission for the backup.
    """
    if _version(connection, path) == len(MIGRATIONS):
        return False
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _version(connection, path)  # again: another process may have been first
        fresh = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if version < len(MIGRATIONS) and not fresh:
            _back_up(path, backup_path(path, version))
        for step in MIGRATIONS[version:]:
            for statement in step:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return fresh


def backup_path(path: Path, version: int) -> Path:
    """Where the copy made before leaving schema ``version`` lies."""
    return path.with_name(f"{path.name}.v{version}.backup")


def _version(connection: sqlite3.Connection, path: Path) -> int:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        what = f"made by a newer version (schema {version}, this one knows up to {len(MIGRATIONS)})"
        raise ArtifactError(what, where=str(path), remedy="upgrade agent-forge")
    return version


def _back_up(path: Path, copy: Path) -> None:
    work = temporary_for(copy)
    with disk_errors(copy.parent):
        try:
            # A connection of its own: SQLite never finishes a backup from one that holds the write lock.
            with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(work)) as target:
                source.backup(target)
            sync_file(work)
            os.replace(work, copy)
        except BaseException:
            work.unlink(missing_ok=True)
            raise
        fsync_dir(copy.parent)
