"""Quantize activations to integer codes per token or per tensor, without outlier columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import ptqkit._core as _core
from ptqkit._repr import one_line_repr
from ptqkit.arrays._inputs import (
    BF16,
    as_array,
    as_extreme,
    as_tokens,
    check_count,
    check_number,
    check_threads,
    widen,
)
from ptqkit.errors import check_choice

__all__ = [
    "QuantizedActivations",
    "activation_grid",
    "outlier_columns",
    "quantize_activations",
]

GRANULARITIES = ("token", "tensor")


@dataclass(frozen=True)
class QuantizedActivations:
    """Activations on signed uniform grids: ``x = scale * (code - zero_point)``.

    Attributes
    ----------
    codes : ndarray of int8 (int16 above 8 bits), shape (..., channels)
        In ``[-2**(bits-1), 2**(bits-1) - 1]``; ``narrow_range``: without the smallest one. Outlier
        columns hold the code of 0.
    scales : ndarray of float32, shape (..., 1), or (1,) for granularity "tensor"
    zero_points : ndarray like ``codes``, shape of ``scales``
        0 if symmetric.
    bits : int
    granularity : {"token", "tensor"}
    symmetric, narrow_range : bool
    outliers : ndarray of bool, shape (channels,), or None
        Columns that are not quantized.
    outlier_values : ndarray of float32, shape (..., number of outliers), or None
        Those columns, exactly as they were before.
    """

    __repr__ = one_line_repr

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    bits: int
    granularity: str
    symmetric: bool
    narrow_range: bool = False
    outliers: np.ndarray | None = None
    outlier_values: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the activations, (..., channels)."""
        return self.codes.shape

    def dequantize(self, dtype: np.dtype | type = np.float32) -> np.ndarray:
        """Return ``scale * (code - zero_point)``, shape (..., channels), outliers as they were."""
        values = (self.codes.astype(np.int32) - self.zero_points).astype(dtype)
        values *= self.scales.astype(dtype, copy=False)
        if self.outliers is not None:
            values[..., self.outliers] = self.outlier_values
        return values


def activation_grid(
    minimum: Any,
    maximum: Any,
    *,
    bits: int = 8,
    symmetric: bool = False,
    narrow_range: bool = False,
) -> tuple[np.float32, int]:
    """Return scale and zero-point of the static grid of a tensor of known range.

    Parameters
    ----------
    minimum, maximum : number or array
        Range of the tensor; for arrays (one entry per channel) the extremes are taken. 0 always
        belongs to the range. A range of 0 gets a scale of 2**-23.
    bits : int from 2 to 16
    symmetric, narrow_range
        As in :func:`quantize_activations`.

    Returns
    -------
    scale : numpy.float32
    zero_point : int
        In ``[-2**(bits-1), 2**(bits-1) - 1]``.

    Raises
    ------
    ValueError
        NaN or Inf, a minimum above the maximum, or a range that overflows float32.
    """
    grid = _signed_grid(bits, symmetric, narrow_range)
    low = as_extreme(minimum, "minimum", np.min)
    high = as_extreme(maximum, "maximum", np.max)
    if low > high:
        raise ValueError(f"minimum {low:g} lies above maximum {high:g}")
    return _fit_range(low, high, grid)


class SignedGrid(NamedTuple):
    """Kind of a grid of signed codes: the tuple ``grid`` of the core's functions."""

    bits: int
    symmetric: bool
    narrow: bool
    bf16: bool


#: Dtypes in which grids and codes are computed.
ARITHMETICS = ("float32", "bfloat16")


