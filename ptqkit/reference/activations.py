"""Integer grids of activations, the outlier split, integer products and bias correction.

Unlike the codes of weights these are signed, as compressed-tensors stores them. Grids and codes
take the type to compute in: float64 for an oracle, float32 for the very bits of the core.
"""

from __future__ import annotations

import numpy as np

from ptqkit.reference.grids import to_bfloat16

__all__ = [
    "bias_correction",
    "code_limits",
    "dequantize_activations",
    "int8_linear",
    "integer_matmul",
    "outlier_columns",
    "quantize_activations",
    "quantize_activations_bf16",
    "signed_grid",
]

# Scale of an all-zero range, any positive number: what compressed-tensors takes for float32.
ZERO_RANGE_SCALE = 2.0**-23


def code_limits(bits: int, narrow_range: bool = False) -> tuple[int, int]:
    """Return the smallest and largest code: -2^(b-1) and 2^(b-1) - 1; narrow: of one size."""
    top = (1 << (bits - 1)) - 1
    return (-top if narrow_range else -top - 1), top


def signed_grid(low, high, *, bits=8, symmetric=True, narrow_range=False, dtype=np.float64):
    """Return scale and zero-point of the range [low, high], elementwise.

    Symmetric: s = max|x| / ((2^b - 1) / 2), or max|x| / (2^(b-1) - 1) when narrow [IPQS].
    Asymmetric: s = (high - low) / (2^b - 1), z = clamp(round(-2^(b-1) - low / s)). A range holds 0.

    Returns
    -------
    scale : ndarray of ``dtype``
    zero : ndarray of int64
    """
    low = np.minimum(np.asarray(low, dtype), dtype(0))
    high = np.maximum(np.asarray(high, dtype), dtype(0))
    smallest, largest = code_limits(bits, narrow_range)
    if symmetric:
        scale = np.maximum(-low, high) / dtype((largest - smallest) / 2)
    else:
        scale = (high - low) / dtype(largest - smallest)
    empty = scale == 0
    scale = np.where(empty, dtype(ZERO_RANGE_SCALE), scale)
    if symmetric:
        return scale, np.zeros(scale.shape, np.int64)
    zero = np.rint(np.clip(dtype(smallest) - low / scale, smallest, largest))
    return scale, np.where(empty, 0, zero).astype(np.int64)


def quantize_activations_bf16(X, *, bits=8, symmetric=True, scale=None, zero_point=0):
    """Return what :func:`quantize_activations` does, by token, each step rounded to bfloat16.

    That is PyTorch's arithmetic in this dtype: an operation in float32, its result rounded.
    """
    X, r = np.asarray(X, np.float32), to_bfloat16
    smallest, largest = (np.float32(v) for v in code_limits(bits))
    with np.errstate(all="ignore"):
        if scale is None:
            low = np.minimum(X.min(axis=1, keepdims=True), np.float32(0))
            high = np.maximum(X.max(axis=1, keepdims=True), np.float32(0))
            if symmetric:
                scale = r(np.maximum(-low, high) / ((largest - smallest) / 2))
                zero = np.zeros((1, 1), np.float32)
            else:
                scale = r(r(high - low) / (largest - smallest))
                zero = r(smallest - r(low / scale))
                zero = np.nan_to_num(np.rint(np.clip(zero, smallest, largest)), nan=0.0)
            zero = np.broadcast_to(zero, scale.shape)
            scale = np.where(scale == 0, np.float32(2.0**-7), scale)
        else:
            scale, zero = (
                np.full((1, 1), scale, np.float32),
                np.full((1, 1), zero_point, np.float32),
            )
        steps = r(r(X / scale) + zero)
    codes = np.rint(np.clip(steps, smallest, largest)).astype(np.int64)
    return codes, scale, zero.astype(np.int64)


def quantize_activations(
    X,
    *,
    bits=8,
    granularity="token",
    symmetric=True,
    narrow_range=False,
    scale=None,
    zero_point=None,
    outliers=None,
    dtype=np.float64,
):
    """Return code = clamp(round(x / s + z)), ties to even; X (tokens, channels).

    Columns with ``outliers`` true do not take part in the range and get the code of 0.

    Returns
    -------
    codes : ndarray of int64, shape (tokens, channels)
    scales, zero_points : ndarray, shape (tokens, 1), or (1, 1) for granularity "tensor"
    """
    X = np.array(X, dtype)
    if outliers is not None:
        X[:, outliers] = 0
    if scale is None:
        axis = 1 if granularity == "token" else None
        low = X.min(axis=axis, keepdims=True, initial=0)
        high = X.max(axis=axis, keepdims=True, initial=0)
        scale, zero_point = signed_grid(
            low, high, bits=bits, symmetric=symmetric, narrow_range=narrow_range, dtype=dtype
        )
    else:
        scale = np.full((1, 1), scale, dtype)
        zero_point = np.full((1, 1), zero_point or 0, np.int64)
    with np.errstate(over="ignore"):
        steps = X / scale + zero_point.astype(dtype)
    codes = np.rint(np.clip(steps, *code_limits(bits, narrow_range))).astype(np.int64)
    return codes, scale, zero_point


def dequantize_activations(codes, scales, zero_points, dtype=np.float64):
    """Return s * (code - z), with broadcasting."""
    steps = np.asarray(codes, np.int64) - np.asarray(zero_points, np.int64)
    return steps.astype(dtype) * np.asarray(scales, dtype)


def outlier_columns(X, threshold=6.0):
    """Return the columns with an |x| >= threshold; X (tokens, channels)."""
    return (np.abs(np.asarray(X, np.float64)) >= threshold).any(axis=0)


def integer_matmul(qx, zx, sx, qw, zw, sw):
    """Return s_x * s_w * sum_k (qx - zx)(qw - zw), the sum in int64; qx (tokens, in), qw (out, in).

    zx, sx (tokens, 1); zw, sw (out, 1). Vector-wise int8 [IPQS].
    """
    x = np.asarray(qx, np.int64) - np.asarray(zx, np.int64)
    w = np.asarray(qw, np.int64) - np.asarray(zw, np.int64)
    product = (x @ w.T).astype(np.float64)
    return product * np.asarray(sx, np.float64) * np.asarray(sw, np.float64).T


def int8_linear(X, codes, scales, zeros, *, bias=None, dtype=np.float64, **grid):
    """Return quantized X times W^T, plus the bias, W = scales * (codes - zeros) [IPQS].

    X (tokens, in); codes (out, in) from 0 to 255; scales, zeros (out,) or (1,); bias (out,); grid:
    as in :func:`quantize_activations`, whose grids are computed in ``dtype``.
    """
    qx, sx, zx = quantize_activations(X, dtype=dtype, **grid)
    zeros, scales = np.reshape(zeros, (-1, 1)), np.reshape(scales, (-1, 1))
    product = integer_matmul(qx, zx, sx, codes, zeros, scales)
    return product if bias is None else product + np.asarray(bias, np.float64)


def bias_correction(W, W_hat, mean):
    """Return (W_hat - W) E[x], to be subtracted from the bias [AWEQ, equations 11 to 15]."""
    return (np.asarray(W_hat, np.float64) - np.asarray(W, np.float64)) @ np.asarray(mean)
