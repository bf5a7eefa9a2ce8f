"""How much every parameter matters to a model: the diagonal empirical Fisher information.

Source: Matena and Raffel, Merging Models with Fisher-Weighted Averaging (arXiv 2111.09832), equation 2 with the
observed labels: F = mean over rows of (d loss(row) / d parameter) squared.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from forgekit.errors import DataError
from forgekit.models.base import CausalLM


def empirical_fisher(model: CausalLM, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Importance of every parameter, float32, under the names the weights have on disk.

    The loss is the model's own training objective, so that parts which only halting or gating hears count too.

    Args:
        model: any model of the house; its mode, its gradients and its weights stay as they are.
        batches: (ids, labels), each (B, T), labels already shifted; every row counts as one observation.

    Raises:
        DataError: there are no rows.
    """
    inner = getattr(model, "hf", model)  # a wrapped transformers model is stored without the wrapper's prefix
    named = [(name, p) for name, p in inner.named_parameters() if p.requires_grad]
    totals = [torch.zeros_like(p, dtype=torch.float32) for _, p in named]
    rows = 0
    for ids_BT, labels_BT in batches:
        for ids, labels in zip(ids_BT.split(1), labels_BT.split(1)):
            loss = model.training_loss(ids, labels).total
            grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
            for total, grad in zip(totals, grads):
                if grad is not None:
                    total.add_(grad.float().square())
            rows += 1
    if not rows:
        raise DataError("no rows to measure importance on", where="importances", remedy="give at least one batch")
    return {name: total.div_(rows) for (name, _), total in zip(named, totals)}
