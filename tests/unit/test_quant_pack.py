"""Packed bytes: exact inverses for every width, the layout to the bit, and no second spelling of anything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forgekit.errors import ArtifactError
from forgekit.quant.pack import (
    pack2,
    pack3,
    pack_bits,
    unpack2,
    unpack3,
    unpack_bits,
    width2,
    width3,
    width_bits,
)

quick = settings(max_examples=200, deadline=None, derandomize=True)
BITS = (4, 5, 6, 7, 8)
TERNARY = {"2bit": (pack2, unpack2, width2), "base3": (pack3, unpack3, width3)}
ternary = pytest.mark.parametrize("name", TERNARY)
bitwise = pytest.mark.parametrize("bits", BITS)


@st.composite
def codes(draw, top: int = 1) -> Tensor:
    """Codes (R, C) in [-top, top], shapes odd and small."""
    shape = draw(st.integers(0, 4)), draw(st.integers(1, 150))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return torch.from_numpy(random.integers(-top, top + 1, shape).astype(np.int8))


def top_of(bits: int) -> int:
    return 2 ** (bits - 1) - 1


@ternary
@quick
@given(codes_RC=codes())
def test_ternary_codes_come_back(name, codes_RC):
    pack, unpack, width = TERNARY[name]
    columns = codes_RC.shape[1]
    packed_RP = pack(codes_RC)
    assert packed_RP.dtype == torch.uint8 and packed_RP.shape == (len(codes_RC), width(columns))
    back_RC = unpack(packed_RP, columns)
    assert back_RC.dtype == torch.int8 and torch.equal(back_RC, codes_RC)
    assert packed_RP.is_contiguous() and back_RC.is_contiguous()


@quick
@given(st.data(), st.sampled_from(BITS))
def test_codes_of_every_width_come_back(data, bits):
    codes_RC = data.draw(codes(top_of(bits)))
    columns = codes_RC.shape[1]
    packed_RP = pack_bits(codes_RC, bits)
    assert packed_RP.dtype == torch.uint8 and packed_RP.shape == (len(codes_RC), width_bits(columns, bits))
    back_RC = unpack_bits(packed_RP, columns, bits)
    assert back_RC.dtype == torch.int8 and torch.equal(back_RC, codes_RC)
    assert packed_RP.is_contiguous() and back_RC.is_contiguous()


@pytest.mark.parametrize(
    ("columns", "bytes2", "bytes3"), [(1, 16, 1), (5, 16, 1), (6, 16, 2), (64, 16, 13), (65, 32, 13), (128, 32, 26)]
)
def test_the_widths(columns, bytes2, bytes3):
    assert (width2(columns), width3(columns)) == (bytes2, bytes3)
    assert [width_bits(columns, bits) for bits in (4, 8)] == [(columns + 1) // 2, columns]


@quick
@given(codes())
def test_two_bits_lie_where_the_kernels_look_for_them(codes_RC):
    packed_RP = pack2(codes_RC)
    rows, columns = codes_RC.shape
    for r in range(rows):
        expected = np.full(64 * -(-columns // 64), 1)
        expected[:columns] = codes_RC[r].numpy() + 1
        for c, value in enumerate(expected):
            block, inside = divmod(c, 64)
            pair, j = divmod(inside, 16)
            assert (packed_RP[r, 16 * block + j].item() >> 2 * pair) & 3 == value


@quick
@given(codes())
def test_base_three_bytes_are_sums_of_powers(codes_RC):
    packed_RP = pack3(codes_RC)
    padded = np.pad(codes_RC.numpy().astype(int), ((0, 0), (0, -codes_RC.shape[1] % 5)))
    expected = ((padded + 1).reshape(len(padded), packed_RP.shape[1], 5) * 3 ** np.arange(5)).sum(2)
    np.testing.assert_array_equal(packed_RP.numpy(), expected)


@quick
@given(st.data(), st.sampled_from(BITS))
def test_the_bit_stream_is_little_endian_twos_complement(data, bits):
    codes_RC = data.draw(codes(top_of(bits)))
    for row, packed in zip(codes_RC.tolist(), pack_bits(codes_RC, bits).tolist()):
        stream = sum((code % 2**bits) << bits * i for i, code in enumerate(row))
        assert bytes(packed) == stream.to_bytes(width_bits(len(row), bits), "little")


def test_eight_bits_are_the_codes_themselves():
    codes_RC = torch.arange(-127, 128, dtype=torch.int8)[None]
    assert torch.equal(pack_bits(codes_RC, 8), codes_RC.view(torch.uint8))


def test_known_bytes():
    codes_RC = torch.zeros(1, 64, dtype=torch.int8)
    codes_RC[0, [0, 16, 32, 48, 1]] = torch.tensor([1, -1, 0, 1, -1], dtype=torch.int8)
    assert pack2(codes_RC)[0].tolist() == [0b10_01_00_10, 0b01_01_01_00, *[0b01_01_01_01] * 14]
    assert pack3(torch.tensor([[-1, 0, 1, 1, 1, -1]], dtype=torch.int8)).tolist() == [[237, 120]]
    assert pack_bits(torch.tensor([[1, -1, 7]], dtype=torch.int8), 4).tolist() == [[0xF1, 0x07]]
    assert pack_bits(torch.tensor([[-15, 1]], dtype=torch.int8), 5).tolist() == [[0b001_10001, 0]]


@ternary
def test_every_byte_is_either_refused_or_the_only_spelling(name):
    pack, unpack, width = TERNARY[name]
    columns = 64 if name == "2bit" else 5
    accepted = 0
    for value in range(256):
        packed_RP = torch.zeros(1, width(columns), dtype=torch.uint8)
        packed_RP[0, 0] = value
        try:
            codes_RC = unpack(packed_RP, columns)
        except ArtifactError:
            continue
        accepted += 1
        assert torch.equal(pack(codes_RC), packed_RP)
    assert accepted == (81 if name == "2bit" else 243)


@bitwise
def test_every_field_is_either_refused_or_the_only_spelling(bits):
    accepted = 0
    for value in range(2**bits):
        packed_RP = torch.tensor([list((value << bits).to_bytes(2 * bits // 8 + (bits % 4 > 0), "little"))])
        packed_RP = packed_RP.to(torch.uint8)
        try:
            codes_RC = unpack_bits(packed_RP, 2, bits)
        except ArtifactError as error:
            assert f"a code is {-(2 ** (bits - 1))}" in str(error)
            continue
        accepted += 1
        assert torch.equal(pack_bits(codes_RC, bits), packed_RP) and codes_RC[0, 0] == 0
    assert accepted == 2**bits - 1


@quick
@given(codes(), st.data())
def test_a_changed_byte_never_reads_as_the_same_codes(codes_RC, data):
    for pack, unpack, _ in TERNARY.values():
        packed_RP = pack(codes_RC)
        if not packed_RP.numel():
            continue
        at = data.draw(st.integers(0, packed_RP.numel() - 1))
        packed_RP.view(-1)[at] ^= data.draw(st.integers(1, 255))
        try:
            assert not torch.equal(unpack(packed_RP, codes_RC.shape[1]), codes_RC)
        except ArtifactError as error:
            assert str(error).startswith("packed codes: ")


@pytest.mark.parametrize(
    ("unpack", "row", "columns", "what"),
    [
        (unpack2, [0b11_01_01_01] + [0b01010101] * 15, 64, "a bit pair is 3"),
        (unpack2, [0b01_01_01_11] + [0b01010101] * 15, 64, "a bit pair is 3"),
        (unpack2, [0b01010101] * 15 + [0b10_01_01_01], 63, "the filling"),
        (unpack2, [0b01010101] * 16, 65, "16 bytes a row do not hold 65 columns; 32 bytes would"),
        (unpack2, [0b01010101] * 32, 64, "32 bytes a row do not hold 64 columns; 16 bytes would"),
        (unpack2, [0b01010101] * 15, 64, "15 bytes a row do not hold 64 columns; 16 bytes would"),
        (unpack3, [243], 5, "a byte is above 242"),
        (unpack3, [255, 121], 7, "a byte is above 242"),
        (unpack3, [121, 120 + 81], 9, "the filling"),
        (unpack3, [121], 6, "1 bytes a row do not hold 6 columns; 2 bytes would"),
        (unpack3, [121, 121], 5, "2 bytes a row do not hold 5 columns; 1 bytes would"),
        (lambda p, c: unpack_bits(p, c, 5), [0, 0b1000], 2, "the filling"),
        (lambda p, c: unpack_bits(p, c, 5), [0, 0b10000000], 2, "the filling"),
        (lambda p, c: unpack_bits(p, c, 4), [0x80], 2, "a code is -8"),
        (lambda p, c: unpack_bits(p, c, 8), [0x80], 1, "a code is -128"),
        (lambda p, c: unpack_bits(p, c, 6), [0, 0], 3, "2 bytes a row do not hold 3 columns; 3 bytes would"),
        (lambda p, c: unpack_bits(p, c, 6), [0], 0, "1 bytes a row do not hold 0 columns"),
        (unpack2, [], 0, "0 bytes a row do not hold 0 columns"),
        (unpack3, [], -5, "0 bytes a row do not hold -5 columns"),
    ],
)
def test_bytes_that_do_not_fit_are_refused(unpack, row, columns, what):
    whole = torch.tensor([row], dtype=torch.uint8)
    with pytest.raises(ArtifactError, match=f"^packed codes: {what}"):
        unpack(whole, columns)


@pytest.mark.parametrize(
    ("codes_RC", "what"),
    [
        (torch.tensor([[0, 2]], dtype=torch.int8), "codes: values from 0 to 2; give -1 to 1"),
        (torch.tensor([[-2, 1]]), "codes: values from -2 to 1; give -1 to 1"),
        (torch.tensor([[255]]), "codes: values from 255 to 255; give -1 to 1"),
        (torch.zeros(2, 2), "codes: torch.float32 of shape"),
        (torch.zeros(2, 2, dtype=torch.uint8), "codes: torch.uint8 of shape"),
        (torch.zeros(2, 2, dtype=torch.bool), "codes: torch.bool of shape"),
        (torch.zeros(2, dtype=torch.int8), "codes: torch.int8 of shape"),
        (torch.zeros(2, 0, dtype=torch.int8), "codes: torch.int8 of shape"),
    ],
)
def test_codes_that_are_none_are_refused(codes_RC, what):
    for pack in (pack2, pack3):
        with pytest.raises(ArtifactError, match=f"^{what}"):
            pack(codes_RC)


@bitwise
def test_codes_beyond_their_bits_are_refused(bits):
    top = top_of(bits)
    for bad in (top + 1, -top - 1):
        with pytest.raises(ArtifactError, match=f"^codes: values from .* give -{top} to {top}"):
            pack_bits(torch.tensor([[0, bad]]), bits)
    with pytest.raises(ArtifactError, match="^codes: torch.float32"):
        pack_bits(torch.zeros(1, 1), bits)


@pytest.mark.parametrize("bits", [0, 3, 9])
def test_only_four_to_eight_bits_are_packed(bits):
    for call in (
        lambda: pack_bits(torch.zeros(1, 1, dtype=torch.int8), bits),
        lambda: unpack_bits(torch.zeros(1, 1, dtype=torch.uint8), 1, bits),
    ):
        with pytest.raises(ArtifactError, match=f"^bits: {bits} bits refused"):
            call()


def test_packed_codes_are_bytes_in_rows():
    for packed in (torch.zeros(1, 16), torch.zeros(1, 16, dtype=torch.int8), torch.zeros(16, dtype=torch.uint8)):
        for unpack in (unpack2, unpack3, lambda p, c: unpack_bits(p, c, 4)):
            with pytest.raises(ArtifactError, match="^packed codes: torch"):
                unpack(packed, 16)


def test_strided_views_are_packed_like_copies():
    codes_RC = torch.randint(-1, 2, (70, 9), generator=torch.Generator().manual_seed(3)).to(torch.int8)
    for pack, unpack, _ in TERNARY.values():
        assert torch.equal(pack(codes_RC.T), pack(codes_RC.T.contiguous()))
        packed_RP = pack(codes_RC)
        assert torch.equal(unpack(packed_RP.T.contiguous().T, 9), codes_RC)
    assert torch.equal(unpack_bits(pack_bits(codes_RC.T, 5), 70, 5), codes_RC.T)
