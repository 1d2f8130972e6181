"""Packed 8-bit weights times activations that are quantized on the way."""

from __future__ import annotations

import numpy as np
import pytest

import ptqkit
import ptqkit._core as _core
import ptqkit.reference as reference
from ptqkit.arrays.matmul import LONGEST_SUM, int8_linear, pack_int8

SHAPES = [  # tokens, outputs, inputs: around the tiles and panels of every level, and their parts
    (1, 1, 1),
    (1, 17, 130),
    (2, 16, 4),
    (3, 15, 5),
    (5, 31, 63),
    (6, 33, 64),
    (8, 48, 65),
    (9, 49, 127),
    (17, 95, 129),
    (33, 200, 260),
    (70, 20, 4099),
    (520, 7, 12),
    (2048, 3, 8),
]


def problem(tokens: int, outputs: int, n: int):
    rng = np.random.default_rng([tokens, outputs, n])
    X = (rng.normal(size=(tokens, n)) + 0.5).astype(np.float32)
    codes = rng.integers(0, 256, (outputs, n), dtype=np.uint8)
    scales = rng.uniform(0.01, 1, outputs).astype(np.float32)
    zeros = rng.integers(0, 256, outputs).astype(np.float32)
    return X, codes, scales, zeros, rng.normal(size=outputs).astype(np.float32)


def twin(X, codes, scales, zeros, **options):
    """The exact integers with the core's float32 grids, rounded once."""
    y = reference.int8_linear(X, codes, scales, zeros.astype(int), dtype=np.float32, **options)
    return y.astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", [{}, {"symmetric": False}, {"narrow_range": True}, {"bits": 4}])
def test_against_the_int64_twin(shape, grid):
    X, codes, scales, zeros, bias = problem(*shape)
    words, sums = pack_int8(codes)
    np.testing.assert_array_equal(sums, (codes.astype(int) - 128).sum(1))
    for b in (None, bias):
        want = twin(X, codes, scales, zeros, bias=b, **grid)
        for s in (sums, None):
            y = int8_linear(X, words, scales, zeros, sums=s, bias=b, outputs=shape[1], **grid)
            assert y.dtype == np.float32 and y.shape == shape[:2]
            np.testing.assert_array_equal(y, want)


def test_static_grids_and_one_grid_of_weights():
    X, codes, _, _, bias = problem(9, 20, 77)
    words, sums = pack_int8(codes)
    scale, zero = np.full(1, 0.25, np.float32), np.full(1, 140, np.float32)
    grid = {"scale": np.float32(0.05), "zero_point": -7, "symmetric": False}
    want = twin(X, codes, scale, zero, bias=bias, **grid)
    for s in (sums, None):
        y = int8_linear(X, words, scale, zero, sums=s, bias=bias, outputs=20, **grid)
        np.testing.assert_array_equal(y, want)
    y = int8_linear(X, words, scale, zero, **grid)  # all that the panels have room for
    np.testing.assert_array_equal(y[:, :20], twin(X, codes, scale, zero, **grid))
    assert y.shape == (9, 32)


def test_the_layout_of_the_words():
    codes = np.arange(35 * 10).reshape(35, 10).astype(np.uint8)
    words, _ = pack_int8(codes)
    assert words.shape == (3, 3, 16)
    bytes_ = words.astype("<u4").view(np.uint8).reshape(3, 3, 16, 4)
    padded = np.zeros((48, 12), np.uint8)
    padded[:35, :10] = codes
    np.testing.assert_array_equal(bytes_.transpose(0, 2, 1, 3).reshape(48, 12), padded)
    signed, sums = pack_int8((codes.astype(int) - 128).astype(np.int8))
    np.testing.assert_array_equal(signed, words)
    np.testing.assert_array_equal(sums, (codes.astype(int) - 128).sum(1))


@pytest.mark.parametrize("code", [0, 127, 128, 255])
@pytest.mark.parametrize("sign", [-1, 1])
def test_extremes_of_the_longest_sum(code, sign):
    n = LONGEST_SUM
    X = np.full((2, n), sign, np.float32)
    codes, one = np.full((3, n), code, np.uint8), np.ones(1, np.float32)
    words, sums = pack_int8(codes)
    for zero in (0, 128, 255):  # the scale 1/128 puts X at -128 or 127
        zeros = np.full(1, zero, np.float32)
        grid = {"scale": 2.0**-7, "symmetric": True}
        want = n * 2.0**-7 * (-128 if sign < 0 else 127) * (code - zero)
        y = int8_linear(X, words, one, zeros, sums=sums, outputs=3, **grid)
        np.testing.assert_array_equal(y, np.float32(want))
        grid = {"scale": 2.0**-7, "zero_point": 127 * -sign, "symmetric": False}
        x = (-128 if sign < 0 else 127) - 127 * -sign
        y = int8_linear(X * 10, words, one, zeros, sums=sums, outputs=3, **grid)
        np.testing.assert_array_equal(y, np.float32(n * 2.0**-7 * x * (code - zero)))


def test_half_precision_activations():
    torch = pytest.importorskip("torch")
    X, codes, scales, zeros, _ = problem(6, 20, 65)
    words, _ = pack_int8(codes)
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.from_numpy(X).to(dtype)
        want = twin(x.float().numpy(), codes, scales, zeros)
        np.testing.assert_array_equal(int8_linear(x, words, scales, zeros), want)