def _signed_grid(
    bits: Any, symmetric: Any, narrow_range: Any, arithmetic: Any = "float32"
) -> SignedGrid:
    check_choice("arithmetic", arithmetic, ARITHMETICS)
    bits = check_count(bits, "bits", 2, 16)
    symmetric, narrow = bool(symmetric), bool(narrow_range)
    if narrow and not symmetric:
        raise ValueError("narrow_range=True needs symmetric=True: it is the symmetric code range")
    bf16 = arithmetic == "bfloat16"
    if bf16 and (narrow or bits > 8):
        raise ValueError(
            "arithmetic='bfloat16' takes at most 8 bits and no narrow_range, as PyTorch's grids do"
        )
    return SignedGrid(bits, symmetric, narrow, bf16)


def _fit_range(low: Any, high: Any, grid: SignedGrid) -> tuple[np.float32, int]:
    scale, zero = _core.signed_grid(low, high, grid)
    if not np.isfinite(scale):
        raise ValueError(f"the range from {low:g} to {high:g} overflows float32")
    return np.float32(scale), zero


def _not_finite() -> ValueError:
    return ValueError("X holds NaN or Inf (or values beyond float32)")


def outlier_columns(X: Any, threshold: float = 6.0, *, threads: int = 0) -> np.ndarray:
    """Return the columns in which some ``|x|`` reaches the threshold [LLM.int8()].

    Parameters
    ----------
    X : array or torch tensor, shape (..., channels)
        float32, float16 or bfloat16 (tensor); float64 is rounded to float32.
    threshold : float
        Above 0.
    threads : int
        0 means automatic.

    Returns
    -------
    ndarray of bool, shape (channels,)

    Raises
    ------
    TypeError, ValueError
        X is not floating point, has no channels, or holds NaN or Inf; a threshold of 0 or below.
    """
    threshold = check_number(threshold, "threshold")
    if not threshold > 0:
        raise ValueError(f"threshold must be above 0, not {threshold}")
    threads = check_threads(threads)
    X, dtype, shape = as_tokens(X)
    X = np.ascontiguousarray(X)
    outliers = np.empty(shape[-1], bool)
    try:
        _core.outlier_columns(X, dtype, threshold, outliers, threads)
    except FloatingPointError:
        raise _not_finite() from None
    return outliers


def _outlier_mask(outliers: Any, channels: int) -> np.ndarray | None:
    if outliers is None:
        return None
    mask = as_array(outliers, "outliers")
    if mask.dtype != bool:
        raise TypeError(
            f"outliers must be boolean, one entry per channel, not {mask.dtype}; "
            "outlier_columns(X, threshold) makes it"
        )
    if mask.shape != (channels,):
        raise ValueError(f"outliers must have shape ({channels},), not {mask.shape}")
    return mask.copy()


def _static_grid(
    scale: Any, zero_point: Any, granularity: str, grid: SignedGrid
) -> tuple[np.float32, int] | None:
    """Return the checked (scale, zero_point) of a static grid, or None if the data decides."""
    if scale is None:
        if zero_point is not None:
            raise ValueError("zero_point was given without scale")
        return None
    if granularity == "token":
        raise ValueError('scale is the static grid of granularity="tensor"; tokens have their own')
    if np.size(scale) != 1 or np.size(zero_point) != 1:
        raise ValueError("scale and zero_point must each be one number")
    scale = check_number(np.asarray(scale).reshape(-1)[0], "scale")
    with np.errstate(over="ignore", under="ignore"):
        scale = np.float32(scale)
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError("scale must be positive and finite (in float32)")
    if zero_point is None:
        if not grid.symmetric:
            raise ValueError("an asymmetric static grid needs zero_point next to scale")
        return scale, 0
    high = (1 << (grid.bits - 1)) - 1
    low = -high if grid.narrow else -high - 1
    zero = check_count(np.asarray(zero_point).reshape(-1)[0], "zero_point", low, high)
    if grid.symmetric and zero:
        raise ValueError(f"zero_point is {zero}, but symmetric=True means 0")
    return scale, zero


