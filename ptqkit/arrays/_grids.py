"""Options of a weight grid, checked once for every solver."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ptqkit.arrays._inputs import check_count, check_number, label
from ptqkit.arrays.matrix import GRID_METHODS, SCALE_TYPES, QuantizedMatrix, WeightGrid
from ptqkit.errors import check_choice

__all__ = [
    "SEARCH",
    "GridSpec",
    "check_scales",
    "check_values",
    "far_exponent",
    "grid_spec",
    "group_width",
    "largest_exponents",
    "named_grid",
    "outputs",
    "row_exponents",
]

#: The search that recipes use: steps, min_shrink, norm and candidates of :func:`grid_spec`.
SEARCH: dict[str, Any] = {"steps": 40, "min_shrink": 0.3, "norm": 2.4, "candidates": 4}

LARGEST_SCALE = {"float32": 3.4e38, "float16": 65504.0, "bfloat16": 3.38e38}


class GridSpec(NamedTuple):
    """How the core fits a weight grid: the tuple ``grid`` of its functions."""

    max_code: int  # 2^bits - 1, or 2 for ternary
    symmetric: int  # 1: the zero-point is (max_code + 1) / 2
    method: int  # of GRID_METHODS
    steps: int  # shrink factors from 1 to min_shrink
    candidates: int  # of these, how many the full Hessian compares
    scale_type: int  # of SCALE_TYPES
    min_zero: int  # smallest zero-point
    min_shrink: float
    norm: float  # exponent of the MSE search


def named_grid(
    bits: int | str,
    group_size: int | None,
    symmetric: bool,
    per_tensor: bool = False,
    scale_dtype: str = "float32",
    *,
    name: str | None = None,
) -> WeightGrid:
    """Return the grid, symmetric for ternary; errors start with the layer's name."""
    try:
        return WeightGrid(bits, group_size, symmetric or bits == "ternary", per_tensor, scale_dtype)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{label(name)}{error}") from None


def grid_spec(
    grid: WeightGrid,
    method: str = "minmax",
    min_zero_point: int = 0,
    steps: int = 1,
    min_shrink: float = 1.0,
    norm: float = 2.0,
    candidates: int = 1,
) -> GridSpec:
    """Return the checked options of fitting a grid."""
    check_choice("grid", method, GRID_METHODS)
    min_shrink = check_number(min_shrink, "grid_min_shrink")
    norm = check_number(norm, "grid_norm")
    if not 0 < min_shrink <= 1:
        raise ValueError(f"grid_min_shrink must lie in (0, 1], not {min_shrink}")
    if not 0 < norm < 100:
        raise ValueError(f"grid_norm must lie in (0, 100), not {norm}")
    return GridSpec(
        max_code=grid.max_code,
        symmetric=int(grid.symmetric),
        method=GRID_METHODS[method],
        steps=check_count(steps, "grid_steps", 1, 256),
        candidates=check_count(candidates, "grid_candidates", 1, 256),
        scale_type=SCALE_TYPES[grid.scale_dtype],
        min_zero=check_count(min_zero_point, "min_zero_point", 0, grid.max_code),
        min_shrink=min_shrink,
        norm=norm,
    )


def group_width(grid: WeightGrid, n: int, name: str | None) -> int:
    """Return the inputs per grid of n inputs, or raise ValueError."""
    size = n if grid.group_size is None else grid.group_size
    if n % size:
        divisors = [d for d in (256, 128, 64, 32, 16, 8) if n % d == 0]
        raise ValueError(
            f"{label(name)}group_size {size} does not divide {n} inputs; use None (per "
            f"channel)" + (f" or {', '.join(map(str, divisors))}" if divisors else "")
        )
    return size


def outputs(rows: int, n: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return empty codes, scales and zero-points for the core to write."""
    return (
        np.empty((rows, n), np.uint8),
        np.empty((rows, groups), np.float32),
        np.empty((rows, groups), np.uint8),
    )


def row_exponents(W: np.ndarray, scale_dtype: str = "float32") -> np.ndarray | None:
    """Return k (rows, 1) for which ``2^-k W`` is neither huge nor tiny, or None if W is neither.

    The core squares errors in float32, where those of such rows overflow or vanish. A power of two
    changes nothing else: the same codes, ``2^k`` times the scales, ``4^k`` times the objectives.
    Tiny weights stay if their scales are to be float16, which rounds them otherwise there.
    """
    return largest_exponents(np.maximum(W.max(axis=1), -W.min(axis=1)), scale_dtype)


def largest_exponents(largest: np.ndarray, scale_dtype: str) -> np.ndarray | None:
    """As :func:`row_exponents`, from the largest magnitude of each row."""
    far = largest > 2.0**30
    if scale_dtype != "float16":
        far |= (largest < 2.0**-30) & (largest > 2.0**-100)
    return np.where(far, np.frexp(largest)[1], 0)[:, None] if far.any() else None


def check_scales(scales: np.ndarray, scale_dtype: str, name: str | None) -> None:
    """Raise ValueError if a scale overflows its storage type."""
    if not np.all(scales <= LARGEST_SCALE[scale_dtype]):
        raise ValueError(f"{label(name)}a scale does not fit {scale_dtype}: the weights are huge")


def far_values(scale: float, max_code: int) -> bool:
    """Whether values of a grid with this scale may be beyond float32."""
    return scale * max(max_code, 1) >= float(np.finfo(np.float32).max)


def check_values(q: QuantizedMatrix, name: str | None) -> None:
    """Raise ValueError if a value of the result is beyond float32, though its scale is not."""
    if q.scales.size and far_values(float(q.scales.max()), q.max_code):
        with np.errstate(over="ignore"):
            finite = np.isfinite(q.dequantize()).all()
        if not finite:
            raise ValueError(f"{label(name)}a scale does not fit float32: the weights are huge")


def far_exponent(matrix: np.ndarray) -> int:
    """Return an even e for which 2^-e H is neither huge nor tiny, 0 if H is neither.

    H, or its diagonal alone.
    """
    diagonal = np.diagonal(matrix) if matrix.ndim == 2 else matrix
    exponent = int(np.frexp(np.abs(diagonal).max())[1])
    return exponent // 2 * 2 if abs(exponent) > 40 else 0
