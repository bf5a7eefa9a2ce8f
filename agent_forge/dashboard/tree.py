"""The session as the page tells it: one frozen tree, filled by :mod:`agent_forge.dashboard.collect`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from forgekit.measure.evidence import Evidence

Points = tuple[tuple[float, float], ...]
"""(x, y) pairs in the order of x."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    points: Points


@dataclass(frozen=True)
class Gate:
    """What a phase's gate decided, one reason per requirement."""

    passed: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """A question that a model was asked, and what it said; ``thought`` is what it wrote before, markers included."""

    model: str
    asked: str
    answered: str
    expected: str
    right: bool | None
    thought: str = ""


@dataclass(frozen=True)
class Strategy:
    """One search run; ``curve`` is the best composite on the select split after each evaluation."""

    name: str
    seed: str
    evaluations: int | None
    curve: Points
    select: float | None
    report: float | None


@dataclass(frozen=True)
class Merge:
    """What phase 2 leaves besides evidence; empty where the phase has none.

    Attributes:
        history: rows by generation, each with its ``generation``.
        floor: the diversity that the search was to keep, as its settings say; None where they do not.
        table: model name to split (``select``, ``report``) to parts of the fitness.
        gains: the champion's composite minus the best parent's, by split.
        strategies: search runs that were compared.
        kept: speciality to ``before`` (its specialist), ``after`` (the champion) and ``kept`` (1 or 0).
        kept_within: the share that may be lost; None where the settings do not say.
        stopped: why the search ended.
        recipe: how the champion was made.
        strategy: the search that made it.
    """

    history: tuple[dict[str, float], ...] = ()
    floor: float | None = None
    table: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)
    strategies: tuple[Strategy, ...] = ()
    kept: dict[str, dict[str, float]] = field(default_factory=dict)
    kept_within: float | None = None
    stopped: str = ""
    recipe: str = ""
    strategy: str = ""


