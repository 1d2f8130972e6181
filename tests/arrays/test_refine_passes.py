"""Coordinate-descent refine_passes after the solve."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from helpers.core_cases import layer, same_result, true_objective

import ptqkit
import ptqkit.reference as reference


def assert_sweep(W, H, before, after, order, tie):
    """Replay one sweep in float64: column by column, each new code is the best one given all
    others, but within ``tie`` steps of a tie; returns the worst distance met.
    """
    scale = before.scales.astype(float)[:, before.g_idx]
    zero = before.zero_points.astype(float)[:, before.g_idx]
    H = H.astype(np.float64)
    W = np.where(np.diag(H) == 0, 0.0, W.astype(np.float64))
    E = W - scale * (before.codes.astype(float) - zero)
    worst = 0.0
    for j in order:
        if H[j, j] == 0:
            np.testing.assert_array_equal(before.codes[:, j], after.codes[:, j])
            continue
        s, z = scale[:, j], zero[:, j]
        target = W[:, j] + E @ H[:, j] / H[j, j] - E[:, j]
        want = reference.quantize(target, s, z, before.max_code)
        wrong = want != after.codes[:, j]
        steps = target / s
        distance = np.abs(steps - np.floor(steps) - 0.5)[wrong]
        worst = max(worst, distance.max(initial=0.0))
        E[:, j] = W[:, j] - s * (after.codes[:, j] - z)
    assert worst <= tie
    return worst


@pytest.mark.parametrize("shape", [(1, 1, None), (9, 24, 8), (49, 49, 7), (50, 130, None)])
@pytest.mark.parametrize("kind", ["correlated", "outlier", "dead"])
def test_each_step_is_the_best_code(shape, kind, tie):
    rows, n, size = shape
    W, H = layer(rows, n, kind)
    orders = [("natural", False), ("act", True), ("act", False), ("group-act", False)]
    for (order, static), bits in product(orders, (2, 4, "ternary")):
        F = ptqkit.factorize(H, order=order, group_size=size)
        options = {"bits": bits, "group_size": size, "static_groups": static}
        results = [ptqkit.gptq(W, F, refine_passes=k, **options) for k in range(3)]
        for before, after in pairwise(results):
            assert before.scales.tobytes() == after.scales.tobytes()
            assert_sweep(W, H, before, after, F.order, tie)


@pytest.mark.parametrize("kind", ["white", "correlated", "outlier", "dead", "ill"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, "ternary"])
def test_no_sweep_raises_the_objective_of_any_row(kind, bits):
    W, H = layer(60, 64, kind)
    for order, symmetric in product(("natural", "act"), (False, True)):
        options = {"bits": bits, "group_size": 16, "order": order, "symmetric": symmetric}
        q = ptqkit.gptq(W, H, refine_passes=6, **options)
        assert q.row_objectives.shape == (7, 60)
        assert np.all(np.diff(q.row_objectives, axis=0) <= 0)  # exactly: steps that do not pay
        assert list(q.sweep_objectives) == sorted(q.sweep_objectives, reverse=True)
        assert q.objective == q.sweep_objectives[-1]
        start = ptqkit.gptq(W, H, **options)
        np.testing.assert_array_equal(start.row_objectives[0], q.row_objectives[0])
        true = true_objective(W, H, q)
        np.testing.assert_allclose(q.row_objectives[-1], true, rtol=0, atol=2e-4 * true.mean())
        assert true.sum() <= true_objective(W, H, start).sum()


def test_sweeps_reach_a_fixed_point_and_help():
    W, H = layer(60, 64)
    options = {"bits": 2, "group_size": 16, "order": "act", "static_groups": True}
    last = ptqkit.gptq(W, H, refine_passes=60, **options)
    assert same_result(ptqkit.gptq(W, H, refine_passes=61, **options), last)
    assert last.objective < 0.97 * last.sweep_objectives[0]


def test_the_sweeps_of_the_twin():
    W, H = layer(30, 48)
    twin = reference.gptq(W, H, max_code=7, refine_passes=3)
    assert np.all(np.diff(twin["history"], axis=0) <= 1e-12 * twin["history"][0].max())
    q = ptqkit.gptq(W, H, bits=3, group_size=None, refine_passes=3)
    assert (q.codes == twin["codes"]).all(axis=1).mean() > 0.9
