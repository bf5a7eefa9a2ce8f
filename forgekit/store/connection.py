"""Opening the registry's SQLite file, and telling its errors in one line."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from forgekit.errors import ArtifactError, ForgeError, ResourceError
from forgekit.store.fsio import free_bytes

BUSY_SECONDS = 30.0
# page_size and auto_vacuum take effect only before the first table, and auto_vacuum only before WAL.
_PRAGMAS = (
    "PRAGMA page_size = 4096",
    "PRAGMA auto_vacuum = INCREMENTAL",
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = NORMAL",
    "PRAGMA cache_size = 10000",
    "PRAGMA temp_store = MEMORY",
    "PRAGMA mmap_size = 268435456",
    "PRAGMA foreign_keys = ON",
)


def connect(path: Path) -> sqlite3.Connection:
    """A connection in autocommit mode: readers never block, writers wait up to half a minute for each other."""
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    try:
        for pragma in _PRAGMAS:
            _patiently(connection, pragma)
    except BaseException:
        connection.close()
        raise
    return connection


def _patiently(connection: sqlite3.Connection, statement: str) -> None:
    """Run ``statement``, waiting for other processes.

    SQLite's own busy handler is not always called while processes turn one new file into WAL mode together.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute(statement).fetchall()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Tell a corrupt, locked, unreadable or unwritable database in one line that names ``path``.

    Raises:
        ArtifactError: the file is corrupt, truncated or no database.
        ResourceError: it is locked, cannot be opened or written, or the disk is full.
    """
    try:
        yield
    except sqlite3.DatabaseError as error:
        explained = _explain(error, path)
        if explained is None:
            raise
        raise explained from None


def corrupt(path: Path, reason: str) -> ArtifactError:
    """The error for a database that cannot be trusted; names the newest backup if there is one."""
    away = f"move {path.name}, {path.name}-wal and {path.name}-shm away"
    backups = sorted(path.parent.glob(f"{path.name}.v*.backup"), key=lambda backup: backup.stat().st_mtime)
    rest = f" and rename {backups[-1].name} to {path.name}" if backups else ", then the folders are indexed anew"
    return ArtifactError(f"damaged database ({reason})", where=str(path), remedy=away + rest)


def _explain(error: sqlite3.DatabaseError, path: Path) -> ForgeError | None:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return corrupt(path, str(error))
    if code == sqlite3.SQLITE_FULL:
        what = f"the disk is full: {free_bytes(path) / 1e6:.1f} MB free"
        return ResourceError(what, where=str(path), remedy="free some space, e.g. `agent-forge clean --all`")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        what = f"another process has held the database for over {BUSY_SECONDS:.0f} s"
        return ResourceError(what, where=str(path), remedy="end that process or try again")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_IOERR):
        remedy = "check the permissions of the file and its folder, and the disk"
        return ResourceError(f"cannot be used ({error})", where=str(path), remedy=remedy)
    return None
