"""Where a tensor stands in its model, and which tensors a merged model is made of. No torch here.

The layer of a tensor is the first number among the dotted parts of its name: ``blocks.3.attn.wq.weight`` and
``model.layers.3.self_attn.q_proj.weight`` stand in layer 3, ``norm.weight`` outside the layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from agent_forge.merging.operators_config import MergeOptions, PassthroughOptions
from forgekit.errors import ArtifactError, ConfigError

_LAYER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")
_DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def layer_of(name: str) -> int | None:
    """The layer of a tensor; None outside the layers."""
    found = _LAYER.search(name)
    return int(found[0]) if found else None


def layer_count(names: Iterable[str]) -> int:
    """One more than the highest layer among the names."""
    return max((layer + 1 for name in names if (layer := layer_of(name)) is not None), default=0)


def in_layer(name: str, layer: int) -> str:
    """The same tensor's name in another layer."""
    return _LAYER.sub(str(layer), name, count=1)


@dataclass(frozen=True)
class Entry:
    """One tensor of the merged model and the (model, name) of each tensor it is made of."""

    name: str
    sources: tuple[tuple[int, str], ...]


def layout(options: MergeOptions, names: Sequence[Sequence[str]]) -> list[Entry]:
    """The tensors of the merged model.

    Args:
        options: of the method; only layer stacking changes which tensors there are.
        names: of each model, in the order in which they are to be written.

    Raises:
        ArtifactError: a layer that is to be stacked has no tensors.
    """
    if not isinstance(options, PassthroughOptions):
        return [Entry(name, tuple((model, name) for model in range(len(names)))) for name in names[0]]
    entries = [Entry(name, ((options.outside, name),)) for name in names[options.outside] if layer_of(name) is None]
    for place, (model, layer) in enumerate(options.stack()):
        found = [name for name in names[model] if layer_of(name) == layer]
        if not found:
            what = f"layer {layer} has no tensors"
            raise ArtifactError(what, where=f"model {model}", remedy="stack layers that the model has")
        entries += [Entry(in_layer(name, place), ((model, name),)) for name in found]
    return entries


def stacked_config(options: PassthroughOptions, configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``config.json`` of stacked layers: the outside model's, with depth and everything told per layer rewritten.

    Raises:
        ConfigError: the configuration does not tell its depth, or our family refuses the new one.
    """
    stack, result = options.stack(), dict(configs[options.outside])
    if "forge" in result:
        result["forge"] = _stacked_forge(stack, [c["forge"] for c in configs], options.outside)
    nested = "text_config" in result
    inner = dict(result["text_config"]) if nested else result
    key = next((key for key in _DEPTH if key in inner), None)
    if key is None:
        what = f"tells no depth (none of {', '.join(_DEPTH)})"
        raise ConfigError(what, where="config.json", remedy="stack models whose config.json names its layers")
    plain = [c.get("text_config", c) for c in configs]
    for name, value in inner.items():  # such as layer_types: one entry per layer
        if isinstance(value, list) and "layer" in name and len(value) == inner[key]:
            inner[name] = [plain[model][name][layer] for model, layer in stack]
    inner[key] = len(stack)
    return {**result, "text_config": inner} if nested else inner


def _stacked_forge(stack: list[tuple[int, int]], forges: list[dict[str, Any]], outside: int) -> dict[str, Any]:
    """Our own configuration of stacked layers: the depth, and which of the layers own a memory."""
    from forgekit.models.config import MODEL_CONFIGS

    values = {**forges[outside], "n_layers": len(stack)}
    if "memory_layers" in values:
        owners = [i for i, (model, layer) in enumerate(stack) if layer in forges[model]["memory_layers"]]
        values["memory_layers"] = owners
    kind = MODEL_CONFIGS.get(values["family"])
    return kind.build(values, source="config.json").model_dump(mode="json")
