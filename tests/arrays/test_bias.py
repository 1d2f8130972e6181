"""Bias correction: the mean output error of quantized weights."""

from __future__ import annotations

import numpy as np
import pytest

import ptqkit
import ptqkit.reference as reference


def problem(rows: int, n: int, seed: int = 0):
    """Weights, their 3-bit form, inputs whose channel means are far from 0."""
    rng = np.random.default_rng([seed, rows, n])
    W = rng.normal(size=(rows, n)).astype(np.float32)
    X = rng.normal(size=(500, n)) + 3 * rng.normal(size=n)
    return W, ptqkit.rtn(W, bits=3, group_size=None).dequantize(), X


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (17, 8), (33, 65), (100, 300)])
def test_against_the_twin(shape):
    W, W_hat, X = problem(*shape)
    mean = X.mean(axis=0)
    bound = 1e-13 * np.abs(W_hat - W).astype(float) @ np.abs(mean) + 1e-300
    for a, b in ((W, W_hat), (W.astype(float) / 3, W_hat), (W.astype(np.float16), W_hat)):
        got = ptqkit.bias_correction(a, b, mean)
        assert got.dtype == np.float64 and got.shape == (len(W),)
        scale = 1 if a.dtype == np.float32 else 100
        assert np.all(np.abs(got - reference.bias_correction(a, b, mean)) <= scale * bound)
    assert np.all(ptqkit.bias_correction(W, W, mean) == 0)


def test_the_mean_output_error_becomes_zero():
    W, W_hat, X = problem(40, 96)
    bias = np.random.default_rng(1).normal(size=40)
    correction = ptqkit.bias_correction(W, W_hat, X.mean(axis=0))
    error = X @ W_hat.T.astype(float) - X @ W.T.astype(float)
    before = np.abs(error.mean(axis=0))
    after = np.abs((error + (bias - correction) - bias).mean(axis=0))
    assert before.max() > 0.5 and np.median(before) > 0.05
    assert after.max() < 1e-12 * np.abs(X).max() * 96


def test_with_channel_ranges():
    W, W_hat, X = problem(10, 32)
    X = X.astype(np.float32)
    ranges = ptqkit.ChannelRanges(32)
    ranges.update(X[:200])
    ranges.update(X[200:])
    got = ptqkit.bias_correction(W, W_hat, ranges.mean)
    want = reference.bias_correction(W, W_hat, X.mean(axis=0, dtype=float))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_inputs_of_every_kind():
    W, W_hat, X = problem(20, 33)
    mean = X.mean(axis=0)
    want = ptqkit.bias_correction(W, W_hat, mean)
    for same in (
        np.asfortranarray(W),
        W.astype(float),
        W.tolist(),
        W.astype(">f4"),
        np.repeat(W, 2, axis=1)[:, ::2],
    ):
        np.testing.assert_array_equal(ptqkit.bias_correction(same, W_hat, mean), want)
    # float64 weights are not rounded: a difference far below float32 survives
    close = W.astype(float)
    moved = ptqkit.bias_correction(close, close * (1 + 1e-12), mean)
    np.testing.assert_allclose(moved, 1e-12 * close @ mean, rtol=1e-2, atol=1e-15)
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(W.copy()).requires_grad_()
    np.testing.assert_array_equal(
        ptqkit.bias_correction(tensor, torch.from_numpy(W_hat), torch.from_numpy(mean)), want
    )
    half = tensor.detach().to(torch.bfloat16)
    np.testing.assert_array_equal(
        ptqkit.bias_correction(half, W_hat, mean),
        ptqkit.bias_correction(half.float().numpy(), W_hat, mean),
    )


def test_threads_change_nothing():
    rng = np.random.default_rng(0)
    W, W_hat, mean = rng.normal(size=(700, 901)), rng.normal(size=(700, 901)), rng.normal(size=901)
    for kind in (np.float32, np.float64):
        one = ptqkit.bias_correction(W.astype(kind), W_hat.astype(kind), mean, threads=1)
        for threads in (2, 3, 8):
            many = ptqkit.bias_correction(W.astype(kind), W_hat.astype(kind), mean, threads=threads)
            np.testing.assert_array_equal(one, many)


GOOD = (np.ones((2, 3)), np.zeros((2, 3)), np.ones(3))


@pytest.mark.parametrize(
    ("at", "value", "error", "text"),
    [
        (0, np.ones((2, 3), int), TypeError, "W must be floating point"),
        (1, [[True] * 3] * 2, TypeError, "W_hat must be floating point"),
        (2, [1, 2, 3], TypeError, "mean must be floating point"),
        (0, np.ones(3), ValueError, r"W_hat must have the shape \(3,\) of W"),
        (0, np.ones((0, 3)), ValueError, r"W_hat must have the shape \(0, 3\) of W"),
        (0, [[1.0], [1.0, 2.0]], ValueError, "W must be an array"),
        (1, np.ones((3, 2)), ValueError, r"W_hat must have the shape \(2, 3\)"),
        (2, np.ones((1, 3)), ValueError, r"mean must have shape \(channels,\)"),
        (2, np.ones(2), ValueError, "mean has 2 inputs, but W has 3"),
        (0, np.full((2, 3), np.nan), ValueError, "W holds NaN or Inf"),
        (1, [[1.0, 2, 3], [1, np.inf, 1]], ValueError, "W_hat holds NaN or Inf"),
        (2, [0.0, 0.0, -np.inf], ValueError, "mean holds NaN or Inf"),
        (0, np.full((2, 3), 1.7e308), ValueError, "the correction overflows"),
        (0, None, TypeError, "W must be floating point"),
        (0, "x", TypeError, "W must be floating point"),
    ],
)
def test_bad_input(at, value, error, text):
    arguments = list(GOOD)
    arguments[at] = value
    with pytest.raises(error, match=text):
        ptqkit.bias_correction(*arguments)


@pytest.mark.parametrize("W", [np.ones(3), np.ones((0, 3))])
def test_weights_that_are_no_matrix(W):
    with pytest.raises(ValueError, match="W must be a non-empty matrix"):
        ptqkit.bias_correction(W, W, np.ones(3))


def test_bad_threads():
    with pytest.raises(ValueError, match="threads"):
        ptqkit.bias_correction(*GOOD, threads=-1)


def test_infinities_are_seen_beside_zero_means_and_in_both():
    W, W_hat, mean = (a.copy() for a in GOOD)
    W[0, 1] = W_hat[0, 1] = np.inf  # their difference is NaN
    mean[:] = 0
    with pytest.raises(ValueError, match="W holds NaN or Inf"):
        ptqkit.bias_correction(W, W_hat, mean)
