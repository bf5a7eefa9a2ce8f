"""What every merge method needs and can be told, as data. No torch here: profiles and refusals need it fast.

A method is a :class:`Merger`: its name, the configuration of its options, its :class:`Needs`, and the function that
computes it on the tensors of one name (given by dotted path, imported when it is first used).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from forgekit.config import Config
from forgekit.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from agent_forge.merging.operators import TensorGroup

Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Index = Annotated[int, Field(ge=0)]

NO_SUM = 1e-12
"""Weights that add up to less than this cannot be normalised."""


class MergeOptions(Config):
    """Base of every method's options."""

    def check(self, models: int, layers: int) -> None:
        """Refuse what does not fit the models.

        Args:
            models: how many are merged, the base not counted.
            layers: how many layers they have.

        Raises:
            ConfigError: names the option, its value and the rule.
        """

    def weights_for(self, models: int, layer: int | None) -> tuple[float, ...]:
        """One weight per model for a tensor of ``layer`` (None: outside the layers). Here: all alike."""
        return (1.0,) * models


class WeightedOptions(MergeOptions):
    """Options of a method that weighs its models."""

    weights: tuple[Number, ...] = ()
    """One weight per model; empty weighs all alike."""
    layer_weights: tuple[tuple[Number, ...], ...] = ()
    """One row of weights per layer; tensors outside the layers use ``weights``. Empty: no difference by layer."""

    signed: ClassVar[bool] = False
    """Whether a weight may be negative."""
    free_sum: ClassVar[bool] = False
    """Whether the weights may add up to zero: only where nothing divides by their sum."""

    @model_validator(mode="after")
    def _weights_usable(self):
        rows = {"weights": self.weights} | {f"layer_weights[{i}]": row for i, row in enumerate(self.layer_weights)}
        for name, row in rows.items():
            if row and not self.signed and min(row) < 0:
                raise ValueError(f"{name} {list(row)} has a negative weight; use weights of zero or more")
            if row and not self.free_sum and abs(sum(row)) < NO_SUM:
                raise ValueError(f"{name} {list(row)} sum to zero; give at least one model a weight")
        return self

    def check(self, models: int, layers: int) -> None:
        """See :meth:`MergeOptions.check`."""
        rows = [("weights", self.weights)] if self.weights else []
        for where, row in rows + [("layer_weights", row) for row in self.layer_weights]:
            if len(row) != models:
                what = f"{len(row)} weights {list(row)} for {models} models"
                raise ConfigError(what, where=where, remedy="give one weight per model, the base not counted")
        if self.layer_weights and len(self.layer_weights) != layers:
            what = f"{len(self.layer_weights)} rows for {layers} layers"
            raise ConfigError(what, where="layer_weights", remedy="give one row of weights per layer")

    def weights_for(self, models: int, layer: int | None) -> tuple[float, ...]:
        """See :meth:`MergeOptions.weights_for`."""
        row = self.weights
        if self.layer_weights and layer is not None:
            row = self.layer_weights[layer]
        return row or (1.0,) * models


class LinearOptions(WeightedOptions):
    """Weighted average: sum w_i x_i / sum w_i."""

    signed: ClassVar[bool] = True


def _many(value: Any) -> Any:
    return (value,) if isinstance(value, int | float) else value


class SlerpOptions(MergeOptions):
    """Spherical interpolation."""

    t: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1)], ...], BeforeValidator(_many), Field(min_length=1)
    ] = (0.5,)  # fmt: skip
    """Where to stop between the two ends, 0 to 1; for more than two models one value for every fold, or one each."""
    fold: bool = True
    """Fold more than two models pairwise, ((m1, m2), m3); off refuses them."""
    parallel: Annotated[float, Field(gt=0, le=1)] = 0.9995
    """Directions with a cosine beyond this, either way, are interpolated on the straight line."""

    def check(self, models: int, layers: int) -> None:
        """See :meth:`MergeOptions.check`."""
        if models > 2 and not self.fold:
            what = f"fold is off and {models} models are given; slerp takes exactly two"
            raise ConfigError(what, where="fold", remedy="give two models, or set fold = true")
        if len(self.t) not in (1, models - 1):
            what = f"{len(self.t)} values {list(self.t)} for {models - 1} folds of {models} models"
            raise ConfigError(what, where="t", remedy="give one value, or one per fold")


class KarcherOptions(WeightedOptions):
    """Riemannian centre of mass on the sphere."""

    iterations: Annotated[int, Field(gt=0)] = 50
    """Steps at most."""
    tolerance: Annotated[float, Field(gt=0)] = 1e-12
    """Stop when a step is shorter than this, in radians."""


class TaskArithmeticOptions(WeightedOptions):
    """Sum of task vectors; the weights are not normalised, and a negative one takes a skill away."""

    signed: ClassVar[bool] = True
    free_sum: ClassVar[bool] = True
    lam: Number = 0.4
    """Factor on the sum."""


