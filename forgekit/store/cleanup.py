"""Removing old sessions: files and rows together, never one whose process is alive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from pydantic import Field

from forgekit.config import Config
from forgekit.store.database import ModelRegistry, Row, session_alive
from forgekit.store.fsio import remove_tree, set_aside, sweep_unfinished
from forgekit.store.names import utc_text
from forgekit.store.storage import ModelStorage


class CleanupPolicy(Config):
    """What may go, and when."""

    max_session_age_days: float = Field(default=30, ge=0)
    """Completed sessions go this long after they last moved."""
    max_failed_session_age_days: float = Field(default=7, ge=0)
    """Failed sessions, and running ones whose process died, go this long after they last moved."""
    max_sessions_total: int = Field(default=100, ge=1)
    """Beyond this many, the oldest that are not running go."""
    checkpoint_every_n_sessions: int = Field(default=10, ge=1)
    """The database is compacted after this many completed sessions."""
    auto_cleanup_enabled: bool = True
    """Whether completing a session removes old ones."""


@dataclass(frozen=True)
class CleanupReport:
    """What a cleanup did: session id to reason, and the bytes given back."""

    removed: dict[str, str] = field(default_factory=dict)
    bytes_freed: int = 0


@dataclass(frozen=True)
class DatabaseSize:
    """Bytes of the registry after compaction, and the pages (4 KiB) given back."""

    main_bytes: int
    wal_bytes: int
    pages_freed: int


class SessionCleanupManager:
    """Removes sessions by age, by outcome or by number.

    A session's folder is first put out of sight by one rename, then its rows go in the same transaction, then its
    files. A kill at any point leaves a session that a second run removes whole, or a hidden folder that it sweeps.
    """

    def __init__(self, registry: ModelRegistry, storage: ModelStorage, policy: CleanupPolicy | None = None) -> None:
        self.registry, self.storage, self.policy = registry, storage, policy or CleanupPolicy()

    def cleanup_old_sessions(self, now: datetime | None = None) -> CleanupReport:
        """Apply the policy as of ``now`` (UTC when it has no zone)."""
        today = datetime.fromisoformat(utc_text(now))
        sessions = self.registry.get_all_sessions()
        doomed = {row["session_id"]: reason for row in sessions if (reason := self._too_old(row, today))}
        excess = len(sessions) - len(doomed) - self.policy.max_sessions_total
        for row in sorted(sessions, key=_last_moved):
            if excess > 0 and row["session_id"] not in doomed and not session_alive(row):
                doomed[row["session_id"]] = f"more than {self.policy.max_sessions_total} sessions"
                excess -= 1
        return self._remove_all(doomed)

    def clean_failed(self) -> CleanupReport:
        """Remove every failed session, and every one whose process died."""
        return self._remove_where(_failed, "failed")

    def clean_all(self) -> CleanupReport:
        """Remove everything but the current session (the newest) and those that run."""
        current = self.registry.get_current_session()
        keep = current["session_id"] if current else None
        return self._remove_where(lambda row: row["session_id"] != keep, "all but the current session")

    def checkpoint_and_vacuum(self) -> DatabaseSize:
        """Give the registry's free pages and its write-ahead log back to the disk."""
        freed = self.registry.vacuum_incremental(pages=100)
        self.registry.checkpoint_wal()  # after the vacuum: only now does the file shrink
        path = self.registry.db_path
        wal = path.with_name(path.name + "-wal")
        return DatabaseSize(path.stat().st_size, wal.stat().st_size if wal.exists() else 0, freed)

    def auto_cleanup_on_session_complete(self, session_id: str) -> CleanupReport:
        """Mark the session completed, compact the database every so often, and apply the policy if enabled.

        Raises:
            ArtifactError: no such session.
        """
        self.registry.update_session(session_id, status="completed")
        completed = sum(row["status"] == "completed" for row in self.registry.get_all_sessions())
        if completed % self.policy.checkpoint_every_n_sessions == 0:
            self.checkpoint_and_vacuum()
        return self.cleanup_old_sessions() if self.policy.auto_cleanup_enabled else CleanupReport()

    def _too_old(self, row: Row, now: datetime) -> str | None:
        limits = {"completed": self.policy.max_session_age_days, "failed": self.policy.max_failed_session_age_days}
        status = "failed" if _failed(row) else row["status"]
        days = (now - _last_moved(row)).total_seconds() / 86_400
        return f"{status}, {days:.0f} days old" if days > limits.get(status, days) else None

    def _remove_where(self, doomed: Callable[[Row], bool], reason: str) -> CleanupReport:
        sessions = self.registry.get_all_sessions()
        return self._remove_all({row["session_id"]: reason for row in sessions if doomed(row)})

    def _remove_all(self, doomed: dict[str, str]) -> CleanupReport:
        freed = {session_id: self._remove(session_id) for session_id in doomed}
        removed = {session_id: doomed[session_id] for session_id, size in freed.items() if size is not None}
        swept = sweep_unfinished(self.storage.base_path / "sessions")
        return CleanupReport(removed, sum(size or 0 for size in freed.values()) + swept)

    def _remove(self, session_id: str) -> int | None:
        """Remove one session; returns the bytes freed, None if it runs (perhaps since a moment ago) or is gone."""
        with self.registry.transaction():
            row = self.registry.get_session(session_id)
            if row is None or session_alive(row):
                return None
            hidden = set_aside(self.storage.session_path(session_id))
            self.registry.remove_session(session_id)
        return remove_tree(hidden) if hidden else 0


def _failed(row: Row) -> bool:
    return row["status"] == "failed" or (row["status"] == "running" and not session_alive(row))


def _last_moved(row: Row) -> datetime:
    return datetime.fromisoformat(utc_text(row["updated_at"] or row["end_time"] or row["start_time"]))
