"""Settings of phase 1. No torch here."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from forgekit.config import Config
from forgekit.data.plans import GymMix, Mix, Positive, Share, TextPlan
from forgekit.errors import ConfigError
from forgekit.train.config import TrainConfig


class SpecialistPlan(Config):
    """One of the three: what it practises and how it differs (V2 specification, 2.1.6)."""

    name: str
    """Specialisation."""
    seed: int
    """Seed of its data."""
    mix: Mix
    """Its speciality: what it practises and is judged by."""
    t_max: Annotated[int, Field(ge=0)] | None = None
    """Recursion steps at most; unset keeps the trunk's."""
    act_threshold: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Halting threshold, where the model recurses."""
    memory_capacity: Positive = 4096
    """Memory horizon in tokens."""
    surprise_weight: Share = 0.5
    """How strongly errors are written to memory."""
    novelty_weight: Share = 0.5
    """How readily old content makes room."""
    rehearse: Share = 0.4
    """Share of rows that keep practising the trunk's data."""
    text_labels: Share = 0.1
    """Share of the rehearsed text's tokens that are supervised, so that text does not drown the speciality."""
    train: dict[str, Any] = {}
    """Changes to the common specialist training settings."""

    def traits(self) -> dict[str, Any]:
        """The fields of the model configuration that this specialist changes; none of them is a shape."""
        names = ("t_max", "act_threshold", "memory_capacity", "surprise_weight", "novelty_weight")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class EvaluationPlan(Config):
    """How much is measured."""

    problems: Positive = 200
    """Problems per family and level on the report split."""
    windows: Positive = 64
    """Windows of held-out text."""
    far_gap: Annotated[int, Field(ge=0)] = 0
    """Filler words of the beyond-the-window test; 0 takes one and a half times what attention can reach."""
    far_pairs: Positive = 4
    """Pairs to remember in that test."""


class CognateConfig(Config):
    """Phase 1: one trunk from nothing, then three specialists from the trunk."""

    trunk_mix: Mix = tuple(GymMix(family=f) for f in ("copy", "reverse", "sort", "recall", "compare", "add"))
    """Direct one-step skills; no scratchpad before phase 3."""
    text: TextPlan = TextPlan()
    """Real text."""
    pool: Positive = 3000
    """Distinct draws of problems per family and level."""
    trunk: TrainConfig = TrainConfig()
    """Training of the trunk."""
    specialist: TrainConfig = TrainConfig()
    """Training common to the specialists."""
    specialists: Annotated[tuple[SpecialistPlan, ...], Field(min_length=1)]
    """The specialists, in order."""
    evaluation: EvaluationPlan = EvaluationPlan()
    """Measurements."""
    ablate: bool = False
    """Also train the ablations: memory off, and the plain family at matched training FLOPs."""

    @model_validator(mode="after")
    def _specialists_trainable(self):
        names = [s.name for s in self.specialists]
        if len(set(names)) < len(names):
            raise ValueError(f"two specialists share a name: {names}")
        for plan in self.specialists:
            try:
                self.training_of(plan)
            except ConfigError as error:
                raise ValueError(f"{plan.name}: {error}") from None
        return self

    def training_of(self, plan: SpecialistPlan) -> TrainConfig:
        """The complete training settings of one specialist."""
        return TrainConfig.build({**self.specialist.model_dump(), **plan.train, "seed": plan.seed}, "train")
