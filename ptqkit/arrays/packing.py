"""Pack codes into dense bit streams: the layout below every checkpoint format."""

from __future__ import annotations

import numpy as np

import ptqkit._core as _core
from ptqkit.arrays._inputs import check_count, check_threads

__all__ = ["pack_rows", "unpack_rows"]


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
