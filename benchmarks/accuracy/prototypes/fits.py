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
from ptqkit.reference.grids import GRID_BLOCK, fit_grid, quantize, round_to_dtype, shrink_factors
from ptqkit.reference.hessian import dampen

__all__ = ["FACTOR_FITS", "FITS", "feedback_errors", "fit_errors", "solving_with"]

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


def feedback_errors(
    w: np.ndarray, R: np.ndarray, grid: WeightGrid, scale: np.ndarray, zero: np.ndarray
) -> np.ndarray:
    """Return what the group adds to the solver's objective (rows,), its columns fed back.

    R (G, G) is the group's block of the upper factor of H, columns in quantization order; of more
    than GRID_BLOCK columns those of a run of so many answer to each other alone.
    """
    E, total = np.zeros_like(w), np.zeros(len(w))
    for j in range(w.shape[1]):
        part = slice(j // GRID_BLOCK * GRID_BLOCK, j)
        carried = E[:, part] @ R[part, j]
        code = quantize(w[:, j] + carried / R[j, j], scale, zero, grid.max_code)
        E[:, j] = w[:, j] - scale * (code - zero)
        total += (carried + E[:, j] * R[j, j]) ** 2
    return total


def fed_back(w: np.ndarray, R: np.ndarray, grid: WeightGrid, candidates: int) -> Grid:
    """Return the factor of the search with the least error once its columns are fed back.

    Only the ``candidates`` that are best under the squared diagonal of R are compared so.
    """
    options = {"symmetric": grid.symmetric, "scale_dtype": grid.scale_dtype}
    tried = []
    for factor in shrink_factors(STEPS, MIN_SHRINK):
        scale, zero, _ = fit_grid(w * factor, max_code=grid.max_code, **options)
        tried.append((scale, zero, fit_errors(w, np.diag(R) ** 2, grid, scale, zero)))
    scales, zeros, cheap = (np.array(values) for values in zip(*tried, strict=True))
    first, every = np.argsort(cheap, axis=0)[:candidates], np.arange(len(w))
    scales, zeros = (values[first, every] for values in (scales, zeros))
    errors = np.array(
        [feedback_errors(w, R, grid, *each) for each in zip(scales, zeros, strict=True)]
    )
    best = errors.argmin(0)
    return scales[best, every], zeros[best, every]


#: The same of w (rows, G) under the group's block of the solver's factor (G, G).
FACTOR_FITS: dict[str, Callable[[np.ndarray, np.ndarray, WeightGrid], Grid]] = {
    "fed back": functools.partial(fed_back, candidates=STEPS),
    "fed back, 10 of 40": functools.partial(fed_back, candidates=10),
    "fed back, 4 of 40": functools.partial(fed_back, candidates=CANDIDATES),
    "search under R": lambda w, R, grid: searched(w, R @ R.T, grid),
    "exact scales under R": lambda w, R, grid: exact(w, R @ R.T, grid, searched),
}


@contextlib.contextmanager
def solving_with(name: str) -> Iterator[None]:
    """Solve with the float64 twin, the grid of each group fitted by one of the fits above."""

    def solved(weight: np.ndarray, source: Any, options: Recipe, **rest: Any) -> QuantizedMatrix:
        grid = WeightGrid(
            options.bits, options.group_size, options.symmetric, False, options.scale_dtype
        )

        whole = np.asarray(source.matrix, np.float64)
        order = solvers.make_order(np.diag(whole), options.order, options.group_size)
        R = solvers.upper_factor(dampen(whole, options.damping)[0][np.ix_(order, order)])
        starts = iter(range(0, len(order), options.group_size or len(order)))

        def fit(w: np.ndarray, *, H: np.ndarray, **_: Any) -> tuple[np.ndarray, ...]:
            if name in FITS:
                found = FITS[name](w, H, grid)
            else:
                # A channel is fitted before the solve, its columns as they are stored.
                part = slice(start := next(starts), start + w.shape[1])
                columns = order if w.shape[1] == len(order) else slice(None)
                found = FACTOR_FITS[name](w[:, columns], R[part, part], grid)
            return *found, np.full(len(w), np.nan)

        with (
            mock.patch.object(grids, "fit_grid", fit),
            mock.patch.object(solvers, "fit_grid", fit),
        ):
            found = solvers.gptq(
                weight,
                whole,
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
