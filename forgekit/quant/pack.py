"""Codes to bytes and back, row by row. Every packing has exactly one spelling, and readers refuse every other.

===========  ==================  ==========================================================================
packing      bytes of a row      layout
===========  ==================  ==========================================================================
2 bits       16 ceil(C / 64)     64 columns are a block of 16 bytes; byte j holds the columns j, j + 16, j + 32
                                 and j + 48 of its block in the bit pairs 0, 2, 4, 6, each as code + 1
base 3       ceil(C / 5)         five columns are a byte: the sum of (code_i + 1) 3^i
b bits       ceil(b C / 8)       a stream of two's complement codes: bit i of the row is bit i % 8 of byte i // 8
===========  ==================  ==========================================================================

Columns that fill up the last block or byte have code 0, bits that fill up the last byte of a stream are 0. A pair 3,
a byte above 242 and the code -2^(b-1) never occur. The 2-bit order is what vector instructions want: one shift and
one mask of a block give sixteen neighbouring columns.

Shapes: R rows, C columns, P bytes of a row, N blocks of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from forgekit.errors import ArtifactError

BLOCK, BLOCK_BYTES, LANES = 64, 16, 4
"""Columns and bytes of a 2-bit block, and codes in a byte."""
TRITS, LAST_TRITS = 5, 3**5 - 1
"""Codes in a base-3 byte and its largest value."""
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)


def width2(columns: int) -> int:
    """Bytes of a row of :func:`pack2`."""
    return BLOCK_BYTES * -(-columns // BLOCK)


def width3(columns: int) -> int:
    """Bytes of a row of :func:`pack3`."""
    return -(-columns // TRITS)


def width_bits(columns: int, bits: int) -> int:
    """Bytes of a row of :func:`pack_bits`."""
    return -(-columns * bits // 8)


def pack2(codes_RC: Tensor) -> Tensor:
    """Ternary codes (R, C) as uint8 (R, 16 ceil(C / 64)), two bits each.

    Raises:
        ArtifactError: no matrix of signed integers, no columns, or a code outside {-1, 0, 1}.
    """
    digits_RC = _digits(codes_RC, BLOCK)
    a, b, c, d = digits_RC.unflatten(1, (-1, LANES, BLOCK_BYTES)).unbind(2)
    return (a | b << 2 | c << 4 | d << 6).flatten(1)


def unpack2(packed_RP: Tensor, columns: int) -> Tensor:
    """The int8 codes (R, columns) that :func:`pack2` packed.

    Raises:
        ArtifactError: the width does not fit the columns, a pair is 3, or the filling is not code 0.
    """
    _check_packed(packed_RP, columns, width2(columns))
    if (packed_RP & packed_RP >> 1 & 0b01010101).any():
        raise _corrupt("a bit pair is 3")
    bytes_RN1J = packed_RP.unflatten(1, (-1, 1, BLOCK_BYTES))
    shifts_L1 = torch.arange(0, 2 * LANES, 2, dtype=torch.uint8, device=packed_RP.device)[:, None]
    return _cut((bytes_RN1J >> shifts_L1 & 3).view(torch.int8).flatten(1) - 1, columns)


def pack3(codes_RC: Tensor) -> Tensor:
    """Ternary codes (R, C) as uint8 (R, ceil(C / 5)), base 3, five per byte.

    Raises:
        ArtifactError: no matrix of signed integers, no columns, or a code outside {-1, 0, 1}.
    """
    first, *others = reversed(_digits(codes_RC, TRITS).unflatten(1, (-1, TRITS)).unbind(2))
    value = first.clone()
    for digit in others:  # Horner
        value.mul_(3).add_(digit)
    return value


def unpack3(packed_RP: Tensor, columns: int) -> Tensor:
    """The int8 codes (R, columns) that :func:`pack3` packed.

    Raises:
        ArtifactError: the width does not fit the columns, a byte is above 242, or the filling is not code 0.
    """
    _check_packed(packed_RP, columns, width3(columns))
    if (packed_RP > LAST_TRITS).any():
        raise _corrupt(f"a byte is above {LAST_TRITS}")
    powers_T = 3 ** torch.arange(TRITS)
    table = (torch.arange(LAST_TRITS + 1)[:, None] // powers_T % 3 - 1).to(torch.int8).to(packed_RP.device)
    codes = table.index_select(0, packed_RP.flatten().int())
    return _cut(codes.view(len(packed_RP), TRITS * packed_RP.shape[1]), columns)


def pack_bits(codes_RC: Tensor, bits: int) -> Tensor:
    """Codes (R, C) in [-(2^(bits-1) - 1), 2^(bits-1) - 1] as uint8 (R, ceil(bits C / 8)).

    Raises:
        ArtifactError: bits outside 4 to 8, no matrix of signed integers, no columns, or a code out of range.
    """
    top = _top(bits)
    _check_codes(codes_RC, top)
    # Eight codes are ``bits`` bytes: gather them in one 64-bit word.
    codes_RN8 = F.pad(codes_RC.to(torch.int8), (0, -codes_RC.shape[1] % 8)).unflatten(1, (-1, 8)).unbind(2)
    word_RN = torch.zeros_like(codes_RN8[0], dtype=torch.int64)
    for i, code_RN in enumerate(codes_RN8):
        word_RN |= (code_RN.long() & (1 << bits) - 1) << bits * i
    bytes_RNb = torch.stack([(word_RN >> 8 * j & 255).to(torch.uint8) for j in range(bits)], 2)
    return bytes_RNb.flatten(1)[:, : width_bits(codes_RC.shape[1], bits)].contiguous()


def unpack_bits(packed_RP: Tensor, columns: int, bits: int) -> Tensor:
    """The int8 codes (R, columns) that :func:`pack_bits` packed.

    Raises:
        ArtifactError: bits outside 4 to 8, the width does not fit the columns, a code is -2^(bits-1), or the filling
            is not zero.
    """
    top = _top(bits)
    _check_packed(packed_RP, columns, width_bits(columns, bits))
    bytes_RNb = F.pad(packed_RP, (0, -packed_RP.shape[1] % bits)).unflatten(1, (-1, bits)).unbind(2)
    word_RN = torch.zeros_like(bytes_RNb[0], dtype=torch.int64)
    for j, byte_RN in enumerate(bytes_RNb):
        word_RN |= byte_RN.long() << 8 * j
    # The sign of a code is the top bit of its field: shift it to the top of the word, then back down as a number.
    fields = [(word_RN << 64 - bits * (i + 1) >> 64 - bits).to(torch.int8) for i in range(8)]
    codes_RC = torch.stack(fields, 2).flatten(1)
    if (codes_RC < -top).any():
        raise _corrupt(f"a code is {-top - 1}")
    return _cut(codes_RC, columns)


def _digits(codes_RC: Tensor, multiple: int) -> Tensor:
    """code + 1 as uint8, filled up with code 0 to a multiple of columns."""
    _check_codes(codes_RC, 1)
    return F.pad((codes_RC + 1).to(torch.uint8), (0, -codes_RC.shape[1] % multiple), value=1)


def _cut(codes_RC: Tensor, columns: int) -> Tensor:
    """The first columns; the others must be 0."""
    if codes_RC[:, columns:].any():
        raise _corrupt("the filling of the last block is not zero")
    return codes_RC[:, :columns].contiguous()


def _top(bits: int) -> int:
    if not 4 <= bits <= 8:
        raise ArtifactError(f"{bits} bits refused", where="bits", remedy="give 4 to 8")
    return 2 ** (bits - 1) - 1


def _check_codes(codes_RC: Tensor, top: int) -> None:
    if codes_RC.ndim != 2 or not codes_RC.shape[1] or codes_RC.dtype not in SIGNED:
        what = f"{codes_RC.dtype} of shape {tuple(codes_RC.shape)} refused"
        raise ArtifactError(what, where="codes", remedy="give an int8 matrix with at least one column")
    if ((codes_RC < -top) | (codes_RC > top)).any():
        what = f"values from {codes_RC.min().item()} to {codes_RC.max().item()}"
        raise ArtifactError(what, where="codes", remedy=f"give -{top} to {top}")


def _check_packed(packed_RP: Tensor, columns: int, width: int) -> None:
    if packed_RP.ndim != 2 or packed_RP.dtype != torch.uint8:
        what = f"{packed_RP.dtype} of shape {tuple(packed_RP.shape)} refused"
        raise ArtifactError(what, where="packed codes", remedy="give a uint8 matrix")
    if columns < 1 or packed_RP.shape[1] != width:
        what = f"{packed_RP.shape[1]} bytes a row do not hold {columns} columns"
        raise ArtifactError(what, where="packed codes", remedy=f"{width} bytes would" if columns > 0 else "")


def _corrupt(what: str) -> ArtifactError:
    return ArtifactError(what, where="packed codes", remedy="restore the artifact")
