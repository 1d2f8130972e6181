"""Prototypes that fit grids exactly: against searches of all scales and zero-points."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from helpers.core_cases import layer

import ptqkit
from benchmarks.accuracy.prototypes import fits
from benchmarks.accuracy.prototypes.scales import exact_scales, rounding_errors
from benchmarks.accuracy.prototypes.zeros import SortedRows
from ptqkit.arrays.matrix import WeightGrid
from ptqkit.hf.quantization import solve
from ptqkit.recipe.recipe import Recipe


def _problem(rows, size, seed=0):
    W, H = layer(rows, size, seed=seed)
    return W.astype(np.float64), H.astype(np.float64)


def _all_intervals(w, H, low, high, floor):
    """The least error of a row, its codes rounded anew in the middle of every interval."""
    halves = np.arange(max(high, -low)) + 0.5
    points = np.unique(np.append((np.abs(w)[:, None] / halves).ravel(), floor))
    points = np.append(points[points >= floor], 2 * points[-1])
    best = w @ H @ w
    for lower, upper in pairwise(points):
        codes = np.clip(np.round(w / ((lower + upper) / 2)), low, high)
        if codes.any():
            s = np.clip((codes @ H @ w) / (codes @ H @ codes), lower, upper)
            best = min(best, (w - s * codes) @ H @ (w - s * codes))
    return best


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("low", "high"), [(-2, 1), (-4, 3), (0, 3), (-7, 8), (-1, 1)])
def test_no_scale_is_better_than_the_exact_one(low, high, diagonal):
    for size, floor in ((1, 1e-3), (3, 1e-3), (6, 0.3)):
        w, H = _problem(20, size, seed=size)
        w[0] = 0
        w[1, 0] = 0
        H = np.diag(H) if diagonal else H
        full = np.diag(H) if diagonal else H
        each = (np.full(20, v) for v in (low, high))
        limits = (*each, np.full(20, floor))
        scale, error = exact_scales(w, H, *limits)
        want = [_all_intervals(row, full, low, high, floor) for row in w]
        np.testing.assert_allclose(error, want, rtol=1e-9, atol=1e-12)
        # The scale has that error, but for one at a breakpoint: from one side of it.
        near = [rounding_errors(w, H, scale * (1 + e), *limits[:2]) for e in (-1e-9, 0, 1e-9)]
        np.testing.assert_allclose(np.min(near, axis=0), error, rtol=1e-6, atol=1e-9)
        assert np.all(scale >= floor)
        for s in np.linspace(floor, 4.0, 400):
            assert np.all(error <= rounding_errors(w, H, np.full(20, s), *limits[:2]) + 1e-9)


@pytest.mark.parametrize("top", [2, 3, 7, 15])
def test_no_zero_is_better_than_the_one_of_the_prefix_sums(top):
    w, H = _problem(30, 9)
    w[:4] += 3  # all to one side: the best zero-point is an end
    w[4:8] -= 3
    h = np.diag(H)
    rows, seen = SortedRows(w, h), set()
    for factor, min_zero in ((0.05, 0), (0.3, 1), (1.0, 0), (2.0, 1)):
        scale = factor * np.abs(w).max(1) / 2
        zero, error = rows.best_zeros(scale, top, min_zero)
        all_zeros = np.arange(min_zero, top + 1)
        want = [rounding_errors(w, h, scale, -np.full(30, z), np.full(30, top - z))
                for z in all_zeros]  # fmt: skip
        np.testing.assert_allclose(error, np.min(want, axis=0), rtol=1e-9, atol=1e-12)
        own = rounding_errors(w, h, scale, -zero, top - zero)
        np.testing.assert_allclose(own, error, rtol=1e-9, atol=1e-12)
        seen |= set(zero)
    assert {1, top} <= seen


@pytest.mark.parametrize("symmetric", [False, True])
def test_fits_are_on_the_grid_and_no_worse_than_the_search(symmetric):
    w, H = _problem(40, 16)
    grid = WeightGrid(3, None, symmetric, False, "float16")
    errors = {}
    for name, fit in fits.FITS.items():
        if symmetric and name.startswith("zeros"):
            continue
        scale, zero = fit(w, H, grid)
        np.testing.assert_array_equal(scale, scale.astype(np.float16))
        assert np.all((zero >= 0) & (zero <= 7)) and (not symmetric or np.all(zero == 4))
        errors[name] = fits.fit_errors(w, H, grid, scale, zero)
    assert np.all(errors["exact scales"] <= errors["search"])
    assert errors["exact scales"].sum() < 0.99 * errors["search"].sum()
    if not symmetric:
        assert np.all(errors["zeros, exact scales"] <= errors["zeros"])


@pytest.mark.parametrize("change", [{}, {"group_size": None}, {"refit_rounds": 1}])
def test_the_solver_takes_the_fitted_grids(change):
    W, H = layer(24, 64)
    X = np.linalg.cholesky(H.astype(np.float64) * 32).T
    source = ptqkit.Hessian(64)
    source.update(X.astype(np.float32))
    options = Recipe(**{"bits": 3, "group_size": 16, **change}).with_scale_dtype("float16")
    want = solve.quantize_matrix(W, source, options)
    found = {}
    for name in ("search", "zeros, exact scales"):
        with fits.solving_with(name):
            found[name] = solve.quantize_matrix(W, source, options, threads=1, name="layer")
    assert solve.quantize_matrix(W, source, options).objective == want.objective
    same = found["search"]
    assert same.scale_dtype == "float16" and same.scales.shape == want.scales.shape
    np.testing.assert_array_equal(same.g_idx, want.g_idx)
    assert same.objective == pytest.approx(want.objective, rel=0.02)
    assert (same.codes == want.codes).mean() > 0.95
    assert (found["zeros, exact scales"].scales != same.scales).mean() > 0.5
