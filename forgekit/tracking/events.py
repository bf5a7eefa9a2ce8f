"""The event log: append-only JSON lines that survive crashes and several writers.

One line is one event: ``time`` (ISO 8601, UTC), ``monotonic`` (seconds, for durations within one process),
``session``, ``phase``, ``kind``, ``data``, and ``nonfinite`` where a number was NaN or infinite: JSON has no
spelling for those, so they are written as null and listed there by path.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from forgekit.errors import DataError, ResourceError

Event = dict[str, Any]


class EventLog:
    """Appends events to a file; several processes and threads may append to the same one on a local disk.

    Args:
        path: the file; it and its folder are made when missing.

    Raises:
        ResourceError: the file cannot be opened or written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered append: each write below is one system call, and the kernel keeps lines of different
            # writers apart.
            self._file = open(self.path, "ab", buffering=0)
            self._torn = _ends_torn(self.path)
        except OSError as error:
            raise self._cannot(error) from error

    def write(self, kind: str, data: dict[str, Any], *, session: str = "", phase: str = "") -> None:
        """Append one event, whole or not at all for every reader."""
        nonfinite: dict[str, str] = {}
        event: Event = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "monotonic": round(time.monotonic(), 6),
            "session": session,
            "phase": phase,
            "kind": kind,
            "data": _plain(data, "", nonfinite),
        }
        if nonfinite:
            event["nonfinite"] = nonfinite
        line = json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        if self._torn:
            line = b"\n" + line  # so that half a line, left by a killed writer, spoils no event but its own
        try:
            written = self._file.write(line)
        except OSError as error:
            raise self._cannot(error) from error
        self._torn = written < len(line)
        if self._torn:
            what = f"the disk is full: only {written} of {len(line)} bytes written"
            raise ResourceError(what, where=str(self.path), remedy="free some space")

    def close(self) -> None:
        """Bring everything to the disk and close; harmless when already closed."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _cannot(self, error: OSError) -> ResourceError:
        return ResourceError(
            f"cannot be written ({error.strerror})", where=str(self.path), remedy="check disk space and permissions"
        )


@dataclass(frozen=True)
class EventReading:
    """What a log holds: iterating gives the events."""

    events: list[Event]
    corrupt: list[int] = field(default_factory=list)
    """Line numbers, from 1, of complete lines that are no event."""
    torn: bool = False
    """The last line has no end: its writer was killed, or is writing it now."""
    end: int = 0
    """Bytes up to the end of the last complete line: where :func:`follow` goes on."""

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)


def read_events(
    path: Path | str, kind: str | None = None, phase: str | None = None, tail: int | None = None
) -> EventReading:
    """Read a log, whatever state it is in.

    Args:
        path: the log.
        kind: keep only events of this kind.
        phase: keep only events of this phase.
        tail: keep only the last so many of those.

    Raises:
        DataError: there is no such log, or it cannot be read. An empty log is an empty reading.
    """
    events: deque[Event] = deque(maxlen=tail)
    corrupt, torn, end = [], False, 0
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                torn = True
                break
            end += len(line)
            event = _parse(line)
            if event is None and line.strip():
                corrupt.append(number)
            elif event is not None and kind in (None, event["kind"]) and phase in (None, event["phase"]):
                events.append(event)
    return EventReading(list(events), corrupt, torn, end)


def follow(
    path: Path | str, start: int = 0, poll: float = 0.2, stop: Callable[[], bool] | None = None
) -> Iterator[Event]:
    """Yield events as they are written, for ever or until ``stop()`` holds at the end of the file.

    A complete line that is no event is yielded as an event of kind ``corrupt_line`` with its byte offset.

    Args:
        path: the log.
        start: byte to begin at, such as :attr:`EventReading.end`.
        poll: seconds between looks at the file.
        stop: asked whenever everything written has been yielded.

    Raises:
        DataError: there is no such log, or it cannot be read.
    """
    with _open(path) as file:
        file.seek(start)
        half = b""
        while True:
            line = half + file.readline()
            if line.endswith(b"\n"):
                half = b""
                event = _parse(line)
                if event is not None:
                    yield event
                elif line.strip():
                    offset = file.tell() - len(line)
                    yield {"session": "", "phase": "", "kind": "corrupt_line", "data": {"offset": offset}}
            else:
                half = line
                if stop is not None and stop():
                    return
                time.sleep(poll)


def _ends_torn(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _open(path: Path | str) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise DataError("no such event log", where=str(path), remedy="check the session id") from None
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror})", where=str(path), remedy="check its permissions"
        ) from error


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    return event if isinstance(event, dict) and {"kind", "phase", "data"} <= event.keys() else None


def _plain(value: Any, path: str, nonfinite: dict[str, str]) -> Any:
    """``value`` as plain JSON; paths of numbers that JSON cannot spell are added to ``nonfinite``."""
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        value = value.tolist()
    elif hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[path] = str(value)
        return None
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{path}.{k}" if path else str(k), nonfinite) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{path}.{i}" if path else str(i), nonfinite) for i, v in enumerate(value)]
    return str(value) if isinstance(value, Path) else value
