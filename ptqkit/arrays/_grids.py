"""Options of a weight grid, checked once for every solver."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ptqkit.arrays._inputs import check_count, check_number, label
from ptqkit.arrays.matrix import parse_bits

__all__ = ["GridSpec", "check_scales", "grid_spec", "group_width", "outputs"]

METHODS = {"minmax": 0, "mse": 1, "hessian": 2}
SCALE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
LARGEST_SCALE = {"float32": 3.4e38, "float16": 65504.0, "bfloat16": 3.38e38}


class GridSpec(NamedTuple):
    """How the core fits a weight grid: the tuple ``grid`` of its functions."""

    max_code: int  # 2^bits - 1, or 2 for ternary
    symmetric: int  # 1: the zero-point is (max_code + 1) / 2
    method: int  # of METHODS
    steps: int  # shrink factors from 1 to min_shrink
    candidates: int  # of these, how many the full Hessian compares
    scale_type: int  # of SCALE_TYPES
    min_zero: int  # smallest zero-point
    min_shrink: float
    norm: float  # exponent of the MSE search


def _choice(value: Any, name: str, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def grid_spec(bits, symmetric, grid, scale_dtype, min_zero_point, search) -> GridSpec:
    """Return the checked options of a grid."""
    max_code = parse_bits(bits)
    _choice(grid, "grid", METHODS)
    _choice(scale_dtype, "scale_dtype", SCALE_TYPES)
    steps, smallest, norm, candidates = search
    smallest = check_number(smallest, "grid_min_shrink")
    norm = check_number(norm, "grid_norm")
    if not 0 < smallest <= 1:
        raise ValueError(f"grid_min_shrink must lie in (0, 1], not {smallest}")
    if not 0 < norm < 100:
        raise ValueError(f"grid_norm must lie in (0, 100), not {norm}")
    return GridSpec(
        max_code,
        int(bool(symmetric)),
        METHODS[grid],
        check_count(steps, "grid_steps", 1, 256),
        check_count(candidates, "grid_candidates", 1, 256),
        SCALE_TYPES[scale_dtype],
        check_count(min_zero_point, "min_zero_point", 0, max_code),
        smallest,
        norm,
    )


def group_width(group_size: int | None, n: int, name: str | None) -> int:
    """Return the inputs per grid, or raise TypeError or ValueError."""
    if group_size is None:
        return n
    if isinstance(group_size, bool) or not isinstance(group_size, (int, np.integer)):
        raise TypeError(f"group_size must be an integer or None, not {group_size!r}")
    if group_size < 1 or n % group_size:
        divisors = [d for d in (256, 128, 64, 32, 16, 8) if n % d == 0]
        raise ValueError(
            f"{label(name)}group_size {group_size} does not divide {n} inputs; use None (per "
            f"channel)" + (f" or {', '.join(map(str, divisors))}" if divisors else "")
        )
    return int(group_size)


def outputs(rows: int, n: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Empty codes, scales and zero-points for the core to write."""
    return (
        np.empty((rows, n), np.uint8),
        np.empty((rows, groups), np.float32),
        np.empty((rows, groups), np.uint8),
    )


def check_scales(scales: np.ndarray, scale_dtype: str, name: str | None) -> None:
    """Raise ValueError where a scale overflowed its storage type."""
    if not np.all(scales <= LARGEST_SCALE[scale_dtype]):
        raise ValueError(f"{label(name)}a scale does not fit {scale_dtype}: the weights are huge")
