"""Where to think, and for how long: at the hardest positions of a row, not too close to each other.

Difficulty has up to three signals: the entropy of the next token, the dispersion of attention, and the loss where the
next token is known. A row's positions are *ranked* by each signal (the scales of the signals do not matter then),
the weighted mean of the ranks decides which positions come first. A thought's budget follows from the signals
themselves, each brought to [0, 1].

Shapes: B rows, T tokens, H heads, V vocabulary, N points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent_forge.phases.quietstar.talk_config import Marks, PointPlan

CHUNK = 4096
"""Positions whose scores over the vocabulary are in memory at once."""


@dataclass(frozen=True)
class Points:
    """Positions after which to think, sorted by row, then by position.

    Attributes:
        row_N, at_N: the thought comes after token ``at`` of row ``row``, before the next one is predicted.
        limit_N: tokens a thought may have there, its markers not counted.
    """

    row_N: Tensor
    at_N: Tensor
    limit_N: Tensor

    def __len__(self) -> int:
        return self.row_N.numel()


def entropy(logits: Tensor) -> Tensor:
    """Entropy (...) of scores (..., V), in nats."""
    log_p = logits.float().log_softmax(-1)
    # A forbidden token has log-probability -inf and probability 0: it adds nothing.
    return -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(-1)


@torch.no_grad()
def signals_of(model: nn.Module, h_BTD: Tensor, labels_BT: Tensor | None) -> dict[str, Tensor]:
    """Entropy, and loss where labels are given, each (B, T) in [0, 1], from the features of all positions.

    Entropy is divided by the log of the vocabulary; a loss of x nats becomes 1 - exp(-x), the probability missed.
    Positions without a label get loss 0.
    """
    flat_ND = h_BTD.flatten(0, 1)
    found: dict[str, list[Tensor]] = {"entropy": [], "loss": []}
    for start in range(0, len(flat_ND), CHUNK):
        logits_NV = model.read_out(flat_ND[start : start + CHUNK]).float()
        found["entropy"].append(entropy(logits_NV) / math.log(max(2, logits_NV.shape[-1])))
        if labels_BT is not None:
            target_N = labels_BT.reshape(-1)[start : start + CHUNK]
            nats_N = F.cross_entropy(logits_NV, target_N, reduction="none")  # 0 where the label is IGNORE
            found["loss"].append(-torch.expm1(-nats_N))
    return {name: torch.cat(parts).view(h_BTD.shape[:2]) for name, parts in found.items() if parts}


@torch.no_grad()
def attention_dispersion(model: nn.Module, read) -> tuple[object, Tensor | None]:
    """What ``read()`` returns, and how widely attention was spread while it ran: (B, T) in [0, 1], mean over layers.

    Entropy of a position's attention over what it sees, divided by the log of how much that is. ``None`` for models
    that do not show their attention layers (:meth:`attentions` is empty), Hugging Face models among them.

    Args:
        model: a model of the house.
        read: runs one forward pass of it over whole rows, without a state before.
    """
    layers = list(model.attentions()) if hasattr(model, "attentions") else []
    seen: list[tuple[nn.Module, tuple]] = []
    hooks = [layer.register_forward_pre_hook(lambda module, args: seen.append((module, args))) for layer in layers]
    try:
        result = read()
    finally:
        for hook in hooks:
            hook.remove()
    spread = [_spread(layer, args[0], args[1]) for layer, args in seen]
    return result, torch.stack(spread).mean(0) if spread else None


def _spread(layer: nn.Module, x_BTD: Tensor, pos_BT: Tensor) -> Tensor:
    """Normalised entropy (B, T) of one layer's attention, the mean over its heads."""
    q, k, _, _ = layer.project(x_BTD, pos_BT, None, None)
    gap_BTT = pos_BT[:, :, None] - pos_BT[:, None, :]
    visible = (gap_BTT >= 0) & (gap_BTT < (layer.shape.window or gap_BTT.shape[1]))
    scores = (q.float() @ k.float().mT / math.sqrt(q.shape[-1])).masked_fill(~visible[:, None], -math.inf)
    many_BT = visible.sum(-1)
    # The first token sees itself only: no choice, no dispersion.
    return entropy(scores).mean(1) / many_BT.clamp_min(2).log()


def ranks(score_BT: Tensor, eligible_BT: Tensor) -> Tensor:
    """Each eligible position's rank in its row, in (0, 1): the share of the row below it; equals share their mean.

    Positions that are not eligible get 0. Scores that are not finite count as the lowest.
    """
    score_BT = torch.where(score_BT.isfinite(), score_BT.float(), torch.finfo(torch.float32).min)
    ordered_BT = score_BT.masked_fill(~eligible_BT, math.inf).sort(dim=-1).values
    below = torch.searchsorted(ordered_BT, score_BT.contiguous())
    upto = torch.searchsorted(ordered_BT, score_BT.contiguous(), right=True)
    share_BT = (below + upto) / (2 * eligible_BT.sum(-1, keepdim=True).clamp_min(1))
    return share_BT.masked_fill(~eligible_BT, 0.0)


def weighted(signals: Mapping[str, Tensor], plan: PointPlan) -> Tensor:
    """The weighted mean of the signals that are there; weights of missing ones count for nothing."""
    weights = {name: getattr(plan, name) for name in signals}
    if not any(weights.values()):  # what weighs something is not to be had from this model: take what there is
        weights = dict.fromkeys(signals, 1.0)
    total = sum(weights.values())
    return sum(signals[name] * (weight / total) for name, weight in weights.items() if weight)


def choose_points(signals: Mapping[str, Tensor], eligible_BT: Tensor, plan: PointPlan) -> Points:
    """The highest-ranked positions of every row, at most ``plan.most``, at least ``plan.interval`` apart.

    Args:
        signals: by name of their weight in the plan, each (B, T) in [0, 1].
        eligible_BT: where thinking is allowed.
        plan: weights and limits.
    """
    score_BT = weighted({name: ranks(signal, eligible_BT) for name, signal in signals.items()}, plan)
    open_BT, chosen_BT = eligible_BT.clone(), torch.zeros_like(eligible_BT)
    place_T = torch.arange(score_BT.shape[1], device=score_BT.device)
    for _ in range(plan.most):
        best_B1 = score_BT.masked_fill(~open_BT, -1.0).argmax(-1, keepdim=True)  # the first among equals
        left_B1 = open_BT.gather(1, best_B1)
        chosen_BT |= (place_T == best_B1) & left_B1
        open_BT &= ((place_T - best_B1).abs() >= plan.interval) | ~left_B1
    row_N, at_N = chosen_BT.nonzero(as_tuple=True)
    hard_N = weighted(signals, plan)[row_N, at_N].nan_to_num(1.0).clamp(0, 1)
    limit_N = plan.min_length + (hard_N * (plan.max_length - plan.min_length)).round().long()
    return Points(row_N, at_N, limit_N)


def outside_thoughts(ids_BT: Tensor, marks: Marks) -> Tensor:
    """Positions (B, T) that are not inside a written thought: before its ``start``, or from its ``stop`` on."""
    opened, closed = (ids_BT == marks.start).cumsum(-1), (ids_BT == marks.stop).cumsum(-1)
    return opened <= closed
