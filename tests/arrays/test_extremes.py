"""Weights, inputs and Hessians of any size, and Hessians without full rank."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import ptqkit

RNG = np.random.default_rng(0)
W = RNG.normal(size=(20, 64)).astype(np.float32)
X = RNG.normal(size=(200, 64)).astype(np.float32)
H = np.array((2 / 200 * X.T @ X + (2 / 200 * X.T @ X).T) / 2)
KINDS = [{}, {"order": "act"}, {"order": "group-act", "refine_passes": 2}]


@pytest.mark.parametrize("grid", ["minmax", "mse", "hessian"])
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.filterwarnings("error")
def test_powers_of_two_change_nothing_but_the_scale(grid, options):
    solvers = [
        lambda w, h: ptqkit.gptq(w, h, group_size=16, grid=grid, **options),
        lambda w, h: ptqkit.rtn(w, H=h, group_size=16, grid=grid),
    ]
    for solve in solvers:
        plain = solve(W, H)
        for w in (100, -80, 35, -35):
            for h in (0, 100, -90):
                far = solve(np.ldexp(W, w), np.ldexp(H, h))
                np.testing.assert_array_equal(far.codes, plain.codes)
                np.testing.assert_array_equal(far.scales, np.ldexp(plain.scales, w))
                want = np.ldexp(plain.row_objectives, 2 * w + h)
                np.testing.assert_allclose(far.row_objectives, want, rtol=1e-6)
    error = np.ldexp(W, 100)
    want = np.ldexp(ptqkit.objective(W, 0, H), 290)
    np.testing.assert_allclose(ptqkit.objective(error, 0, np.ldexp(H, 90)), want, rtol=1e-6)


def test_rows_of_unlike_size_are_as_alone():
    mixed = W.copy()
    mixed[3] *= np.float32(2.0**100)
    q, plain = (ptqkit.gptq(w, H, group_size=16) for w in (mixed, W))
    np.testing.assert_array_equal(q.codes, plain.codes)
    others = np.arange(20) != 3
    np.testing.assert_array_equal(q.row_objectives[:, others], plain.row_objectives[:, others])


def test_weights_that_are_too_large_for_the_scales_are_the_cause_that_is_named():
    with pytest.raises(ValueError, match="a scale does not fit float16: the weights are huge"):
        ptqkit.gptq(W * np.float32(1e30), H, group_size=16, scale_dtype="float16")


def test_a_damaged_factor_is_the_cause_that_is_named():
    F = ptqkit.factorize(H)
    for R in (np.full_like(H, np.nan), np.zeros_like(H)):
        with pytest.raises(ValueError, match="R of the Factorization is no factor of H"):
            ptqkit.gptq(W, dataclasses.replace(F, R=R), group_size=16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [2e19, 1e25, 3e38])
def test_inputs_whose_squares_overflow_are_refused_at_the_update(dtype, value, blas):
    good, bad = X, X.copy()
    bad[150, 63] = value
    if dtype == "bfloat16":
        torch = pytest.importorskip("torch")
        good, bad = (torch.from_numpy(x).to(torch.bfloat16) for x in (good, bad))
    hessian = ptqkit.Hessian(64)
    hessian.update(good)
    before = hessian.matrix.copy()
    for _ in range(2):
        with pytest.raises(ValueError, match="squares add up beyond float32; the batch was not"):
            hessian.update(bad)
    assert hessian.tokens == 200
    np.testing.assert_array_equal(hessian.matrix, before)
    mask = np.arange(200) != 150
    hessian.update(bad, mask)  # a token that does not count
    assert hessian.tokens == 399 and np.isfinite(hessian.matrix).all()


def test_sums_that_just_fit_are_taken_and_the_next_one_is_not(blas):
    hessian, large = ptqkit.Hessian(64), np.full((1, 64), 1.29e19, np.float32)
    hessian.update(large)
    assert np.isfinite(hessian.matrix).all()
    with pytest.raises(ValueError, match="beyond float32"):
        hessian.update(large)
    many = ptqkit.Hessian(64)
    many.update(np.full((1000, 64), 4e17, np.float32))
    np.testing.assert_allclose(many.matrix, 3.2e35, rtol=1e-5)
    twice = hessian.copy()
    twice.merge(hessian)
    with pytest.raises(ValueError, match="overflow float32; nothing was added"):
        twice.merge(hessian)
    assert twice.tokens == 2 and np.isfinite(twice.matrix).all()
    with pytest.raises(ValueError, match="overflows float32 at 1000000 tokens"):
        ptqkit.Hessian.from_matrix(np.eye(4, dtype=np.float32) * 1e34, 10**6)


@pytest.mark.parametrize("order", ["natural", "act"])
@pytest.mark.parametrize("tokens, spread", [(1, 0), (8, 3), (16, 0)])
def test_no_objective_of_a_rank_deficient_hessian_is_negative_or_noise(tokens, spread, order):
    rng = np.random.default_rng(tokens)
    x = (rng.normal(size=(tokens, 256)) * 10.0 ** rng.uniform(-spread, spread, 256)).astype("f4")
    hessian = ptqkit.Hessian(256)
    hessian.update(x)
    h = hessian.matrix.astype(np.float64)
    for passes in (0, 3):
        q = ptqkit.gptq(
            W[:, :1] * np.ones(256, "f4") + rng.normal(size=(20, 256)).astype("f4"),
            hessian,
            group_size=32,
            order=order,
            refine_passes=passes,
        )
        assert (q.row_objectives >= 0).all() and (np.diff(q.row_objectives, axis=0) <= 0).all()
    w = rng.normal(size=(20, 256)).astype(np.float32)
    q = ptqkit.gptq(w, hessian, group_size=32, order=order, refine_passes=3)
    e = w.astype(np.float64) - q.dequantize()
    exact = np.einsum("ij,jk,ik->i", e, h, e)
    # what float32 entries of H leave unknown of a sum that cancels
    noise = 2.0**-24 * (e**2 @ np.diagonal(h))
    for found in (q.row_objectives[-1], ptqkit.objective(w, q.dequantize(), hessian)):
        assert (found >= 0).all()
        assert np.all(np.abs(found - exact) <= 1e-3 * np.abs(exact) + 3 * noise)


def test_an_indefinite_matrix_keeps_its_negative_values():
    h = np.diag(np.array([1, 1, 1, 1], np.float32))
    h[0, 1] = h[1, 0] = -3
    found = ptqkit.objective(np.array([[1, 1, 0, 0], [1, -1, 0, 0]], np.float32), 0, h)
    np.testing.assert_allclose(found, [-4, 8])
