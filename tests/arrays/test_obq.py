"""OBQ, the slow reference, and brute force on tiny layers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from helpers.core_cases import layer, max_code, same_result, true_objective

import ptqkit
import ptqkit.reference as reference


@pytest.mark.parametrize("shape", [(1, 1, None), (5, 8, None), (20, 33, 11), (9, 48, 16)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, "ternary"])
def test_codes_equal_the_twins(shape, bits):
    rows, n, size = shape
    for kind, symmetric in product(("correlated", "dead", "outlier"), (False, True)):
        W, H = layer(rows, n, kind)
        q = ptqkit.obq(W, H, bits=bits, group_size=size, symmetric=symmetric)
        # the twin on the grids that the core has fitted, which are float32
        damped, dead = reference.dampen(H, 0.01)
        zeroed = np.where(dead, 0.0, W.astype(np.float64))
        scale, zero = q.scales.astype(float)[:, q.g_idx], q.zero_points.astype(float)[:, q.g_idx]
        inverse = np.linalg.inv(damped)
        want = [
            reference.solvers._obq_row(w, inverse.copy(), s, z, max_code(bits))
            for w, s, z in zip(zeroed, scale, zero, strict=True)
        ]
        np.testing.assert_array_equal(q.codes, want)
        grids = ptqkit.rtn(zeroed, bits=bits, group_size=size, symmetric=symmetric)
        np.testing.assert_array_equal(q.scales, grids.scales)
        np.testing.assert_allclose(
            q.row_objectives[0], true_objective(W, H, q), rtol=1e-4, atol=1e-9
        )


def test_the_twin_itself():
    W, H = layer(12, 20)
    codes, scales, zeros = reference.obq(W, H, max_code=15)
    q = ptqkit.obq(W, H, bits=4)
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_allclose(q.scales, scales, rtol=3e-7)
    np.testing.assert_array_equal(q.zero_points, zeros)


def test_obq_beats_gptq_which_beats_rtn_in_sum():
    W, H = layer(60, 40, "correlated", 3)
    for bits in (2, 3, 4):
        options = {"bits": bits, "group_size": None}
        rtn = ptqkit.rtn(W, H=H, **options).objective
        gptq = ptqkit.gptq(W, H, **options).objective
        obq = ptqkit.obq(W, H, **options).objective
        assert obq < gptq < 0.8 * rtn


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_brute_force_is_a_lower_bound(n):
    W, H = layer(12, n, "correlated", 11)
    static = {"bits": 2, "group_size": None}
    solved = {
        "rtn": ptqkit.rtn(W, H=H, **static),
        "gptq": ptqkit.gptq(W, H, **static),
        "swept": ptqkit.gptq(W, H, refine_passes=5, **static),
        "obq": ptqkit.obq(W, H, **static),
    }
    grids = solved["rtn"]
    best = np.empty(len(W))
    for r, w in enumerate(W.astype(np.float64)):
        s, z = float(grids.scales[r, 0]), float(grids.zero_points[r, 0])
        codes = reference.brute_force(w, s, z, H, 3)
        best[r] = reference.objective((w - s * (codes - z))[None], H)[0]
    for name, q in solved.items():
        assert q.scales.tobytes() == grids.scales.tobytes(), name
        assert np.all(true_objective(W, H, q) >= best * (1 - 1e-9)), name
    # The solvers are not far off in sum: measured at most 1.22, 1.35 and 1.82 times the bound.
    for name, ratio in (("swept", 1.3), ("gptq", 1.5), ("obq", 2.0)):
        assert true_objective(W, H, solved[name]).sum() <= ratio * best.sum() + 1e-12, name


def test_threads_change_nothing():
    W, H = layer(20, 30)
    first = ptqkit.obq(W, H, threads=1)
    for threads in (2, 3, 8):
        assert same_result(ptqkit.obq(W, H, threads=threads), first)
