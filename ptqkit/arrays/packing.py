"""Codes as dense bit streams, the layout under every checkpoint format, and ptqkit's own rows."""

from __future__ import annotations

import numpy as np

import ptqkit._core as _core
from ptqkit.arrays._inputs import check_count, check_threads

__all__ = ["native_pack", "native_row_bytes", "native_unpack", "pack_rows", "unpack_rows"]

TRITS_PER_BYTE = 5
_TRIT_WEIGHTS = 3 ** np.arange(TRITS_PER_BYTE)


def _check_bits(bits: int) -> int:
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)) or not 1 <= bits <= 8:
        raise ValueError(f"bits must be an integer from 1 to 8, not {bits!r}")
    return int(bits)


def pack_rows(codes: np.ndarray, bits: int, *, threads: int = 0) -> np.ndarray:
    """Pack each row of unsigned codes into 32-bit words.

    Element i of a row occupies bits ``[i*bits, (i+1)*bits)`` of its stream, least significant
    first, and may cross a word boundary (compressed-tensors and GPTQ use this stream).

    Parameters
    ----------
    codes : array of unsigned integers below ``2**bits``, shape (rows, columns)
    bits : int, 1 to 8

    Returns
    -------
    ndarray of uint32, shape (rows, ceil(columns * bits / 32))
    """
    bits = _check_bits(bits)
    codes = np.asarray(codes)
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError("codes must be a 2-D array of integers")
    if codes.size and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(f"codes must lie in [0, {(1 << bits) - 1}] to fit {bits} bits")
    codes = np.ascontiguousarray(codes, np.uint8)
    words = np.zeros((codes.shape[0], -(-codes.shape[1] * bits // 32)), np.uint32)
    _core.pack(codes, bits, words, check_threads(threads))
    return words


def unpack_rows(packed: np.ndarray, bits: int, columns: int, *, threads: int = 0) -> np.ndarray:
    """Return the codes of packed rows: the inverse of :func:`pack_rows`.

    Returns
    -------
    ndarray of uint8, shape (rows, columns)
    """
    bits = _check_bits(bits)
    columns = check_count(columns, "columns", 0, 1 << 40)
    packed = np.asarray(packed)
    if packed.ndim != 2 or packed.dtype.itemsize != 4 or packed.dtype.kind not in "iu":
        raise ValueError("packed must be a 2-D array of 32-bit integers")
    words = -(-columns * bits // 32)
    if packed.shape[1] != words:
        raise ValueError(
            f"packed rows hold {packed.shape[1]} words, but {columns} codes of {bits} bits "
            f"need {words}"
        )
    native = packed.dtype.newbyteorder("=")
    packed = np.ascontiguousarray(packed, native).view(np.uint32)
    codes = np.empty((packed.shape[0], columns), np.uint8)
    _core.unpack(codes, bits, packed, check_threads(threads))
    return codes


def native_row_bytes(columns: int, bits: int | str) -> int:
    """Bytes of one packed row of ``columns`` codes in ptqkit's own checkpoint format."""
    if bits == "ternary":
        return -(-columns // TRITS_PER_BYTE)
    return int(bits) * -(-columns // 8)


def _pad_columns(codes: np.ndarray, multiple: int) -> np.ndarray:
    extra = -codes.shape[1] % multiple
    return np.pad(codes, ((0, 0), (0, extra))) if extra else codes


def native_pack(codes: np.ndarray, bits: int | str) -> np.ndarray:
    """Pack the rows of a matrix of codes as ptqkit's own checkpoint format stores them.

    Rows are padded to whole bytes of five ternary digits, or to whole blocks of eight codes
    (``bits`` bytes), so that a reader can unpack by strides alone.

    Parameters
    ----------
    codes : array of unsigned integers below ``2**bits`` (3 if ternary), shape (rows, columns)
    bits : int from 1 to 8, or "ternary"

    Returns
    -------
    ndarray of uint8, shape (rows, native_row_bytes(columns, bits))
    """
    if bits == "ternary":
        digits = _pad_columns(codes, TRITS_PER_BYTE)
        digits = digits.reshape(len(codes), digits.shape[1] // TRITS_PER_BYTE, TRITS_PER_BYTE)
        packed = np.zeros(digits.shape[:2], dtype=np.uint8)
        for place, weight in enumerate(_TRIT_WEIGHTS):
            packed += digits[:, :, place] * np.uint8(weight)
        return packed
    padded = np.ascontiguousarray(_pad_columns(codes, 8), dtype=np.uint8)
    words = pack_rows(padded, int(bits)).astype("<u4", copy=False)
    stream = np.ascontiguousarray(words).view(np.uint8)
    return np.ascontiguousarray(stream[:, : native_row_bytes(codes.shape[1], bits)])


def native_unpack(packed: np.ndarray, bits: int | str, columns: int) -> np.ndarray:
    """Inverse of :func:`native_pack`.

    Returns
    -------
    ndarray of uint8, shape (rows, columns)

    Raises
    ------
    ValueError
        If the rows do not have the length that so many codes need.
    """
    if packed.shape[1] != native_row_bytes(columns, bits):
        raise ValueError(
            f"packed rows of {columns} codes ({bits} bits) have {native_row_bytes(columns, bits)} "
            f"bytes, not {packed.shape[1]}"
        )
    if bits == "ternary":
        digits = packed[:, :, None] // _TRIT_WEIGHTS.astype(np.uint8) % np.uint8(3)
        return np.ascontiguousarray(digits.reshape(len(packed), -1)[:, :columns])
    stream = np.ascontiguousarray(np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4))))
    words = stream.view("<u4").astype(np.uint32, copy=False)
    whole = 8 * -(-columns // 8)
    return np.ascontiguousarray(unpack_rows(words, int(bits), whole)[:, :columns])
