"""Round to nearest."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from helpers.core_cases import layer, max_code, same_result, true_objective

import ptqkit
import ptqkit.reference as reference

BITS = [2, 3, 4, 5, 6, 7, 8, "ternary"]


@pytest.mark.parametrize("shape", [(1, 1), (5, 8), (23, 24), (49, 49), (97, 96), (3, 256)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_against_the_twin(shape, symmetric):
    rows, n = shape
    W, _ = layer(rows, n)
    for bits, size in product(BITS, {None, 1, n, *(s for s in (7, 8, 32) if n % s == 0)}):
        q = ptqkit.rtn(W, bits=bits, group_size=size, symmetric=symmetric)
        codes, scales, zeros = reference.rtn(
            W, max_code=max_code(bits), group_size=size, symmetric=q.symmetric
        )
        np.testing.assert_allclose(q.scales, scales, rtol=3e-7)
        np.testing.assert_array_equal(q.zero_points, zeros)
        if not q.symmetric:
            np.testing.assert_array_equal(q.codes, codes)
        else:  # the largest weight lies on a tie, which a scale rounded to float32 decides
            far = np.abs(W) < 0.999 * np.repeat(
                np.abs(W).reshape(rows, len(zeros[0]), -1).max(2), n // len(zeros[0]), axis=1
            )
            np.testing.assert_array_equal(q.codes[far], codes[far])
        np.testing.assert_array_equal(q.g_idx, np.arange(n) // (size or n))


def test_ties_go_to_even():
    W = np.array([[0, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 15]], np.float32)
    q = ptqkit.rtn(W, bits=4, group_size=8)
    np.testing.assert_array_equal(q.codes, [[0, 0, 2, 2, 4, 4, 6, 15]])
    np.testing.assert_array_equal(ptqkit.rtn(-W, bits=4, group_size=8).codes, 15 - q.codes)


def test_dequantize_and_the_result_object():
    W, H = layer(20, 48)
    q = ptqkit.rtn(W, bits=3, group_size=16)
    assert np.isnan(q.objective) and q.sweep_objectives == () and q.row_objectives is None
    zero = q.zero_points.astype(int)[:, q.g_idx]
    exact = q.scales.astype(np.float64)[:, q.g_idx] * (q.codes.astype(int) - zero)
    np.testing.assert_array_equal(q.dequantize(np.float64), exact)
    np.testing.assert_array_equal(q.dequantize(), exact.astype(np.float32))
    assert q.dequantize().dtype == np.float32
    assert q.bits_per_weight == pytest.approx(3 + (32 + 3) / 16)
    assert not q.permuted_groups
    half = q.rows(5, 9)
    np.testing.assert_array_equal(half.dequantize(), q.dequantize()[5:9])
    q = ptqkit.rtn(W, bits=3, group_size=16, H=H)
    np.testing.assert_allclose(q.row_objectives[0], true_objective(W, H, q), rtol=1e-5)
    assert q.rows(5, 9).objective == pytest.approx(q.row_objectives[0, 5:9].sum())


def test_threads_and_layouts_change_nothing():
    W, H = layer(150, 64)
    options = {"bits": 3, "group_size": 16, "grid": "hessian", "H": H}
    first = ptqkit.rtn(W, threads=1, **options)
    for threads in (2, 3, 8):
        assert same_result(ptqkit.rtn(W, threads=threads, **options), first)
    for other in (np.asfortranarray(W), W.astype(np.float64), W.astype(">f4"), W.tolist()):
        assert same_result(ptqkit.rtn(other, **options), first)
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(W.copy())
    assert same_result(ptqkit.rtn(tensor.requires_grad_(), **options), first)
    rounded = tensor.detach().to(torch.bfloat16)
    want = ptqkit.rtn(rounded.float().numpy(), **options)
    assert same_result(ptqkit.rtn(rounded, **options), want)
