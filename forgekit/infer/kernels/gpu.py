"""The ternary product on GPUs, in Triton. Imported only where Triton is installed.

Shapes: R rows (outputs), C columns (inputs), B batch, P packed bytes of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from forgekit.quant.grid import quantise_activations

ROWS, BYTES = 16, 128
"""Rows of a program, and packed bytes of a row that it takes at a time (whole blocks of 16)."""


def ternary_matmul(packed_RP: Tensor, scale_R: Tensor, x_BC: Tensor) -> Tensor:
    """(B, R) float32. All tensors contiguous and on one GPU, x and scale float32: the caller has seen to it."""
    (rows, width), (batch, columns) = packed_RP.shape, x_BC.shape
    codes_BC, scale_B1 = quantise_activations(x_BC)
    out_BR = torch.empty(batch, rows, dtype=torch.float32, device=x_BC.device)
    if batch and rows:
        grid = (triton.cdiv(rows, ROWS), batch)
        _ternary[grid](packed_RP, scale_R, codes_BC, scale_B1, out_BR, rows, columns, width, ROWS=ROWS, BYTES=BYTES)
    return out_BR


@triton.jit
def _ternary(packed, scale, codes, scales, out, R, C, P, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """ROWS rows of one token: each lane adds its bytes in 32-bit integers, then the lanes are added."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    total = tl.zeros((ROWS, BYTES), tl.int32)
    for start in range(0, P, BYTES):
        byte = start + tl.arange(0, BYTES)
        there = (r < R)[:, None] & (byte < P)[None, :]
        four = tl.load(packed + r[:, None] * P + byte[None, :], mask=there, other=0).to(tl.int32)
        # Byte j of a block holds the columns j, j + 16, j + 32, j + 48.
        first = byte // 16 * 64 + byte % 16
        for p in tl.static_range(4):
            column = first + 16 * p
            x = tl.load(codes + b * C + column, mask=column < C, other=0).to(tl.int32)
            total += ((four >> (2 * p) & 3) - 1) * x[None, :]
    value = tl.sum(total, 1).to(tl.float32) * tl.load(scale + r, mask=r < R, other=0.0) * tl.load(scales + b)
    tl.store(out + b * R + r, value, mask=r < R)
