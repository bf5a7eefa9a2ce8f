"""Children from recipes: :func:`build` makes the tensors that a :class:`Recipe` describes.

Everything drawn comes from the recipe's seed and the tensor's or slot's name, so a child is the same bits whenever and
wherever it is built. Buffers, such as the halting teacher, are merged like everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from agent_forge.merging import MERGERS
from agent_forge.merging.check import check_finite, check_shapes
from agent_forge.merging.genome import State, combine, mutate
from agent_forge.merging.genome_config import GenomeOptions
from agent_forge.merging.operators import TOO_LARGE, TensorGroup, merge_tensor, stream, weighted_sum
from agent_forge.merging.strategies_config import Recipe, Space, slot_of, slots
from forgekit.errors import ConfigError

__all__ = ["Recipe", "Space", "build", "slot_of", "slots"]

Lookup = Callable[[str], State]
"""The state dict of a model by its name."""


def build(recipe: Recipe, lookup: Lookup, base: State) -> dict[str, Tensor]:
    """The child of a recipe.

    ``weights`` is base + sum_i w[i][slot] (model_i - base): exact where one weight is 1 and the others 0 (that model,
    bit for bit) and where all are 0 (the base). Integers are taken over where all agree.

    Args:
        recipe: what to make.
        lookup: gives each parent's state; what it gives is not changed.
        base: the common ancestor's.

    Returns:
        New tensors, in the order of the base's (a mutation, a crossover and an original: of the parent's).

    Raises:
        ConfigError: the recipe does not fit the models.
        ArtifactError: the models do not fit together, hold NaN or infinity, or differ in integers that are averaged.
    """
    models = [lookup(name) for name in recipe.parents]
    _check(recipe, models, base)
    if recipe.kind == "combination":
        return combine(recipe.combo, models, base, GenomeOptions.build(recipe.options), recipe.seed)
    if recipe.kind == "weights":
        return _weighted(recipe, models, base)
    if recipe.kind == "original":
        return {name: _copy(tensor) for name, tensor in models[0].items()}
    child = _crossed(recipe, models) if recipe.kind == "crossover" else models[0]
    noise = recipe.noise()
    return child if noise is None else mutate(child, recipe.seed, noise)


def _check(recipe: Recipe, models: Sequence[State], base: State) -> None:
    shapes = {name: tuple(t.shape) for name, t in base.items()}
    for label, model in zip(recipe.parents, models):
        check_shapes(("base", shapes), (label, {name: tuple(t.shape) for name, t in model.items()}))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _weighted(recipe: Recipe, models: Sequence[State], base: State) -> dict[str, Tensor]:
    columns = {slot: i for i, slot in enumerate(slots(base, recipe.granularity))}
    if len(columns) != len(recipe.weights[0]):
        what = f"rows of {len(recipe.weights[0])} weights for a model of {len(columns)} slots ({recipe.granularity})"
        raise ConfigError(what, where="weights", remedy="make recipes with the slots of this model")
    labels = (*recipe.parents, "base")
    child = {}
    for name, origin in base.items():
        factors = [row[columns[slot_of(name, recipe.granularity)]] for row in recipe.weights]
        group = TensorGroup(name, [model[name] for model in models], origin, seed=recipe.seed, labels=labels)
        child[name] = _weighted_tensor(group, factors)
    return child


def _weighted_tensor(group: TensorGroup, factors: Sequence[float]) -> Tensor:
    """(1 - sum w) base + sum w_i x_i, in one pass."""
    parts = [*group.models, group.base]
    factors = [*factors, 1.0 - sum(factors)]
    used = [i for i, factor in enumerate(factors) if factor]
    for i in used:
        if parts[i].is_floating_point():
            check_finite(parts[i], group.name, group.label(i))
    if len(used) == 1 and factors[used[0]] == 1:
        return _copy(parts[used[0]])
    if not group.base.is_floating_point():
        return merge_tensor(MERGERS.get("linear"), group, MERGERS.get("linear").build(None))
    result = weighted_sum(parts, factors, group.work).to(group.base.dtype)
    check_finite(result, group.name, "the child", TOO_LARGE)
    return result


def _crossed(recipe: Recipe, models: Sequence[State]) -> dict[str, Tensor]:
    """Each slot from one of two parents, or a mixture of both."""
    first, second = models
    parts = slots(first, recipe.granularity)
    shares = _shares(recipe, len(parts))
    by_slot = dict(zip(parts, shares))
    child = {}
    for name, x in first.items():
        share = by_slot[slot_of(name, recipe.granularity)]
        if recipe.blends and not x.is_floating_point():
            group = TensorGroup(name, [x, second[name]], labels=recipe.parents)
            child[name] = merge_tensor(MERGERS.get("linear"), group, MERGERS.get("linear").build(None))
        else:
            child[name] = _between(x, second[name], share)
        if child[name].is_floating_point():
            check_finite(child[name], name, f"the crossover of {' and '.join(recipe.parents)}")
    return child


def _shares(recipe: Recipe, count: int) -> list[float]:
    """For each slot how much of it comes from the second parent."""
    draws = stream(recipe.seed, "crossover", 0)
    if recipe.blends:
        return draws.random(count).tolist()
    if count < 2:
        what = f"a model of one slot ({recipe.granularity}) cannot take slots from two parents"
        raise ConfigError(what, where="granularity", remedy="choose layer or module, or blend = true")
    picks = draws.integers(2, size=count)
    if picks.min() == picks.max():  # all from one parent: hand one slot to the other
        spot = int(draws.integers(count))
        picks[spot] = 1 - picks[spot]
    return picks.astype(float).tolist()


def _between(x: Tensor, y: Tensor, share: float) -> Tensor:
    """x + share (y - x); the ends are exact, and so are equal tensors."""
    if share in (0.0, 1.0):
        return _copy(y if share else x)
    work = torch.promote_types(x.dtype, torch.float32)
    return torch.lerp(x.detach().to(work), y.detach().to(work), share).to(x.dtype)
