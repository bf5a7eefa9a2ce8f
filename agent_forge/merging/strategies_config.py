"""The search space of the merge evolution as data: what a child is made of, what may be combined, and the settings.

A :class:`Recipe` says of which models a child was made and how; with the same models it gives the same child, so
lineage, the evaluation cache and resuming are one mechanism. :class:`Space` says what a strategy may combine. No torch
here: profiles and refusals need it fast.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from agent_forge.merging.genome_config import GenomeOptions, MutationOptions, combination
from agent_forge.merging.operators_config import Number
from forgekit.config import Config
from forgekit.errors import ConfigError
from forgekit.registry import Registry

Granularity = Literal["model", "layer", "module"]

STRATEGIES = Registry("merge_strategy")
"""Every strategy by name; a user's enters as an entry point of the group ``forgekit.merge_strategy``."""
for _name, _class in (
    ("elite", "EliteStrategy"),
    ("tournament", "TournamentStrategy"),
    ("cma_es", "CMAStrategy"),
    ("random", "RandomStrategy"),
):
    STRATEGIES.lazy(_name, f"agent_forge.merging.strategies:{_class}")

CHAMPION = "champion"
"""The name of the best model so far, whichever it is."""

_PARENTS = {"combination": (2, None), "mutation": (1, 1), "crossover": (2, 2), "weights": (1, None), "original": (1, 1)}
_WORDS = {
    "linear": "linear average",
    "slerp": "SLERP",
    "dare_linear": "DARE",
    "ties": "TIES",
    "frankenmerge": "layers grafted",
    "dfs": "fusion by importance",
}
# Names that hold a whole model: alone they say nothing about the place inside it.
_WRAPPERS = {"model", "transformer", "language_model", "gpt_neox"}


class Recipe(Config):
    """A child as data. Equal recipes on equal parents give equal children, bit for bit."""

    kind: Literal["combination", "mutation", "crossover", "weights", "original"]
    """How it is made."""
    parents: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of the models it is made of: originals, the base, ``champion``, or individuals of the last generation."""
    traits: str = ""
    """Name of the original model whose settings (loops, thresholds) the child takes; empty: the caller decides."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides everything that is drawn while it is built."""
    combo: int | None = None
    """Combination: 0 to 7."""
    weights: tuple[tuple[Number, ...], ...] = ()
    """Weights: one row per parent, one column per slot; factors on the task vectors."""
    options: dict[str, Any] = {}
    """Combination: of its stages. Mutation: of the noise. Crossover: ``blend`` (mix each slot instead of taking it from
    one parent), and of the noise that follows, if any is named."""
    granularity: Granularity = "module"
    """What a slot is."""

    @field_validator("options")
    @classmethod
    def _plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        """As it will be after a round trip through JSON."""
        return json.loads(json.dumps(value, allow_nan=False))

    @model_validator(mode="after")
    def _fits_its_kind(self):
        low, high = _PARENTS[self.kind]
        if not low <= len(self.parents) <= (high or len(self.parents)):
            raise ValueError(f"{self.kind} takes {low}{'' if high else ' or more'} parents, got {list(self.parents)}")
        if (self.combo is not None) != (self.kind == "combination"):
            raise ValueError(f"combo is {self.combo} in a {self.kind}; give it to a combination, and only there")
        if self.kind == "combination":
            combination(self.combo)
            GenomeOptions.build(self.options, path="options")
        elif self.kind in ("mutation", "crossover"):
            self.noise()
        elif self.options:
            raise ValueError(f"{self.kind} takes no options, got {', '.join(self.options)}")
        self._check_weights()
        return self

    def _check_weights(self) -> None:
        if self.kind != "weights":
            if self.weights:
                raise ValueError(f"{self.kind} takes no weights; choose kind weights")
            return
        lengths = {len(row) for row in self.weights}
        if len(self.weights) != len(self.parents) or len(lengths) != 1 or 0 in lengths:
            shape = [len(row) for row in self.weights]
            raise ValueError(f"rows of {shape} weights for {len(self.parents)} parents; give each one row of one size")

    @property
    def blends(self) -> bool:
        """Whether a crossover mixes each slot instead of taking it from one parent."""
        return self.kind == "crossover" and self.options.get("blend", False) is True

    def noise(self) -> MutationOptions | None:
        """The noise of a mutation, or after a crossover; None where there is none."""
        values = dict(self.options)
        if self.kind == "crossover" and not isinstance(values.pop("blend", False), bool):
            raise ConfigError("value refused: not true or false", where="options.blend", remedy="give true or false")
        if self.kind not in ("mutation", "crossover") or (self.kind == "crossover" and not values):
            return None
        return MutationOptions.build(values, path="options")

    def describe(self) -> str:
        """One short sentence for people."""
        names, place = _listed(self.parents), self.granularity
        if self.kind == "combination":
            stages = ", then ".join(_WORDS[stage] for stage in combination(self.combo))
            text = f"{stages} (combination {self.combo}) of {names}"
        elif self.kind == "mutation":
            text = f"{_noise(self.noise())} on {names}"
        elif self.kind == "crossover":
            how = f"{place} by {place} a blend of" if self.blends else f"each {place} from one of"
            text = f"{how} {names}" + (f", then {_noise(self.noise())}" if self.noise() else "")
        elif self.kind == "weights":
            means = [f"{math.fsum(row) / len(row):+.2f} {name}" for name, row in zip(self.parents, self.weights)]
            spread = "" if len(self.weights[0]) == 1 else f", weighted {place} by {place} (means)"
            text = f"task vectors {' '.join(means)}{spread}"
        else:
            text = f"{names} as it is"
        return f"{text}; traits of {self.traits}" if self.traits else text


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _noise(options: MutationOptions) -> str:
    unit = " root mean squares" if options.relative else ""
    return f"Gaussian noise (sigma {options.sigma:g}{unit}, {100 * options.rate:g} % of the values)"


