"""tr((W - W_hat) H (W - W_hat)^T) row by row."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.core_cases import EPS, layer

import ptqkit
import ptqkit.reference as reference


@pytest.mark.parametrize("rows", [1, 8, 24, 47, 49])
@pytest.mark.parametrize("n", [1, 4, 7, 8, 9, 48, 95, 130, 257])
def test_against_the_twin(rows, n):
    W, H = layer(rows, n, "outlier")
    W_hat = np.round(W)
    E = (W - W_hat).astype(np.float64)
    found = ptqkit.objective(W, W_hat, H)
    bound = n * EPS * np.einsum("rj,jk,rk->r", np.abs(E), np.abs(H), np.abs(E))
    assert np.all(np.abs(found - reference.objective(E, H)) <= bound)
    assert found.shape == (rows,) and found.dtype == np.float64
    np.testing.assert_allclose(
        ptqkit.objective(W, 0, H),
        reference.objective(W, H),
        rtol=0,
        atol=(n * EPS * np.einsum("rj,jk,rk->r", np.abs(W), np.abs(H), np.abs(W))).max(),
    )


def test_equal_matrices_give_exactly_zero():
    W, H = layer(10, 20)
    np.testing.assert_array_equal(ptqkit.objective(W, W, H), 0)


def test_threads_change_no_bit():
    W, H = layer(150, 64)
    first = ptqkit.objective(W, 0, H, threads=1)
    for threads in (2, 3, 8):
        np.testing.assert_array_equal(ptqkit.objective(W, 0, H, threads=threads), first)


def test_it_is_the_output_error():
    rng = np.random.default_rng(0)
    X, E = rng.normal(size=(200, 30)), rng.normal(size=(5, 30)).astype(np.float32)
    H = ptqkit.Hessian(30)
    H.update(X)
    output = 2 * ((X @ E.T.astype(float)) ** 2).mean(axis=0)
    np.testing.assert_allclose(ptqkit.objective(E, 0, H), output, rtol=1e-5)
