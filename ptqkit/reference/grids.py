"""Uniform grids: fitting scale and zero-point, quantizing and dequantizing (float64)."""

from __future__ import annotations

import numpy as np

__all__ = [
    "dequantize",
    "fed_back_error",
    "fit_grid",
    "fit_groups",
    "quantize",
    "round_to_dtype",
    "shrink_factors",
]

# Width of the diagonal blocks of H that stand for H itself when a group is wider than this.
GRID_BLOCK = 128
SMALLEST = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-14}


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Return the nearest bfloat16 of each float32 value, ties to even, as float32."""
    x = np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.where(np.isnan(x), np.float32(np.nan), nearest.astype(np.uint32).view(np.float32))


def round_to_dtype(x: np.ndarray, dtype: str) -> np.ndarray:
    """Round positive scales to a storage dtype, never below its smallest normal number."""
    x32 = np.asarray(x, np.float32)
    if dtype == "float16":
        rounded = x32.astype(np.float16).astype(np.float64)
    elif dtype == "bfloat16":
        rounded = to_bfloat16(x32).astype(np.float64)
    else:
        rounded = x32.astype(np.float64)
    return np.maximum(rounded, SMALLEST[dtype])


def quantize(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, max_code: int) -> np.ndarray:
    """Return clamp(round(x / s) + z, 0, max_code), ties to even, with broadcasting."""
    return np.clip(np.round(x / scale) + zero, 0, max_code).astype(np.uint8)


def dequantize(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Return s * (code - z), with broadcasting."""
    return scale * (codes.astype(np.float64) - zero)


def _grid_of_range(low, high, max_code, symmetric, scale_dtype, min_zero):
    """Return scale and zero-point of the range [low, high] (low <= 0 <= high), elementwise."""
    if symmetric:
        reach = np.maximum(-low, high)
        scale = np.where(reach > 0, reach / (max_code / 2), 1.0)
        return round_to_dtype(scale, scale_dtype), np.full_like(scale, (max_code + 1) // 2)
    scale = np.where(high > low, (high - low) / max_code, 1.0)
    scale = round_to_dtype(scale, scale_dtype)
    return scale, np.clip(np.round(-low / scale), min_zero, max_code)


def shrink_factors(steps: int, smallest: float) -> np.ndarray:
    """Return the factors from 1 down to ``smallest`` by which the min-max range is shrunk."""
    return np.linspace(1.0, smallest, steps)


def _search_error(d, method, norm, H):
    """Return the error of a candidate per row: sum |d|^norm, or d B d^T with blocks B of H."""
    if method == "mse":
        return (np.abs(d) ** norm).sum(axis=1)
    total = np.zeros(len(d))
    for start in range(0, d.shape[1], GRID_BLOCK):
        part = slice(start, start + GRID_BLOCK)
        total += np.einsum("rj,jk,rk->r", d[:, part], H[part, part], d[:, part])
    return total


def fed_back_error(w, R, scale, zero, max_code):
    """Return what solving a group on a grid adds to the objective, per row: sum (e R)_j^2.

    Column j is rounded from w_j + (sum_{k<j} e_k R_kj) / R_jj; R (group, group) is the group's
    block of the upper factor of H.
    """
    E, total = np.zeros_like(w), np.zeros(len(w))
    for j in range(w.shape[1]):
        carried = E[:, :j] @ R[:j, j]
        code = quantize(w[:, j] + carried / R[j, j], scale, zero, max_code)
        E[:, j] = w[:, j] - dequantize(code, scale, zero)
        total += (carried + E[:, j] * R[j, j]) ** 2
    return total


def fit_grid(
    w,
    *,
    max_code,
    symmetric=False,
    method="minmax",
    H=None,
    R=None,
    steps=40,
    min_shrink=0.3,
    norm=2.4,
    candidates=4,
    scale_dtype="float32",
    min_zero=0,
):
    """Fit one grid to each row of ``w`` (rows, group).

    Parameters
    ----------
    w : ndarray, shape (rows, group)
    max_code : int
        Largest code, ``2**bits - 1`` or 2 for ternary.
    method : {"minmax", "mse", "hessian", "feedback"}
        Min-max range; or the shrink factor of that range with the least ``sum |d|^norm``; or the
        one with the least ``d H d^T``, with d the rounding error and H (group, group) the
        group's own block of the Hessian. Only the ``candidates`` factors that are best under the
        diagonal of H are compared under all of it. Or the one with the least error once the group
        is solved, its columns in quantization order: see :func:`fed_back_error`, which reads R.

    Returns
    -------
    scale, zero : ndarray, shape (rows,)
    error : ndarray, shape (rows,)
        Error of the chosen candidate under the criterion (NaN for "minmax").
    """
    w = np.asarray(w, np.float64)
    low, high = np.minimum(w.min(axis=1), 0), np.maximum(w.max(axis=1), 0)
    make = lambda p: _grid_of_range(p * low, p * high, max_code, symmetric, scale_dtype, min_zero)  # noqa: E731
    if method == "minmax":
        return (*make(1.0), np.full(len(w), np.nan))

    def error(p, measure, matrix):
        s, z = (v[:, None] for v in make(p))
        return _search_error(
            dequantize(quantize(w, s, z, max_code), s, z) - w, measure, norm, matrix
        )

    factors = shrink_factors(steps, min_shrink)
    if method == "feedback":
        errors = np.stack([fed_back_error(w, R, s, z, max_code) for s, z in map(make, factors)])
    elif method == "mse":
        errors = np.stack([error(p, "mse", None) for p in factors])
    else:
        cheap = np.stack([error(p, "hessian", np.diag(np.diag(H))) for p in factors])
        cutoff = np.sort(cheap, axis=0)[min(candidates, steps) - 1]
        full = np.stack([error(p, "hessian", H) for p in factors])
        errors = np.where(cheap <= cutoff, full, np.inf)
    best = errors.argmin(axis=0)
    scale, zero = make(factors[best])
    return scale, zero, errors.min(axis=0)


def fit_groups(W, group_size, *, H=None, **options):
    """Fit a grid to every (row, group of consecutive inputs).

    Returns
    -------
    scales, zeros : ndarray, shape (rows, groups)
    """
    fitted = []
    for start in range(0, W.shape[1], group_size):
        part = slice(start, start + group_size)
        block = None if H is None else H[part, part]
        fitted.append(fit_grid(W[:, part], H=block, **options)[:2])
    return tuple(np.stack(values, axis=1) for values in zip(*fitted, strict=True))
