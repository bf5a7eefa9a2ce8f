"""Settings of phase 3. No torch here."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from agent_forge.phases.quietstar.talk_config import TalkConfig
from forgekit.config import Config
from forgekit.data.plans import GymMix, Mix, Positive, Share, TextPlan
from forgekit.data.thoughts.strategies import STRATEGIES
from forgekit.measure.thought_config import CoherenceConfig, TheaterConfig
from forgekit.registry import unknown
from forgekit.train.config import TrainConfig
from forgekit.train.optim_config import MuGrokConfig

LEAST_TRACES = 1600
"""Distinct verified traces that step 1 learns from, at least (V2 specification, 2.3)."""


class TracePlan(Config):
    """What is written for step 1."""

    mix: Mix = (
        GymMix(family="add", levels=(2, 4, 5)),
        *(GymMix(family=name, levels=(3, 4, 5)) for name in ("state", "lookup", "words", "program")),
    )
    """Questions that take several steps."""
    per_level: Positive = 1500
    """Questions per family and level."""
    told: Share = 0.3
    """Share of the traces whose system message names their strategy."""
    strategies: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    """How often each strategy is used; unset takes all seven alike."""
    seed: int = 31
    """Seed of questions, strategies and slips."""

    @model_validator(mode="after")
    def _strategies_known(self):
        for name in self.strategies:
            if name not in STRATEGIES:
                raise ValueError(str(unknown("thinking strategy", name, STRATEGIES.names())))
        return self


class TeachPlan(Config):
    """Step 1: supervised training on traces, with rehearsal of what the parent can do."""

    train: TrainConfig = TrainConfig(
        steps=800, rows=16, seq_len=128, seed=31, cooldown=0.6, optimizer=MuGrokConfig.from_phase(3, supervised=True)
    )
    """How to train; the model trained without thoughts, for comparison, is trained alike."""
    direct: Share = 0.05
    """Share of the rows with the same questions answered directly, so that thinking can be switched off."""
    skills: Share = 0.17
    """Share of the rows that rehearse the parent's skills, answered directly."""
    text: Share = 0.08
    """Share of the rows that are real text."""
    text_labels: Share = 0.3
    """Share of that text's tokens that are supervised."""
    pool: Positive = 600
    """Questions per family and level that are rehearsed."""
    converged: Share = 0.85
    """Share of held-out thoughts that must be valid for step 1 to count as converged."""

    @model_validator(mode="after")
    def _room_for_traces(self):
        if self.train.optimizer.kl_coefficient:
            raise ValueError("train.optimizer.kl_coefficient is for step 2; step 1 keeps to the parent by rehearsal")
        rest = self.direct + self.skills + self.text
        if rest >= 1:
            raise ValueError(f"direct, skills and text take {rest:g} of the rows; leave some for the traces")
        return self


class QuietPlan(Config):
    """Step 2: Quiet-STaR on what step 1 made."""

    run: bool = True
    """Off stops after step 1."""
    talk: TalkConfig = TalkConfig()
    """Thoughts, their places and how they are heard."""
    train: TrainConfig = TrainConfig(
        steps=200, rows=8, seq_len=96, seed=32, checkpoint_every=20, optimizer=MuGrokConfig.from_phase(3)
    )
    """How to train; ``optimizer.kl_coefficient`` weighs the divergence from the parent."""
    text: Share = 0.25
    """Share of the rows that are real text; the others are the traces' questions, answered directly."""
    validations: Annotated[int, Field(ge=1, le=4)] = 4
    """Times that thoughts are looked at while it trains."""
    watched: Positive = 4
    """Held-out questions per family and level that are thought about each time."""
    rows: Positive = 64
    """Held-out rows on which the validation loss is told."""

    @model_validator(mode="after")
    def _steps_to_look_after(self):
        if self.run and self.train.steps < self.validations:
            raise ValueError(f"{self.validations} validations need as many steps, train.steps is {self.train.steps}")
        return self


class ReportPlan(Config):
    """How much is measured on the report split."""

    problems: Positive = 60
    """Questions per family and level that are thought about."""
    skills: Positive = 40
    """Questions per family and level of the parent's skills."""
    select: Positive = 20
    """Questions per family and level of the select split, which chooses between step 1 and step 2."""
    windows: Positive = 64
    """Windows of held-out text."""
    length: Annotated[int, Field(ge=8)] = 96
    """Tokens per window."""


class QuietStarConfig(Config):
    """Phase 3: teach the model to think (step 1), then let it keep the thoughts that help (step 2)."""

    traces: TracePlan = TracePlan()
    """Written thoughts."""
    teach: TeachPlan = TeachPlan()
    """Step 1."""
    quiet: QuietPlan = QuietPlan()
    """Step 2."""
    skills: Mix | None = None
    """What the parent can do and must keep; unset takes what its manifest says it practised."""
    text: TextPlan | None = None
    """Real text; unset takes phase 1's."""
    window: Annotated[int, Field(ge=0)] | None = None
    """Attention window of the model that learns to think, in tokens, 0 for everything where the family allows it; unset
    keeps the parent's. A thought stands between the question and its answer, and pushes the question out of a narrow
    window."""
    coherence: CoherenceConfig = CoherenceConfig()
    """How coherent thoughts are."""
    theater: TheaterConfig = TheaterConfig()
    """What thoughts must show; its ``thinking_budget`` is also the longest thought that is measured."""
    evaluation: ReportPlan = ReportPlan()
    """Measurements."""
    below: Share = 0.5
    """A level counts as one that the parent cannot do when its accuracy there is below this (select split)."""
    least_gain: Share = 0.2
    """Accuracy that thoughts must add on those levels, as the mean; the interval must exclude zero."""
    least_valid: Share = 0.75
    """Share of valid thoughts that the gate asks for."""
    grace: Share = 0.03
    """Accuracy on the parent's other skills that may be lost."""
    seed: int = 30
    """Seed of the new rows of the embedding."""

    def forecast(self) -> list[dict[str, Any]]:
        """What the trainings cost, for the plan of a run: a token that is learned from counts three times, for the
        backward pass costs as much as two readings."""
        teach, quiet = self.teach.train, self.quiet.train
        tokens = teach.steps * teach.rows * teach.seq_len
        rows = [
            {"stage": name, "steps": teach.steps, "tokens": 3 * tokens, "models": 2}
            for name in ("thinking, step 1", "control without thoughts")
        ]
        if self.quiet.run:
            talk = self.quiet.talk
            branches = quiet.rows * talk.points.most * talk.thoughts
            own = quiet.rows * quiet.seq_len * 4 + branches * (4 * talk.points.max_length + 4 * talk.ahead)
            rows += [
                {"stage": name, "steps": steps, "tokens": quiet.steps * own}
                for name, steps in (("thinking, step 2", quiet.steps), ("control at equal compute", 0))
            ]
        return rows
