"""What rounding to nearest would have given, in the results of the solvers."""

from __future__ import annotations

import math

import numpy as np
import pytest

import ptqkit

OPTIONS = {"bits": 8, "group_size": 8, "symmetric": True}


def unlike(seed):
    """Inputs of very unlike scale, and weights of which one column is large."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((256, 64)) * 10.0 ** rng.uniform(-6, 6, 64)
    H = (2 / 256 * X.T @ X).astype(np.float32)
    W = rng.standard_normal((24, 64)).astype(np.float32)
    W[:, 7] *= 100
    return W, np.ascontiguousarray((H + H.T) / 2)


@pytest.mark.parametrize("grid", ["minmax", "hessian"])
@pytest.mark.parametrize("seed", range(6))
def test_act_order_that_is_worse_says_so(seed, grid):
    W, H = unlike(seed)
    q = ptqkit.gptq(W, H, order="act", grid=grid, **OPTIONS)
    rtn = ptqkit.rtn(W, H=H, grid=grid, **OPTIONS)
    assert q.objective_rtn == rtn.objective == rtn.objective_rtn
    np.testing.assert_array_equal(q.rtn_objectives, rtn.row_objectives[-1])
    assert q.rows(3, 9).objective_rtn == pytest.approx(q.rtn_objectives[3:9].sum())
    if seed == 5:
        assert q.objective > 2.5 * q.objective_rtn


def test_it_is_computed_where_it_is_needed_or_asked_for():
    W, H = unlike(0)
    assert math.isnan(ptqkit.gptq(W, H, **OPTIONS).objective_rtn)
    assert math.isnan(ptqkit.gptq(W, H, order="act", compare_rtn=False, **OPTIONS).objective_rtn)
    assert math.isnan(ptqkit.rtn(W, **OPTIONS).objective_rtn)
    want = ptqkit.rtn(W, H=H, **OPTIONS).objective
    for order in ("natural", "act", "group-act"):
        assert ptqkit.gptq(W, H, order=order, compare_rtn=True, **OPTIONS).objective_rtn == want
    assert (
        ptqkit.obq(W[:2], H, **OPTIONS).objective_rtn == ptqkit.rtn(W[:2], H=H, **OPTIONS).objective
    )
