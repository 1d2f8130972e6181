"""Multiply int8 codes, with int32 accumulation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

import ptqkit._core as _core
from ptqkit.arrays._inputs import check_threads
from ptqkit.arrays.activations import QuantizedActivations
from ptqkit.arrays.matrix import QuantizedMatrix

__all__ = ["int8_matmul"]

# Longest sum of products of two int8 codes that surely fits 32 bits.
LONGEST_SUM = (2**31 - 1) // 2**14


def _int8_operand(q: Any, what: str) -> QuantizedActivations:
    """Check one factor of a product; a weight matrix of one grid per output becomes signed."""
    if isinstance(q, QuantizedMatrix) and what == "qw":
        if q.scales.shape[1] != 1 or q.bits == "ternary":
            raise ValueError(f"{what} must have one grid per output (group_size=None), 2 to 8 bits")
        middle = 1 << (int(q.bits) - 1)
        codes, zeros = (
            (a.astype(np.int16) - middle).astype(np.int8) for a in (q.codes, q.zero_points)
        )
        return QuantizedActivations(codes, q.scales, zeros, int(q.bits), "token", q.symmetric)
    if not isinstance(q, QuantizedActivations):
        raise TypeError(
            f"{what} must be the result of quantize_activations, not {type(q).__name__}"
        )
    if q.bits > 8:
        raise ValueError(f"{what} has {q.bits} bits; an int8 product takes at most 8")
    return q


def int8_matmul(
    qx: QuantizedActivations, qw: QuantizedActivations | QuantizedMatrix, *, threads: int = 0
) -> np.ndarray:
    """Return X W^T from integer codes, accumulated in int32, times ``s_x * s_w`` [IPQS].

    Zero-points are subtracted exactly, with row sums; the one rounding is that of the result to
    float32. Columns that are outliers on either side are multiplied in float32 and added;
    [LLM.int8()] gives both sides the same ``outliers``.

    Parameters
    ----------
    qx : QuantizedActivations, shape (..., in), at most 8 bits
    qw : QuantizedActivations, shape (out, in), or QuantizedMatrix with one grid per output
        ``quantize_activations(W)``: granularity "token" is one grid per output.
    threads : int
        0 means automatic. The result does not depend on it.

    Returns
    -------
    ndarray of float32, shape (..., out)

    Raises
    ------
    TypeError, ValueError
        More than 8 bits, shapes that do not fit, or sums that could leave int32.
    """
    threads = check_threads(threads)
    x, w = _int8_operand(qx, "qx"), _int8_operand(qw, "qw")
    if len(w.shape) != 2:
        raise ValueError(f"qw must have shape (out, in), not {w.shape}")
    n = w.shape[1]
    if x.shape[-1] != n:
        raise ValueError(f"qx has {x.shape[-1]} channels, but qw has {n} inputs")
    if n > LONGEST_SUM:
        raise ValueError(f"{n} inputs: more than {LONGEST_SUM} products can leave int32")
    tokens, lead = x.codes.size // n, x.shape[:-1]
    y = np.empty((tokens, len(w.codes)), np.float32)
    x_codes, x_scales, x_zeros = _arrays(x)
    w_codes, w_scales, w_zeros = _arrays(w)
    X, W = _float_columns(x, w) or (None, None)
    _core.int8_matmul(x_codes, x_scales, x_zeros, w_codes, w_scales, w_zeros, X, W, y, threads)
    return y.reshape(*lead, len(w.codes))


def _arrays(q: QuantizedActivations) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes (rows, in), scales and zero-points (rows,) or (1,)."""
    codes = np.ascontiguousarray(q.codes.reshape(-1, q.shape[-1]))
    return codes, q.scales.reshape(-1), q.zero_points.reshape(-1)


def _float_columns(
    x: QuantizedActivations, w: QuantizedActivations
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the factors (tokens, columns) and (columns, out) of the columns that are outliers."""
    masks = [q.outliers for q in (x, w) if q.outliers is not None]
    if not masks:
        return None
    columns = np.logical_or.reduce(masks)
    X, W = (_dequantized(q, columns) for q in (x, w))
    return X, np.ascontiguousarray(W.T)


def _dequantized(q: QuantizedActivations, columns: np.ndarray) -> np.ndarray:
    """Return some columns, all outliers among them, as float32 (rows, columns)."""
    outliers = None if q.outliers is None else q.outliers[columns]
    part = replace(q, codes=q.codes[..., columns], outliers=outliers)
    return np.ascontiguousarray(part.dequantize().reshape(-1, int(columns.sum())))
