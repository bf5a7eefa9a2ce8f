"""What every language model of the house promises, whoever made it.

A model family is a frozen configuration plus a module with one ``forward`` for training, scoring and
generation alike: state goes in as a value and comes out as a value. Hugging Face causal models satisfy the
same protocol through :mod:`forgekit.hub`.

Shapes: B batch, T new tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from forgekit.config import Config
from forgekit.models.constants import IGNORE


@dataclass
class Output:
    """What a forward pass returns.

    Attributes:
        logits: (B, T, V) next-token scores.
        state: everything needed to go on after the last token; ``None`` when it was not asked for.
        steps: (B, T) recursion steps each position used (families with adaptive computation only).
        aux: scalar diagnostics and regularisers by name.
    """

    logits: Tensor
    state: Any = None
    steps: Tensor | None = None
    aux: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Loss:
    """A training loss and what it was made of.

    Attributes:
        total: scalar to differentiate: mean over the supervised tokens, regularisers included.
        nats: scalar, mean next-token cross-entropy of the final answer, in nats per supervised token.
        tokens: how many tokens were supervised.
        parts: detached scalars worth logging.
    """

    total: Tensor
    nats: Tensor
    tokens: int
    parts: dict[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class CausalLM(Protocol):
    """The protocol phases, engine and metrics rely on."""

    config: Config

    def forward(self, input_ids_BT: Tensor, state: Any = None, lengths_B: Tensor | None = None) -> Output: ...

    def training_loss(self, input_ids_BT: Tensor, labels_BT: Tensor) -> Loss: ...

    def initial_state(self, batch: int) -> Any: ...

    def flops_per_token(self, context: int) -> float: ...


def parameter_count(model: torch.nn.Module) -> int:
    """Parameters as torch counts them; tied tensors count once.

    The codes of a packed model are none of torch's parameters: :func:`forgekit.quant.model.logical_parameters` counts
    the numbers of any model.
    """
    return sum(p.numel() for p in model.parameters())


def mean_nats(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """Mean cross-entropy; zero (not NaN) where nothing is supervised, as a micro batch of padding may be."""
    return F.cross_entropy(logits_NV.float(), target_N, reduction="sum") / max(1, target_N.numel())


def whole(tensor: Tensor) -> Tensor:
    """The full tensor behind a sharded one (every process must ask), and any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory, and any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def placed_like(full: Tensor, model: Tensor) -> Tensor:
    """A full tensor that every process holds, sharded as ``model`` is; no communication."""
    if not hasattr(model, "device_mesh"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, model.device_mesh, model.placements, src_data_rank=None)


def supervised_positions(labels_BT: Tensor) -> Tensor:
    """Flat indices (N,) into B*T of the positions that carry a label."""
    return (labels_BT.reshape(-1) != IGNORE).nonzero().squeeze(1)


def score_at(model: CausalLM, ids_BT: Tensor, at_N: Tensor) -> Output:
    """Logits (N, V) and steps (N,) at flat positions of (B, T); models that can skip the rest do."""
    if hasattr(model, "score_at"):
        return model.score_at(ids_BT, at_N)
    out = model(ids_BT)
    return Output(out.logits.flatten(0, 1)[at_N], None, None if out.steps is None else out.steps.flatten()[at_N])
