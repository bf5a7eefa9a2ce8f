"""Receivers of metrics and events, chosen by name: the event log, Weights & Biases, MLflow.

A sink is built as ``sink(directory, session_id)``. The event log is always there; the other packages are optional
and imported when asked for, and keep their data in the session's folder unless their own environment variables
(``WANDB_*``, ``MLFLOW_TRACKING_URI``) say otherwise.
"""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from forgekit.errors import ConfigError, ResourceError
from forgekit.registry import Registry
from forgekit.tracking.events import EventLog

PROJECT = "agent-forge"
EVENTS_FILE = "events.jsonl"


class Sink(Protocol):
    """Receives what the loggers write."""

    def write(self, kind: str, data: dict[str, Any], *, session: str, phase: str) -> None:
        """Take one event; for the kind ``metrics``, ``data`` holds ``values`` and ``step`` or ``epoch``.

        Raises:
            ForgeError: the sink cannot go on.
        """

    def close(self) -> None:
        """Bring everything to its place; raises as :meth:`write`."""


SINKS = Registry("sink")
SINKS.lazy("jsonl", f"{__name__}:event_log")
SINKS.lazy("wandb", f"{__name__}:WandbSink")
SINKS.lazy("mlflow", f"{__name__}:MlflowSink")


def event_log(directory: Path, session_id: str) -> EventLog:
    """The session's event log, ``<directory>/events.jsonl``; its lines carry the session's id."""
    return EventLog(directory / EVENTS_FILE)


class WandbSink:
    """One W&B run per session, resumed by the session's id; each phase has its own step axis.

    Raises:
        ConfigError: the package is not installed.
        ResourceError: W&B refuses the run.
    """

    def __init__(self, directory: Path, session_id: str) -> None:
        self._wandb = _require("wandb")
        self._seen: set[str] = set()
        try:
            self._run = self._wandb.init(project=PROJECT, id=session_id, resume="allow", dir=str(directory))
        except self._wandb.Error as error:
            raise _failed("wandb", error) from error

    def write(self, kind: str, data: dict[str, Any], *, session: str, phase: str) -> None:
        """Metrics go to ``<phase>/<name>``; other events stay in the event log."""
        if kind != "metrics":
            return
        axis = "epoch" if "epoch" in data else "step"
        position = {f"{phase}/{axis}": data[axis]} if data.get(axis) is not None else {}
        values = {f"{phase}/{name}": value for name, value in data["values"].items()}
        try:
            # W&B's own step only ever grows, ours begin again in every phase: each metric gets its phase's axis.
            for name in values.keys() - self._seen if position else ():
                self._run.define_metric(name, step_metric=f"{phase}/{axis}")
            self._seen |= values.keys() if position else set()
            self._run.log(values | position)
        except self._wandb.Error as error:
            raise _failed("wandb", error) from error

    def close(self) -> None:
        """Finish the run."""
        try:
            self._run.finish()
        except self._wandb.Error as error:
            raise _failed("wandb", error) from error


class MlflowSink:
    """One MLflow run per session, found again by its tag when the session is resumed.

    Raises:
        ConfigError: the package is not installed.
        ResourceError: the tracking server cannot be used.
    """

    def __init__(self, directory: Path, session_id: str) -> None:
        self._mlflow = _require("mlflow")
        elsewhere = self._mlflow.is_tracking_uri_set()
        try:
            self._client = self._mlflow.MlflowClient(
                None if elsewhere else f"sqlite:///{directory.absolute()}/mlflow.db"
            )
            found = self._client.get_experiment_by_name(PROJECT)
            files = None if elsewhere else (directory.absolute() / "mlflow").as_uri()
            experiment = found.experiment_id if found else self._client.create_experiment(PROJECT, files)
            tags = {"session": session_id}
            runs = self._client.search_runs([experiment], f"tags.session = '{session_id}'")
            run = runs[0] if runs else self._client.create_run(experiment, run_name=session_id, tags=tags)
        except self._mlflow.MlflowException as error:
            raise _failed("mlflow", error) from error
        self._run_id = run.info.run_id

    def write(self, kind: str, data: dict[str, Any], *, session: str, phase: str) -> None:
        """Metrics go to ``<phase>/<name>``; other events stay in the event log."""
        if kind != "metrics":
            return
        step, now = data.get("epoch", data.get("step")) or 0, time.time_ns() // 1_000_000
        metric = self._mlflow.entities.Metric
        batch = [metric(f"{phase}/{name}", float(value), now, step) for name, value in data["values"].items()]
        try:
            self._client.log_batch(self._run_id, metrics=batch)
        except self._mlflow.MlflowException as error:
            raise _failed("mlflow", error) from error

    def close(self) -> None:
        """Mark the run as finished."""
        try:
            self._client.set_terminated(self._run_id)
        except self._mlflow.MlflowException as error:
            raise _failed("mlflow", error) from error


def _require(package: str) -> ModuleType:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ConfigError(f"{package!r} is not installed", where="sink", remedy=f"pip install {package}") from None


def _failed(package: str, error: BaseException) -> ResourceError:
    return ResourceError(str(error), where=package, remedy=f"check its settings or take {package} out of the sinks")
