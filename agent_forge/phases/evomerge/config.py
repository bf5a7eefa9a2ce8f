"""Settings of phase 2. No torch here."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from agent_forge.merging.strategies_config import StrategySettings
from forgekit.config import Config
from forgekit.data.plans import Mix, Positive, Share, TextPlan
from forgekit.registry import unknown

MOST = 8
"""Individuals of a generation that is kept on the disk, at most."""
STRATEGY_NAMES = ("elite", "tournament", "cma_es", "random")
"""Strategies that ship; others enter by the entry points of the group ``forgekit.merge_strategy``."""


class FitnessPlan(Config):
    """What a candidate is selected by (V2 specification, 2.2.5; DESIGN 7 (2)), measured on the select split."""

    perplexity: Share = 0.4
    """Weight of 1 / perplexity per byte of held-out text."""
    accuracy: Share = 0.3
    """Weight of the exact answers, the mean over the specialities."""
    speed: Share = 0.2
    """Weight of the base's FLOPs per answered token over the candidate's; counted, not timed."""
    memory: Share = 0.1
    """Weight of the base's bytes over the candidate's; counted."""
    problems: Positive = 8
    """Problems per family and level."""
    windows: Positive = 32
    """Windows of held-out text."""
    length: Annotated[int, Field(ge=8)] = 96
    """Tokens per window."""

    @model_validator(mode="after")
    def _whole(self):
        total = self.perplexity + self.accuracy + self.speed + self.memory
        if not math.isclose(total, 1.0, abs_tol=1e-9):
            raise ValueError(f"the weights perplexity, accuracy, speed, memory sum to {total:g}; make them sum to 1")
        return self


class ReportPlan(Config):
    """How much is measured on the report split."""

    problems: Positive = 200
    """Problems per family and level."""
    windows: Positive = 64
    """Windows of held-out text."""


class ComparePlan(Config):
    """The strategies against each other, at equal evaluations."""

    strategies: tuple[str, ...] = STRATEGY_NAMES
    """Which ones."""
    seeds: Positive = 3
    """Runs of each."""
    evaluations: Annotated[int, Field(ge=0)] = 0
    """Candidates each run may score; 0 leaves the comparison out."""


class EvoMergeConfig(Config):
    """Phase 2: merge the specialists into one model and evolve the merges."""

    strategy: str = "elite"
    """How the next candidates are made: elite, tournament, cma_es or random."""
    search: StrategySettings = StrategySettings()
    """Settings of the strategy."""
    generations: Annotated[int, Field(ge=1, le=200)] = 50
    """Generations at most, the first one included."""
    patience: Positive = 5
    """Generations without a better champion after which the search stops."""
    min_gain: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    """How much better a champion has to be to count as better."""
    min_diversity: Share = 0.05
    """Floor of a breeding population's diversity; below it the most redundant children become newcomers."""
    seed: int = 7
    """Seed of every draw."""
    granularity: Literal["model", "layer", "module"] = "module"
    """What has a merge weight, or a parent, of its own."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that score candidates, one thread each; 0 scores in this process. The numbers are the same."""
    engine: Literal["processes", "ray"] = "processes"
    """Who runs the workers; Ray has to be installed."""
    base: str = ""
    """The common ancestor, a model id or folder; unset finds it in the parents' lineage."""
    skills: dict[str, Mix] = {}
    """Specialities by name; unset takes what the parents' manifests say they practised."""
    text: TextPlan | None = None
    """Held-out text; unset takes phase 1's."""
    fitness: FitnessPlan = FitnessPlan()
    """Selection."""
    evaluation: ReportPlan = ReportPlan()
    """Report."""
    kept_within: Share = 0.03
    """How much of a speciality's accuracy may be lost and it still counts as kept."""
    compare: ComparePlan = ComparePlan()
    """Strategies against each other."""

    @model_validator(mode="after")
    def _strategies_known(self):
        from agent_forge.merging.strategies_config import STRATEGIES

        for name in (self.strategy, *self.compare.strategies):
            if name not in STRATEGIES:
                raise ValueError(str(unknown("strategy", name, STRATEGIES.names())))
        for name in {self.strategy, *(self.compare.strategies if self.compare.evaluations else ())}:
            if STRATEGIES.get(name).breeds and self.search.population > MOST:
                raise ValueError(
                    f"search.population {self.search.population} is too large for {name}, which keeps a generation on "
                    f"the disk: with the champion and three parents more than 12 models; choose {MOST} or fewer"
                )
        return self

    def forecast(self) -> dict[str, Any]:
        """What the search may cost, for the plan of a run: candidates scored at most."""
        compared = self.compare.evaluations * self.compare.seeds * len(self.compare.strategies)
        each = self.search.population or MOST
        return {"generations": self.generations, "evaluations": self.generations * each + compared}
