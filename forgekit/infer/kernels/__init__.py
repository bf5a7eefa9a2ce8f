"""Products with low-bit weights: one entry for every device, each implementation in a module of its own.

``cpu`` (compiled at first use by LLVM), ``gpu`` (Triton), ``plain`` (torch alone). All round activations alike and add
integers, so that their ternary products are equal bit for bit.

Shapes: R rows (outputs), C columns (inputs), B batch, P packed bytes of a row (:func:`forgekit.quant.pack.pack2`),
G groups.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from forgekit.errors import ArtifactError, ConfigError
from forgekit.infer.kernels import cpu, plain
from forgekit.infer.kernels.cpu import TernaryMaps
from forgekit.infer.kernels.llvm_attention import LANES
from forgekit.infer.kernels.steps import Token, Writing, attend, compiled, remember, rms_norm
from forgekit.quant.pack import width2
from forgekit.registry import unknown

VARIABLE = "AGENT_FORGE_KERNELS"
BACKENDS = ("llvm", "torch", "triton")
SYNONYMS = {"numba": "llvm"}
"""numba brings the LLVM that is used here."""
HEAD_STEP, MEMORY_STEP = 2 * LANES, LANES
"""What the width of heads must be a multiple of for :func:`attend`, and for :func:`remember`."""
__all__ = [
    "TernaryMaps", "Token", "Writing", "attend", "backend", "grouped_matmul", "plain_floats", "prepared_maps",
    "remember", "rms_norm", "takes", "traced", "ternary_matmul", "ternary_matmul_float",
]  # fmt: skip
REMEDY = {"llvm": "pip install llvmlite", "triton": "pip install triton, on a machine with a GPU"}


def backend(device: str | torch.device = "cpu") -> str:
    """What computes on a device: ``llvm`` or ``torch`` on a CPU, ``triton`` or ``torch`` elsewhere.

    The environment variable AGENT_FORGE_KERNELS forces one (``numba`` means ``llvm``).

    Raises:
        ConfigError: the forced one is unknown, not installed, or not for this device.
    """
    return _choose(os.environ.get(VARIABLE, ""), torch.device(device).type)


def ternary_matmul(packed2_RP: Tensor, scale_R: Tensor, x_BC: Tensor, columns: int) -> Tensor:
    """Product of activations, rounded to 8 bits per token, with packed ternary weights.

    The integer sums are exact; the result is sum * scale of the row * scale of the token. No gradient flows.

    Args:
        packed2_RP: uint8 (R, P) from :func:`forgekit.quant.pack.pack2`.
        scale_R: (R) or (R, 1), one for each row.
        x_BC: (..., C) of any floating dtype.
        columns: C.

    Returns:
        float32 (..., R).

    Raises:
        ArtifactError: the shapes do not fit.
        ConfigError: as :func:`backend`.
    """
    flat_BC, scale_R = _fitting(packed2_RP, scale_R, x_BC, columns)
    chosen = _chosen(flat_BC)
    if chosen == "llvm":
        out_BR = cpu.ternary_matmul(packed2_RP.contiguous(), scale_R, flat_BC)
    elif chosen == "triton":
        from forgekit.infer.kernels import gpu

        out_BR = gpu.ternary_matmul(packed2_RP.contiguous(), scale_R, flat_BC)
    else:
        out_BR = plain.ternary_matmul(packed2_RP, scale_R, flat_BC)
    return out_BR if x_BC.ndim == 2 else out_BR.view(*x_BC.shape[:-1], len(scale_R))


def prepared_maps(maps: Sequence[tuple[Tensor, Tensor]], columns: int) -> TernaryMaps | None:
    """Ternary maps of one input, to be multiplied with it in one call; None where :func:`ternary_matmul` has to do it.

    The backend is chosen here, once.

    Args:
        maps: packed weights and scales of each.
        columns: C.
    """
    for packed2_RP, scale_R in maps:
        fits = (
            packed2_RP.is_cpu
            and packed2_RP.dtype == torch.uint8
            and packed2_RP.shape == (scale_R.numel(), width2(columns))
        )
        if not fits or scale_R.ndim != 1 or not (plain_floats(scale_R) and packed2_RP.is_contiguous()):
            return None
    return TernaryMaps(maps, columns) if _chosen(maps[0][0]) == "llvm" else None


def plain_floats(tensor: Tensor) -> bool:
    """Whether compiled code can take it as it is: float32, contiguous, on the CPU."""
    return tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()


def takes(*tensors: Tensor | None) -> bool:
    """Whether the compiled steps can take all of these: :func:`plain_floats`, or None."""
    return _chosen(tensors[0]) == "llvm" and all(one is None or plain_floats(one) for one in tensors) and compiled()


def traced() -> bool:
    """Whether calls are recorded, as torch.export does: compiled code would leave no trace."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def ternary_matmul_float(packed2_RP: Tensor, scale_R: Tensor, x_BC: Tensor, columns: int) -> Tensor:
    """:func:`ternary_matmul` without rounding the activations, in plain torch."""
    flat_BC, scale_R = _fitting(packed2_RP, scale_R, x_BC, columns)
    return plain.ternary_matmul_float(packed2_RP, scale_R, flat_BC).view(*x_BC.shape[:-1], len(scale_R))


