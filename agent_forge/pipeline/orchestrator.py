"""Runs phases in order, as a session that can be interrupted at any instant and resumed.

A session is a plan (profile, data folder, models to start from, first and last phase) in the registry and a folder on
disk. Every finished phase leaves ``result.json``; a resumed session skips it, and the phase itself skips finished
pieces and goes on from checkpoints. Between two phases stands a handoff contract.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent_forge.pipeline.handoff import EXTERNAL, HandoffDecision, ModelHandoffValidator
from agent_forge.pipeline.inputs import Input, find_input, following, next_phase, source_of, take_in
from agent_forge.pipeline.phase import PHASES, PhaseContext, PhaseResult, Progress
from agent_forge.profile import Profile, load_profile
from forgekit.compute.device import environment
from forgekit.compute.monitor import ResourceMonitor
from forgekit.config import Config
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


@dataclass(frozen=True)
class Offer:
    """Models on their way to a phase.

    Attributes:
        models: their ids.
        source: the phase whose place they come from.
        parents: what to go on with when they are refused.
        stand_in: they are parents already: the source did not help, or made nothing.
    """

    models: tuple[str, ...] = ()
    source: str = ""
    parents: tuple[str, ...] = ()
    stand_in: bool = False


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
        self.data = _data_folder(data)
        self.storage = ModelStorage(storage)
        self.show = show
        self.plan = _plan(self.profile, self.data)
        self.validator = ModelHandoffValidator(self.profile)
        self._leads, self._resumed = world()[0] == 0, session_id is not None
        self._pausing, self._stopped = False, False
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

    @classmethod
    def starting_from(
        cls,
        models: Sequence[str],
        profile: Profile | str = "nano",
        storage: Path | str = "./storage",
        start: str | int | None = None,
        until: str | int | None = None,
        **options: Any,
    ) -> PipelineOrchestrator:
        """Begin a session with models that are there already. What does not fit is refused before it exists.

        Args:
            models: ids or folders, ours or Hugging Face's.
            profile, storage: as in the constructor.
            start: the first phase; None takes the one after the phase that made the models.
            until: the last phase; None runs all that the profile has.
            options: ``data``, ``show`` and ``sinks`` of the constructor.

        Raises:
            ConfigError: no phase to start at, or the profile has no settings for it.
            ArtifactError: no such model, or its weights cannot be used.
            GateError: the models break the contract of the first phase; names model, rule, value and remedy.
        """
        settings = load_profile(profile) if isinstance(profile, str) else profile
        data, store = _data_folder(options.pop("data", None)), ModelStorage(storage)
        found = agreed(lambda: [find_input(store, str(ref)) for ref in models])
        source = source_of(found)
        first = phase_name(start) if start is not None else next_phase(source)
        last = phase_name(until) if until is not None else None
        phases_to_run(settings, first, last)
        validator = ModelHandoffValidator(settings)
        decision = agreed(lambda: validator.validate_stored(source, first, store, [one.ref for one in found]))
        if not _passes(decision, settings):
            raise decision.error()
        plan = {**_plan(settings, data), "start": first, "until": last, "source": source}
        plan["inputs"] = [one.record() for one in found]
        session_id = agreed(lambda: store.registry.create_session(plan))
        forge = cls(settings, storage, data, session_id, **options)
        forge.plan, forge._resumed = plan, False
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
        if status == "completed" and self._stopped:
            status = "paused"
        try:
            self._monitor.stop_monitoring()
            self.logger.event("session_ended", status=status, error=str(error) if error else None)
            self._note(status=status)
            if status == "completed" and self._leads:
                manager = SessionCleanupManager(self.storage.registry, self.storage, self.profile.cleanup)
                manager.auto_cleanup_on_session_complete(self.session_id)
        finally:
            self.logger.close()

    def pause(self) -> None:
        """Ask the run to stop before its next phase, paused; from another thread or from ``show``.

        A phase that is running finishes. Ctrl-C (``agent-forge pause`` sends it) stops inside one, with a checkpoint.
        """
        self._pausing = True

    def run_full_pipeline(
        self, until: str | int | None = None, start: str | int | None = None
    ) -> dict[str, PhaseResult]:
        """Run every phase the profile has settings for, in order, from ``start`` up to and including ``until``.

        A resumed session stops where it was told to, unless it is told otherwise. A run that does not begin with the
        profile's first phase begins with the models the session was given, or with what it made before.

        Raises:
            ConfigError: unknown phase, one the profile has no settings for, or two that do not hand over.
            GateError: a gate or a handoff contract said no and the profile's policy has no way on; what was made is
                kept.
        """
        until = self.plan.get("until") if until is None else until
        last = phase_name(until) if until is not None else None
        first = phase_name(start) if start is not None else self.plan.get("start")
        names = phases_to_run(self.profile, first, last)
        for source, target in zip(names, names[1:]):
            self.validator.contract(source, target)
        self.plan = {**self.plan, "until": last}
        self._note(plan=self.plan)
        results: dict[str, PhaseResult] = {}
        offer = self._first_offer(names[0])
        for done, name in enumerate(names):
            if self._asked_to_pause():
                self.logger.event("paused", before=name)
                return results
            self._note(current_phase=name, progress_percent=100.0 * done / len(names))
            results[name], given = self._run_phase(name, offer)
            offer = self._offer(results[name], given)
        self._note(progress_percent=100.0)
        self._outlook(offer)
        return results

    def run_single_phase(self, phase: str | int, models: list[str] | None = None) -> PhaseResult:
        """Run one phase by name or number.

        Args:
            phase: which.
            models: ids or folders; None takes what the session was given for this phase, or made before it.

        Raises:
            ForgeError: there are no models, they break the contract, or the phase failed; one line says why.
        """
        name = phase_name(phase)
        if models:
            given = agreed(lambda: [take_in(self.storage, self.session_id, one) for one in self._find(models)])
            offer = Offer(tuple(one.model_id for one in given), source_of(given))
        else:
            offer = self._first_offer(name)
        self._note(current_phase=name)
        result, given = self._run_phase(name, offer)
        self._outlook(Offer(_made(result) or given, name))
        return result

    def _find(self, models: Sequence[str]) -> list[Input]:
        return [find_input(self.storage, str(ref)) for ref in models]

    def _asked_to_pause(self) -> bool:
        """Whether :meth:`pause` was called in the first process."""
        self._stopped = agreed(lambda: self._pausing)
        return self._stopped

    def _note(self, **changes: Any) -> None:
        """Update the session's row; the first process speaks for all."""
        if self._leads:
            self.storage.registry.update_session(self.session_id, **changes)

    def _first_offer(self, name: str) -> Offer:
        """What the first phase of this run gets: nothing, the session's inputs, or what it made before.

        Raises:
            ConfigError: the phase needs models and there are none.
        """
        if self.plan.get("inputs") and name == self.plan["start"]:
            return Offer(tuple(one.model_id for one in self._inputs()), self.plan["source"])
        if name == ORDER[0]:
            return Offer()
        made = agreed(lambda: session_results(self.storage, self.session_id))
        earlier = [one for one in ORDER[: ORDER.index(name)] if one in made]
        if not earlier:
            remedy = "give them with --from MODEL, or resume a session whose earlier phases have finished"
            raise ConfigError("needs models and this session has made none", where=f"phase {name}", remedy=remedy)
        record = made[earlier[-1]]
        return self._offer(_result(record, earlier[-1]), tuple(record["key"]["inputs"]))

    def _inputs(self) -> list[Input]:
        """The models the session was given, by now all in the registry; the plan remembers them."""

        def all_in() -> list[Input]:
            given = [Input(**record) for record in self.plan["inputs"]]
            return [take_in(self.storage, self.session_id, one) for one in given]

        found = agreed(all_in)
        self.plan = {**self.plan, "inputs": [one.record() for one in found]}
        self._note(plan=self.plan)
        return found

    def _offer(self, result: PhaseResult, given: tuple[str, ...]) -> Offer:
        """Models for the next phase: what this one made, or its parents where its gate said no.

        The parents are what a phase names as ``fall_back``, else what it was given; the first was given nothing.
        """
        made, gate = _made(result), result.artifacts.get("gate")
        parents = tuple(result.artifacts.get("fall_back") or given)
        if not gate or gate["passed"] or self.profile.gate == "accept":
            return Offer(made, result.phase_name, parents)
        if self.profile.gate == "stop":
            reason = next(r for r in gate["reasons"] if r.startswith("no"))
            remedy = 'see `agent-forge report`; gate = "fall_back" or "accept" goes on'
            raise GateError(f"the gate said {reason}", where=f"phase {result.phase_name}", remedy=remedy)
        return Offer(parents or made, result.phase_name, stand_in=bool(parents))

    def _admit(self, offer: Offer, target: str) -> tuple[str, ...]:
        """The models that really go into a phase: those offered, or their parents where the contract says no.

        Raises:
            GateError: refused, and the profile's policy has no way on.
            ArtifactError: weights that cannot be used.
        """
        if not offer.models and target == ORDER[0]:
            return ()
        decision = self._decide(offer, target)
        if _passes(decision, self.profile):
            return offer.models
        if self.profile.gate == "fall_back" and offer.parents:
            again = Offer(offer.parents, offer.source, stand_in=True)
            if self._decide(again, target).accepted:
                return offer.parents
        raise decision.error()

    def _decide(self, offer: Offer, target: str) -> HandoffDecision:
        """Validate a handoff, and record it: an event, and a row for every model."""
        arguments = (offer.source or EXTERNAL, target, self.storage, offer.models, offer.stand_in)
        decision = agreed(lambda: self.validator.validate_stored(*arguments))
        self.logger.event("handoff", stand_in=offer.stand_in, **decision.record())
        for model in offer.models:
            self._record(decision, model, target)
        return decision

    def _record(self, decision: HandoffDecision, model: str, target: str) -> None:
        """Enter a handoff in the registry. A resumed session replaces its row."""
        registry = self.storage.registry
        if not self._leads or registry.get_model(model) is None:
            return
        found = {"accepted": "yes" if decision.accepted else "no"}
        if decision.refusals:
            found["rule"] = "; ".join(str(one) for one in decision.refusals if one.model == model) or decision.message
        if decision.unknown:
            found["not known"] = ", ".join(decision.unknown)
        registry.record_handoff(
            model,
            model,
            target_phase=target,
            validation_status="passed" if decision.accepted else "failed",
            validation_metrics=found,
            handoff_id=self._handoff_id(model, target),
        )

    def _handoff_id(self, model: str, target: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{self.session_id} {model} {target}"))

    def _outlook(self, offer: Offer) -> None:
        """Say as an event whether the next phase would take what this run ends with."""
        target = following(offer.source)
        arguments = (offer.source, target, self.storage, offer.models, offer.stand_in)
        decision = agreed(lambda: self.validator.validate_stored(*arguments))
        self.logger.event("handoff_outlook", stand_in=offer.stand_in, **decision.record())

    def _run_phase(self, name: str, offer: Offer) -> tuple[PhaseResult, tuple[str, ...]]:
        """Run one phase, or take its finished result; gives the models that went into it too."""
        config = self.profile.phase(name)
        folder = fsio.make_folder(self.folder / phase_folder(name))

        def key(models: tuple[str, ...]) -> dict[str, Any]:
            return {"config": config.fingerprint(), "inputs": list(models), "data": data_print(self.data)}

        models = offer.models
        finished = agreed(lambda: _finished(folder / "result.json", key(models)))
        if finished is None:
            models = self._admit(offer, name)
            if models != offer.models:  # parents in their place; they may have been through this phase already
                finished = agreed(lambda: _finished(folder / "result.json", key(models)))
        if finished is not None:
            self.show(Progress(name, 1, 1, "already finished"))
            return finished, models
        result = self._work(name, config, folder, list(models))
        record = json.dumps({"key": key(models), **result.record()}, indent=1, default=str)
        if self._leads:
            fsio.write_atomic(folder / "result.json", record.encode())
            self._record_made(name, models, result)
        self.logger.phase(name).event("phase_finished", seconds=result.duration_seconds, success=result.success)
        return result, models

    def _work(self, name: str, config: Config, folder: Path, models: list[str]) -> PhaseResult:
        """Let the phase's controller do its work."""
        logger = self.logger.phase(name)
        context = PhaseContext(self.session_id, folder, self.profile, self.storage, logger, self.data, self.show)
        controller = PHASES.get(name)(config, context)
        controller.validate_input(models)
        logger.event("phase_started", inputs=models)
        started = datetime.now(UTC).isoformat()
        try:
            result = controller.run(models)
        except ForgeError as error:
            logger.event("phase_failed", error=str(error))
            raise
        result.start_time, result.end_time = started, datetime.now(UTC).isoformat()
        return result

    def _record_made(self, name: str, models: tuple[str, ...], result: PhaseResult) -> None:
        """Complete the handoffs into a phase with what it made of them."""
        if result.model and self.storage.registry.get_model(result.model):
            for model in models:
                self.storage.registry.complete_handoff(self._handoff_id(model, name), result.model)


def _plan(profile: Profile, data: Path | None) -> dict[str, Any]:
    return {"profile": profile.model_dump(mode="json"), "data": str(data) if data else None}


def _data_folder(data: Path | str | None) -> Path | None:
    """The data folder, absolute.

    Raises:
        ConfigError: it is not there.
    """
    if not data:
        return None
    folder = Path(data).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}", where="--data", remedy="give a folder with data sets")
    return folder