def test_shapes_and_rows_that_lie_apart():
    X, codes, scales, zeros, _ = problem(24, 20, 10)
    words, _ = pack_int8(codes)
    want = int8_linear(X, words, scales, zeros)
    y = int8_linear(X.reshape(2, 3, 4, 10), words, scales, zeros)
    np.testing.assert_array_equal(y, want.reshape(2, 3, 4, 20))
    np.testing.assert_array_equal(int8_linear(X[5], words, scales, zeros), want[5])
    wide = np.full((24, 30), np.nan, np.float32)
    wide[:, 5:15] = X
    np.testing.assert_array_equal(int8_linear(wide[:, 5:15], words, scales, zeros), want)
    assert int8_linear(np.zeros((0, 10)), words, scales, zeros).shape == (0, 20)


def test_threads_change_nothing():
    X, codes, scales, zeros, bias = problem(300, 500, 130)
    words, _ = pack_int8(codes, threads=1)
    np.testing.assert_array_equal(pack_int8(codes, threads=3)[0], words)
    one = int8_linear(X, words, scales, zeros, bias=bias, symmetric=False, threads=1)
    for threads in (2, 3, 8):
        y = int8_linear(X, words, scales, zeros, bias=bias, symmetric=False, threads=threads)
        np.testing.assert_array_equal(y, one)


def test_the_same_as_quantizing_first():
    rng = np.random.default_rng(0)
    X, W = (rng.normal(size=s).astype(np.float32) for s in ((40, 300), (50, 300)))
    w = ptqkit.quantize_activations(W)
    words, sums = pack_int8(w.codes)
    for options in ({}, {"symmetric": False}, {"bits": 6}):
        want = ptqkit.int8_matmul(ptqkit.quantize_activations(X, **options), w)
        zeros = np.full(50, 128, np.float32)
        y = int8_linear(X, words, w.scales.reshape(-1), zeros, sums=sums, **options)
        np.testing.assert_array_equal(y, want)


def test_chunks_of_tokens():
    """More tokens than are packed at a time."""
    tokens, n = 300, 100_000
    rng = np.random.default_rng(1)
    X = rng.integers(-3, 4, (tokens, n)).astype(np.float32)
    X[:, 0] = 127
    codes = rng.integers(0, 256, (2, n), dtype=np.uint8)
    words, _ = pack_int8(codes)
    one, middle = np.ones(2, np.float32), np.full(2, 128, np.float32)
    y = int8_linear(X, words, one, middle, narrow_range=True)
    want = X.astype(np.int64) @ (codes.astype(np.int64) - 128).T
    np.testing.assert_array_equal(y, want.astype(np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(bad):
    X, codes, scales, zeros, _ = problem(20, 20, 70)
    words, _ = pack_int8(codes)
    for at in ((0, 0), (19, 69)):
        x = X.copy()
        x[at] = bad
        with pytest.raises(ValueError, match="NaN or Inf"):
            int8_linear(x, words, scales, zeros)
    x = X.copy()
    x[3, :2] = 3e38, -3e38
    with pytest.raises(ValueError, match="range of a token overflows"):
        int8_linear(x, words, scales, zeros, symmetric=False)


def test_bad_input():
    X, codes, scales, zeros, bias = problem(5, 20, 16)
    words, sums = pack_int8(codes)
    good = (X, words, scales, zeros)
    for at, wrong, error in [
        (0, X.astype(int), TypeError),
        (0, X[:, :7], ValueError),
        (1, words[:1], ValueError),
        (1, words[:, :3], ValueError),
        (1, words.astype(np.int64), TypeError),
        (2, scales[:7], ValueError),
        (2, scales.astype(float), TypeError),
        (3, zeros[:7], ValueError),
        (3, zeros.astype(int), TypeError),
    ]:
        arguments = list(good)
        arguments[at] = wrong
        with pytest.raises(error):
            int8_linear(*arguments)
    for options, text in [
        ({"bits": 9}, "at most 8 bits"),
        ({"bits": 1}, "bits"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"scale": -1.0}, "scale must be above 0"),
        ({"symmetric": False, "narrow_range": True}, "narrow_range"),
        ({"bias": bias[:3]}, "axis"),
        ({"sums": sums[:3]}, "axis"),
        ({"threads": -1}, "threads"),
        ({"outputs": 0}, "outputs"),
        ({"outputs": 33}, "outputs"),
        ({"outputs": 19}, "w_scales"),
    ]:
        with pytest.raises(ValueError, match=text):
            int8_linear(*good, **options)
    for wrong in (codes[0], codes.astype(np.int16), codes.astype(float)):
        with pytest.raises(TypeError, match="codes must be an array of uint8 or int8"):
            pack_int8(wrong)
    with pytest.raises(ValueError, match="can leave int32"):
        pack_int8(np.zeros((1, LONGEST_SUM + 1), np.uint8))
    with pytest.raises(ValueError, match="out of range"):
        _core.int8_pack(np.zeros((1, 0), np.uint8), np.zeros((1, 0, 16), np.uint32), sums[:1], 1)