class ConsensusOptions(WeightedOptions):
    """Task vectors merged where their signs agree (TIES)."""

    lam: Number = 1.0
    """Factor on the merged task vector."""
    normalize: bool = True
    """Divide by the weights that agree (the disjoint mean of TIES); off keeps their sum."""


class TiesOptions(ConsensusOptions):
    """Trim, elect sign, disjoint mean."""

    density: Share = 0.2
    """Share of each task vector that is kept, the largest magnitudes first."""


class DareOptions(TaskArithmeticOptions):
    """Drop at random and rescale, then the sum of task vectors."""

    drop_rate: Rate = 0.9
    """Chance of each entry to be dropped."""


class DareTiesOptions(ConsensusOptions):
    """Drop at random and rescale, then elect sign and disjoint mean."""

    drop_rate: Rate = 0.9
    """Chance of each entry to be dropped."""


class DellaOptions(ConsensusOptions):
    """Drop by magnitude and rescale, then elect sign and disjoint mean."""

    drop_rate: Rate = 0.5
    """Mean chance of an entry to be dropped."""
    epsilon: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The smallest entry of a row is dropped with ``drop_rate + epsilon``, the largest with ``drop_rate - epsilon``."""

    @model_validator(mode="after")
    def _chances(self):
        if self.drop_rate - self.epsilon < 0 or self.drop_rate + self.epsilon >= 1:
            raise ValueError(f"drop_rate {self.drop_rate} -+ epsilon {self.epsilon} must stay in 0 .. 1 (1 left out)")
        return self


class BreadcrumbsOptions(TaskArithmeticOptions):
    """Both tails of each task vector dropped, then the sum."""

    low: Rate = 0.85
    """Share dropped at the small end."""
    high: Rate = 0.007
    """Share dropped at the large end."""

    @model_validator(mode="after")
    def _something_left(self):
        if self.low + self.high >= 1:
            raise ValueError(f"low {self.low} + high {self.high} drop everything; keep their sum below 1")
        return self


class ModelStockOptions(MergeOptions):
    """Nothing to set: the angle between the task vectors decides."""


class FisherOptions(WeightedOptions):
    """Average weighted by how much each parameter matters to each model."""

    floor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-6
    """Smallest importance, as a share of the tensor's mean importance."""


class DfsOptions(WeightedOptions):
    """Dynamic fusion: one importance per tensor and model."""

    rule: Literal["softmax", "normalised"] = "softmax"
    """How importances become shares: softmax of importance / mean / temperature, or importance / sum."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Softmax temperature; small takes the most important model, large weighs all alike."""


def _check_index(field: str, value: int, models: int) -> None:
    if value >= models:
        what = f"model {value} is chosen, there are models 0 to {models - 1}"
        raise ConfigError(what, where=field, remedy="count models from 0, in the order given")


class FrankenmergeOptions(MergeOptions):
    """Every layer from one model."""

    choices: Annotated[tuple[Index, ...], Field(min_length=1)]
    """For each layer the model it is taken from, counted from 0."""
    outside: Index = 0
    """The model that gives the tensors outside the layers."""

    def check(self, models: int, layers: int) -> None:
        """See :meth:`MergeOptions.check`."""
        if not layers:
            remedy = "name tensors after their layer, such as blocks.0.weight, or choose another method"
            raise ConfigError("the models have no numbered layers to choose from", where="choices", remedy=remedy)
        if len(self.choices) != layers:
            what = f"{len(self.choices)} choices for {layers} layers"
            raise ConfigError(what, where="choices", remedy="name one model per layer")
        for value in self.choices:
            _check_index("choices", value, models)
        _check_index("outside", self.outside, models)


class LayerSlice(Config):
    """Consecutive layers of one model."""

    model: Index
    """The model, counted from 0."""
    start: Index
    """First layer."""
    stop: Annotated[int, Field(gt=0)]
    """The layer after the last."""

    @model_validator(mode="after")
    def _not_empty(self):
        if self.stop <= self.start:
            raise ValueError(f"layers {self.start}..{self.stop} are none; stop must be beyond start")
        return self


class PassthroughOptions(MergeOptions):
    """Layers stacked as they are; the result may be deeper or shallower than its parts."""

    slices: Annotated[tuple[LayerSlice, ...], Field(min_length=1)]
    """What is stacked, from the first layer to the last."""
    outside: Index = 0
    """The model that gives the tensors outside the layers."""

    def check(self, models: int, layers: int) -> None:
        """See :meth:`MergeOptions.check`. ``layers`` are those of the deepest model."""
        for part in self.slices:
            _check_index("slices", part.model, models)
            if part.stop > layers:
                what = f"layers {part.start}..{part.stop} are asked for, the models have {layers}"
                raise ConfigError(what, where="slices", remedy="count layers from 0; stop is the layer after the last")
        _check_index("outside", self.outside, models)

    def stack(self) -> list[tuple[int, int]]:
        """(model, layer) of every layer of the result."""
        return [(part.model, layer) for part in self.slices for layer in range(part.start, part.stop)]


