"""Multiply int8 codes, with int32 accumulation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

import ptqkit._core as _core
from ptqkit.arrays._inputs import as_tokens, check_count, check_number, check_threads
from ptqkit.arrays.activations import QuantizedActivations, _signed_grid
from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.arrays.packed import LANES

__all__ = ["int8_linear", "int8_matmul", "pack_int8"]

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
    _check_inputs(n)
    tokens, lead = x.codes.size // n, x.shape[:-1]
    y = np.empty((tokens, len(w.codes)), np.float32)
    x_codes, x_scales, x_zeros = _arrays(x)
    w_codes, w_scales, w_zeros = _arrays(w)
    X, W = _float_columns(x, w) or (None, None)
    _core.int8_matmul(x_codes, x_scales, x_zeros, w_codes, w_scales, w_zeros, X, W, y, threads)
    return y.reshape(*lead, len(w.codes))


QUAD = 4  # inputs of a 32-bit word


def pack_int8(codes: Any, *, threads: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return 8-bit codes of weights in the order in which :func:`int8_linear` reads them.

    Parameters
    ----------
    codes : ndarray of uint8, or of int8 (to which 128 is added), shape (out, in)
    threads : int
        0 means automatic.

    Returns
    -------
    words : ndarray of uint32, shape (ceil(out / 16), ceil(in / 4), 16)
        Four codes of one output in a word; outputs and inputs beyond the last have code 0.
    sums : ndarray of int32, shape (out,)
        Of each output's codes less 128, for activations with zero-points.

    Raises
    ------
    TypeError, ValueError
        Codes of another type or shape, or sums that could leave int32.
    """
    codes = np.ascontiguousarray(codes)
    if codes.dtype not in (np.uint8, np.int8) or codes.ndim != 2:
        raise TypeError("codes must be an array of uint8 or int8 of shape (out, in)")
    outputs, n = codes.shape
    _check_inputs(n)
    words = np.empty((-(-outputs // LANES), -(-n // QUAD), LANES), np.uint32)
    sums = np.empty(outputs, np.int32)
    _core.int8_pack(codes, words, sums, check_threads(threads))
    return words, sums


def int8_linear(
    x: Any,
    words: np.ndarray,
    w_scales: np.ndarray,
    w_zeros: np.ndarray,
    *,
    sums: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    outputs: int | None = None,
    bits: int = 8,
    symmetric: bool = True,
    narrow_range: bool = False,
    scale: float | None = None,
    zero_point: int = 0,
    arithmetic: str = "float32",
    threads: int = 0,
) -> np.ndarray:
    """Return x W^T + bias, x quantized on the way and W packed, with exact integer sums [IPQS].

    The same numbers as :func:`int8_matmul` of ``quantize_activations(x, bits, ...)`` gives, plus
    the bias; one rounding to float32.

    Parameters
    ----------
    x : array or torch tensor, shape (..., in)
        float32, float16 or bfloat16 (tensor).
    words : ndarray of uint32, shape (ceil(out / 16), ceil(in / 4), 16)
        Of :func:`pack_int8`.
    w_scales, w_zeros : ndarray of float32, shape (out,) or (1,)
        W = scale * (code - zero) with codes from 0 to 255.
    sums : ndarray of int32, shape (out,), optional
        Of :func:`pack_int8`: saves a pass over W if the activations have zero-points.
    bias : ndarray of float32, shape (out,), optional
    outputs : int, optional
        None: as many as scales, or all that the panels have room for if there is one scale.
    bits : int from 2 to 8
    symmetric, narrow_range
        Grids of the activations, as in ``quantize_activations``; one is fitted to each token.
    scale, zero_point : number, optional
        One static grid instead.
    arithmetic : {"float32", "bfloat16"}
        Of the grids and codes of the activations, as in ``quantize_activations``.
    threads : int
        0 means automatic. The result does not depend on it.

    Returns
    -------
    ndarray of float32, shape (..., out)

    Raises
    ------
    TypeError, ValueError
        Shapes or types that do not fit, more than 8 bits, NaN or Inf in x.
    """
    grid = _signed_grid(bits, symmetric, narrow_range, arithmetic)
    if grid.bits > 8:
        raise ValueError(f"an int8 product takes at most 8 bits, not {grid.bits}")
    X, dtype, shape = as_tokens(x)
    _check_inputs(shape[-1])
    x_scales = x_zeros = None
    if scale is not None:
        scale = check_number(scale, "scale")
        if not scale > 0:
            raise ValueError(f"scale must be above 0, not {scale}")
        x_scales = np.array([scale], np.float32)
        x_zeros = np.array([zero_point], np.int8)
    if outputs is None:
        outputs = len(w_scales) if len(w_scales) > 1 else len(words) * LANES
    outputs = check_count(outputs, "outputs", 1, len(words) * LANES)
    y = np.empty((len(X), outputs), np.float32)
    threads = check_threads(threads)
    try:
        _core.int8_linear(
            X, dtype, grid, x_scales, x_zeros, words, sums, w_scales, w_zeros, bias, y, threads
        )
    except FloatingPointError:
        raise ValueError("x holds NaN or Inf, or the range of a token overflows") from None
    return y.reshape(*shape[:-1], outputs)


def _check_inputs(n: int) -> None:
    if n > LONGEST_SUM:
        raise ValueError(f"{n} inputs: more than {LONGEST_SUM} products can leave int32")


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
