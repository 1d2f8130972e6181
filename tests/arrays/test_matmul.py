"""Products of int8 codes."""

from __future__ import annotations

import numpy as np
import pytest

import ptqkit
import ptqkit._core as _core
import ptqkit.reference as reference
from ptqkit.arrays.matmul import LONGEST_SUM

SHAPES = [  # tokens, outputs, inputs: around the tiles of 4 x 2, 64 x 128 and 1024
    (1, 1, 1),
    (3, 2, 5),
    (4, 3, 31),
    (5, 7, 32),
    (63, 127, 33),
    (65, 129, 64),
    (70, 260, 100),
    (4, 6, 1023),
    (5, 5, 1024),
    (6, 3, 1025),
    (2, 3, 2100),
]


def layer(tokens: int, outputs: int, n: int, seed: int = 0):
    rng = np.random.default_rng([seed, tokens, outputs, n])
    X = rng.normal(size=(tokens, n)) + 0.5 * rng.normal(size=n)
    return X.astype(np.float32), rng.normal(size=(outputs, n)).astype(np.float32)


def twin(x, w):
    """The product from the codes: exact integers, one rounding to float32."""
    n = x.shape[-1]
    parts = []
    for q in (x, w):
        codes = q.codes.reshape(-1, n)
        parts += [codes, q.zero_points.reshape(-1, 1), q.scales.reshape(-1, 1)]
    qx, zx, sx, qw, zw, sw = parts
    return reference.integer_matmul(qx, zx, sx, qw, zw, sw).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_against_the_int64_twin(shape, granularity):
    X, W = layer(*shape)
    for symmetric in (True, False):
        for bits in (8, 4):
            qx = ptqkit.quantize_activations(X, bits, symmetric=symmetric, granularity=granularity)
            for qw in (
                ptqkit.quantize_activations(W),
                ptqkit.quantize_activations(W, 8, symmetric=False),
                ptqkit.quantize_activations(W, 6, granularity=granularity, narrow_range=True),
            ):
                y = ptqkit.int8_matmul(qx, qw)
                assert y.dtype == np.float32 and y.shape == shape[:2]
                np.testing.assert_array_equal(y, twin(qx, qw))


def test_close_to_the_float_product():
    X, W = layer(50, 40, 512)
    y = ptqkit.int8_matmul(ptqkit.quantize_activations(X), ptqkit.quantize_activations(W))
    want = X.astype(float) @ W.T.astype(float)
    assert np.linalg.norm(y - want) < 0.015 * np.linalg.norm(want)
    simulated = ptqkit.quantize_activations(X).dequantize(float)
    simulated = simulated @ ptqkit.quantize_activations(W).dequantize(float).T
    np.testing.assert_allclose(y, simulated, rtol=1e-6, atol=1e-6 * np.abs(simulated).max())


def test_extreme_codes_do_not_overflow():
    n = LONGEST_SUM
    x = ptqkit.QuantizedActivations(
        np.full((1, n), -128, np.int8),
        np.ones((1, 1), np.float32),
        np.full((1, 1), 127, np.int8),
        8,
        "token",
        False,
    )
    assert ptqkit.int8_matmul(x, x) == np.float32(n * 255 * 255)
    plain = ptqkit.QuantizedActivations(
        x.codes, x.scales, np.zeros((1, 1), np.int8), 8, "token", True
    )
    assert ptqkit.int8_matmul(plain, plain) == np.float32(n * 128 * 128)
    codes = np.zeros((1, n + 1), np.int8)
    longer = ptqkit.QuantizedActivations(codes, x.scales, x.zero_points, 8, "token", False)
    with pytest.raises(ValueError, match=f"more than {n} products"):
        ptqkit.int8_matmul(longer, longer)
    one, zero, y = np.ones(1, np.float32), np.zeros(1, np.int8), np.zeros((1, 1), np.float32)
    with pytest.raises(ValueError, match="out of range"):
        _core.int8_matmul(codes, one, zero, codes, one, zero, None, None, y, 1)


def test_scales_far_apart_round_once():
    for size, other, n in ((1e-22, 1e-20, 1000), (1e30, 1e-30, 8), (1e-30, 1e30, 8)):
        # the product of the first two scales is no float32
        x, w = (ptqkit.quantize_activations(np.full((1, n), v)) for v in (size, other))
        np.testing.assert_allclose(ptqkit.int8_matmul(x, w), n * size * other, rtol=0.01)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_tensor", [True, False])
