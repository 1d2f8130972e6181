"""Scales fitted again to their codes, alternated with sweeps."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from helpers.core_cases import layer, same_result, true_objective

import ptqkit
import ptqkit.reference as reference

ORDERS = [
    (None, "act", False),
    (16, "natural", False),
    (16, "act", False),  # g_idx
    (16, "act", True),  # groups that the order takes apart
    (16, "group-act", False),
    (4, "natural", True),
]


def before_and_after(W, H, **options):
    """The results before the first refit, after one round and after two."""
    start, once = (ptqkit.gptq(W, H, refine_passes=1, refit_rounds=r, **options) for r in (0, 1))
    return start, once, ptqkit.gptq(W, H, refine_passes=1, refit_rounds=2, **options)


@pytest.mark.parametrize("kind", ["white", "correlated", "outlier", "dead", "ill"])
@pytest.mark.parametrize("bits", [2, 4, "ternary"])
def test_no_step_raises_the_objective_of_any_row(kind, bits):
    W, H = layer(60, 64, kind)
    types = ("float32", "float16", "bfloat16")
    for (size, order, static), scale_dtype in product(ORDERS, types):
        options = {"bits": bits, "group_size": size, "order": order, "static_groups": static}
        options |= {"scale_dtype": scale_dtype, "symmetric": static}
        start, _, twice = before_and_after(W, H, **options)
        assert twice.row_objectives.shape == (6, 60)
        np.testing.assert_array_equal(twice.row_objectives[:2], start.row_objectives)
        assert np.all(np.diff(twice.row_objectives, axis=0) <= 0)
        true = true_objective(W, H, twice)
        np.testing.assert_allclose(twice.row_objectives[-1], true, rtol=0, atol=2e-4 * true.mean())
        assert true.sum() < true_objective(W, H, start).sum()
        rounded = reference.round_to_dtype(twice.scales, scale_dtype)
        np.testing.assert_array_equal(rounded, twice.scales)
        np.testing.assert_array_equal(twice.zero_points, start.zero_points)


@pytest.mark.parametrize("kind", ["correlated", "outlier", "dead"])
@pytest.mark.parametrize("shape", [(1, 16), (9, 48), (50, 64)])
def test_equals_the_twin(kind, shape):
    """The scales of the C core's first round are the twin's from the same codes."""
    W, H = layer(*shape, kind)
    for (size, order, static), bits in product(ORDERS, (2, 4, "ternary")):
        options = {"bits": bits, "group_size": size, "order": order, "static_groups": static}
        start, once, _ = before_and_after(W, H, **options)
        live = np.where(np.diag(H) == 0, 0.0, W.astype(np.float64))
        scales = reference.refit(
            live, start.codes, start.scales, start.zero_points, start.g_idx, H.astype(np.float64)
        )
        np.testing.assert_allclose(once.scales, scales, rtol=2e-3)
        assert np.abs(scales / start.scales - 1).max() > (0.01 if len(W) > 1 else 1e-3)

        def value(scale, q=start, live=live):
            E = live - scale[:, q.g_idx] * (q.codes.astype(float) - q.zero_points[:, q.g_idx])
            return reference.objective(E, H)

        np.testing.assert_allclose(value(once.scales), value(scales), rtol=1e-4)
        np.testing.assert_allclose(once.row_objectives[2], value(once.scales), rtol=2e-3)


def test_the_whole_loop_is_near_that_of_the_twin():
    W, H = layer(30, 48)
    twin = reference.gptq(W, H, max_code=7, refine_passes=1, refit_rounds=2)
    assert np.all(np.diff(twin["history"], axis=0) <= 1e-12 * twin["history"][0].max())
    q = ptqkit.gptq(W, H, bits=3, group_size=None, refine_passes=1, refit_rounds=2)
    assert twin["history"].shape == q.row_objectives.shape
    np.testing.assert_allclose(q.objective, twin["history"][-1].sum(), rtol=0.01)
    assert (q.codes == twin["codes"]).all(axis=1).mean() > 0.8


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_change_no_bit(threads):
    W, H = layer(200, 96, "outlier")
    for size, order, static in [(None, "act", False), (12, "act", True), (48, "group-act", False)]:
        options = {"bits": 3, "group_size": size, "order": order, "static_groups": static}
        one, many = (ptqkit.gptq(W, H, refit_rounds=2, threads=t, **options) for t in (1, threads))
        assert same_result(one, many)
        np.testing.assert_array_equal(one.row_objectives, many.row_objectives)


def test_rows_do_not_depend_on_each_other():
    W, H = layer(60, 64)
    whole = ptqkit.gptq(W, H, group_size=16, refit_rounds=1)
    part = ptqkit.gptq(W[7:20], H, group_size=16, refit_rounds=1)
    np.testing.assert_array_equal(part.scales, whole.scales[7:20])
    np.testing.assert_array_equal(part.codes, whole.codes[7:20])


def test_a_group_of_zeros_keeps_its_scale():
    W, H = (a.copy() for a in layer(12, 32))
    W[:, 8:16] = 0
    W[3] = 0
    start, once, _ = before_and_after(W, H, bits=2, group_size=8, symmetric=True)
    same = (start.codes.reshape(12, 4, 8) == start.zero_points[..., None]).all(axis=2)
    assert same[3].all()
    np.testing.assert_array_equal(once.scales[3], start.scales[3])
    assert np.isfinite(once.scales).all() and (once.scales > 0).all()
    assert not np.array_equal(once.scales[0], start.scales[0])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_weights_of_any_size(scale):
    W, H = layer(20, 32)
    q = ptqkit.gptq(W, H, group_size=8, refit_rounds=2)
    other = ptqkit.gptq((W * np.float32(scale)), H, group_size=8, refit_rounds=2)
    np.testing.assert_allclose(other.objective, q.objective * scale**2, rtol=0.02)


def test_without_feedback_too():
    W, H = layer(20, 32)
    start, once, _ = before_and_after(W, H, group_size=8, feedback=False)
    np.testing.assert_allclose(once.row_objectives[-1], true_objective(W, H, once), rtol=1e-3)
    assert once.objective < start.objective


@pytest.mark.parametrize("rounds", [-1, 1001, 1.5, True, None])
def test_refused(rounds):
    W, H = layer(3, 8)
    with pytest.raises((TypeError, ValueError), match="refit_rounds"):
        ptqkit.gptq(W, H, group_size=None, refit_rounds=rounds)
