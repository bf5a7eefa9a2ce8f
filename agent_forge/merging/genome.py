"""Merging in memory: whole state dicts by any method, and the combinations that evolution starts from.

Source: V2 specification, 2.2.4 (three stages, one of two methods each) and 2.2.5 (mutation). What it leaves open or
contradictory is settled in :func:`combine`.

A state dict maps names to tensors; nothing here changes the ones it is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agent_forge.merging import MERGERS
from agent_forge.merging.check import Supply, check_finite, check_shapes, check_supply
from agent_forge.merging.genome_config import COMBINATIONS, STAGES, GenomeOptions, MutationOptions, combination
from agent_forge.merging.operators import TOO_LARGE, TensorGroup, gram, merge_tensor, stream, weighted_sum
from agent_forge.merging.operators_layers import layer_count, layout
from agent_forge.merging.variety import differences, variety
from forgekit.errors import ConfigError

__all__ = [
    "COMBINATIONS",
    "STAGES",
    "GenomeOptions",
    "MutationOptions",
    "State",
    "combination",
    "combine",
    "diversity",
    "graft",
    "merge_states",
    "mutate",
]

State = Mapping[str, Tensor]


def merge_states(
    method: str,
    models: Sequence[State],
    options: Any = None,
    *,
    base: State | None = None,
    importances: Sequence[State] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Merge state dicts; tensor for tensor what :func:`agent_forge.merging.folders.merge_folders` writes.

    Args:
        method: a name in ``MERGERS``.
        models: state dicts of one shape.
        options: the method's options, or plain values for them.
        base: the common ancestor's.
        importances: one set per model; a tensor without one is averaged by weight.
        seed: of methods that draw random numbers.

    Raises:
        ConfigError: the method lacks what it needs, or an option does not fit.
        ArtifactError: the models do not fit together, or hold NaN or infinity.
    """
    merger = MERGERS.get(method)
    options = merger.build(options)
    supply = Supply(len(models), max(map(layer_count, models), default=0), base is not None, len(importances or ()))
    check_supply(merger, options, supply)
    _check_states(models, base, common=merger.name == "passthrough")
    merged = {}
    for entry in layout(options, [list(model) for model in models]):
        parts = [models[model][name] for model, name in entry.sources]
        origin = base[entry.name] if base is not None and merger.needs.uses_base else None
        group = TensorGroup(entry.name, parts, origin, _matters(importances, entry.name), seed)
        merged[entry.name] = merge_tensor(merger, group, options)
    return merged


def _check_states(models: Sequence[State], base: State | None, common: bool = False) -> None:
    every = [(f"model {i}", model) for i, model in enumerate(models)] + ([("base", base)] if base is not None else [])
    shapes = [(label, {name: tuple(t.shape) for name, t in state.items()}) for label, state in every]
    for other in shapes[1:]:
        check_shapes(shapes[0], other, common)


def _matters(importances: Sequence[State] | None, name: str) -> list[Tensor] | None:
    if not importances or any(name not in one for one in importances):
        return None
    return [one[name] for one in importances]


def combine(
    combo_id: int,
    models: Sequence[State],
    base: State,
    options: GenomeOptions | None = None,
    seed: int = 0,
    importances: Sequence[State] | None = None,
) -> dict[str, Tensor]:
    """One of the eight three-stage merges of the specification.

    1. Interpolate the models: linear (bit 0 = 0) or pairwise SLERP (1).
    2. Thin out the result's task vector: DARE (bit 1 = 0) or TIES (1).
    3. Mix with the models: FrankenMerge (bit 2 = 0) or DFS (1).

    Where the specification contradicts itself: its code reads the number from the lowest bit, its table prints the
    first stage leftmost; the code is followed. Its second stage works on one model, where no sign is left to elect:
    TIES trims to the largest share, and keeps the signs (its formula multiplies by them again, which would make every
    change positive). Its third stage takes layers, or averages, of the original models alone, so the first two stages
    would be lost: here the second stage's result takes part, and ``options.keep`` says with how much. FrankenMerge
    keeps that share of the layers (at least one) and everything outside them, and grafts the others from the model with
    the best of ``options.scores``; without scores, from models drawn at random. DFS keeps that share of every value
    and fuses the models by importance for the rest; without importances a tensor matters as much as training moved it.

    Args:
        combo_id: 0 to 7.
        models: state dicts of one shape, usually three.
        base: the common ancestor's.
        options: settings of the stages.
        seed: of DARE's mask and of the layers drawn.
        importances: one set per model, for DFS.

    Raises:
        ConfigError: no such combination, or options that do not fit the models.
        ArtifactError: the models do not fit together, or hold NaN or infinity.
    """
    first, second, third = combination(combo_id)
    options = options or GenomeOptions()
    _check_states(models, base)
    layers = layer_count(base)
    choices = options.choices or graft(layers, len(models), options, seed)
    settings = _settings(options, choices)
    for name, supply in (
        (first, Supply(len(models), layers)),
        (second, Supply(1, layers, base=True)),
        (
            third,
            Supply(len(models) + (third == "frankenmerge"), layers, True, len(importances or ()) * (third == "dfs")),
        ),
    ):
        check_supply(MERGERS.get(name), MERGERS.get(name).build(settings[name]), supply)
    merged = {}
    for name in base:
        group = TensorGroup(name, [model[name] for model in models], base[name], _matters(importances, name), seed)
        merged[name] = _three_stages(group, (first, second, third), settings, options.keep)
    return merged


