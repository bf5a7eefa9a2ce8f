"""The ternary grid of weights and the 8-bit grid of activations: values, codes, straight-through gradients.

Weights follow BitNet b1.58 (arXiv 2402.17764, section 2: W ~ clip(round(W / mean|W|)) * mean|W|) with the choices of
:class:`~forgekit.quant.config.TernaryPlan`; the median as scale is from BitNet b1.58 Reloaded (arXiv 2407.09527).
Activations are scaled per token by their largest magnitude (the same section). Training and packing go through the
same functions here, so what was trained is what is stored.

Shapes: R rows (outputs), C columns (inputs), B batch, 1 a single column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from forgekit.errors import ArtifactError, ConfigError
from forgekit.quant.config import TernaryPlan

ACTIVATION_BITS = 8


class Quantised(Protocol):
    """Codes and scales that stand for a matrix."""

    def dense(self) -> Tensor:
        """The matrix (R, C), float32."""


@dataclass(frozen=True)
class Ternary:
    """A matrix on the ternary grid: codes int8 in {-1, 0, 1} (R, C) times a scale float32 (R, 1) for each row.

    One scale for the whole matrix is stored as the same number in every row.
    """

    codes_RC: Tensor
    scale_R1: Tensor

    def dense(self) -> Tensor:
        """The matrix (R, C), float32."""
        return self.codes_RC.to(torch.float32) * self.scale_R1

    @property
    def sparsity(self) -> float:
        """Share of the codes that are zero."""
        return 1.0 - self.codes_RC.count_nonzero().item() / self.codes_RC.numel()


def ternarise(W_RC: Tensor, plan: TernaryPlan) -> Ternary:
    """The codes and the scale of a matrix. A row of zeros, or one too small for float32, gets codes 0 and scale 0.

    Raises:
        ArtifactError: no matrix, an empty one, or one that holds NaN or infinities.
    """
    with torch.no_grad():
        wide_RC = W_RC.float()
        check_weights(wide_RC)  # after the conversion: what float32 cannot hold is infinite
        codes_RC, scale_R1 = _codes(wide_RC, plan)
        return Ternary(codes_RC.to(torch.int8), scale_R1.expand(len(W_RC), 1).contiguous())


def fake_ternary(W_RC: Tensor, plan: TernaryPlan, strength: float = 1.0) -> Tensor:
    """The matrix moved towards its ternary image; the gradient passes as if nothing had happened.

    Strength 1 gives ``ternarise(W_RC, plan).dense()`` bit for bit (rounded to the dtype of the weights when that is
    narrower than float32), 0 gives the weights. In between it is W + strength * (dense - W), the warm-up of the
    straight-through estimator. Weights that are not finite are not refused here, where each step passes: they come
    out as NaN and so reach the loss.

    Raises:
        ConfigError: the strength is outside [0, 1].
    """
    check_strength(strength)
    with torch.no_grad():
        wide_RC = W_RC.float()
        codes_RC, scale_R1 = _codes(wide_RC, plan)
        mixed_RC = wide_RC.lerp(codes_RC * scale_R1, strength).to(W_RC.dtype)
    return straight_through(mixed_RC, W_RC)


def quantise_activations(x_BC: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes int8 (..., C) in [-127, 127] and a scale float32 (..., 1) per token: x ~ codes * scale.

    The recipe, for kernels that do it themselves: scale = max|x| / 127 and code = round(x / scale), both true float32
    divisions, halves to even. A token of zeros has scale 0. A token that holds NaN or infinity comes back as NaN: the
    scale is not finite.
    """
    with torch.no_grad():
        codes, scale = _activation_codes(x_BC.float(), ACTIVATION_BITS)
        return codes.nan_to_num(0.0).to(torch.int8), scale


def fake_activations(x: Tensor, bits: int = ACTIVATION_BITS) -> Tensor:
    """Activations on the grid of :func:`quantise_activations`, per token (last dimension), straight-through gradient.

    Args:
        x: (..., C) of any floating dtype; the result has the same.
        bits: 2 to 8; 0 returns ``x`` itself.

    Raises:
        ConfigError: another number of bits.
    """
    if bits == 0:
        return x
    if not 2 <= bits <= ACTIVATION_BITS:
        raise ConfigError(f"{bits} bits refused", where="activation_bits", remedy="give 2 to 8, or 0 for none")
    with torch.no_grad():
        codes, scale = _activation_codes(x.float(), bits)
        value = (codes * scale).to(x.dtype)
    return straight_through(value, x)


def straight_through(value: Tensor, source: Tensor) -> Tensor:
    """``value`` in the forward pass, the gradient of the identity on ``source`` in the backward pass.

    The usual source + (value - source).detach() rounds the value; this form adds an exact zero to it.
    """
    return value + (source - source.detach())


