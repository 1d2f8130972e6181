"""Hessians and factors on a device, which the host has when it asks for them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from ptqkit.arrays.factorization import factorize
from ptqkit.arrays.hessian import Hessian
from ptqkit.nn import device_factor
from ptqkit.nn.device_factor import factor_on, hessian_on
from ptqkit.nn.device_solver import factorize_on
from ptqkit.nn.statistics import TorchHessian

CPU = torch.device("cpu")
X = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))


def there():
    seen = TorchHessian(8, CPU)
    seen.update(X)
    return seen.finish_there()


def host(*values):
    found = Hessian(8)
    for value in values:
        found.update(value)
    return found


def test_nothing_comes_to_the_host_before_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(device_factor, "_fixed", None)  # cannot be called
    found = there()
    factor = factorize_on(CPU, found, order="act")
    assert hessian_on(CPU, found) is hessian_on(CPU, factor) is found.matrix_there
    assert factor_on(CPU, factor) is factor.R_there and found.tokens == 60
    monkeypatch.undo()
    expected = factorize(host(X), order="act")
    np.testing.assert_array_equal(factor.order, expected.order)
    np.testing.assert_allclose(factor.R, np.triu(expected.R), rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(factor.matrix, expected.matrix, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ask", [True, False])
def test_it_is_a_hessian_that_goes_on_on_the_host(ask):
    found = there()
    if ask:
        np.testing.assert_allclose(found.matrix, host(X).matrix, rtol=1e-5, atol=1e-6)
    for changed in (found.copy(), pickle.loads(pickle.dumps(found)), found):
        changed.update(X + 1)
        expected = host(X, X + 1)
        np.testing.assert_allclose(changed.matrix, expected.matrix, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(hessian_on(CPU, changed), expected.matrix, rtol=1e-5, atol=1e-6)
    merged = there()
    merged.merge(host(X + 1))
    np.testing.assert_allclose(hessian_on(CPU, merged), expected.matrix, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="read-only"):
        there().matrix[0, 0] = 0
