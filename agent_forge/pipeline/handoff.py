"""Handoffs: what may pass from one phase to the next, as data, and the validator that says yes or no.

Every boundary of the pipeline has a :class:`HandoffContract`. The rules are those of the V2 specification (3.1.4 and
the success criteria of each phase); a profile changes them under ``handoffs``. No torch here until weights are read.

What a model of ours lacks is a refusal. A model of elsewhere has no metadata of ours, and a parent that goes on in
place of its child has none of the phase that did not help: there a missing entry is *not known*, is told, and does not
stand in the way. What can be looked at in any model (number, sizes, architecture, weights) binds all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, FiniteFloat, field_validator, model_validator

from forgekit.config import Config
from forgekit.errors import ArtifactError, ConfigError, ForgeError, GateError
from forgekit.registry import unknown
from forgekit.store.names import PHASES, canonical_phase

if TYPE_CHECKING:
    from agent_forge.pipeline.handoff_subject import Subject
    from agent_forge.profile import Profile
    from forgekit.store.storage import ModelStorage

START, RELEASE, EXTERNAL = "start", "release", "external"
"""What comes before the first phase, what comes after the last, and where models of elsewhere come from."""

Boundary = tuple[str, str]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class HandoffContract(Config):
    """The rules of one boundary."""

    source: str
    """The phase that hands over."""
    target: str
    """The phase that receives."""
    num_models: Annotated[int, Field(ge=0)] = 1
    """Exactly so many models."""
    param_range: str | tuple[int, int] = "any"
    """Parameters of each model: `any`, `profile` (the profile's target within its tolerance) or [fewest, most]."""
    required_metadata: tuple[str, ...] = ()
    """Entries that each model's metadata must have, with a value; a number among them must be finite."""
    nullable: tuple[str, ...] = ()
    """Required entries for which null is a value."""
    minimum: dict[str, FiniteFloat] = {}
    """Least value by metadata entry."""
    maximum: dict[str, FiniteFloat] = {}
    """Greatest value by metadata entry."""
    maximum_per_million: dict[str, FiniteFloat] = {}
    """Greatest value by metadata entry, for each million parameters of the profile's target: 0.8 is 20 at 25M."""
    distinct: tuple[str, ...] = ()
    """Entries in which no two models may be alike."""
    same_architecture: bool = True
    """Family, width, layers and vocabulary are the same in all models."""
    as_parents: bool = False
    """And the same as in the models they were made from, where those are still there."""
    max_total_mb: Positive = 1000.0
    """Weights of all models together, in MB on disk."""
    waive: tuple[str, ...] = ()
    """Metadata entries whose rules are set aside."""

    @field_validator("param_range", mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        if value in ("any", "profile"):
            return value
        pair = isinstance(value, list | tuple) and len(value) == 2 and all(type(one) is int for one in value)
        if not pair or not 0 < value[0] <= value[1]:
            raise ValueError('give "any", "profile" or [fewest, most]')
        return tuple(value)

    @model_validator(mode="after")
    def _consistent(self) -> HandoffContract:
        for key in self.minimum.keys() & self.maximum.keys():
            if self.minimum[key] > self.maximum[key]:
                raise ValueError(f"minimum.{key} {self.minimum[key]:g} is above maximum.{key} {self.maximum[key]:g}")
        for key in self.waive:
            if key not in self.entries():
                raise ValueError(f"waive: there is no rule on {key!r}; rules: {', '.join(self.entries()) or 'none'}")
        return self

    def entries(self) -> list[str]:
        """Metadata entries that have a rule, waived ones included."""
        limits = [*self.minimum, *self.maximum, *self.maximum_per_million]
        return list(dict.fromkeys([*self.required_metadata, *self.distinct, *limits]))

    @property
    def name(self) -> str:
        """``source->target``, as a profile writes it."""
        return f"{self.source}->{self.target}"


_CONTRACTS: tuple[dict[str, Any], ...] = (
    {"source": START, "target": "cognate", "num_models": 0},
    {  # 2.2.2, 3.1.4; distinct specialisations: 2.1.9
        "source": "cognate",
        "target": "evomerge",
        "num_models": 3,
        "param_range": "profile",
        "required_metadata": ("specialization", "final_loss", "seed"),
        "nullable": ("specialization",),  # a specialist of one's own has none of the three
        "distinct": ("specialization",),
    },
    {  # 2.3.2, 3.1.4
        "source": "evomerge",
        "target": "quietstar",
        "required_metadata": ("fitness", "merge_technique"),
        "minimum": {"fitness": 0.70},
        "as_parents": True,
    },
    {  # 3.1.4
        "source": "quietstar",
        "target": "bitnet",
        "required_metadata": ("coherence_score", "validity_rate"),
        "minimum": {"accuracy": 0.80},
        "as_parents": True,
    },
    {  # 3.1.4; the 20 MB are those of the 25M model, and of the ternary file (2.5.2: what is trained on is FP16);
        # weight_grid says whether training keeps to the ternary grid (`ternary`) or not (`free`)
        "source": "bitnet",
        "target": "curriculum",
        "required_metadata": ("compression_ratio", "accuracy_retention", "weight_grid"),
        "minimum": {"compression_ratio": 7.0},
        "maximum_per_million": {"compressed_size_mb": 0.8},
        "as_parents": True,
    },
    {  # 2.5.6, 2.6.2
        "source": "curriculum",
        "target": "baking",
        "required_metadata": ("final_accuracy", "final_loss", "weight_grid"),
        "minimum": {"final_accuracy": 0.85, "tool_use_success_rate": 0.85, "self_modeling_accuracy": 0.80},
        "as_parents": True,
    },
    {  # 2.6.6, 2.7.2
        "source": "baking",
        "target": "experts",
        "required_metadata": ("weight_grid",),
        "minimum": {"tool_success_rate": 0.70, "persona_consistency": 0.85},
        "as_parents": True,
    },
    {  # 2.7.5, 2.8.2
        "source": "experts",
        "target": "compression",
        "required_metadata": ("weight_grid",),
        "minimum": {"accuracy_retention": 0.90},
        "maximum": {"inference_latency_ms": 50.0},
        "maximum_per_million": {"model_size_mb": 0.8},
    },
    {  # 2.8.4, 2.8.6; the ratio is reported as the bytes say, and has no least value
        "source": "compression",
        "target": RELEASE,
        "required_metadata": ("total_compression_ratio",),
        "minimum": {"accuracy_retention": 0.84, "eudaimonia_score": 0.60},
    },
)
CONTRACTS: dict[Boundary, HandoffContract] = {(c["source"], c["target"]): HandoffContract(**c) for c in _CONTRACTS}
"""The boundaries of the pipeline, before a profile changes them."""


def contracts(changes: Mapping[str, Mapping[str, Any]] | None = None) -> dict[Boundary, HandoffContract]:
    """The contracts with a profile's changes. Limits are changed one by one, other fields as a whole.

    A boundary that the pipeline does not have (``cognate->quietstar``) can be added; it begins without metadata rules.

    Args:
        changes: fields by boundary, written ``evomerge->quietstar`` or by its target alone.

    Raises:
        ConfigError: unknown phase or field, or a value is refused; names the field.
    """
    found, named = dict(CONTRACTS), {}
    for key, values in (changes or {}).items():
        place, where = boundary(key), f"handoffs.{key}"
        if place in named:
            raise ConfigError(f"is the boundary of {named[place]!r}", where=where, remedy="keep one of the two")
        named[place] = key
        source, target = place
        start = found[place].model_dump() if place in found else {"source": source, "target": target}
        for fixed in ("source", "target"):
            if fixed in values:
                raise ConfigError("cannot be changed", where=f"{where}.{fixed}", remedy="the key names the boundary")
        merged = {name: _merged(start.get(name), value) for name, value in values.items()}
        found[place] = HandoffContract.build({**start, **merged}, path=where)
    return found


def _merged(old: Any, new: Any) -> Any:
    return {**old, **new} if isinstance(old, dict) and isinstance(new, dict) else new


def boundary(key: str) -> Boundary:
    """Source and target that ``evomerge->quietstar``, or ``quietstar`` alone, names; aliases are followed.

    Raises:
        ConfigError: unknown; the nearest are given.
    """
    source, arrow, target = (part.strip() for part in key.partition("->"))
    if not arrow:
        name = _end_name(source, key, {t: t for _, t in CONTRACTS})
        return next(place for place in CONTRACTS if place[1] == name)
    sources = {name: name for name in (START, *PHASES, EXTERNAL)}
    return _end_name(source, key, sources), _end_name(target, key, {t: t for _, t in CONTRACTS})


def _end_name(name: str, key: str, known: Mapping[str, str]) -> str:
    try:
        own = canonical_phase(name)
    except ConfigError:
        own = name
    if own not in known:
        wrong = unknown("boundary", name, list(known))
        raise ConfigError(wrong.what, where=f"handoffs.{key}", remedy=wrong.remedy)
    return own


Kind = Literal["weights", "structure", "metadata", "threshold"]


@dataclass(frozen=True)
class Refusal:
    """One broken rule.

    Attributes:
        model: whose, or the names of all.
        what: the rule, the value and the limit.
        remedy: what to do.
        kind: ``weights`` are unreadable or not finite, ``structure`` can be seen in any model, ``metadata`` is missing
            or no number, ``threshold`` is a number on the wrong side.
    """

    model: str
    what: str
    remedy: str
    kind: Kind

    def __str__(self) -> str:
        return f"{self.model}: {self.what}; {self.remedy}"


@dataclass(frozen=True)
class HandoffDecision:
    """Yes or no, and why. Unpacks as ``valid, message``.

    Attributes:
        source, target: the boundary.
        models: names of what was to be handed over.
        refusals: every broken rule, empty when accepted.
        unknown: what could not be told, one line each.
    """

    source: str
    target: str
    models: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        """Whether no rule is broken."""
        return not self.refusals

    @property
    def thresholds_only(self) -> bool:
        """Whether it is refused, and only because a measured number is on the wrong side."""
        return bool(self.refusals) and all(refusal.kind == "threshold" for refusal in self.refusals)

    @property
    def message(self) -> str:
        """One line."""
        if self.refusals:
            more = len(self.refusals) - 1
            return f"{self.refusals[0]}{f' (and {more} more)' if more else ''}"
        said = f"; not known: {', '.join(self.unknown)}" if self.unknown else ""
        return f"{self.source}->{self.target}: {', '.join(self.models) or 'no model'} accepted{said}"

    def __bool__(self) -> bool:
        return self.accepted

    def __iter__(self) -> Iterator[Any]:
        return iter((self.accepted, self.message))

    def error(self) -> ForgeError:
        """The refusal as one line: exit code 4 for weights that cannot be used, else that of a gate."""
        first, more = self.refusals[0], len(self.refusals) - 1
        remedy = f"{first.remedy} (and {more} more problem{'s' * (more > 1)})" if more else first.remedy
        kind = ArtifactError if first.kind == "weights" else GateError
        return kind(f"{first.model}: {first.what}", where=f"handoff {self.source}->{self.target}", remedy=remedy)

    def record(self) -> dict[str, Any]:
        """For an event, as JSON-able values."""
        values = {"source": self.source, "target": self.target, "models": list(self.models)}
        refused = [str(refusal) for refusal in self.refusals]
        return {**values, "accepted": self.accepted, "message": self.message, "refusals": refused,
                "unknown": list(self.unknown)}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What the rules look at."""

    contract: HandoffContract
    subjects: Sequence[Subject]
    target_parameters: int
    tolerance: float
    found: list[Refusal] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def refuse(self, model: str, what: str, remedy: str, kind: Kind) -> None:
        """Note a broken rule."""
        self.found.append(Refusal(model, what, remedy, kind))

    def note(self, line: str) -> None:
        """Note once what cannot be told."""
        if line not in self.unknown:
            self.unknown.append(line)

    def setting(self, rule: str) -> str:
        """Where a profile changes a rule."""
        standard = CONTRACTS.get((self.contract.source, self.contract.target))
        return f"handoffs.{self.contract.target if standard else self.contract.name}.{rule}"


class ModelHandoffValidator:
    """Decides whether models may pass from one phase to another.

    Args:
        profile: whose contracts, and whose parameter target; None takes the specification's own (25M, 10 %).
    """

    def __init__(self, profile: Profile | None = None) -> None:
        self.contracts = contracts(profile.handoffs if profile else None)
        self._target = (profile.model.target_parameters, profile.model.tolerance) if profile else (25_000_000, 0.1)

    def contract(self, source: str, target: str) -> HandoffContract:
        """The rules of a boundary. Models of elsewhere meet those of whatever the pipeline hands to the target.

        Raises:
            ConfigError: the two are no neighbours; says who hands over, and how a profile adds the boundary.
        """
        source, target = (canonical_phase(name) for name in (source, target))
        if (source, target) in self.contracts:
            return self.contracts[source, target]
        usual = next((place for place in CONTRACTS if place[1] == target), None)
        if usual is None:
            raise unknown("phase", target, list(PHASES))
        if source == EXTERNAL:
            return self.contracts[usual]
        if usual[0] == START:
            raise ConfigError(f"{target} starts from nothing", where="handoff", remedy="leave the models out")
        what = f"{source} does not hand over to {target}, {usual[0]} does"
        remedy = f"run {usual[0]} before, or allow it: --set 'handoffs.{source}->{target}.num_models=N'"
        raise ConfigError(what, where="handoff", remedy=remedy)

    def validate_handoff(
        self,
        source_phase: str,
        target_phase: str,
        models: Sequence[Any],
        metadata: Sequence[Mapping[str, Any]] | None = None,
        stand_in: bool = False,
    ) -> HandoffDecision:
        """Judge models against the contract between two phases.

        Args:
            source_phase: who hands over; ``external`` for models of elsewhere.
            target_phase: who receives.
            models: loaded models, or model folders.
            metadata: of each model; None reads the folders' manifests.
            stand_in: the models are parents going on in place of what the source made.

        Returns:
            The decision, which unpacks as ``valid, message``.
        """
        from agent_forge.pipeline.handoff_subject import of_folder, of_model

        if metadata is not None and len(metadata) != len(models):
            what = f"{len(metadata)} for {len(models)} models"
            raise ConfigError(what, where="metadata", remedy="give one per model")
        given: Sequence[Mapping[str, Any] | None] = metadata if metadata is not None else [None] * len(models)
        makers = [
            partial(of_folder, Path(one), str(one), meta)
            if isinstance(one, str | Path)
            else partial(of_model, one, f"model {number}", meta or {})
            for number, (one, meta) in enumerate(zip(models, given))
        ]
        return self._decide(source_phase, target_phase, makers, stand_in)

    def validate_stored(
        self, source: str, target: str, storage: ModelStorage, ids: Sequence[str], stand_in: bool = False
    ) -> HandoffDecision:
        """Judge models of a storage, given by id or folder; parents are looked up in its registry.

        Args:
            source, target: the phases.
            storage: where the models are.
            ids: ids or folders.
            stand_in: as in :meth:`validate_handoff`.
        """
        from agent_forge.pipeline.handoff_subject import of_stored

        return self._decide(source, target, [partial(of_stored, storage, one) for one in ids], stand_in)

    def _decide(
        self, source: str, target: str, makers: Sequence[Callable[[], Subject]], stand_in: bool
    ) -> HandoffDecision:
        from agent_forge.pipeline.handoff_rules import judge

        source, target = canonical_phase(source), canonical_phase(target)
        try:
            contract = self.contract(source, target)
        except ConfigError as error:
            return HandoffDecision(source, target, (), (Refusal("all", error.what, error.remedy, "structure"),))
        subjects, broken = [], []
        for make in makers:
            try:
                subject = make()
                subjects.append(subject.lenient() if stand_in else subject)
            except ArtifactError as error:
                broken.append(Refusal(error.where or "a model", error.what, error.remedy, "weights"))
        case = Case(contract, subjects, *self._target)
        names = tuple(subject.name for subject in subjects)
        if broken:
            return HandoffDecision(source, target, names, tuple(broken))
        judge(case)
        return HandoffDecision(source, target, names, tuple(case.found), tuple(case.unknown))


def validate_models(
    profile: Profile, source: str, target: str, storage: ModelStorage, ids: Sequence[str]
) -> HandoffDecision:
    """Whether models of a storage may pass from one phase to another under a profile.

    Args:
        profile: whose contracts.
        source, target: phase names; ``external`` as source for models of elsewhere.
        storage: where the models are.
        ids: model ids, or folders.
    """
    return ModelHandoffValidator(profile).validate_stored(source, target, storage, ids)


def is_number(value: Any) -> bool:
    """Whether a metadata value is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
