"""Round to nearest on one grid for the whole matrix."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from helpers.core_cases import layer, max_code, same_result, true_objective

import ptqkit
import ptqkit.reference as reference

BITS = [2, 3, 4, 5, 8, "ternary"]


def quantized(W, **options):
    return ptqkit.rtn(W, group_size=None, per_tensor=True, **options)


@pytest.mark.parametrize("shape", [(1, 1), (5, 8), (23, 24), (49, 49), (97, 96), (3, 257)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_against_the_twin(shape, symmetric):
    W, _ = layer(*shape)
    for bits in BITS:
        q = quantized(W, bits=bits, symmetric=symmetric)
        codes, scales, zeros = reference.rtn(
            W, max_code=max_code(bits), per_tensor=True, symmetric=q.symmetric
        )
        assert q.per_tensor and q.group_size is None and q.scales.shape == (len(W), 1)
        assert len(np.unique(q.scales)) == len(np.unique(q.zero_points)) == 1
        np.testing.assert_allclose(q.scales, scales, rtol=3e-7)
        np.testing.assert_array_equal(q.zero_points, zeros)
        far = np.ones(W.shape, bool)
        if q.symmetric:  # the largest weight lies on a tie, which a float32 scale decides
            far = np.abs(W) < 0.999 * np.abs(W).max()
        np.testing.assert_array_equal(q.codes[far], codes[far])
        steps = q.codes.astype(float) - q.zero_points
        np.testing.assert_array_equal(q.dequantize(), (steps * q.scales).astype(np.float32))


def test_it_is_one_long_row():
    W, _ = layer(12, 40)
    for bits, symmetric in product(BITS, (True, False)):
        for scale_dtype in ("float32", "float16", "bfloat16"):
            options = {"bits": bits, "symmetric": symmetric, "scale_dtype": scale_dtype}
            q = quantized(W, **options)
            row = ptqkit.rtn(W.reshape(1, -1), group_size=None, **options)
            np.testing.assert_array_equal(q.codes.reshape(1, -1), row.codes)
            np.testing.assert_array_equal(np.unique(q.scales), row.scales[0])
            np.testing.assert_array_equal(np.unique(q.zero_points), row.zero_points[0])


def test_the_result_object():
    W, H = layer(20, 48)
    q = quantized(W, bits=4, H=H)
    np.testing.assert_allclose(q.row_objectives[0], true_objective(W, H, q), rtol=1e-5)
    assert q.bits_per_weight == pytest.approx(4 + (32 + 4) / W.size)
    half = quantized(W, bits=8, symmetric=True, scale_dtype="float16")
    assert half.bits_per_weight == pytest.approx(8 + 16 / W.size)
    part = q.rows(3, 8)
    assert part.per_tensor
    np.testing.assert_array_equal(part.dequantize(), q.dequantize()[3:8])
    assert not ptqkit.rtn(W, group_size=None).per_tensor
    assert not ptqkit.gptq(W, H, group_size=None).per_tensor


def test_options_of_the_grid():
    W = np.abs(layer(10, 30)[0]) + 1  # asymmetric zero-point 0
    assert np.all(quantized(W).zero_points == 0)
    assert np.all(quantized(W, min_zero_point=1).zero_points == 1)
    for dtype in ("float16", "bfloat16"):
        scale = quantized(W, scale_dtype=dtype).scales
        np.testing.assert_array_equal(scale, reference.round_to_dtype(scale, dtype))
    zero = quantized(np.zeros((4, 6), np.float32))
    assert np.all(zero.scales > 0) and np.all(zero.dequantize() == 0)


def test_threads_and_layouts_change_nothing():
    W, _ = layer(150, 65)
    W = np.tile(W, (40, 1))
    first = quantized(W, bits=8, threads=1)
    for threads in (2, 3, 8):
        assert same_result(quantized(W, bits=8, threads=threads), first)
    for other in (np.asfortranarray(W), W.astype(np.float64), W.astype(">f4")):
        assert same_result(quantized(other, bits=8), first)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"group_size": 128}, "layer.0: per_tensor=True is one grid for all of W"),
        ({"group_size": 8}, "pass group_size=None"),
        ({"grid": "mse"}, "per_tensor=True needs grid='minmax'"),
        ({"grid": "hessian", "H": np.eye(8)}, "per_tensor=True needs grid='minmax'"),
        ({"bits": 9}, "bits must be"),
        ({"W": np.full((2, 8), np.nan)}, "W holds NaN or Inf"),
        ({"W": np.full((2, 8), 1e9), "scale_dtype": "float16"}, "a scale does not fit float16"),
    ],
)
def test_bad_input(options, text):
    options = {"W": np.ones((3, 8)), "group_size": None, "name": "layer.0"} | options
    with pytest.raises(ValueError, match=text):
        ptqkit.rtn(per_tensor=True, **options)


def test_gptq_has_no_such_option():
    W, H = layer(4, 8)
    with pytest.raises(TypeError, match="per_tensor"):
        ptqkit.gptq(W, H, group_size=None, per_tensor=True)
