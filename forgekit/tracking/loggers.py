"""Loggers: what a phase and a pipeline write their metrics and events through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forgekit.errors import ForgeError
from forgekit.registry import unknown
from forgekit.tracking.catalogue import Metric, catalogue
from forgekit.tracking.events import EventLog, read_events
from forgekit.tracking.sinks import SINKS, Sink


class PhaseLogger:
    """Writes one phase's metrics, by catalogue name only, and events.

    What an interrupted run of the same session emitted counts as emitted.

    Args:
        log: the session's event log.
        session_id: the session.
        phase: a phase with a metric catalogue.
        sinks: further receivers; one that fails is dropped with an event ``sink_failed``, the run goes on.

    Raises:
        ConfigError: the phase has no metric catalogue.
    """

    def __init__(self, log: EventLog, session_id: str, phase: str, sinks: list[Sink] | None = None) -> None:
        self.phase = phase
        self.session_id = session_id
        self.catalogue: dict[str, Metric] = catalogue(phase)
        self.emitted: set[str] = set()
        for event in read_events(log.path, kind="metrics", phase=phase):
            if event.get("session") == session_id:
                self.emitted.update(event["data"]["values"])
        self._log = log
        self._sinks = sinks if sinks is not None else []

    def metrics(self, values: dict[str, Any], step: int | None = None) -> None:
        """Write measured values.

        Raises:
            ConfigError: a name is not in the phase's catalogue; the nearest names are given.
        """
        self._metrics(values, {"step": step})

    def epoch(self, epoch: int, values: dict[str, Any]) -> None:
        """Write the values measured over epoch ``epoch``; raises as :meth:`metrics`."""
        self._metrics(values, {"epoch": epoch})

    def event(self, kind: str, **data: Any) -> None:
        """Write an event of this phase."""
        _write(self._log, self._sinks, kind, data, self.session_id, self.phase)

    def missing(self) -> list[str]:
        """Names of the catalogue that were never emitted, in the catalogue's order."""
        return [name for name in self.catalogue if name not in self.emitted]

    def _metrics(self, values: dict[str, Any], at: dict[str, int | None]) -> None:
        for name in values:
            if name not in self.catalogue:
                raise unknown("metric", name, list(self.catalogue))
        _write(self._log, self._sinks, "metrics", {**at, "values": values}, self.session_id, self.phase)
        self.emitted.update(values)


class PipelineLogger:
    """Writes a whole session: events in ``<directory>/events.jsonl``, and whatever further sinks are named.

    Args:
        directory: the session's folder, made when missing.
        session_id: the session.
        sinks: names of sinks, such as ``wandb``; ``jsonl`` is always among them.

    Raises:
        ConfigError: a sink is unknown or its package is not installed.
        ResourceError: a sink cannot be opened.
    """

    def __init__(self, directory: Path | str, session_id: str, sinks: Iterable[str] = ("jsonl",)) -> None:
        self.session_id = session_id
        makers = [SINKS.get(name) for name in dict.fromkeys(sinks) if name != "jsonl"]
        self.log: EventLog = SINKS.get("jsonl")(Path(directory), session_id)
        self._sinks: list[Sink] = []
        try:
            for make in makers:
                self._sinks.append(make(Path(directory), session_id))
        except ForgeError:
            self.close()
            raise

    def phase(self, name: str) -> PhaseLogger:
        """The logger of one phase, writing to the same places."""
        return PhaseLogger(self.log, self.session_id, name, self._sinks)

    def event(self, kind: str, **data: Any) -> None:
        """Write an event that belongs to no phase."""
        _write(self.log, self._sinks, kind, data, self.session_id, "")

    def close(self) -> None:
        """Close every sink, then the event log."""
        for sink in list(self._sinks):
            with _dropping(sink, self._sinks, self.log, session=self.session_id, phase=""):
                sink.close()
        self._sinks.clear()
        self.log.close()

    def __enter__(self) -> PipelineLogger:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _write(log: EventLog, sinks: list[Sink], kind: str, data: dict[str, Any], session: str, phase: str) -> None:
    log.write(kind, data, session=session, phase=phase)
    for sink in list(sinks):
        with _dropping(sink, sinks, log, session=session, phase=phase):
            sink.write(kind, data, session=session, phase=phase)


@contextmanager
def _dropping(sink: Sink, sinks: list[Sink], log: EventLog, session: str, phase: str) -> Iterator[None]:
    """Losing a remote dashboard must not lose the run: drop the sink and say so; the log on disk is complete."""
    try:
        yield
    except ForgeError as error:
        # Not remove(): the resource monitor's thread may be dropping the same sink now.
        sinks[:] = [other for other in sinks if other is not sink]
        log.write("sink_failed", {"sink": type(sink).__name__, "error": str(error)}, session=session, phase=phase)
