"""The description of a weight grid, and the result that holds it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import ptqkit
from ptqkit import WeightGrid
from ptqkit.arrays.matrix import stack_rows


def test_the_result_holds_its_grid():
    W = np.random.default_rng(0).normal(size=(4, 16))
    for options in (
        {"bits": 3, "group_size": 8, "symmetric": True, "scale_dtype": "float16"},
        {"bits": "ternary", "group_size": 4, "symmetric": True},
        {"bits": 8, "group_size": None, "per_tensor": True},
    ):
        given = {"symmetric": False, "per_tensor": False, "scale_dtype": "float32", **options}
        q = ptqkit.rtn(W, **options)
        assert q.grid == WeightGrid(**given) and hash(q.grid) == hash(WeightGrid(**given))
        assert dataclasses.asdict(q.grid) == {name: getattr(q, name) for name in given}
        assert q.codes.max() <= q.max_code == q.grid.max_code
        if q.symmetric:
            assert (q.zero_points == q.grid.middle).all()
        assert q.rows(0, 2).grid is q.grid
    assert ptqkit.rtn(W, bits="ternary", group_size=4).symmetric


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"bits": 9}, ValueError, "bits must be an integer from 2 to 8 or 'ternary'"),
        ({"group_size": 0}, ValueError, "group_size 0 is below 1"),
        ({"group_size": 4.0}, TypeError, "group_size must be an integer or None"),
        ({"per_tensor": True}, ValueError, "pass group_size=None, not 128"),
        ({"scale_dtype": "float64"}, ValueError, "scale_dtype must be one of 'float32', 'float16'"),
    ],
)
def test_bad_grids(options, error, text):
    with pytest.raises(error, match=text):
        WeightGrid(**options)


def test_plain_values():
    grid = WeightGrid(4, np.int64(8), np.True_)
    assert type(grid.group_size) is int and grid.symmetric is True


def test_stacked_rows_are_those_of_their_parts():
    W = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    H = [np.diag(np.arange(1.0, 9)).astype(np.float32), np.eye(8, dtype=np.float32)]
    H[1][3, 3] = 0
    options = {"bits": 3, "group_size": 4, "refine_passes": 1}
    parts = [ptqkit.gptq(w, h, **options) for w, h in zip(np.split(W, 2), H, strict=True)]
    whole = stack_rows(parts)
    assert whole.shape == (6, 8) and whole.dead_inputs == 1 and whole.rtn_objectives is None
    for start, part in ((0, parts[0]), (3, parts[1])):
        rows = whole.rows(start, start + 3)
        for name in ("codes", "scales", "zero_points", "g_idx", "row_objectives"):
            np.testing.assert_array_equal(getattr(rows, name), getattr(part, name))
    assert whole.objective == pytest.approx(sum(part.objective for part in parts))
    assert stack_rows(parts[:1]) is parts[0]
    without = dataclasses.replace(parts[1], row_objectives=None)
    assert stack_rows([parts[0], without]).row_objectives is None
    for other in (
        ptqkit.rtn(W, bits=4, group_size=4),
        ptqkit.gptq(W, H[0], order="act", **options),
    ):
        with pytest.raises(ValueError, match="different grids or groups of inputs"):
            stack_rows([parts[0], other])
