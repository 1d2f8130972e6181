"""Multiply int8 codes, with int32 accumulation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import ptqkit._core as _core
from ptqkit.arrays._inputs import F32, check_threads
from ptqkit.arrays.activations import QuantizedActivations, SignedGrid
from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.arrays.packed import PackedMatrix

__all__ = ["PackedInt8", "int8_matmul"]

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


@dataclass(frozen=True)
class PackedInt8:
    """A packed weight of 8 bits with one grid per output, for products with quantized inputs.

    Attributes
    ----------
    words : ndarray of uint32, shape (panels, words, 16)
        Of :class:`ptqkit.PackedMatrix`; not copied.
    sums : ndarray of int32, shape (out,)
        Of each output's codes less 128.
    scales, zeros : ndarray of float32, shape (out,)
    inputs : int
    """

    words: np.ndarray
    sums: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    inputs: int

    @classmethod
    def of(cls, matrix: PackedMatrix) -> PackedInt8:
        """View a packed matrix.

        Raises
        ------
        ValueError
            If it has other bits or several groups, or is too wide for 32-bit sums.
        """
        inputs = matrix.shape[1]
        if matrix.bits != 8 or matrix.groups != 1:
            raise ValueError("integer products take 8 bits and one grid per output")
        if inputs > LONGEST_SUM:
            raise ValueError(f"{inputs} inputs: more than {LONGEST_SUM} products can leave int32")
        codes, scales, zeros, _ = matrix.unpack()
        sums = codes.sum(axis=1, dtype=np.int64) - 128 * inputs
        return cls(
            matrix.words,
            sums.astype(np.int32),
            np.ascontiguousarray(scales[:, 0]),
            zeros[:, 0].astype(np.float32),
            inputs,
        )

    def matmul(
        self,
        X: np.ndarray,
        *,
        bits: int = 8,
        symmetric: bool = True,
        scale: float | None = None,
        zero_point: int = 0,
        bias: np.ndarray | None = None,
        out: np.ndarray | None = None,
        threads: int = 0,
    ) -> np.ndarray:
        """Quantize inputs on the way and multiply: exact integer sums, one rounding.

        The codes are those of :func:`quantize_activations` with the same options.

        Parameters
        ----------
        X : ndarray of float32, shape (tokens, in)
        bits : int from 2 to 8
        symmetric : bool
        scale, zero_point : number, optional
            One grid for all tokens; None: each token has its own.
        bias : ndarray of float32, shape (out,), optional
        out : ndarray of float32, shape (tokens, out), optional
            Written and returned.
        threads : int
            0 means automatic. The result does not depend on it.

        Raises
        ------
        FloatingPointError
            If X holds NaN or Inf.
        """
        if X.ndim != 2 or X.dtype != np.float32 or X.shape[1] != self.inputs:
            raise ValueError(f"X must be float32 of shape (tokens, {self.inputs})")
        if out is None:
            out = np.empty((len(X), len(self.scales)), np.float32)
        static = scale is not None
        _core.int8_linear(
            X,
            F32,
            SignedGrid(bits, symmetric, False),
            np.array([scale], np.float32) if static else None,
            np.array([zero_point], np.int8) if static else None,
            self.words,
            self.sums,
            self.scales,
            self.zeros,
            bias,
            out,
            check_threads(threads),
        )
        return out
