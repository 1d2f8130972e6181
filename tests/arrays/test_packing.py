"""Dense little-endian bit streams."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ptqkit
import ptqkit.reference as reference
from ptqkit.arrays.packing import pack_rows, unpack_rows


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 70), st.integers(0, 70), st.integers(0, 2**32 - 1))
def test_round_trip_and_twin(bits, rows, columns, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    packed = pack_rows(codes, bits)
    assert packed.dtype == np.uint32 and packed.shape == (rows, -(-columns * bits // 32))
    if rows and columns:
        np.testing.assert_array_equal(packed, reference.pack_rows(codes, bits))
        np.testing.assert_array_equal(reference.unpack_rows(packed, bits, columns), codes)
    np.testing.assert_array_equal(unpack_rows(packed, bits, columns), codes)
    np.testing.assert_array_equal(pack_rows(codes, bits, threads=3), packed)


def test_golden_words():
    codes = np.arange(16, dtype=np.uint8)[None]
    np.testing.assert_array_equal(pack_rows(codes, 4), [[0x76543210, 0xFEDCBA98]])
    np.testing.assert_array_equal(pack_rows(codes, 8)[0, :2], [0x03020100, 0x07060504])
    # eleven 3-bit codes cross the first word: bit 32 is the high bit of code 10
    codes = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 6]], np.uint8)
    value = sum(int(c) << 3 * i for i, c in enumerate(codes[0]))
    np.testing.assert_array_equal(pack_rows(codes, 3), [[value & 0xFFFFFFFF, value >> 32]])


@pytest.mark.parametrize("bits", range(1, 9))
def test_unused_bits_are_zero_and_ignored(bits):
    codes = np.full((3, 5), (1 << bits) - 1, np.uint8)
    packed = pack_rows(codes, bits)
    used = 5 * bits
    assert int(packed[0, -1]) >> (used - 32 * (packed.shape[1] - 1)) == 0 or used % 32 == 0
    dirty = packed.copy()
    if used % 32:
        dirty[:, -1] |= np.uint32((0xFFFFFFFF << (used % 32)) & 0xFFFFFFFF)
    np.testing.assert_array_equal(unpack_rows(dirty, bits, 5), codes)


def test_layouts_and_integer_types():
    codes = np.random.default_rng(0).integers(0, 8, (20, 33), dtype=np.uint8)
    packed = pack_rows(codes, 3)
    for other in (np.asfortranarray(codes), codes.astype(np.int64), codes.astype(">i4")):
        np.testing.assert_array_equal(pack_rows(other, 3), packed)
    wide = np.repeat(packed, 2, axis=1)
    for other in (packed.view(np.int32), packed.astype(">u4"), wide[:, ::2]):
        np.testing.assert_array_equal(unpack_rows(other, 3, 33), codes)


@pytest.mark.parametrize("bits", [0, 9, -1, 4.0, True, None, "4"])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match="bits must be an integer from 1 to 8"):
        pack_rows(np.zeros((1, 4), np.uint8), bits)
    with pytest.raises(ValueError, match="bits must be an integer from 1 to 8"):
        unpack_rows(np.zeros((1, 4), np.uint32), bits, 4)


PACK_ERRORS = {
    "too large": (np.full((1, 4), 8, np.uint8), "codes must lie in"),
    "negative": (np.full((1, 4), -1), "codes must lie in"),
    "wraps": (np.full((1, 4), 256 + 3), "codes must lie in"),
    "float": (np.zeros((1, 4)), "codes must be a 2-D array of integers"),
    "1-D": (np.zeros(4, np.uint8), "codes must be a 2-D array of integers"),
}


@pytest.mark.parametrize("case", PACK_ERRORS)
def test_bad_codes(case):
    codes, message = PACK_ERRORS[case]
    with pytest.raises(ValueError, match=message):
        pack_rows(codes, 3)


UNPACK_ERRORS = {
    "words": (np.zeros((1, 3), np.uint32), 8, ValueError, "packed rows hold 3 words"),
    "width": (np.zeros((1, 1), np.uint64), 8, ValueError, "packed must be"),
    "float": (np.zeros((1, 1), np.float32), 8, ValueError, "packed must be"),
    "1-D": (np.zeros(1, np.uint32), 8, ValueError, "packed must be"),
    "negative": (np.zeros((1, 0), np.uint32), -1, ValueError, "columns must lie in"),
    "columns": (np.zeros((1, 1), np.uint32), 7.5, TypeError, "columns must be an integer"),
}


@pytest.mark.parametrize("case", UNPACK_ERRORS)
def test_bad_words(case):
    packed, columns, error, message = UNPACK_ERRORS[case]
    with pytest.raises(error, match=message):
        unpack_rows(packed, 4, columns)


def test_module_is_reached_from_the_package():
    assert ptqkit.pack_rows is pack_rows