def weighted_error(W_RC: Tensor, ternary: Quantised, second_moment_C: Tensor) -> float:
    """Share of the output energy that quantisation changes: sum_c m_c (w - q)^2 / sum_c m_c w^2, over all rows.

    With m_c the mean square of input c this is the expected squared error of the linear map relative to its output,
    if inputs are uncorrelated (the diagonal of the Hessian that GPTQ, arXiv 2210.17323, uses whole).

    Args:
        W_RC: the matrix.
        ternary: anything with ``dense()`` of the same shape.
        second_moment_C: mean square of each input, not negative. All zero counts as no error.

    Raises:
        ArtifactError: shapes do not fit, or a moment is negative or not finite.
    """
    q_RC, m_C = ternary.dense(), second_moment_C
    if q_RC.shape != W_RC.shape:
        raise ArtifactError(f"{tuple(q_RC.shape)} for weights of {tuple(W_RC.shape)}", where="quantised weights")
    if m_C.shape != W_RC.shape[1:]:
        what = f"{tuple(m_C.shape)} for {W_RC.shape[1]} columns"
        raise ArtifactError(what, where="second_moment", remedy="give one number per input")
    if not (m_C.isfinite() & (m_C >= 0)).all():
        raise ArtifactError("negative or not finite", where="second_moment", remedy="calibrate again")
    with torch.no_grad():
        w_RC, m_C = _wide(W_RC), _wide(m_C)
        error = ((w_RC - _wide(q_RC)).square() @ m_C).sum().item()
        energy = (w_RC.square() @ m_C).sum().item()
    return error / energy if energy else 0.0 if not error else float("inf")


def check_weights(W_RC: Tensor) -> None:
    """Refuse what is no matrix of finite numbers (ArtifactError)."""
    if W_RC.ndim != 2 or not W_RC.numel():
        what = f"shape {tuple(W_RC.shape)} refused"
        raise ArtifactError(what, where="weights", remedy="give a matrix with at least one element")
    if not W_RC.isfinite().all():
        raise ArtifactError("NaN or infinite values", where="weights", remedy="use a checkpoint from before that")


def check_strength(strength: float) -> None:
    """Refuse a strength outside [0, 1], NaN included (ConfigError)."""
    if not 0 <= strength <= 1:
        raise ConfigError(f"{strength} refused", where="strength", remedy="give 0 (float weights) to 1 (quantised)")


def _codes(W_RC: Tensor, plan: TernaryPlan) -> tuple[Tensor, Tensor]:
    """Codes as float32 (R, C) and the scale (R, 1), or (1, 1) for one per tensor."""
    size_RC = W_RC.abs()
    rows_RC = size_RC if plan.per == "channel" else size_RC.reshape(1, -1)
    scale_R1 = _scale(rows_RC, plan.scale)
    # The division decides, not size > threshold * scale: it is what rounds like b1.58. A scale of 0 (zeros, or
    # too small for float32) lets no weight pass. 0 and 1 as float32: masks of bool cost several times as much.
    used_RC = (size_RC / torch.where(scale_R1 > 0, scale_R1, torch.inf)).gt_(plan.threshold)
    if plan.refit:
        # sum(w * code) / sum(code^2) with code = sign(w) on the used ones is their mean magnitude.
        kept = used_RC.reshape(rows_RC.shape)
        count = _wide(kept).sum(1, keepdim=True)
        scale_R1 = (_wide(rows_RC * kept).sum(1, keepdim=True) / count.clamp_min(1)).float()
    return W_RC.sign() * used_RC, scale_R1


def _scale(rows_RC: Tensor, kind: str) -> Tensor:
    """Mean or median magnitude of each row (R, 1). The median is the lower of the two middle ones."""
    # In double precision the mean does not depend on the order of summation, so neither do codes at the threshold
    # on the number of threads or the device; huge weights do not overflow either.
    mean_R1 = _wide(rows_RC).mean(1, keepdim=True).float()
    if kind == "mean":
        return mean_R1
    median_R1 = rows_RC.median(1, keepdim=True).values
    # More than half zeros (weights that were ternary before) leave nothing to compare with.
    return torch.where(median_R1 > 0, median_R1, mean_R1)


def _activation_codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes as float32 (..., C) and the scale (..., 1)."""
    top = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True) / top
    return (x / torch.where(scale == 0, 1.0, scale)).round().clamp(-top, top), scale


def _wide(x: Tensor) -> Tensor:
    """Double precision where the device has it (MPS has not)."""
    return x.float() if x.device.type == "mps" else x.double()
