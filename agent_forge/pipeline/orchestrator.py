"""Runs phases in order, as a session that can be interrupted at any instant and resumed.

A session is a plan (profile, until, data folder) in the registry and a folder on disk. Every finished phase leaves
``result.json``; a resumed session skips it, and the phase itself skips finished pieces and goes on from checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent_forge.pipeline.phase import PHASES, PhaseContext, PhaseResult, Progress
from agent_forge.profile import Profile, load_profile
from forgekit.compute.device import environment
from forgekit.compute.monitor import ResourceMonitor
from forgekit.errors import ArtifactError, ConfigError, ForgeError, GateError
from forgekit.measure.evidence import Evidence
from forgekit.registry import unknown
from forgekit.store import fsio
from forgekit.store.cleanup import SessionCleanupManager
from forgekit.store.names import PHASES as ORDER
from forgekit.store.names import canonical_phase, phase_folder
from forgekit.store.storage import ModelStorage
from forgekit.tracking.loggers import PipelineLogger
from forgekit.train.distributed import agreed, threads_here, world


class PipelineOrchestrator:
    """One session; use it as a context manager.

    Under ``torchrun`` every process makes one: the first owns the session, writes and measures; the others train
    along, and their folder has to be the same one.

    Args:
        profile: a profile, its name, or a file.
        storage: where sessions, models and the registry live.
        data: a data folder for the phases, or None.
        session_id: an existing session to go on with; None begins a new one.
        show: called with :class:`Progress`.
        sinks: further metric sinks by name (``wandb``, ``mlflow``).
    """

    def __init__(
        self,
        profile: Profile | str = "nano",
        storage: Path | str = "./storage",
        data: Path | str | None = None,
        session_id: str | None = None,
        show: Callable[[Progress], None] = lambda progress: None,
        sinks: tuple[str, ...] = (),
    ) -> None:
        self.profile = load_profile(profile) if isinstance(profile, str) else profile
        self.data = Path(data).expanduser().absolute() if data else None
        if self.data is not None and not self.data.is_dir():
            raise ConfigError(f"no folder {self.data}", where="--data", remedy="give a folder with data sets")
        self.storage = ModelStorage(storage)
        self.show = show
        self.plan = {"profile": self.profile.model_dump(mode="json"), "data": str(self.data) if self.data else None}
        self._leads, self._resumed = world()[0] == 0, session_id is not None
        self.session_id = session_id or agreed(lambda: self.storage.registry.create_session(self.plan))
        self.folder = fsio.make_folder(self.storage.session_path(self.session_id))
        log = self.folder if self._leads else self.folder / f"process-{world()[0]}"
        self.logger = PipelineLogger(log, self.session_id, ("jsonl", *sinks) if self._leads else ())
        self._monitor = ResourceMonitor(self.logger, interval=5.0)

    @classmethod
    def resume(cls, session_id: str, storage: Path | str = "./storage", **options: Any) -> PipelineOrchestrator:
        """Go on with an interrupted session, with the plan it was started with.

        Entering it claims the session, which is refused while another living process runs it.

        Raises:
            ArtifactError: no such session, or one without a plan.
        """
        store = ModelStorage(storage)
        agreed(store.reindex)  # a model that was finished but not yet registered when its process was killed
        registry = store.registry
        row = registry.get_session(_full_id(registry, session_id))
        plan = row["config"]
        if "profile" not in plan:
            raise ArtifactError(
                "was restored from its models and has no plan",
                where=f"session {row['session_id']}",
                remedy="its models can be used; start a new run to make others",
            )
        forge = cls(
            Profile.build(plan["profile"], f"session {row['session_id']}"),
            storage,
            data=plan.get("data"),
            session_id=row["session_id"],
            **options,
        )
        forge.plan = plan
        return forge

    def __enter__(self) -> PipelineOrchestrator:
        import torch

        torch.set_num_threads(threads_here(self.profile.threads or torch.get_num_threads()))
        if self._resumed:
            agreed(lambda: self.storage.registry.claim_session(self.session_id))
        self.logger.event("session_started", profile=self.profile.name, environment=environment())
        self._monitor.start_monitoring()
        return self

    def __exit__(self, kind, error, trace) -> None:
        status = "completed" if error is None else "paused" if isinstance(error, KeyboardInterrupt) else "failed"
        try:
            self._monitor.stop_monitoring()
            self.logger.event("session_ended", status=status, error=str(error) if error else None)
            self._note(status=status)
            if status == "completed" and self._leads:
                manager = SessionCleanupManager(self.storage.registry, self.storage, self.profile.cleanup)
                manager.auto_cleanup_on_session_complete(self.session_id)
        finally:
            self.logger.close()

    def run_full_pipeline(self, until: str | int | None = None) -> dict[str, PhaseResult]:
        """Run every phase the profile has settings for, in order, up to and including ``until``.

        A resumed session stops where it was told to, unless it is told otherwise.

        Raises:
            ConfigError: unknown phase, or one the profile has no settings for.
            GateError: a gate said no and the profile asks to stop there; what the phase made is kept.
        """
        until = self.plan.get("until") if until is None else until
        last = phase_name(until) if until is not None else None
        names = [name for name in ORDER if name in self.profile.phases]
        if last is not None and last not in names:
            self.profile.phase(last)
        self.plan = {**self.plan, "until": last}
        self._note(plan=self.plan)
        results: dict[str, PhaseResult] = {}
        models: list[str] = []
        for done, name in enumerate(names):
            self._note(current_phase=name, progress_percent=100.0 * done / len(names))
            results[name] = self.run_single_phase(name, models)
            models = self._handed_over(results[name], models)
            if name == last:
                break
        self._note(progress_percent=100.0)
        return results

    def _note(self, **changes: Any) -> None:
        """Update the session's row; the first process speaks for all."""
        if self._leads:
            self.storage.registry.update_session(self.session_id, **changes)

    def _handed_over(self, result: PhaseResult, given: list[str]) -> list[str]:
        """Models for the next phase: what this one made, or what it was given where its gate said no."""
        made = list(result.artifacts.get("all_models") or [result.model])
        gate = result.artifacts.get("gate")
        if not gate or gate["passed"] or self.profile.gate == "accept":
            return made
        if self.profile.gate == "stop":
            reason = next(r for r in gate["reasons"] if r.startswith("no"))
            remedy = 'see `agent-forge report`; gate = "fall_back" or "accept" goes on'
            raise GateError(f"the gate said {reason}", where=f"phase {result.phase_name}", remedy=remedy)
        return given or made  # the first phase was given nothing to fall back to

    def run_single_phase(self, phase: str | int, models: list[str] | None = None) -> PhaseResult:
        """Run one phase by name or number on models given by id.

        Raises:
            ForgeError: the input does not fit, or the phase failed; one line says why.
        """
        name = phase_name(phase)
        config = self.profile.phase(name)
        folder = fsio.make_folder(self.folder / phase_folder(name))
        key = {"config": config.fingerprint(), "inputs": models or [], "data": data_print(self.data)}
        finished = agreed(lambda: _finished(folder / "result.json", key))
        if finished is not None:
            self.show(Progress(name, 1, 1, "already finished"))
            return finished
        logger = self.logger.phase(name)
        context = PhaseContext(self.session_id, folder, self.profile, self.storage, logger, self.data, self.show)
        controller = PHASES.get(name)(config, context)
        controller.validate_input(models or [])
        logger.event("phase_started", inputs=models or [])
        started = datetime.now(UTC).isoformat()
        try:
            result = controller.run(models or [])
        except ForgeError as error:
            logger.event("phase_failed", error=str(error))
            raise
        result.start_time, result.end_time = started, datetime.now(UTC).isoformat()
        record = json.dumps({"key": key, **result.record()}, indent=1, default=str)
        if self._leads:
            fsio.write_atomic(folder / "result.json", record.encode())
        logger.event("phase_finished", seconds=result.duration_seconds, success=result.success)
        return result