class Space(Config):
    """What strategies may combine."""

    originals: Annotated[tuple[str, ...], Field(min_length=2)]
    """The parent models, usually three."""
    base: str
    """Their common ancestor."""
    slots: Annotated[tuple[str, ...], Field(min_length=1)]
    """The parts that get a weight each, from :func:`slots`."""
    granularity: Granularity = "module"
    """What a slot is."""
    traits: Annotated[tuple[str, ...], Field(min_length=1)]
    """Originals whose settings differ, one representative each."""
    low: Number = -0.25
    """The smallest merge weight."""
    high: Number = 1.25
    """The largest merge weight."""

    @model_validator(mode="after")
    def _consistent(self):
        names = [*self.originals, self.base]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name} is named twice among originals and base; give every model a name of its own")
        if CHAMPION in names:
            raise ValueError(f"{CHAMPION} is the name of the best model so far; rename the original or the base")
        for name in self.traits:
            if name not in self.originals:
                raise ValueError(f"traits names {name}, which is no original; choose among {_listed(self.originals)}")
        for field in ("slots", "traits"):
            if len(set(getattr(self, field))) != len(getattr(self, field)):
                raise ValueError(f"{field} has an entry twice; name each once")
        if not self.low < self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}; widen the range")
        return self


class StrategySettings(Config):
    """How a strategy searches. Each strategy uses the entries that concern it."""

    population: Annotated[int, Field(ge=0)] = 8
    """Individuals per generation, 2 or more. 0: what the strategy recommends (8; CMA-ES 4 + 3 ln of its dimensions)."""
    elites: Annotated[int, Field(ge=1)] = 2
    """Elite: how many of the best are mutated."""
    children_per_elite: Annotated[int, Field(ge=1)] = 3
    """Elite: mutated children of each."""
    mutation: MutationOptions = MutationOptions()
    """Elite and tournament: the noise."""
    combination: GenomeOptions = GenomeOptions()
    """Elite and tournament: settings of the combinations' stages."""
    tournament_size: Annotated[int, Field(ge=1)] = 3
    """Tournament: individuals that compete to be a parent."""
    crossover_rate: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Tournament: share of children with two parents; the others are mutated only."""
    blend_rate: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Tournament: share of crossovers that mix each slot instead of taking it from one parent."""
    sigma: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.2
    """CMA-ES: initial standard deviation of the merge weights."""
    start: Number | None = None
    """CMA-ES: initial mean of the merge weights; None: one over the number of originals."""
    trait_switch: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Chance that a mutated child takes another original's traits."""

    @field_validator("population")
    @classmethod
    def _enough(cls, value: int) -> int:
        if value == 1:
            raise ValueError("a population of one cannot evolve; choose 2 or more")
        return value


def slot_of(name: str, granularity: Granularity) -> str:
    """The slot of a tensor: ``model``, its layer (or ``outside``), or its module inside or outside the layers."""
    if granularity == "model":
        return "model"
    parts = name.split(".")
    layer = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if granularity == "layer":
        return "outside" if layer is None else ".".join(parts[: layer + 1])
    if layer is None:
        layer = next((i for i, part in enumerate(parts) if part not in _WRAPPERS), len(parts)) - 1
    return ".".join(parts[: layer + 2])


def slots(names: Iterable[str], granularity: Granularity) -> tuple[str, ...]:
    """Every slot of a model once, in an order that does not depend on that of the names.

    Args:
        names: of the model's tensors.
        granularity: ``model`` (one slot), ``layer`` (each layer and what is outside), or ``module`` (such as
            ``blocks.0.attn`` and ``embedding``).
    """
    return tuple(sorted({slot_of(name, granularity) for name in names}, key=_natural))


def _natural(slot: str) -> tuple:
    """Layer 2 before layer 10."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in slot.split("."))
