"""Low-bit products in plain torch: exact, on every device, for machines that can do no better.

Shapes: R rows (outputs), C columns (inputs), B batch, P packed bytes of a row, N blocks of 64 columns, G groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from forgekit.quant.grid import quantise_activations
from forgekit.quant.pack import BLOCK, BLOCK_BYTES, LANES, width2

PIECE = 1 << 22
"""Weights decoded at a time: 16 MiB of float32, whatever the size of the matrix."""
EXACT = 2**24
"""Below this float32 counts without gaps."""


def exactly(function: Callable) -> Callable:
    """Without gradients, and without autocast, which would round."""

    @functools.wraps(function)
    def call(*tensors: Tensor | int) -> Tensor:
        with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
            return function(*tensors)

    return call


@exactly
def ternary_matmul(packed_RP: Tensor, scale_R: Tensor, x_BC: Tensor) -> Tensor:
    """(B, R) float32 of packed ternary weights and activations rounded to 8 bits."""
    codes_BC, scale_B1 = quantise_activations(x_BC)
    # Products are whole numbers up to 127: sums of fewer than 2^24 / 127 of them are exact in any order.
    exact = torch.float32 if 127 * x_BC.shape[1] < EXACT or x_BC.device.type == "mps" else torch.float64
    sums_BR = packed_product(packed_RP, codes_BC.to(exact)).float()
    return sums_BR * scale_R * scale_B1


@exactly
def ternary_matmul_float(packed_RP: Tensor, scale_R: Tensor, x_BC: Tensor) -> Tensor:
    """(B, R) float32 of packed ternary weights and activations as they are."""
    return packed_product(packed_RP, x_BC) * scale_R


def packed_product(packed_RP: Tensor, x_BC: Tensor) -> Tensor:
    """x (B, C) times the transposed codes, (B, R), in the dtype of x."""
    batch, columns = x_BC.shape
    # Byte j of a block holds the columns j, j + 16, j + 32, j + 48: it is cheaper to give x that order.
    width = width2(columns)
    padded = F.pad(x_BC, (0, -columns % BLOCK)).view(batch, width // BLOCK_BYTES, LANES, BLOCK_BYTES)
    ordered = padded.transpose(2, 3).reshape(batch, LANES * width)
    table = _digits(x_BC.dtype, x_BC.device)
    step = max(1, PIECE // ordered.shape[1])
    parts = []
    for bytes_rP in packed_RP.split(step):
        codes_rC = table.index_select(0, bytes_rP.flatten().int()).view(len(bytes_rP), -1)
        parts.append(F.linear(ordered, codes_rC))
    return torch.cat(parts, 1)


@exactly
def grouped_matmul(codes_RC: Tensor, scale_RG: Tensor, x_BC: Tensor, group: int) -> Tensor:
    """(B, R) float32 of int8 weights with a scale per group of columns."""
    rows, columns = codes_RC.shape
    step = max(1, PIECE // columns)
    parts = []
    for start in range(0, rows, step):
        scale_rC = scale_RG[start : start + step].float().repeat_interleave(min(group, columns), 1)[:, :columns]
        parts.append(F.linear(x_BC, codes_RC[start : start + step] * scale_rC))
    return torch.cat(parts, 1)


@functools.lru_cache
def _digits(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 4): the four codes of every byte."""
    return (torch.arange(256)[:, None] // 4 ** torch.arange(LANES) % 4 - 1).to(dtype).to(device)