@dataclass(frozen=True)
class Needs:
    """What a method needs besides models of one shape, so that a caller can refuse before any work."""

    base: bool = False
    """The common ancestor."""
    importances: Literal["no", "optional", "required"] = "no"
    """Importance tensors, one set per model."""
    base_or_importances: bool = False
    """At least one of the two."""
    models_min: int = 2
    models_max: int | None = None
    random: bool = False
    """Draws random numbers; the seed decides the result."""
    structure: bool = False
    """Chooses tensors by their place in the model instead of computing with their values."""

    @property
    def uses_base(self) -> bool:
        """Whether it computes with a base when there is one."""
        return self.base or self.base_or_importances


@dataclass(frozen=True)
class Merger:
    """One method.

    Attributes:
        name: as registered.
        options: the configuration of its options.
        needs: what it needs.
        function: ``function(group, options) -> Tensor``, or where to import it from.
        about: one line for people.
        buffers: float32 values it holds per value of the tensor while it works, the result not counted.
    """

    name: str
    options: type[MergeOptions]
    needs: Needs
    function: Callable[[TensorGroup, Any], Tensor] | str
    about: str
    buffers: int = 0

    def run(self, group: TensorGroup, options: MergeOptions) -> Tensor:
        """The merged tensor in working precision (float32, or float64 for float64 models)."""
        function = self.function
        if isinstance(function, str):
            module, _, attribute = function.partition(":")
            function = getattr(import_module(module), attribute)
        return function(group, options)

    def build(self, values: dict[str, Any] | MergeOptions | None) -> MergeOptions:
        """Its options from plain values.

        Raises:
            ConfigError: names the option, its value and the rule.
        """
        if isinstance(values, self.options):
            return values
        values = values.model_dump() if isinstance(values, Config) else dict(values or {})
        return self.options.build(values, path=self.name)


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum, which is not zero."""
    total = sum(weights)
    return [w / total for w in weights]


_HERE = "agent_forge.merging.operators"
_BASE = Needs(base=True, models_min=1)
_BASE_RANDOM = Needs(base=True, models_min=1, random=True)

LINEAR = Merger("linear", LinearOptions, Needs(), f"{_HERE}:linear", "weighted average")
SLERP = Merger("slerp", SlerpOptions, Needs(), f"{_HERE}:slerp", "interpolation on the sphere, pairwise")
KARCHER = Merger("karcher", KarcherOptions, Needs(), f"{_HERE}:karcher", "centre of mass on the sphere")
TASK_ARITHMETIC = Merger(
    "task_arithmetic", TaskArithmeticOptions, _BASE, f"{_HERE}:task_arithmetic", "base plus the sum of task vectors"
)
TIES = Merger("ties", TiesOptions, _BASE, f"{_HERE}:ties", "trim, elect sign, mean of those that agree", buffers=1)
DARE_LINEAR = Merger(
    "dare_linear", DareOptions, _BASE_RANDOM, f"{_HERE}:dare_linear", "drop at random and rescale, then sum"
)
DARE_TIES = Merger(
    "dare_ties", DareTiesOptions, _BASE_RANDOM, f"{_HERE}:dare_ties", "drop at random and rescale, then elect sign"
)
DELLA = Merger("della", DellaOptions, _BASE_RANDOM, f"{_HERE}:della", "drop by magnitude and rescale, then elect sign")
BREADCRUMBS = Merger(
    "breadcrumbs", BreadcrumbsOptions, _BASE, f"{_HERE}:breadcrumbs", "drop both tails, then sum", buffers=1
)
MODEL_STOCK = Merger(
    "model_stock",
    ModelStockOptions,
    Needs(base=True),
    f"{_HERE}:model_stock",
    "between base and mean, by the angle between the task vectors",
)
FISHER = Merger(
    "fisher", FisherOptions, Needs(importances="required"), f"{_HERE}:fisher", "average weighted by importance"
)
DFS = Merger(
    "dfs",
    DfsOptions,
    Needs(importances="optional", base_or_importances=True),
    f"{_HERE}:dfs",
    "one share per tensor and model, by importance",
)
FRANKENMERGE = Merger(
    "frankenmerge", FrankenmergeOptions, Needs(structure=True), f"{_HERE}:frankenmerge", "every layer from one model"
)
PASSTHROUGH = Merger(
    "passthrough",
    PassthroughOptions,
    Needs(structure=True, models_min=1),
    f"{_HERE}:passthrough",
    "layers stacked as they are",
)