def quantize_activations(
    X: Any,
    bits: int = 8,
    *,
    granularity: str = "token",
    symmetric: bool = True,
    narrow_range: bool = False,
    scale: float | None = None,
    zero_point: int | None = None,
    outliers: Any = None,
    arithmetic: str = "float32",
    threads: int = 0,
) -> QuantizedActivations:
    """Quantize activations (or the rows of a weight matrix) on signed grids, in float32.

    ``code = clamp(round(x / s + z))``, ties to even. The grids are those of compressed-tensors:
    symmetric ``s = max|x| / ((2**bits - 1) / 2)``; asymmetric
    ``s = (max - min) / (2**bits - 1)``, ``z = round(-2**(bits-1) - min / s)``, 0 being part of the
    range. A range of 0 gets z = 0 and s = 2**-23, so that it dequantizes to exactly 0.

    Parameters
    ----------
    X : array or torch tensor, shape (..., channels)
        float32, float16 or bfloat16 (tensor); float64 is rounded to float32.
    bits : int from 2 to 16
        Codes are int8, above 8 bits int16.
    granularity : {"token", "tensor"}
        One grid per row of X (dynamic), or one for all of X.
    symmetric : bool
        Zero-point 0.
    narrow_range : bool
        Symmetric codes in +-(2**(bits-1) - 1), ``s = max|x| / (2**(bits-1) - 1)`` [IPQS].
    scale, zero_point : number, optional
        Static grid of granularity "tensor" (see :func:`activation_grid`); None: from X.
    outliers : array of bool, shape (channels,), optional
        Columns that stay float and do not widen the grids (see :func:`outlier_columns`).
    arithmetic : {"float32", "bfloat16"}
        "bfloat16": every step is rounded to that dtype, as PyTorch computes the grid and the codes
        of a bfloat16 tensor; at most 8 bits, a range of 0 gets s = 2**-7.
    threads : int
        0 means automatic. The result does not depend on it.

    Returns
    -------
    QuantizedActivations

    Raises
    ------
    TypeError, ValueError
        X is not floating point, has no channels, or holds NaN or Inf; contradicting options.

    Examples
    --------
    >>> import numpy as np, ptqkit
    >>> q = ptqkit.quantize_activations(np.array([[1.0, -2.0, 0.5]]), narrow_range=True)
    >>> q.codes, q.scales
    (array([[  64, -127,   32]], dtype=int8), array([[0.01574803]], dtype=float32))
    """
    check_choice("granularity", granularity, GRANULARITIES)
    grid = _signed_grid(bits, symmetric, narrow_range, arithmetic)
    static = _static_grid(scale, zero_point, granularity, grid)
    threads = check_threads(threads)
    X, dtype, shape = as_tokens(X)
    X = np.ascontiguousarray(X)
    mask = _outlier_mask(outliers, shape[-1])
    codes = np.empty(X.shape, np.int8 if grid.bits <= 8 else np.int16)
    grids = len(X) if granularity == "token" else 1
    scales, zeros = np.empty(grids, np.float32), np.empty(grids, np.int16)
    try:
        if granularity == "tensor":
            if static is None:
                static = _fit_range(*_core.activation_range(X, dtype, mask, threads), grid)
            scales[0], zeros[0] = static
        per_token = int(granularity == "token")
        _core.activations_quantize(X, dtype, mask, grid, per_token, codes, scales, zeros, threads)
    except FloatingPointError:
        raise _not_finite() from None
    if not np.isfinite(scales).all():
        raise ValueError("the range of a token overflows float32")
    values = None
    if mask is not None:
        kept = X[:, mask]
        values = widen(kept) if dtype == BF16 else kept.astype(np.float32)
        values = values.reshape(*shape[:-1], -1)
    lead = (1,) if granularity == "tensor" else (*shape[:-1], 1)
    return QuantizedActivations(
        codes=codes.reshape(shape),
        scales=scales.reshape(lead),
        zero_points=zeros.astype(codes.dtype).reshape(lead),
        bits=grid.bits,
        granularity=granularity,
        symmetric=grid.symmetric,
        narrow_range=grid.narrow,
        outliers=mask,
        outlier_values=values,
    )
