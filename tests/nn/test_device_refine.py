"""Passes over the codes and scales fitted again, by torch against those of the core."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.core_cases import layer

import ptqkit
from ptqkit.nn import device_refine
from ptqkit.nn.device_matrix import matrix_on
from ptqkit.nn.device_refine import refine_on

CPU = torch.device("cpu")

GRIDS = [(None, "act"), (16, "natural"), (16, "act"), (16, "group-act")]


def refined(W, start, F, **steps):
    return refine_on(torch.tensor(W), matrix_on(CPU, start), F, **steps).finish()


@pytest.mark.parametrize("kind", ["white", "correlated", "outlier", "dead"])
@pytest.mark.parametrize(("size", "order"), GRIDS)
@pytest.mark.parametrize(("passes", "rounds"), [(1, 0), (0, 1), (1, 2)])
def test_equals_the_core(kind, size, order, passes, rounds):
    W, H = layer(52, 48, kind)
    F = ptqkit.factorize(H, order=order, group_size=size)
    options = {"bits": 3, "group_size": size, "scale_dtype": "bfloat16"}
    steps = {"refine_passes": passes, "refit_rounds": rounds}
    expected = ptqkit.gptq(W, F, **options, **steps)
    start = ptqkit.gptq(W, F, **options)
    found = refined(W, start, F, **steps)
    assert (found.codes != start.codes).any()
    assert (found.scales != start.scales).any() == (rounds > 0)
    # float32 rounds what lies on a tie, and what follows from it.
    assert (found.codes == expected.codes).mean() > 0.99
    assert (found.scales == expected.scales).mean() > 0.97
    assert found.row_objectives.shape == expected.row_objectives.shape
    own = ptqkit.objective(W * ~F.dead, found.dequantize(), H)
    np.testing.assert_allclose(found.row_objectives[-1], own, rtol=1e-3, atol=1e-6 * own.max())
    total, other = found.row_objectives.sum(1), expected.row_objectives.sum(1)
    np.testing.assert_allclose(total, other, rtol=5e-3)
    assert (np.diff(total) <= 1e-6 * total[0]).all()


def test_rows_are_fitted_in_parts_that_fit_in_memory(monkeypatch):
    W, H = layer(52, 48)
    F = ptqkit.factorize(H, group_size=16)
    start = ptqkit.gptq(W, F, bits=3, group_size=16)
    own, parts = device_refine._refitted, []

    def refitted(weight, *rest):
        parts.append(len(weight))
        return own(weight, *rest)

    monkeypatch.setattr(device_refine, "_refitted", refitted)
    found = []
    for memory in (1 << 30, 20 * 8 * 3**2):
        monkeypatch.setattr(device_refine, "_SYSTEMS", memory)
        found.append(refined(W, start, F, refine_passes=0, refit_rounds=1))
    assert parts == [52, 20, 20, 12]
    one, two = found
    assert (one.scales != start.scales).any()
    np.testing.assert_allclose(one.scales, two.scales, rtol=1e-4)
    np.testing.assert_allclose(one.row_objectives, two.row_objectives, rtol=1e-3)


def test_a_group_of_zeros_keeps_its_scale():
    W, H = layer(20, 48)
    W = W.copy()
    W[:, 16:32] = 0
    F = ptqkit.factorize(H, group_size=16)
    options = {"bits": 3, "group_size": 16, "symmetric": True, "feedback": False}
    start = ptqkit.gptq(W, F, **options)
    found = refined(W, start, F, refine_passes=0, refit_rounds=1)
    np.testing.assert_array_equal(found.scales[:, 1], start.scales[:, 1])
    assert np.isfinite(found.scales).all() and (found.scales != start.scales).any()
