"""Hidden states and head apart, for every model of the house and for Hugging Face models.

What trains on distributions over the whole vocabulary needs them apart: the head is then applied to a few positions
at a time, so that a large vocabulary is never in memory for all of them.

Shapes: B batch, T new tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from forgekit.errors import ArtifactError
from forgekit.models.base import CausalLM


def hidden(model: CausalLM, ids_BT: Tensor, state: Any = None, lengths_B: Tensor | None = None) -> tuple[Tensor, Any]:
    """Features (B, T, D) before the output head, and the state after the tokens (None without a state before)."""
    h_BTD, after, *_ = model.features(ids_BT, state, lengths_B)
    return h_BTD, after


def read_out(model: CausalLM, h: Tensor) -> Tensor:
    """Next-token scores (..., V), float32, of features (..., D)."""
    return model.read_out(h)


@torch.no_grad()
def check_head(model: CausalLM) -> None:
    """Make sure that features and head together are the model.

    Raises:
        ArtifactError: they are not: some Hugging Face models scale or cap their scores after the head.
    """
    parts: nn.Module = model
    device = next(parts.parameters()).device
    ids_BT = torch.arange(4, device=device)[None] % model.config.vocab_size
    whole, split = model(ids_BT).logits, read_out(model, hidden(model, ids_BT)[0])
    if not torch.allclose(whole, split.to(whole.dtype), rtol=1e-3, atol=1e-3):
        raise ArtifactError(
            "its scores are more than a product of features and head",
            where=type(getattr(model, "hf", model)).__name__,
            remedy="use a model without scaled or capped logits",
        )