def grouped_matmul(codes_RC: Tensor, scale_RG: Tensor, x_BC: Tensor, group: int) -> Tensor:
    """Product of float32 activations with int8 weights that share a scale per group of columns.

    Args:
        codes_RC: int8 (R, C).
        scale_RG: float16 (R, ceil(C / group)).
        x_BC: (..., C) of any floating dtype.
        group: columns that share a scale; the last group may be shorter.

    Returns:
        float32 (..., R). No gradient flows.

    Raises:
        ArtifactError: the shapes do not fit, or the tensors are on different devices.
        ConfigError: as :func:`backend`.
    """
    rows, columns = codes_RC.shape
    groups = -(-columns // group) if group > 0 else 0
    if not groups or codes_RC.dtype != torch.int8 or scale_RG.shape != (rows, groups) or x_BC.shape[-1] != columns:
        what = f"codes {tuple(codes_RC.shape)}, scales {tuple(scale_RG.shape)}, activations {tuple(x_BC.shape)}"
        what = f"{what} do not fit groups of {group}"
        raise ArtifactError(what, where="group-wise product", remedy="restore the artifact")
    _together("group-wise product", codes_RC, scale_RG, x_BC)
    flat_BC, chosen = _flat(x_BC, columns), _chosen(x_BC)
    if chosen == "llvm":
        out_BR = cpu.grouped_matmul(codes_RC.contiguous(), scale_RG.half().contiguous(), flat_BC, group)
    elif chosen == "triton":
        from forgekit.infer.kernels import gpu

        out_BR = gpu.grouped_matmul(codes_RC.contiguous(), scale_RG.half().contiguous(), flat_BC, group)
    else:
        out_BR = plain.grouped_matmul(codes_RC, scale_RG, flat_BC, group)
    return out_BR if x_BC.ndim == 2 else out_BR.view(*x_BC.shape[:-1], rows)


def _fitting(packed_RP: Tensor, scale_R: Tensor, x_BC: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Activations as contiguous float32 (B, C) and scales as float32 (R), once all sizes have been compared."""
    rows, width = packed_RP.shape
    if width != width2(columns) or scale_R.numel() != rows or x_BC.shape[-1] != columns or columns < 1:
        what = f"packed {tuple(packed_RP.shape)}, scales {tuple(scale_R.shape)}, activations {tuple(x_BC.shape)}"
        raise ArtifactError(
            f"{what} do not fit {columns} columns", where="ternary product", remedy="restore the artifact"
        )
    if packed_RP.dtype != torch.uint8 or not x_BC.is_floating_point():
        what = f"{packed_RP.dtype} codes and {x_BC.dtype} activations"
        raise ArtifactError(what, where="ternary product", remedy="give uint8 codes and float activations")
    _together("ternary product", packed_RP, scale_R, x_BC)
    if scale_R.ndim != 1 or scale_R.dtype != torch.float32:
        scale_R = scale_R.reshape(-1).float()
    return _flat(x_BC, columns), scale_R.contiguous()


def _together(where: str, *tensors: Tensor) -> None:
    """Refuse weights and activations on different devices: compiled code would read one's addresses on the other."""
    weights, *_, given = (tensor.device for tensor in tensors)
    if any(tensor.device != given for tensor in tensors):
        raise ArtifactError(f"weights on {weights}, activations on {given}", where=where, remedy="move the model there")


def _flat(x_BC: Tensor, columns: int) -> Tensor:
    """Contiguous float32 (B, C). Every call of a decoded token passes here: what is not needed is not done."""
    if x_BC.ndim != 2:
        x_BC = x_BC.reshape(-1, columns)
    if x_BC.dtype != torch.float32:
        x_BC = x_BC.float()
    return x_BC.contiguous()


def _chosen(x: Tensor) -> str:
    """:func:`backend` for the device of a tensor."""
    return "torch" if traced() else _choose(os.environ.get(VARIABLE, ""), "cpu" if x.is_cpu else x.device.type)


@functools.cache
def _choose(forced: str, device: str) -> str:
    """See :func:`backend`."""
    name = SYNONYMS.get(forced, forced)
    has = {
        "llvm": device == "cpu" and cpu.available(),
        "triton": device == "cuda" and importlib.util.find_spec("triton") is not None,
        "torch": True,
    }
    if not name:
        return next(name for name, there in has.items() if there)
    if name not in BACKENDS:
        raise unknown("kernels", forced, [*BACKENDS, *SYNONYMS])
    if not has[name]:
        why = f" ({cpu.obstacle()})" if name == "llvm" and device == "cpu" else ""
        what = f"{forced!r} cannot be used on {device}{why}"
        raise ConfigError(what, where=VARIABLE, remedy=f"{REMEDY[name]}, or unset the variable")
    return name