@dataclass(frozen=True)
class Estimate:
    """A measured value and the ends of its 95 % interval, as far as they are known."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Condition:
    """One way of answering the same questions.

    Attributes:
        accuracy: share of right answers.
        lost: the share of the thoughts' gain that is lost this way; None where it does not apply.
        n: questions.
        meaning: what was done, in a clause.
    """

    name: str
    accuracy: Estimate
    lost: Estimate | None
    n: int | None
    meaning: str


@dataclass(frozen=True)
class Theater:
    """Whether thoughts that only look like work were found.

    Attributes:
        detected: None where it was not judged.
        reasons: one per requirement, beginning with ``yes:``, ``no:`` or ``not used:``.
        power: chance that the right answer is likelier after its own thought than after another question's.
        correlation: of coherence and right answers; note: why it is missing, or what to keep in mind.
    """

    detected: bool | None
    reasons: tuple[str, ...] = ()
    power: Estimate | None = None
    correlation: Estimate | None = None
    note: str = ""


@dataclass(frozen=True)
class Example:
    """A question, the thought that a model wrote about it, and its answer.

    Attributes:
        valid: whether the thought is well formed and no statement in it is false.
        strategy: the way of thinking that was asked for, or that the thought shows.
        note: what to look at.
    """

    asked: str
    thought: str
    answered: str
    expected: str
    right: bool | None
    valid: bool | None
    strategy: str
    note: str


@dataclass(frozen=True)
class FirstStep:
    """Learning to think from written thoughts: counts and shares by name, whether it converged, its loss."""

    counts: dict[str, float] = field(default_factory=dict)
    converged: bool | None = None
    losses: Points = ()


@dataclass(frozen=True)
class SecondStep:
    """Quiet-STaR: which step's model was kept and why, and what changed.

    Attributes:
        nats: validation nats per token, by ``before``, ``after`` and ``continued`` (equal compute, no thoughts).
        select: accuracy on the select split by step.
        rewards, listening: by training step.
    """

    chosen: str = ""
    why: str = ""
    nats: dict[str, float] = field(default_factory=dict)
    select: dict[str, float] = field(default_factory=dict)
    rewards: Points = ()
    listening: Points = ()


@dataclass(frozen=True)
class Thinking:
    """What phase 3 leaves besides evidence; empty where the phase has none.

    Attributes:
        conditions: ways of answering, in the order recorded.
        totals: counts, shares and means over all thoughts.
        strategies: strategy to ``share``, ``valid``, ``right``; families: task family to ``valid``, ``right``, ``n``.
    """

    conditions: tuple[Condition, ...] = ()
    theater: Theater | None = None
    totals: dict[str, float] = field(default_factory=dict)
    strategies: dict[str, dict[str, float]] = field(default_factory=dict)
    families: dict[str, dict[str, float]] = field(default_factory=dict)
    one: FirstStep = FirstStep()
    two: SecondStep = SecondStep()
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Sized:
    """One model of phase 4: what it takes and what it can do; None where that was not measured.

    Attributes:
        bytes: of its weights on disk; ratio: how many times smaller that is than the parent.
        accuracy: share of right answers; n: questions.
        perplexity: per token of held-out text.
        rate: tokens per second, one row; blocks: the rates it is the median of.
    """

    name: str
    bytes: float | None = None
    ratio: float | None = None
    accuracy: Estimate | None = None
    n: int | None = None
    perplexity: float | None = None
    rate: float | None = None
    blocks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Ternary:
    """What phase 4 leaves besides evidence; empty where the phase has none.

    Attributes:
        models: in the order recorded.
        parent, made, rounded: names of the model that was made small, of what the phase made of it, and of the same
            without training; empty where there is none.
        trained: whether what it made was trained after rounding; None where that was not recorded.
        skilled: False where the parent was not shown to be above chance, so that there is nothing to keep.
        losses: training to loss by step, as logged: one value per step.
        select: model to right answers on the split that chose.
        recovery: ``skills`` and ``perplexity``: share of what rounding lost that training brought back.
        levels: model to ``family/level`` to accuracy.
        facts: further numbers by their names in the metric catalogue.
        packed, dense: ids of the packed model and of its float copy, which is handed on.
        gate: what was decided.
    """

    models: tuple[Sized, ...] = ()
    parent: str = ""
    made: str = ""
    rounded: str = ""
    trained: bool | None = None
    skilled: bool = True
    losses: dict[str, Points] = field(default_factory=dict)
    select: dict[str, float] = field(default_factory=dict)
    recovery: dict[str, float] = field(default_factory=dict)
    levels: dict[str, dict[str, float]] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    packed: str = ""
    dense: str = ""
    gate: Gate | None = None

    def model(self, name: str) -> Sized | None:
        """The model of that name, if there is one."""
        return next((one for one in self.models if one.name == name), None) if name else None


@dataclass(frozen=True)
class PhaseReport:
    """One phase of the session.

    Attributes:
        state: finished, failed, interrupted, running, damaged or not run.
        seconds: time of its last start; starts: how often it was begun.
        inputs: ids of the models it was given; made: ids it handed on; names: their names.
        tokens: tokens trained on, by model.
        levels: model to ``family/level`` to accuracy; halting: model to steps to share of tokens.
    """

    name: str
    number: int
    state: str
    seconds: float | None = None
    starts: int = 0
    error: str = ""
    inputs: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    config_hash: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    evidence: tuple[Evidence, ...] = ()
    gate: Gate | None = None
    losses: tuple[Curve, ...] = ()
    tokens: dict[str, int] = field(default_factory=dict)
    data: tuple[dict[str, Any], ...] = ()
    data_notes: tuple[str, ...] = ()
    levels: dict[str, dict[str, float]] = field(default_factory=dict)
    halting: dict[str, dict[str, float]] = field(default_factory=dict)
    conversation: tuple[Answer, ...] | None = None
    merge: Merge = Merge()
    thinking: Thinking = Thinking()
    ternary: Ternary = Ternary()


@dataclass(frozen=True)
class Model:
    """A finished artifact of the session.

    Attributes:
        weights: bytes of the weights on disk; None when the files are gone.
    """

    model_id: str
    name: str
    phase: str
    parents: tuple[str, ...]
    parameters: int
    weights: int | None
    seeds: tuple[int, ...]
    config_hash: str
    data_hash: str
    code_version: str


@dataclass(frozen=True)
class SessionReport:
    """Everything the page tells.

    Attributes:
        status: completed, failed, paused, running or interrupted.
        error: why a failed session ended, in its own words.
        seconds: from every start to the last event that followed it, together; None without events.
        environments: what each start recorded about the machine; equal ones once.
        gate_policy: what the profile says happens when a gate says no; empty where it is not recorded.
        not_run: phases the plan has, as far as it was to go, that left nothing.
        peak_bytes: largest resident memory of the process that was sampled.
        handoffs: the registry's rows of models handed to a phase.
        notes: what is missing or damaged, in words.
    """

    session_id: str
    status: str
    started: str
    ended: str
    profile: str
    until: str
    data: str
    gate_policy: str
    settings: dict[str, Any]
    starts: int
    error: str
    seconds: float | None
    peak_bytes: float | None
    environments: tuple[dict[str, Any], ...]
    phases: tuple[PhaseReport, ...]
    not_run: tuple[str, ...]
    models: tuple[Model, ...]
    handoffs: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """Every claim of every phase."""
        return tuple(e for phase in self.phases for e in phase.evidence)
