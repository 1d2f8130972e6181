"""Objectives of rows by torch against the core's."""

from __future__ import annotations

import numpy as np
import torch

import ptqkit
from ptqkit.nn import row_objectives as module
from ptqkit.nn.row_objectives import row_objectives


def test_they_are_those_of_the_core_to_rounding(monkeypatch):
    draw = np.random.default_rng(0)
    x = draw.standard_normal((200, 48)).astype(np.float32)
    errors = draw.standard_normal((37, 48)).astype(np.float32)
    given = torch.tensor(errors)
    H = ptqkit.Hessian(48)
    H.update(x)
    expected = ptqkit.objective(errors, 0, H)
    matrix = torch.tensor(H.matrix)
    whole = row_objectives(given, matrix)
    assert whole.dtype == torch.float64
    np.testing.assert_allclose(whole, expected, rtol=2e-6)
    monkeypatch.setattr(module, "_BLOCK", 48 * 10)
    np.testing.assert_allclose(row_objectives(given, matrix), expected, rtol=2e-6)
