"""Packed models as plain ones: the way from codes and scales back to weights that anything can read and train.

Shapes: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from forgekit.errors import ArtifactError
from forgekit.quant.layers import GroupedEmbedding, PackedLinear, TiedHead
from forgekit.quant.model import is_packed, quantised_modules, swap


def rounds_activations(model: nn.Module) -> bool:
    """Whether it is packed on a grid that rounds activations too, which plain modules do not."""
    return any(isinstance(module, PackedLinear) and module.plan.activation_bits for module in model.modules())


def check_plain(model: nn.Module) -> None:
    """Make sure that a model can be trained.

    Raises:
        ArtifactError: its weights are packed.
    """
    if is_packed(model):
        what, remedy = "its weights are packed: it can be run, not trained", "give a dense copy, as unpacked(model) is"
        raise ArtifactError(what, where=type(getattr(model, "hf", model)).__name__, remedy=remedy)


@torch.no_grad()
def unpacked(model: nn.Module) -> nn.Module:
    """Put plain modules in the places of the packed ones, in place; their weights are what the codes stand for.

    The result can be trained. Activations are no longer rounded; where they were not (:func:`rounds_activations`), it
    computes what the packed model computes. A plain model stays as it is.

    Raises:
        ArtifactError: it has sub-layer norms, which plain modules have not.
    """
    found = quantised_modules(model)
    for name, module in found.items():
        if getattr(module, "gain", None) is not None:
            remedy = "use it packed, or train its parent without sub_norm"
            raise ArtifactError("its sub-layer norm has no place in a plain model", where=name, remedy=remedy)
    done: dict[int, nn.Module] = {}  # one module may have several names
    for name, module in sorted(found.items(), key=lambda pair: isinstance(pair[1], TiedHead)):
        if id(module) not in done:
            table = done.get(id(module.table)) if isinstance(module, TiedHead) else None
            done[id(module)] = _plain(module, table).train(model.training)
        swap(model, name, done[id(module)])
    return model.requires_grad_(True) if found else model


def _plain(module: nn.Module, table: nn.Module | None) -> nn.Module:
    """The plain module for a packed one; a tied head shares the weight of its table's."""
    if isinstance(module, GroupedEmbedding):
        plain = nn.Embedding(*module.codes.shape, module.padding_idx, device="meta")
        plain.weight = nn.Parameter(module.weight)
        return plain
    weight = nn.Parameter(module.weight) if table is None else table.weight
    return _map(weight, module.bias, getattr(module, "transposed", False))


def _map(weight: nn.Parameter, bias: Tensor | None, transposed: bool) -> nn.Module:
    """A linear map with these very parameters, as ``nn.Linear`` (R, C) or transformers' ``Conv1D`` (C, R)."""
    with torch.device("meta"):
        if transposed:
            from transformers.pytorch_utils import Conv1D

            plain: nn.Module = Conv1D(*reversed(weight.shape))
        else:
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    plain.weight = weight
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone())
    return plain
