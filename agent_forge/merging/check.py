"""Whether models can be merged, found out before any work. No torch here: configurations and headers are enough.

Every refusal names the model, the rule, the value and what to do. What cannot be known (the lineage of a Hugging Face
folder) is a note, not an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from agent_forge.merging.operators_config import MergeOptions, Merger
from forgekit.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from forgekit.store.artifact import Manifest

Shapes = Mapping[str, tuple[int, ...]]

# Settings that give the same weights another meaning, in our families and in Hugging Face's.
_MEANING = {
    "n_heads": "heads",
    "qk_norm": "normalised queries and keys",
    "rope_base": "rotary base",
    "conv": "short convolution",
    "memory": "kind of memory",
    "memory_heads": "memory heads",
    "memory_layers": "layers with a memory",
    "num_attention_heads": "heads",
    "num_key_value_heads": "key-value heads",
    "head_dim": "width of a head",
    "hidden_act": "activation",
    "hidden_activation": "activation",
    "activation_function": "activation",
    "tie_word_embeddings": "tied embeddings",
}
# Entries of a Hugging Face configuration that say nothing about the model's function.
_NOISE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures", "auto_map"}


@dataclass(frozen=True)
class Candidate:
    """What is known of a model without reading its weights.

    Attributes:
        name: for messages.
        config: its ``config.json``.
        shapes: of every tensor.
        tokenizer: fingerprint of the vocabulary; None if it has no tokenizer.
        manifest: if it is an artifact of ours.
    """

    name: str
    config: Mapping[str, Any]
    shapes: Shapes
    tokenizer: str | None = None
    manifest: Manifest | None = None

    def traits(self) -> dict[str, Any]:
        """Its settings, flat."""
        if "forge" in self.config:
            return dict(self.config["forge"])
        return {k: v for k, v in {**self.config, **self.config.get("text_config", {})}.items() if k not in _NOISE}


@dataclass(frozen=True)
class Supply:
    """What a caller has for a method."""

    models: int
    layers: int = 0
    base: bool = False
    importances: int = 0


@dataclass(frozen=True)
class Findings:
    """What is worth telling about models that fit.

    Attributes:
        notes: one line each.
        traits: settings in which they differ, each with its value by model.
    """

    notes: list[str] = field(default_factory=list)
    traits: dict[str, dict[str, Any]] = field(default_factory=dict)


def check_supply(merger: Merger, options: MergeOptions, supply: Supply) -> None:
    """Refuse a method that lacks what it needs, or options that do not fit.

    Raises:
        ConfigError: names the method, what it needs, and what to do.
    """
    needs, name = merger.needs, merger.name
    if supply.models < needs.models_min:
        what = f"needs {needs.models_min} models or more, {supply.models} given"
        raise ConfigError(what, where=name, remedy="give more models, the base not counted")
    if needs.models_max is not None and supply.models > needs.models_max:
        what = f"takes {needs.models_max} models at most, {supply.models} given"
        raise ConfigError(what, where=name, remedy="give fewer models, or merge in steps")
    if needs.base and not supply.base:
        raise ConfigError("needs the common ancestor, none given", where=name, remedy="give it as base")
    if needs.importances == "required" and not supply.importances:
        remedy = "give one set per model (squared gradients, the diagonal Fisher)"
        raise ConfigError("needs importances, none given", where=name, remedy=remedy)
    if needs.base_or_importances and not (supply.base or supply.importances):
        raise ConfigError("needs a base or importances, neither given", where=name, remedy="give one of the two")
    if supply.importances and needs.importances == "no":
        raise ConfigError("uses no importances", where=name, remedy="leave them out, or choose fisher or dfs")
    if supply.importances not in (0, supply.models):
        what = f"{supply.importances} sets of importances for {supply.models} models"
        raise ConfigError(what, where=name, remedy="give one set per model, the base not counted")
    try:
        options.check(supply.models, supply.layers)
    except ConfigError as error:
        raise ConfigError(error.what, where=f"{name}.{error.where}", remedy=error.remedy) from None


def check_models(
    models: Sequence[Candidate],
    base: Candidate | None = None,
    *,
    tokenizer: Literal["same", "any"] = "same",
    stacked: bool = False,
) -> Findings:
    """Refuse models that are not of one family, vocabulary and shape.

    Args:
        models: in the order given.
        base: the common ancestor, if the method uses one.
        tokenizer: ``any`` accepts different tokenizers with a note.
        stacked: layers are stacked: a tensor may be missing in one model, the depth may differ.

    Raises:
        ArtifactError: names the model, the rule and the value.
    """
    first, *rest = every = [*models, *([base] if base else [])]
    for other in rest:
        mine, theirs = (c.config.get("model_type", "unknown") for c in (first, other))
        if mine != theirs:
            what = f"model_type {theirs!r} is not that of {first.name}, {mine!r}"
            raise ArtifactError(what, where=other.name, remedy="merge models of one family")
    notes = _check_vocabularies(every, tokenizer)
    for other in rest:
        check_shapes((first.name, first.shapes), (other.name, other.shapes), stacked)
    traits = _differing(every)
    for name in [] if stacked else sorted(set(traits) & set(_MEANING)):
        if None in traits[name].values():  # left to the library's default, whatever that is
            continue
        odd = next(c.name for c in rest if traits[name][c.name] != traits[name][first.name])
        what = (
            f"{name} ({_MEANING[name]}) {traits[name][odd]!r} is not that of {first.name}, {traits[name][first.name]!r}"
        )
        raise ArtifactError(what, where=odd, remedy="merge models that compute alike")
    return Findings(notes, traits)


def _check_vocabularies(every: Sequence[Candidate], tokenizer: str) -> list[str]:
    first, *rest = every
    for other in rest:
        mine, theirs = (c.traits().get("vocab_size") for c in (first, other))
        if mine != theirs and mine is not None and theirs is not None:
            what = f"vocab_size {theirs} is not that of {first.name}, {mine}"
            raise ArtifactError(what, where=other.name, remedy="merge models of one vocabulary")
    known = [c for c in every if c.tokenizer]
    for other in known[1:]:
        if other.tokenizer == known[0].tokenizer:
            continue
        what = f"tokenizer {other.tokenizer[:12]}… is not that of {known[0].name}, {known[0].tokenizer[:12]}…"
        if tokenizer == "same":
            remedy = "merge models of one tokenizer, or say tokenizer = any if equal ids mean the same"
            raise ArtifactError(what, where=other.name, remedy=remedy)
        return [f"{other.name}: {what}; accepted because tokenizer = any"]
    missing = [c.name for c in every if not c.tokenizer]
    return [f"no tokenizer to compare in {', '.join(missing)}"] if missing else []


def check_shapes(first: tuple[str, Shapes], other: tuple[str, Shapes], common: bool = False) -> None:
    """Refuse a model whose tensors are not those of the first.

    Args:
        first: name and shapes of the first model.
        other: name and shapes of the model to check.
        common: compare only the tensors both have.

    Raises:
        ArtifactError: names the first tensor that is missing, surplus or of another shape, and both shapes.
    """
    (name, mine), (label, theirs) = first, other
    for tensor, shape in mine.items():
        if tensor in theirs and tuple(theirs[tensor]) != tuple(shape):
            what = f"{tensor} has shape {_sides(theirs[tensor])}, in {name} it is {_sides(shape)}"
            raise ArtifactError(what, where=label, remedy="merge models of one shape")
        if tensor not in theirs and not common:
            what = f"has no tensor {tensor} (shape {_sides(shape)} in {name})"
            raise ArtifactError(what, where=label, remedy="merge models of one architecture, saved the same way")
    for tensor, shape in {} if common else theirs.items():
        if tensor not in mine:
            what = f"has a tensor {tensor} (shape {_sides(shape)}) that {name} has not"
            raise ArtifactError(what, where=label, remedy="merge models of one architecture, saved the same way")


def _sides(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _differing(every: Sequence[Candidate]) -> dict[str, dict[str, Any]]:
    """Settings that all models state, not all alike."""
    tables = [c.traits() for c in every]
    names = [name for name in tables[0] if all(name in table for table in tables)]
    return {
        name: {c.name: table[name] for c, table in zip(every, tables)}
        for name in names
        if any(table[name] != tables[0][name] for table in tables)
    }


Lookup = Callable[[str], Sequence[str] | None]
"""The parents of a model by id; None where it is unknown."""


def check_lineage(
    models: Sequence[Candidate], base: Candidate | None, parents_of: Lookup = lambda _: None
) -> list[str]:
    """Refuse a base that is not an ancestor, or models without a common one; say what cannot be known.

    Args:
        models: in the order given.
        base: the presumed ancestor, if any.
        parents_of: parents of models that are not among those given.

    Raises:
        ArtifactError: the lineage is known and says no.
    """
    given = {c.manifest.model_id: c.manifest.parents for c in (*models, *([base] if base else [])) if c.manifest}

    def parents(model_id: str) -> Sequence[str] | None:
        return given[model_id] if model_id in given else parents_of(model_id)

    unknown = [c.name for c in models if not c.manifest]
    notes = [f"lineage unknown (not an artifact of ours): {', '.join(unknown)}"] if unknown else []
    lines = {c.name: _ancestors(c.manifest.model_id, parents) for c in models if c.manifest}
    if base and not base.manifest:
        notes.append(f"lineage unknown: whether {base.name} is an ancestor is taken on trust")
    elif base:
        notes += _check_base(base, lines)
    elif len(lines) > 1 and all(whole for _, whole in lines.values()):
        if not set.intersection(*(line for line, _ in lines.values())):
            what = f"no common ancestor with {next(iter(lines))}"
            remedy = "merge siblings branched from one model: independent ones do not merge"
            raise ArtifactError(what, where=list(lines)[-1], remedy=remedy)
    return notes


def _check_base(base: Candidate, lines: dict[str, tuple[set[str], bool]]) -> list[str]:
    base_id, notes = base.manifest.model_id, []
    for name, (line, whole) in lines.items():
        if base_id in line:
            continue
        if not whole:
            notes.append(f"lineage of {name} is known in part: whether {base.name} is an ancestor is taken on trust")
            continue
        others = sorted(line)
        what = f"{base_id} is no ancestor of {name}, whose lineage is {', '.join(others[:4])}{' …' * (len(others) > 4)}"
        raise ArtifactError(what, where="base", remedy="give the model that all of them were branched from")
    return notes


def _ancestors(model_id: str, parents: Lookup) -> tuple[set[str], bool]:
    """Ids of a model and everything it was made from, and whether that is all."""
    line, waiting, whole = {model_id}, [model_id], True
    while waiting:
        found = parents(waiting.pop())
        if found is None:
            whole = False
            continue
        waiting += [one for one in found if one not in line]
        line.update(found)
    return line, whole


DIVERGED = "use a checkpoint from before its training diverged"


def check_finite(tensor: Tensor, name: str, model: str, remedy: str = DIVERGED) -> None:
    """Refuse a tensor that holds NaN or infinity.

    Args:
        tensor: any floating-point tensor.
        name: the tensor's name.
        model: whose it is, for the message.
        remedy: what to do about it.

    Raises:
        ArtifactError: names the model, the tensor and how many values are bad.
    """
    import torch

    wide = tensor if tensor.element_size() > 1 else tensor.float()
    precision = torch.promote_types(wide.dtype, torch.float32)
    # One sum is cheaper than a look at every value, and finite unless a value is not (or the sum overflows).
    if math.isfinite(wide.sum(dtype=precision).item()):
        return
    bad = int((~wide.isfinite()).sum())
    if bad:
        what = f"tensor {name} holds {bad} of {tensor.numel()} values that are NaN or infinite"
        raise ArtifactError(what, where=model, remedy=remedy)
