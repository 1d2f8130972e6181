"""Dense little-endian bit streams, the layout under every checkpoint format."""

from __future__ import annotations

import numpy as np

__all__ = ["pack_rows", "unpack_rows"]


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack each row of unsigned codes: element i at bits [i*b, i*b+b), least significant first.

    Returns
    -------
    packed : ndarray of uint32, shape (rows, ceil(columns * bits / 32))
    """
    rows, columns = codes.shape
    stream = np.zeros((rows, -(-columns * bits // 32) * 32), np.uint8)
    for b in range(bits):
        stream[:, b : columns * bits : bits] = (codes >> b) & 1
    return np.packbits(stream, axis=1, bitorder="little").view("<u4")


def unpack_rows(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Return the codes of packed rows."""
    stream = np.unpackbits(
        np.ascontiguousarray(packed, "<u4").view(np.uint8), axis=1, bitorder="little"
    )
    codes = np.zeros((len(packed), columns), np.uint8)
    for b in range(bits):
        codes |= stream[:, b : columns * bits : bits] << b
    return codes
