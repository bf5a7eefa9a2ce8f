"""What a phase is: a typed configuration in, a result out, everything measured in between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from forgekit.config import Config, canonical_json
from forgekit.registry import Registry

if TYPE_CHECKING:
    from agent_forge.profile import Profile
    from forgekit.measure.evidence import Evidence
    from forgekit.store.storage import ModelStorage
    from forgekit.tracking.loggers import PhaseLogger

PHASES = Registry(
    "phase",
    aliases={"forge": "curriculum", "edge": "experts", "final_compression": "compression"},
)
"""Phase controllers by name; ours enter by the entry points of the distribution, like a user's."""


@dataclass(frozen=True)
class Progress:
    """One sign of life from a phase, for people.

    Attributes:
        stage: what is going on, such as ``trunk``.
        done, total: steps of this stage.
        note: short status, such as loss and tokens per second.
    """

    stage: str
    done: int
    total: int
    note: str = ""


@dataclass(frozen=True)
class PhaseContext:
    """Where a phase runs.

    Attributes:
        session_id, folder: the session and this phase's folder inside it.
        profile: the run's settings.
        storage: artifacts and registry.
        logger: metrics and events of this phase.
        data: a data folder, or None.
        show: called with :class:`Progress`.
    """

    session_id: str
    folder: Path
    profile: Profile
    storage: ModelStorage
    logger: PhaseLogger
    data: Path | None = None
    show: Callable[[Progress], None] = lambda progress: None


@dataclass
class PhaseResult:
    """What a phase returns.

    Attributes:
        success: the phase finished and its outputs are valid; whether it *helped* is for the gate to say.
        model: id of the model the next phase gets, or None.
        metrics: numbers by name.
        artifacts: ``all_models`` (ids) and whatever else was made; ``fall_back`` (ids) is what to go on with when the
            gate says no, where that is not simply what the phase was given.
        evidence: the measured claims.
        error: one line when not successful.
    """

    success: bool
    model: str | None
    phase_name: str
    metrics: dict[str, Any]
    artifacts: dict[str, Any]
    duration_seconds: float
    config: dict[str, Any]
    evidence: list[Evidence] = field(default_factory=list)
    error: str | None = None
    start_time: str = field(default_factory=lambda: datetime.now(UTC).isoformat())
    end_time: str = ""

    def record(self) -> dict[str, Any]:
        """The result as JSON-able values."""
        values = {k: v for k, v in self.__dict__.items() if k != "evidence"}
        return {**values, "evidence": [e.model_dump(mode="json") for e in self.evidence]}


class PhaseController(ABC):
    """Base of all phases. A controller is made for one run and reaches other phases only through artifacts."""

    name: ClassVar[str]

    def __init__(self, config: Config, context: PhaseContext) -> None:
        self.config, self.context = config, context

    @abstractmethod
    def validate_input(self, models: list[str]) -> None:
        """Check the handed-over models.

        Raises:
            ForgeError: they are not what this phase needs; names model, rule and value.
        """

    @abstractmethod
    def run(self, models: list[str]) -> PhaseResult:
        """Do the work on models given by id. Finished pieces of an interrupted run of the session are reused."""

    def key(self, piece: str, *inputs: str) -> str:
        """The fingerprint under which a finished piece of this phase is found again."""
        import hashlib

        parts = [self.name, piece, self.config.fingerprint(), self.context.profile.model.fingerprint(), *inputs]
        return hashlib.sha256(canonical_json(parts).encode()).hexdigest()