def data_print(folder: Path | None) -> str:
    """A fingerprint of a data folder by the names, sizes and times of its files: contents are hashed when read."""
    if folder is None:
        return ""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    lines = [f"{p.relative_to(folder)}\0{p.stat().st_size}\0{p.stat().st_mtime_ns}" for p in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def phase_name(phase: str | int) -> str:
    """The canonical name of a phase given by name, alias or number.

    Raises:
        ConfigError: unknown; the nearest names are given.
    """
    if isinstance(phase, int) or str(phase).isdigit():
        number = int(phase)
        if not 1 <= number <= len(ORDER):
            raise ConfigError(f"there is no phase {number}", where="phase", remedy=f"choose 1 to {len(ORDER)}")
        return ORDER[number - 1]
    name = canonical_phase(str(phase))
    if name not in ORDER:
        raise unknown("phase", phase, list(ORDER))
    return name


def session_results(storage: ModelStorage, session_id: str) -> dict[str, dict[str, Any]]:
    """The finished phases' ``result.json`` of a session, in phase order.

    Raises:
        ArtifactError: one of them is damaged.
    """
    folder = storage.session_path(session_id)
    paths = ((name, folder / phase_folder(name) / "result.json") for name in ORDER)
    return {name: _read_result(path) for name, path in paths if path.is_file()}


def _read_result(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ArtifactError("is not JSON", where=str(path), remedy="delete it to run the phase again") from None


def _full_id(registry, prefix: str) -> str:
    """The one session that begins with ``prefix`` (``latest`` is the newest).

    Raises:
        ArtifactError: none or several do.
    """
    rows = registry.get_all_sessions()
    if prefix == "latest" and rows:
        return max(rows, key=lambda r: r["start_time"])["session_id"]
    hits = [r["session_id"] for r in rows if r["session_id"].startswith(prefix)]
    if len(hits) != 1:
        what = f"{len(hits)} sessions begin with {prefix!r}" if hits else f"no session {prefix!r}"
        raise ArtifactError(what, where="session", remedy="see `agent-forge status`")
    return hits[0]


find_session = _full_id


def _finished(path: Path, key: dict[str, Any]) -> PhaseResult | None:
    """The stored result, if it was made by the same settings from the same inputs."""
    if not path.is_file():
        return None
    record = _read_result(path)
    if record.pop("key") != key:
        return None
    record["evidence"] = [Evidence.build(e, str(path)) for e in record["evidence"]]
    return PhaseResult(**record)
