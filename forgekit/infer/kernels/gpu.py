"""Products with low-bit weights on GPUs, in Triton. Imported only where Triton is installed.

Shapes: R rows (outputs), C columns (inputs), B batch, P packed bytes of a row, G groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from forgekit.quant.grid import quantise_activations

ROWS, BYTES = 16, 128
"""Rows of a program, and packed bytes or columns of a row that it takes at a time (whole blocks of 16 bytes)."""


def ternary_matmul(packed_RP: Tensor, scale_R: Tensor, x_BC: Tensor) -> Tensor:
    """(B, R) float32. All tensors contiguous and on one GPU, x and scale float32: the caller has seen to it."""
    (rows, width), (batch, columns) = packed_RP.shape, x_BC.shape
    codes_BC, scale_B1 = quantise_activations(x_BC)
    out_BR = torch.empty(batch, rows, dtype=torch.float32, device=x_BC.device)
    if batch and rows:
        grid = (batch, triton.cdiv(rows, ROWS))  # the second has room for 65,535 only: a million rows
        with torch.cuda.device_of(x_BC):  # Triton launches on the current one
            _ternary[grid](packed_RP, scale_R, codes_BC, scale_B1, out_BR, rows, columns, width, ROWS=ROWS, BYTES=BYTES)
    return out_BR


def grouped_matmul(codes_RC: Tensor, scale_RG: Tensor, x_BC: Tensor, group: int) -> Tensor:
    """(B, R) float32. All tensors contiguous and on one GPU, scale float16, x float32: the caller has seen to it."""
    (rows, columns), batch = codes_RC.shape, len(x_BC)
    out_BR = torch.empty(batch, rows, dtype=torch.float32, device=x_BC.device)
    if batch and rows:
        grid, groups = (batch, triton.cdiv(rows, ROWS)), scale_RG.shape[1]
        with torch.cuda.device_of(x_BC):
            _grouped[grid](codes_RC, scale_RG, x_BC, out_BR, rows, columns, group, groups, ROWS=ROWS, STEP=BYTES)
    return out_BR


@triton.jit
def _grouped(codes, scales, x, out, R, C, group, G, ROWS: tl.constexpr, STEP: tl.constexpr):
    """ROWS rows of one token, STEP columns at a time: each lane adds its products, then the lanes are added."""
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    b = tl.program_id(0).to(tl.int64)
    total = tl.zeros((ROWS, STEP), tl.float32)
    for start in range(0, C, STEP):
        c = start + tl.arange(0, STEP)
        there = (r < R)[:, None] & (c < C)[None, :]
        code = tl.load(codes + r[:, None] * C + c[None, :], mask=there, other=0).to(tl.float32)
        scale = tl.load(scales + r[:, None] * G + (c // group)[None, :], mask=there, other=0.0).to(tl.float32)
        total += code * scale * tl.load(x + b * C + c, mask=c < C, other=0.0)[None, :]
    tl.store(out + b * R + r, tl.sum(total, 1), mask=r < R)


@triton.jit
def _ternary(packed, scale, codes, scales, out, R, C, P, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """ROWS rows of one token: each lane adds its bytes in 32-bit integers, then the lanes are added."""
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    b = tl.program_id(0).to(tl.int64)
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
