"""Products of packed weights: the layout of their words, and both ways of computing."""

from __future__ import annotations

import numpy as np

__all__ = ["packed_matmul", "packed_matmul_int8", "word_codes"]

LANES, QUAD = 16, 4


def word_codes(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes of panels of words, as they lie: byte b of a word belongs to input b of 4.

    Parameters
    ----------
    words : ndarray of uint32, shape (panels, lane words, 16)
    bits : 2, 3, 4 or 8

    Returns
    -------
    codes : ndarray of uint8, shape (panels * 16, places)
    """
    panels = len(words)
    lanes = words.transpose(0, 2, 1).reshape(panels * LANES, -1)  # (outputs, lane words)
    data = np.ascontiguousarray(lanes, "<u4").view(np.uint8).reshape(*lanes.shape, QUAD)
    if bits != 3:
        quads = [(data >> bits * q) & ((1 << bits) - 1) for q in range(8 // bits)]
        return np.stack(quads, axis=2).reshape(len(lanes), -1)
    triples = data.reshape(len(lanes), -1, 3, QUAD)
    quads = [
        (triples[:, :, q // 4] >> 2 * (q % 4)) & 3 | ((triples[:, :, 2] >> q) & 1) << 2
        for q in range(8)
    ]
    return np.stack(quads, axis=2).reshape(len(lanes), -1)


def packed_matmul(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, g_idx: np.ndarray, x: np.ndarray
) -> np.ndarray:
    """Return x w^T for w = scale * (code - zero) in float64.

    Parameters
    ----------
    codes : (out, in); scales, zeros : (out, groups); g_idx : (in,); x : (tokens, in)

    Returns
    -------
    ndarray of float64, shape (tokens, out)
    """
    steps = codes.astype(np.float64) - zeros.astype(np.float64)[:, g_idx]
    return x.astype(np.float64) @ (steps * scales.astype(np.float64)[:, g_idx]).T


def packed_matmul_int8(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, g_idx: np.ndarray, x: np.ndarray
) -> np.ndarray:
    """Return the same with x rounded to int8 per token and group: integers in int64.

    The float32 operations on each group's integer are those of the core, in its order.

    Returns
    -------
    ndarray of float32, shape (tokens, out)
    """
    total = np.zeros((len(x), len(codes)), np.float32)
    for g in range(scales.shape[1]):
        inputs = g_idx == g
        part = x[:, inputs].astype(np.float32)
        largest = np.abs(part).max(axis=1, initial=0.0)
        step = np.maximum(largest / np.float32(127), np.float32(2.0**-126))
        quantized = np.rint(part / step[:, None]).astype(np.int64)
        differences = codes[:, inputs].astype(np.int64) - zeros[:, g, None].astype(np.int64)
        integer = (quantized @ differences.T).astype(np.float32)
        total += integer * (scales[:, g].astype(np.float32) * step[:, None])
    return total