def _settings(options: GenomeOptions, choices: Sequence[int]) -> dict[str, dict[str, Any]]:
    """The options of each method of the stages."""
    return {
        "linear": {"weights": options.weights},
        "slerp": {"t": options.t},
        "dare_linear": {"drop_rate": options.drop_rate, "lam": options.lam},
        "ties": {"density": options.density, "lam": options.lam},
        "frankenmerge": {"choices": choices or (0,)},
        "dfs": {"rule": options.rule, "temperature": options.temperature},
    }


def _three_stages(group: TensorGroup, stages: Sequence[str], settings: dict[str, dict], keep: float) -> Tensor:
    """The stages on the tensors of one name, in working precision in between."""
    dtype = group.models[0].dtype
    if not dtype.is_floating_point:
        return merge_tensor(MERGERS.get("linear"), group, MERGERS.get("linear").build(None))

    def stage(name: str, models: Sequence[Tensor], **changes: Any) -> Tensor:
        merger = MERGERS.get(name)
        return merge_tensor(merger, replace(group, models=models, **changes), merger.build(settings[name]))

    wide = [tensor.to(group.work) for tensor in group.models]
    mixed = stage(stages[0], wide, importances=None)
    thinned = stage(stages[1], [mixed], importances=None)
    if stages[2] == "frankenmerge":
        result = stage("frankenmerge", [thinned, *wide], importances=None)
    else:
        result = weighted_sum([thinned, stage("dfs", wide)], [keep, 1 - keep], group.work)
    result = result.to(dtype)
    check_finite(result, group.name, "the combination", TOO_LARGE)
    return result


def graft(layers: int, models: int, options: GenomeOptions, seed: int) -> tuple[int, ...]:
    """For each layer 0 (keep the second stage's result) or the number of a model, counted from 1.

    Raises:
        ConfigError: the scores are not one per model.
    """
    if options.scores and len(options.scores) != models:
        what = f"{len(options.scores)} scores for {models} models"
        raise ConfigError(what, where="scores", remedy="give one score per model")
    draws = stream(seed, "graft", 0)
    count = max(0, min(round(layers * (1 - options.keep)), layers - 1))
    chosen = draws.permutation(layers)[:count]
    best = int(np.argmax(options.scores)) if options.scores else None
    choices = [0] * layers
    for layer in sorted(chosen.tolist()):
        choices[layer] = 1 + (int(draws.integers(models)) if best is None else best)
    return tuple(choices)


def mutate(state: State, seed: int, options: MutationOptions | None = None) -> dict[str, Tensor]:
    """Add Gaussian noise to a random share of all floating-point values.

    Args:
        state: the parent's.
        seed: decides every draw, whatever the order of the tensors.
        options: how much and how often.
    """
    options = options or MutationOptions()
    return {name: _mutated(name, tensor, seed, options) for name, tensor in state.items()}


def _mutated(name: str, tensor: Tensor, seed: int, options: MutationOptions) -> Tensor:
    child = tensor.detach().clone(memory_format=torch.contiguous_format)
    if not child.is_floating_point() or not child.numel():
        return child
    draws = stream(seed, name, 0)
    hit = np.flatnonzero(draws.random(child.numel(), dtype=np.float32) < options.rate)
    scale = options.sigma
    if options.relative:
        scale *= math.sqrt(gram([child])[0, 0] / child.numel())
    work = torch.promote_types(child.dtype, torch.float32)
    noise = torch.from_numpy(draws.standard_normal(len(hit), dtype=np.float32) * np.float32(scale)).to(work)
    flat, where = child.view(-1), torch.from_numpy(hit)
    flat[where] = (flat[where].to(work) + noise).to(child.dtype)
    return child


def diversity(population: Sequence[State], base: State | None = None) -> float:
    """How different the models of a population are: the mean over pairs of |d_i - d_j| / (|d_i| + |d_j|).

    d_i is model i's task vector over all floating-point tensors (without a base, the model itself). 0 means all alike,
    1 all opposed; pairs of equal length at right angles give 0.71. Two models that equal the base differ by 0.

    Returns:
        A number from 0 to 1; 0 for fewer than two models.

    Raises:
        ArtifactError: the models are not of one shape.
    """
    _check_states(population, base)
    return variety(differences(population, base))
