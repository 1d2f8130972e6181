"""The description of a weight grid, and the result that holds it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import ptqkit
from ptqkit import WeightGrid


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