def phases_to_run(profile: Profile, first: str | int | None = None, last: str | int | None = None) -> list[str]:
    """The phases the profile has settings for, from the first to the last one wanted.

    Raises:
        ConfigError: unknown phase, one that is not built or that the profile has no settings for, none at all, or the
            last before the first.
    """
    wanted = [phase_name(one) for one in (first, last) if one is not None]
    for one in wanted or (() if profile.phases else ORDER[:1]):
        profile.phase(one)
    names = [name for name in ORDER if name in profile.phases]
    begin = names.index(phase_name(first)) if first is not None else 0
    end = names.index(phase_name(last)) + 1 if last is not None else len(names)
    if end <= begin:
        what = f"{names[end - 1]} comes before {names[begin]}, where the run starts"
        raise ConfigError(what, where="--until", remedy="name the same phase or a later one")
    for name in names[begin:end]:
        PHASES.resolve(name)  # one that nobody has built is told now, not when its turn comes
    return names[begin:end]


def _made(result: PhaseResult) -> tuple[str, ...]:
    return tuple(result.artifacts.get("all_models") or filter(None, [result.model]))


def _passes(decision: HandoffDecision, profile: Profile) -> bool:
    """Accepted, or refused for a measured number only where the profile goes on nevertheless."""
    return decision.accepted or (profile.gate == "accept" and decision.thresholds_only)


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
    return _result(record, str(path)) if record["key"] == key else None


def _result(record: dict[str, Any], source: str) -> PhaseResult:
    """What was stored, as the phase returned it."""
    values = {name: value for name, value in record.items() if name != "key"}
    return PhaseResult(**{**values, "evidence": [Evidence.build(e, source) for e in record["evidence"]]})
