"""Rows that make up for each other's errors."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.core_cases import layer

import ptqkit
import ptqkit.reference as reference

ORDERS = [(None, "act"), (16, "natural"), (16, "act"), (16, "group-act")]


def moments(rows, seed=3):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(4 * rows, rows)) @ rng.normal(size=(rows, rows))
    return g.T @ g


def coupled_loss(W, H, B, q, damping=0.0):
    E = W.astype(np.float64) - q.dequantize(np.float64)
    B = B / np.diagonal(B).mean() + damping * np.eye(len(B))
    return float(((B @ E @ H.astype(np.float64)) * E).sum())


@pytest.mark.parametrize("kind", ["white", "correlated", "outlier", "dead"])
@pytest.mark.parametrize("shape", [(1, 16), (20, 48)])
def test_equals_the_twin(kind, shape):
    W, H = layer(*shape, kind)
    B = moments(shape[0])
    for (size, order), bits in zip(ORDERS, (2, 3, 4, "ternary"), strict=True):
        q = ptqkit.gptq(W, H, bits=bits, group_size=size, order=order)
        found = ptqkit.couple_rows(W, q, H, B, passes=2, damping=0.25)
        damped = B / np.diagonal(B).mean() + 0.25 * np.eye(len(B))
        rank = np.argsort(-np.diagonal(H), kind="stable")
        codes = reference.couple_rows(
            W, q.codes, q.scales, q.zero_points, q.g_idx, H, damped, rank, q.max_code, 2
        )
        assert (codes != q.codes).any() or shape[0] == 1
        assert (codes == found.codes).mean() > 0.999  # float32 rounds what lies on a tie
        E = W - found.dequantize()
        np.testing.assert_allclose(
            found.row_objectives[-1], reference.objective(E, H), rtol=1e-4, atol=1e-9
        )
        np.testing.assert_array_equal(found.row_objectives[:-1], q.row_objectives)
        np.testing.assert_array_equal(found.scales, q.scales)


@pytest.mark.parametrize("kind", ["correlated", "outlier", "ill"])
def test_no_pass_raises_the_loss_and_the_first_lowers_it(kind):
    W, H = layer(60, 64, kind)
    B = moments(60)
    q = ptqkit.gptq(W, H, bits=3, group_size=16, order="group-act", refine_passes=3)
    losses = [
        coupled_loss(W, H, B, ptqkit.couple_rows(W, q, H, B, passes=p, damping=0.1), 0.1)
        for p in range(5)
    ]
    assert losses[0] == coupled_loss(W, H, B, q, 0.1)
    assert losses[1] < 0.9 * losses[0]
    assert np.all(np.diff(losses) <= 1e-6 * losses[0])


def test_a_diagonal_moment_leaves_rows_alone():
    W, H = layer(24, 32)
    q = ptqkit.gptq(W, H, bits=3, group_size=16)
    weights = np.geomspace(1e-3, 1e3, 24)
    one, other = (
        ptqkit.couple_rows(W, q, H, B, damping=0.0) for B in (np.eye(24), np.diag(weights))
    )
    np.testing.assert_array_equal(one.codes, other.codes)
    assert np.all(one.row_objectives[-1] <= q.row_objectives[-1] * (1 + 1e-6))
    assert one.objective < q.objective


def test_rows_without_gradients_and_dead_inputs_stay():
    W, H = layer(20, 40, "dead")
    B = moments(20)
    B[4] = B[:, 4] = 0.0
    q = ptqkit.gptq(W, H, bits=2, group_size=None)
    found = ptqkit.couple_rows(W, q, H, B, damping=0.0)
    changed = found.codes != q.codes
    assert changed.any() and not changed[4].any() and not changed[:, np.diagonal(H) == 0].any()
    np.testing.assert_array_equal(ptqkit.couple_rows(W, q, H, 0 * B).codes, q.codes)


def test_results_do_not_depend_on_threads_or_on_the_scale():
    W, H = layer(70, 96, "correlated")
    B = moments(70)
    q = ptqkit.gptq(W, H, bits=3, group_size=32)
    one = ptqkit.couple_rows(W, q, H, B, threads=1)
    for other in (
        ptqkit.couple_rows(W, q, H, B, threads=2),
        ptqkit.couple_rows(W, q, H, 2.0**20 * B, threads=1),
    ):
        np.testing.assert_array_equal(other.codes, one.codes)
        np.testing.assert_array_equal(other.row_objectives, one.row_objectives)


def test_wrong_arguments_are_told():
    W, H = layer(8, 16)
    q, B = ptqkit.gptq(W, H, group_size=16), moments(8)
    skew = B.copy()
    skew[0, 1] += B[0, 0]
    for wrong, text in (
        ({"B": B[:4]}, r"B must have the shape \(8, 8\)"),
        ({"B": skew}, "B must be symmetric"),
        ({"B": np.full((8, 8), np.nan)}, "B holds NaN"),
        ({"W": W[:4]}, r"W must have the shape \(8, 16\)"),
        ({"damping": -1.0}, "damping must be"),
        ({"passes": -1}, "passes must lie"),
    ):
        arguments = {"W": W, "B": B, **wrong}
        weight, second = arguments.pop("W"), arguments.pop("B")
        with pytest.raises(ValueError, match=text):
            ptqkit.couple_rows(weight, q, H, second, name="fc1", **arguments)
    for damping in (True, "0.1", None):
        with pytest.raises(TypeError, match="fc1: damping must be a number"):
            ptqkit.couple_rows(W, q, H, B, name="fc1", damping=damping)
