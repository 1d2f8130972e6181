"""Grids chosen by the error that the group's own solve leaves, against the float64 twin."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.core_cases import layer, max_code, updated_weights

import ptqkit
import ptqkit.reference as reference
from ptqkit.recipe.recipe import Recipe
from ptqkit.reference.grids import GRID_BLOCK, fed_back_error

CASES = [  # rows, inputs, group, order, options
    (50, 96, 16, "group-act", {"bits": 3}),
    (9, 130, 65, "natural", {"bits": 2, "symmetric": True}),
    (33, 96, 32, "act", {"bits": 3, "min_zero_point": 1}),
    (40, 300, None, "group-act", {"bits": 4, "scale_dtype": "float16"}),
    (20, 48, None, "natural", {"bits": "ternary"}),
    (17, 288, 144, "group-act", {"bits": 2, "grid_steps": 7, "grid_min_shrink": 0.4}),
    (5, 7, 1, "natural", {"bits": 3}),
]


def _solved(W, H, size, order, **options):
    F = ptqkit.factorize(H, order=order, group_size=size)
    return F, ptqkit.gptq(W, F, group_size=size, grid="feedback", order=order, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_factor_leaves_less_than_the_one_that_was_taken(case):
    rows, n, size, order, options = case
    W, H = layer(rows, n)
    F, q = _solved(W, H, size, order, **options)
    damped, _ = reference.dampen(H, q.damping)
    R = reference.upper_factor(damped[np.ix_(F.order, F.order)])
    width = size or n
    grid = {
        "max_code": max_code(options["bits"]),
        "symmetric": q.symmetric,
        "method": "feedback",
        "steps": options.get("grid_steps", 40),
        "min_shrink": options.get("grid_min_shrink", 0.3),
        "scale_dtype": q.scale_dtype,
        "min_zero": options.get("min_zero_point", 0),
    }
    starts = iter(range(0, n, width))
    for g, w, _ in updated_weights(W, H, q, F, size, static=False):
        part = slice(start := next(starts), start + width)
        block = R[part, part]
        if width == n:
            w, runs = w[:, F.order], np.arange(n) // GRID_BLOCK
            block = np.where(runs[:, None] == runs, R, 0.0)
        taken = q.scales[:, g].astype(np.float64), q.zero_points[:, g].astype(np.float64)
        found = fed_back_error(w, block, *taken, q.max_code)
        scale, zero, least = reference.fit_grid(w, R=block, **grid)
        # A code near a tie may move in float32, and all that follow it: then errors differ.
        floor = 1e-9 * (w**2 @ np.diag(block) ** 2)
        near = found <= least * (1 + 1e-3) + floor
        assert near.mean() > 0.9 and found.sum() <= 1.02 * least.sum() + floor.sum()
        assert (np.isclose(taken[0], scale, rtol=1e-3) & (taken[1] == zero)).mean() > 0.85


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_whole_results_are_near_the_twins(case):
    rows, n, size, order, options = case
    W, H = layer(rows, n)
    _, q = _solved(W, H, size, order, refine_passes=1, **options)
    want = reference.gptq(
        W, H, max_code=q.max_code, group_size=size, order=order, refine_passes=1,
        method="feedback", symmetric=q.symmetric, scale_dtype=q.scale_dtype,
        min_zero=options.get("min_zero_point", 0),
    )  # fmt: skip
    np.testing.assert_array_equal(q.g_idx, want["g_idx"])
    assert (q.codes == want["codes"]).mean() > 0.9
    np.testing.assert_allclose(q.row_objectives.sum(1), want["history"].sum(1), rtol=0.01)


def test_it_leaves_less_than_the_search_under_h():
    for bits, size, order in ((2, 16, "group-act"), (3, 32, "act"), (3, None, "group-act")):
        W, H = layer(60, 96)
        options = {"bits": bits, "group_size": size, "order": order, "refine_passes": 1}
        under_h = ptqkit.gptq(W, H, grid="hessian", **options).objective
        assert ptqkit.gptq(W, H, grid="feedback", **options).objective < 0.995 * under_h


def test_block_size_and_threads_change_nothing():
    W, H = layer(70, 300, "outlier")
    for size in (20, 150, None):
        results = [
            _solved(W, H, size, "group-act", bits=3, block_size=block, threads=threads)[1]
            for block, threads in ((128, 1), (16, 2), (512, 1))
        ]
        for other in results[1:]:
            np.testing.assert_array_equal(other.codes, results[0].codes)
            np.testing.assert_array_equal(other.scales, results[0].scales)


def test_dead_and_zero_inputs():
    W, H = layer(20, 60, "dead")
    W = W.copy()
    W[3] = 0
    _, q = _solved(W, H, 15, "group-act", bits=3)
    assert np.isfinite(q.scales).all() and np.all(q.scales > 0)
    assert np.all(q.dequantize()[:, ::5] == 0) and np.all(q.dequantize()[3] == 0)


def test_what_cannot_be_tried_is_refused():
    W, H = layer(8, 16)
    for call in (
        lambda: ptqkit.rtn(W, grid="feedback", H=H, group_size=8),
        lambda: ptqkit.obq(W, H, grid="feedback"),
        lambda: ptqkit.gptq(W, H, grid="feedback", group_size=8, static_groups=True),
        lambda: ptqkit.gptq(W, H, grid="feedback", group_size=8, feedback=False),
        lambda: Recipe(method="rtn", grid="feedback"),
        lambda: Recipe(static_groups=True, order="act", grid="feedback"),
    ):
        with pytest.raises(ValueError, match="feedback"):
            call()
    assert Recipe(grid="feedback").grid == "feedback"
