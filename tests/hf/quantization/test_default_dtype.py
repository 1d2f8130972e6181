"""The caller's default dtype (torch.set_default_dtype) changes no result."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
from helpers.driver_models import build, tokens

import ptqkit
from ptqkit import GPTQ, ActivationQuantization, BiasCorrection, Equalize

GROUPED = {"bits": 4, "group_size": 16}
RECIPES = {
    "quality": ("quality", GROUPED),
    "rtn": ("rtn", GROUPED),
    "propagation": ("quality", {**GROUPED, "error_propagation": 0.5}),
    "search": ([Equalize(alpha="search"), GPTQ(bits=4, group_size=16)], {}),
    "static": (
        [GPTQ(bits=8, group_size=16), ActivationQuantization(8, "tensor"), BiasCorrection()],
        {},
    ),
}


MODEL = build()


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def numbers(recipe, changes):
    """Everything that a run says in numbers."""
    result = ptqkit.quantize(copy.deepcopy(MODEL), recipe, tokens(), progress=False, **changes)
    rows = [(r.objective, r.objective_rtn, r.output_sqnr_db) for r in result.report.layers]
    grids = {
        n: (q.scale.item(), q.zero_point)
        for n, q in result.activations.items()
        if q.scale is not None
    }
    state = {k: v.clone() for k, v in result.model.state_dict().items()}
    return [m.codes for m in result.matrices.values()], rows, str(grids), state


@pytest.mark.parametrize("name", RECIPES)
def test_quantize(name):
    codes, rows, grids, state = numbers(*RECIPES[name])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        with default_dtype(dtype):
            found = numbers(*RECIPES[name])
        assert all(np.array_equal(a, b) for a, b in zip(found[0], codes, strict=True))
        assert np.array_equal(found[1], rows, equal_nan=True) and found[2] == grids
        assert all(torch.equal(found[3][k], v) for k, v in state.items())


def test_softmax_and_sensitivity():
    def run():
        model = copy.deepcopy(MODEL)
        table = ptqkit.hf.sensitivity(model, tokens(), progress=False)
        ptqkit.quantize_softmax(model, tokens(), bits=4, grid_range="search")
        return [r.sqnr_db for r in table.rows], model(tokens()).logits

    rows, logits = run()
    for dtype in (torch.bfloat16, torch.float64):
        with default_dtype(dtype):
            found = run()
        assert found[0] == rows and torch.equal(found[1], logits)
