"""Factors and corrected weights by torch against those of the core."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ptqkit
from ptqkit.errors import NotPositiveDefiniteError
from ptqkit.nn.device_solver import corrected_weights, factorize_on

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 32)) * np.linspace(0.5, 2, 32)


def hessian(values):
    found = ptqkit.Hessian(values.shape[1])
    found.update(values)
    return found


@pytest.mark.parametrize("order", ["natural", "act", "group-act"])
@pytest.mark.parametrize("dead", [False, True])
def test_factor_is_that_of_the_core(order, dead):
    values = X.copy()
    values[:, 5] *= not dead
    H, options = hessian(values), {"order": order, "group_size": 8, "damping": 0.01}
    expected, found = ptqkit.factorize(H, **options), factorize_on(CPU, H, **options)
    np.testing.assert_array_equal(found.order, expected.order)
    np.testing.assert_allclose(found.R, np.triu(expected.R), rtol=2e-5, atol=2e-6)
    assert not np.tril(found.R, -1).any() and found.damping == expected.damping


def test_damping_is_raised_and_the_pivot_named_as_by_the_core():
    values = X.copy()
    values[:, 7] = values[:, 3]
    H = hessian(values)
    expected, found = (
        f(H, damping=0.0) for f in (ptqkit.factorize, lambda *a, **k: factorize_on(CPU, *a, **k))
    )
    assert found.damping_raised == expected.damping_raised == 1
    with pytest.raises(NotPositiveDefiniteError, match="layer: .*pivot of input 3 failed"):
        factorize_on(CPU, H, damping=0.0, max_damping=0.0, name="layer")


@pytest.mark.parametrize("parts", ["G", "D", "both", "none"])
def test_corrected_weights_are_those_of_the_core(parts):
    W = RNG.normal(size=(12, 32)).astype(np.float32)
    values = X.copy()
    values[:, 5] = 0
    drift, residual = ptqkit.Drift(32, 32), ptqkit.Drift(12, 32)
    drift.update(X + 0.1 * RNG.normal(size=X.shape), values)
    noise = RNG.normal(size=(300, 12))
    residual.update(noise + values[:, :12], noise, values)
    given = [
        drift if parts in ("G", "both") else None,
        residual if parts in ("D", "both") else None,
    ]
    options = {"alpha": 0.5, "damping": 0.02}
    expected = ptqkit.target_weights(W, hessian(values), *given, **options)
    tensors = [None if g is None else torch.from_numpy(g.matrix).float() for g in given]
    found = corrected_weights(torch.from_numpy(W), hessian(values), *tensors, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(found, W) == (parts == "none")


def test_corrected_weights_need_a_positive_definite_matrix():
    values = X.copy()
    values[:, 7] = values[:, 3]
    W, drift = torch.ones(2, 32), torch.ones(32, 32)
    with pytest.raises(NotPositiveDefiniteError, match="layer: .*pivot of input 7 failed"):
        corrected_weights(W, hessian(values), drift, None, alpha=1, damping=0.0, name="layer")
    with pytest.raises(ValueError, match="beyond float32"):
        corrected_weights(W, hessian(X), drift * 3e38, None, alpha=1, damping=0.01)
