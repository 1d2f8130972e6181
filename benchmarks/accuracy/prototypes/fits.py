"""Other ways to fit the grid of a group than the package's search, inside of the float64 solver."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.accuracy.prototypes.scales import exact_scales, rounding_errors
from benchmarks.accuracy.prototypes.zeros import SortedRows
from ptqkit.arrays.matrix import QuantizedMatrix, WeightGrid
from ptqkit.arrays.solvers import rtn
from ptqkit.hf.quantization import solve
from ptqkit.recipe.recipe import Recipe
from ptqkit.reference import grids, solvers
from ptqkit.reference.grids import fit_grid, round_to_dtype, shrink_factors

__all__ = ["FITS", "fit_errors", "solving_with"]

Grid = tuple[np.ndarray, np.ndarray]
#: The package's search, by default.
STEPS, MIN_SHRINK, CANDIDATES = 40, 0.3, 4
#: Exact searches go down to this part of the min-max scale.
FLOOR = 0.2


def searched(w: np.ndarray, H: np.ndarray, grid: WeightGrid, **search: Any) -> Grid:
    """Return scales and zero-points (rows,) of the package's own search."""
    found = rtn(
        w.astype(np.float32),
        bits=grid.bits,
        group_size=None,
        symmetric=grid.symmetric,
        grid="hessian",
        H=np.ascontiguousarray(H, np.float32),
        scale_dtype=grid.scale_dtype,
        threads=1,
        **search,
    )
    return found.scales[:, 0].astype(np.float64), found.zero_points[:, 0].astype(np.float64)


def _minmax(w: np.ndarray, grid: WeightGrid) -> np.ndarray:
    options = {"symmetric": grid.symmetric, "scale_dtype": grid.scale_dtype}
    return fit_grid(w, max_code=grid.max_code, **options)[0]


def fit_errors(
    w: np.ndarray, H: np.ndarray, grid: WeightGrid, scale: np.ndarray, zero: np.ndarray
) -> np.ndarray:
    """Return d H d^T (rows,) of rounding on a grid."""
    return rounding_errors(w, H, scale, -zero, grid.max_code - zero)


def _best(w: np.ndarray, H: np.ndarray, grid: WeightGrid, found: list[Grid]) -> Grid:
    """Return the best of some grids of every row, scales rounded to their type before."""
    stored = [(round_to_dtype(s, grid.scale_dtype), z) for s, z in found]
    best = np.argmin([fit_errors(w, H, grid, *each) for each in stored], axis=0)
    rows = np.arange(len(w))
    return tuple(np.array(values)[best, rows] for values in zip(*stored, strict=True))


def _neighbours(scale: np.ndarray, dtype: str) -> list[np.ndarray]:
    """Return the scale and those next to it in its type: rounding it may move a code."""
    step = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}[dtype]
    return [scale, scale * (1 - step), scale * (1 + step)]


def exact(w: np.ndarray, H: np.ndarray, grid: WeightGrid, start: Callable[..., Grid]) -> Grid:
    """Return the exact scale under H for the zero-point of ``start``, or its grid if that is best.

    An exact scale may be worse once it is rounded to its type.
    """
    scale, zero = start(w, H, grid)
    low = -zero.astype(np.int64)
    found = exact_scales(w, H, low, grid.max_code + low, FLOOR * _minmax(w, grid))[0]
    near = [(s, zero) for s in _neighbours(found, grid.scale_dtype)]
    return _best(w, H, grid, [(scale, zero), *near])


def exact_diagonal(w: np.ndarray, H: np.ndarray, grid: WeightGrid) -> Grid:
    """Return the exact scale under the diagonal of H for the zero-point of the search."""
    return exact(w, np.diag(H), grid, lambda w, h, grid: searched(w, H, grid))


def zeros_searched(w: np.ndarray, H: np.ndarray, grid: WeightGrid) -> Grid:
    """Return the package's search, each of its scales with the best zero-point under diag H."""
    if grid.symmetric:
        raise ValueError("a symmetric grid has one zero-point")
    rows, whole = SortedRows(w, np.diag(H)), _minmax(w, grid)
    tried = []
    for factor in shrink_factors(STEPS, MIN_SHRINK):
        scale = round_to_dtype(factor * whole, grid.scale_dtype)
        tried.append((scale, *rows.best_zeros(scale, grid.max_code)))
    scales, zeros, errors = (np.array(values) for values in zip(*tried, strict=True))
    first, every = np.argsort(errors, axis=0)[:CANDIDATES], np.arange(len(w))
    return _best(w, H, grid, [(scales[i, every], zeros[i, every]) for i in first])


#: name: scales and zero-points (rows,) of w (rows, G) under H (G, G).
FITS: dict[str, Callable[[np.ndarray, np.ndarray, WeightGrid], Grid]] = {
    "search": searched,
    "256 steps": functools.partial(
        searched, grid_steps=256, grid_min_shrink=0.2, grid_candidates=40
    ),
    "exact scales": functools.partial(exact, start=searched),
    "exact scales, diagonal": exact_diagonal,
    "zeros": zeros_searched,
    "zeros, exact scales": functools.partial(exact, start=zeros_searched),
}


@contextlib.contextmanager
def solving_with(name: str) -> Iterator[None]:
    """Solve with the float64 twin, the grid of each group fitted by ``FITS[name]``."""

    def solved(weight: np.ndarray, source: Any, options: Recipe, **rest: Any) -> QuantizedMatrix:
        grid = WeightGrid(
            options.bits, options.group_size, options.symmetric, False, options.scale_dtype
        )

        def fit(w: np.ndarray, *, H: np.ndarray, **_: Any) -> tuple[np.ndarray, ...]:
            return *FITS[name](w, H, grid), np.full(len(w), np.nan)

        with (
            mock.patch.object(grids, "fit_grid", fit),
            mock.patch.object(solvers, "fit_grid", fit),
        ):
            found = solvers.gptq(
                weight,
                np.asarray(source.matrix, np.float64),
                max_code=grid.max_code,
                group_size=options.group_size,
                order=options.order,
                static_groups=options.static_groups,
                damping=options.damping,
                refine_passes=options.refine_passes,
                refit_rounds=options.refit_rounds,
                scale_dtype=options.scale_dtype,
            )
        return QuantizedMatrix(
            found["codes"],
            found["scales"].astype(np.float32),
            found["zeros"].astype(np.uint8),
            found["g_idx"],
            grid,
            row_objectives=found["history"],
            damping=options.damping,
            dead_inputs=int(found["dead"].sum()),
        )

    with mock.patch.object(solve, "quantize_matrix", solved):
        yield
