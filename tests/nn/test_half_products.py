"""Sums of products of 16-bit numbers without widening: exact products, and where they are used."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptqkit.nn import half_products, statistics
from ptqkit.nn.statistics import TorchDrift, TorchHessian

HALVES = [torch.bfloat16, torch.float16]


def values(dtype, tokens=300, channels=16):
    return torch.randn(tokens, channels, generator=torch.Generator().manual_seed(0)).to(dtype)


def hessian(x, mask=None):
    found = TorchHessian(x.shape[-1], "cpu")
    found.update(x, mask)
    return found.finish().matrix


def twin(total, left, right):
    """What the device does, on the host: exact products, sums in float32."""
    assert left.dtype == right.dtype and left.dtype in HALVES and total.dtype == torch.float32
    total.addmm_(left.float().T, right.float())


@pytest.fixture
def tensor_cores(monkeypatch):
    """A host that multiplies halves; yields the tokens of each product."""
    calls = []

    def add(total, left, right):
        calls.append(len(right))
        twin(total, left, right)

    monkeypatch.setattr(half_products, "_add", add)
    monkeypatch.setattr(statistics, "multiplies_halves", lambda device, dtype: dtype in HALVES)
    return calls


@pytest.mark.parametrize("dtype", HALVES)
def test_products_are_exact_in_float32(dtype):
    x = values(dtype)
    outer = x.float()[:, :, None] * x.float()[:, None, :]
    exact = x.double()[:, :, None] * x.double()[:, None, :]
    assert torch.equal(outer.double(), exact)
    one = hessian(x[:1])
    np.testing.assert_array_equal(one.astype(np.float64), 2 * exact[0].numpy())


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_are_those_of_float32_to_rounding(dtype, tensor_cores):
    x = values(dtype)
    exact = 2 * (x.double().T @ x.double()).numpy() / len(x)
    np.testing.assert_allclose(hessian(x), exact, rtol=0, atol=1e-6 * exact.max())
    assert tensor_cores == [256, 44]
    mask = torch.arange(300) % 3 > 0
    found, kept = hessian(x, mask), x[mask].double()
    np.testing.assert_allclose(
        found, 2 * (kept.T @ kept).numpy() / len(kept), rtol=0, atol=1e-6 * exact.max()
    )
    assert tensor_cores == [256, 44, 200]


def test_long_sums_are_made_of_short_ones(tensor_cores):
    hessian(values(torch.bfloat16, 600, 2))
    assert tensor_cores == [256, 256, 88]


def test_differences_are_multiplied_in_parts_without_rounding(tensor_cores):
    a, b = values(torch.bfloat16), values(torch.bfloat16).flip(0) * 3e-4
    found = TorchDrift(16, 16, "cpu")
    found.update(a, b)
    partial = ((a.double() - b.double())[:, :, None] * b.double()[:, None, :]).cumsum(0)
    # Each addition in float32 rounds by at most 2^-24 of the sum so far, as if at random.
    deviation = 2**-24 / 3**0.5 * partial.square().sum(0).sqrt()
    errors = found.finish().matrix - 2 / len(a) * partial[-1]
    assert (errors.abs() < 4 * 2 / len(a) * deviation).all()
    assert tensor_cores == [300] * 3
    found.update(values(torch.bfloat16, 1030, 16), values(torch.bfloat16, 1030, 16))
    assert tensor_cores[3:] == [1024] * 3 + [6] * 3
    rest = (a.float() - b.float())[:1]
    for _ in range(3):
        rest = rest - rest.bfloat16()
    assert (
        not rest.any()
        and (a.float() - b.float()).bfloat16().float().ne(a.float() - b.float()).any()
    )


def test_float32_is_multiplied_as_before(request):
    x = values(torch.float32)
    before = hessian(x)
    calls = request.getfixturevalue("tensor_cores")
    np.testing.assert_array_equal(hessian(x), before)
    assert not calls


def test_a_device_is_asked_whether_it_can(monkeypatch):
    cpu = torch.device("cpu")
    ask = half_products.multiplies_halves.__wrapped__
    assert not ask(cpu, torch.bfloat16) and not ask(cpu, torch.float32)
    monkeypatch.setattr(half_products, "_add", twin)
    assert ask(cpu, torch.bfloat16) and ask(cpu, torch.float16)

    def rounding(total, left, right):
        total.copy_((total.to(right.dtype) + left.T @ right).float())

    monkeypatch.setattr(half_products, "_add", rounding)
    assert not ask(cpu, torch.bfloat16)