def test_weights_of_rtn(bits, symmetric, per_tensor):
    X, W = layer(20, 30, 96)
    q = ptqkit.rtn(W, bits=bits, group_size=None, symmetric=symmetric, per_tensor=per_tensor)
    x = ptqkit.quantize_activations(X, symmetric=False)
    y = ptqkit.int8_matmul(x, q)
    want = x.dequantize(float) @ q.dequantize(float).T
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("sides", ["x", "w", "same", "different"])
def test_outlier_columns_are_added_in_float32(symmetric, sides):
    X, W = layer(33, 150, 200)
    X[:, [3, 50, 199]] *= 80
    mask = ptqkit.outlier_columns(X, 20)
    assert 3 <= mask.sum() < 20
    other = np.arange(200) % 70 == 3
    masks = {"x": (mask, None), "w": (None, mask), "same": (mask, mask), "different": (mask, other)}
    x, w = (
        ptqkit.quantize_activations(a, symmetric=symmetric, outliers=m)
        for a, m in zip((X, W), masks[sides], strict=True)
    )
    y = ptqkit.int8_matmul(x, w)
    exact = x.dequantize(float) @ w.dequantize(float).T
    bound = 210 * 2.0**-23 * np.abs(x.dequantize(float)) @ np.abs(w.dequantize(float)).T
    assert np.all(np.abs(y - exact) <= bound)
    if sides == "same":  # LLM.int8(): the outlier part is exact, the rest as without them
        rest = ptqkit.int8_matmul(
            *(ptqkit.quantize_activations(a[:, ~mask], symmetric=True) for a in (X, W))
        )
        part = X[:, mask].astype(float) @ W[:, mask].T.astype(float)
        if symmetric:
            np.testing.assert_allclose(y - part, rest, atol=1e-5 * np.abs(part).max())
        plain = ptqkit.int8_matmul(ptqkit.quantize_activations(X), ptqkit.quantize_activations(W))
        want = X.astype(float) @ W.T.astype(float)
        assert np.abs(y - want).max() < 0.2 * np.abs(plain - want).max()


def test_shapes():
    X, W = layer(24, 6, 16)
    w = ptqkit.quantize_activations(W)
    want = ptqkit.int8_matmul(ptqkit.quantize_activations(X), w)
    q = ptqkit.quantize_activations(X.reshape(2, 3, 4, 16))
    np.testing.assert_array_equal(ptqkit.int8_matmul(q, w), want.reshape(2, 3, 4, 6))
    q = ptqkit.quantize_activations(X[5])
    np.testing.assert_array_equal(ptqkit.int8_matmul(q, w), want[5])
    empty = ptqkit.quantize_activations(np.zeros((0, 2, 16)))
    assert ptqkit.int8_matmul(empty, w).shape == (0, 2, 6)


def test_threads_change_nothing():
    X, W = layer(300, 500, 130)
    mask = np.arange(130) % 40 == 1
    for options in ({}, {"symmetric": False, "outliers": mask}):
        x, w = (ptqkit.quantize_activations(a, **options) for a in (X, W))
        one = ptqkit.int8_matmul(x, w, threads=1)
        for threads in (2, 3, 8):
            np.testing.assert_array_equal(ptqkit.int8_matmul(x, w, threads=threads), one)


def test_bad_input():
    X, W = layer(5, 4, 16)
    x, w = ptqkit.quantize_activations(X), ptqkit.quantize_activations(W)
    cases = [
        ((X, w), TypeError, "qx must be the result of quantize_activations, not ndarray"),
        ((x, W), TypeError, "qw must be"),
        ((x, None), TypeError, "qw must be"),
        ((ptqkit.quantize_activations(X, 9), w), ValueError, "qx has 9 bits"),
        ((x, ptqkit.quantize_activations(W, 16)), ValueError, "qw has 16 bits"),
        ((x, ptqkit.quantize_activations(W[:, :8])), ValueError, "qx has 16 channels, but qw has"),
        ((x, ptqkit.quantize_activations(W[0])), ValueError, "qw must have shape"),
        ((x, ptqkit.quantize_activations(W[None])), ValueError, "qw must have shape"),
        ((x, ptqkit.rtn(W, group_size=8)), ValueError, "one grid per output"),
        ((x, ptqkit.rtn(W, bits="ternary", group_size=None)), ValueError, "one grid per output"),
        ((ptqkit.rtn(W, group_size=None), w), TypeError, "qx must be"),
    ]
    for arguments, error, text in cases:
        with pytest.raises(error, match=text):
            ptqkit.int8_matmul(*arguments)
    with pytest.raises(ValueError, match="threads"):
        ptqkit.int8_matmul(x, w, threads=-1)
