"""The twins against first principles, so that agreeing with them means something."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.core_cases import layer

import ptqkit.reference as reference


def test_hessian_and_merge_by_hand():
    X = np.array([[1.0, 2], [3, 4], [5, 6]])
    np.testing.assert_allclose(reference.hessian(X), 2 / 3 * np.array([[35, 44], [44, 56]]))
    masked = reference.hessian(X, mask=[True, False, True])
    np.testing.assert_allclose(masked, np.array([[26, 32], [32, 40.0]]))
    merged = reference.merge(reference.hessian(X[:1]), 1, reference.hessian(X[1:]), 2)
    np.testing.assert_allclose(merged, reference.hessian(X))


def test_damping_by_hand():
    damped, dead = reference.dampen(np.diag([2.0, 0, 4]), 0.5)
    np.testing.assert_allclose(damped, np.diag([3.5, 1, 5.5]))
    np.testing.assert_array_equal(dead, [False, True, False])


def test_grids_by_hand():
    scale, zero, _ = reference.fit_grid(np.array([[-1.0, 0.5, 2.0]]), max_code=3)
    assert (scale[0], zero[0]) == (1, 1)
    scale, zero, _ = reference.fit_grid(np.array([[1.0, 2.0]]), max_code=4)
    assert (scale[0], zero[0]) == (0.5, 0)  # the range always holds zero
    scale, zero, _ = reference.fit_grid(np.array([[-3.0, 1.5]]), max_code=3, symmetric=True)
    assert (scale[0], zero[0]) == (2, 2)
    scale, zero, _ = reference.fit_grid(np.array([[-3.0, 1.5]]), max_code=2, symmetric=True)
    assert (scale[0], zero[0]) == (3, 1)  # ternary: -s, 0, s
    scale, zero, _ = reference.fit_grid(np.zeros((1, 4)), max_code=15)
    assert scale[0] > 0 and zero[0] == 0


def test_round_to_dtype():
    np.testing.assert_array_equal(
        reference.round_to_dtype(np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11]), "float16"),
        [1, 1 + 2.0**-9],
    )
    np.testing.assert_array_equal(
        reference.round_to_dtype(np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8]), "bfloat16"),
        [1, 1 + 2.0**-6],
    )
    assert reference.round_to_dtype(np.array([1e-30]), "float16")[0] == 2.0**-14
    torch = pytest.importorskip("torch")
    x = np.exp(np.random.default_rng(0).normal(size=1000)).astype(np.float32)
    for name in ("float16", "bfloat16"):
        want = torch.from_numpy(x).to(getattr(torch, name)).double().numpy()
        np.testing.assert_array_equal(reference.round_to_dtype(x, name), want)


def test_the_factor_is_upper_and_reproduces_h():
    _, H = layer(1, 20)
    R = reference.upper_factor(H.astype(np.float64))
    np.testing.assert_array_equal(R, np.triu(R))
    np.testing.assert_allclose(R @ R.T, H, rtol=1e-10, atol=1e-12)
    # R's rows scaled by its diagonal are what the published U says of H^-1 = U^T U
    U = np.linalg.cholesky(np.linalg.inv(H.astype(np.float64))).T
    np.testing.assert_allclose(np.linalg.inv(R), U, rtol=1e-8, atol=1e-10)


def test_the_objective_by_hand():
    H, E = np.array([[2.0, 1], [1, 3]]), np.array([[1.0, -1], [2, 0]])
    np.testing.assert_allclose(reference.objective(E, H), [3, 8])


def test_gptq_of_one_column_after_another_is_the_conditional_minimum():
    # Given the first code, the real second weight that minimises the objective is what is rounded.
    H = np.array([[2.0, 1.2], [1.2, 1.0]])
    W = np.array([[0.7, -0.4]])
    found = reference.gptq(W, H, max_code=15, damping=0)
    scale, zero = found["scales"][0, 0], found["zeros"][0, 0]
    e0 = W[0, 0] - scale * (found["codes"][0, 0] - zero)
    best = W[0, 1] + e0 * H[0, 1] / H[1, 1]
    assert found["codes"][0, 1] == reference.quantize(best, scale, zero, 15)


def test_brute_force_finds_the_least():
    H = np.array([[2.0, 1.9], [1.9, 2.0]])
    w, scale, zero = np.array([0.4, 0.4]), 1.0, 1.0
    codes = reference.brute_force(w, scale, zero, H, 3)
    errors = {
        (a, b): reference.objective(
            np.array([[w[0] - scale * (a - zero), w[1] - scale * (b - zero)]]), H
        )[0]
        for a in range(4)
        for b in range(4)
    }
    assert errors[tuple(codes)] == min(errors.values())
    assert tuple(codes) != (1, 1)  # rounding each alone is not the best here


def test_packing_by_hand():
    packed = reference.pack_rows(np.array([[1, 2, 3, 0, 7, 5]], np.uint8), 3)
    assert packed[0, 0] == 1 | 2 << 3 | 3 << 6 | 7 << 12 | 5 << 15
    np.testing.assert_array_equal(reference.unpack_rows(packed, 3, 6), [[1, 2, 3, 0, 7, 5]])


def test_patches_by_hand():
    x = np.arange(2 * 1 * 4).reshape(1, 2, 4)
    found = reference.im2col(x, [2], [2], [(1, 0)], [2], 2)
    # padded: 0 0 1 2 3 and 0 4 5 6 7; taps two apart, positions two apart
    np.testing.assert_array_equal(found, [[[0, 1], [1, 3]], [[0, 5], [5, 7]]])
    found = reference.im2col(x, [2], [2], [(1, 0)], [2], 1, "circular")
    np.testing.assert_array_equal(found, [[[3, 1, 7, 5], [1, 3, 5, 7]]])
