"""Group-wise rounding of embeddings and heads: 4 to 8 bits, symmetric, one fp16 scale per group of columns.

Kept in full precision, embedding and head would outweigh all ternary layers of a small model together.

Shapes: R rows, C columns, G groups of a row, S columns of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from forgekit.errors import ArtifactError
from forgekit.quant.config import GroupPlan
from forgekit.quant.grid import check_strength, check_weights, straight_through


@dataclass(frozen=True)
class Grouped:
    """A matrix as codes int8 (R, C), never below -(2^(bits-1) - 1), times a scale float16 (R, G) per ``group`` columns.

    The last group of a row is shorter when ``group`` does not divide C.
    """

    codes_RC: Tensor
    scale_RG: Tensor
    group: int
    bits: int

    def dense(self) -> Tensor:
        """The matrix (R, C), float32."""
        columns = self.codes_RC.shape[1]
        scale_RC = self.scale_RG.float().repeat_interleave(min(self.group, columns), 1)[:, :columns]
        return self.codes_RC.float() * scale_RC


def round_groups(W_RC: Tensor, plan: GroupPlan) -> Grouped:
    """Round to nearest. No weight moves by more than half the scale of its group.

    Raises:
        ArtifactError: no matrix, an empty one, one that holds NaN or infinities, or weights whose scale exceeds fp16.
    """
    with torch.no_grad():
        wide_RC = W_RC.float()
        check_weights(wide_RC)  # after the conversion: what float32 cannot hold is infinite
        codes_RGS, scale_RG1 = _round(wide_RC, plan)
        if scale_RG1.isinf().any():
            what = f"magnitudes up to {W_RC.abs().max().item():.3g} need a scale beyond fp16"
            raise ArtifactError(what, where="weights", remedy="scale the model down first")
        codes_RC = codes_RGS.flatten(1)[:, : W_RC.shape[1]].to(torch.int8).contiguous()
        return Grouped(codes_RC, scale_RG1.squeeze(-1), plan.group, plan.bits)


def fake_groups(W_RC: Tensor, plan: GroupPlan, strength: float = 1.0) -> Tensor:
    """The matrix moved towards its rounded image, with a straight-through gradient.

    Strength 1 gives ``round_groups(W_RC, plan).dense()`` bit for bit, 0 the weights (see
    :func:`~forgekit.quant.grid.fake_ternary`, also for weights that are not finite).

    Raises:
        ConfigError: the strength is outside [0, 1].
    """
    check_strength(strength)
    with torch.no_grad():
        wide_RC = W_RC.float()
        codes_RGS, scale_RG1 = _round(wide_RC, plan)
        dense_RC = (codes_RGS * scale_RG1.float()).flatten(1)[:, : W_RC.shape[1]]
        mixed_RC = wide_RC.lerp(dense_RC, strength).to(W_RC.dtype)
    return straight_through(mixed_RC, W_RC)


def _round(W_RC: Tensor, plan: GroupPlan) -> tuple[Tensor, Tensor]:
    """Codes as float32 (R, G, S), the last group filled up with zeros, and the scale float16 (R, G, 1)."""
    group = min(plan.group, W_RC.shape[1])
    W_RGS = F.pad(W_RC, (0, -W_RC.shape[1] % group)).unflatten(1, (-1, group))
    size_RG1 = W_RGS.abs().amax(-1, keepdim=True)
    scale_RG1 = (size_RG1 / plan.top).half()
    # Rounded to fp16 the scale can come out so small (at worst 0) that the largest weight is cut off by more than
    # half a step; the next fp16 number is then large enough. Positive ones are ordered like their bits.
    low_RG1 = size_RG1 > (plan.top + 0.5) * scale_RG1.float()
    scale_RG1 = torch.where(low_RG1, (scale_RG1.view(torch.int16) + 1).view(torch.float16), scale_RG1)
    steps_RGS = W_RGS / torch.where(scale_RG1 == 0, 1.0, scale_RG1.float())
    return steps_RGS.round().clamp(-plan.top, plan.top), scale_RG1
