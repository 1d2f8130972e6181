"""Statistics of activations against the float64 twin, torch and SciPy."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

import ptqkit
import ptqkit._core as _core
import ptqkit.reference as reference
from ptqkit.errors import CalibrationError

CHANNELS = [1, 2, 15, 16, 17, 31, 33, 64, 130, 1025]
DTYPES = ["float32", "float16", "bfloat16"]
LEVELS = ["base", "avx2", "avx512", "avx512_bf16", "avx512_vnni_bf16_amx"]

# Half a bin of 1/32 octave, where octaves begin: sqrt(33/32) - 1.
HALF_BIN = math.sqrt(33 / 32) - 1


def _inputs(tokens, n, dtype="float32", seed=0):
    """What update() takes, and the same values in float64; channels differ in mean and range."""
    rng = np.random.default_rng([seed, tokens, n])
    X = rng.normal(size=(tokens, n)) * rng.uniform(0.01, 9, n) + rng.normal(size=n)
    if dtype == "bfloat16":
        torch = pytest.importorskip("torch")
        tensor = torch.from_numpy(X).to(torch.bfloat16)
        return tensor, tensor.double().numpy()
    X = X.astype(dtype)
    return X, X.astype(np.float64)


def _errors(actual, exact, X, bits=8):
    """A float32 scale is off by 2^-24 of itself, so a value by that of its own magnitude; where
    that flips a code, the errors on both sides are nearly equal.
    """
    assert abs(actual - exact) <= 2.0**-24 * np.sqrt((X**2).mean()) + exact * 2.0 ** (bits - 25)


def _check(statistics, X, tensor=True):
    """tensor=False: the grids per tensor were those of several updates."""
    options = {"bits": statistics.bits, "threshold": statistics.threshold}
    expected = reference.activation_statistics(X, absmax=statistics.absmax, **options)
    assert statistics.tokens == len(X)
    for name in ("rms", "std", "kurtosis"):
        np.testing.assert_allclose(getattr(statistics, name), expected[name], rtol=1e-11)
    _errors(statistics.rmse_token, expected["rmse_token"], X, statistics.bits)
    if tensor:
        _errors(statistics.rmse_tensor, expected["rmse_tensor"], X, statistics.bits)
    np.testing.assert_array_equal(statistics.channel_absmax, expected["channel_absmax"])
    np.testing.assert_array_equal(statistics.channel_counts, expected["channel_counts"])
    values = [value for value, _, _ in statistics.largest]
    np.testing.assert_array_equal(values, expected["largest"][: len(values)])
    assert len(values) == min(3, np.count_nonzero(X))
    assert all(abs(X[token, channel]) == value for value, token, channel in statistics.largest)
    np.testing.assert_allclose(statistics.median, expected["median"], rtol=HALF_BIN * 1.0001)
    assert statistics.maximum == expected["largest"][0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", CHANNELS)
def test_widths(n, dtype):
    X, exact = _inputs(43, n, dtype)
    statistics = ptqkit.ActivationStatistics(n)
    statistics.update(X)
    _check(statistics, exact)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 33, 100])
def test_token_counts(tokens):
    X, exact = _inputs(tokens, 37)
    statistics = ptqkit.ActivationStatistics(37)
    statistics.update(X[:0])
    assert statistics.tokens == 0
    statistics.update(X)
    _check(statistics, exact)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12, 16])
@pytest.mark.parametrize("absmax", [None, 2.5, 100.0])
def test_grids(bits, absmax):
    X, exact = _inputs(50, 40)
    statistics = ptqkit.ActivationStatistics(40, bits=bits, threshold=3.0, absmax=absmax)
    statistics.update(X)
    _check(statistics, exact)
    assert (statistics.channel_counts > 0).any()


def test_against_torch_and_scipy():
    torch = pytest.importorskip("torch")
    kurtosis = pytest.importorskip("scipy.stats").kurtosis
    X, _ = _inputs(64, 96)
    statistics = ptqkit.ActivationStatistics(96)
    statistics.update(torch.from_numpy(X))
    tensor = torch.from_numpy(X).double()
    scale = (tensor.abs().amax(1) / 127).float()
    rounded = torch.fake_quantize_per_channel_affine(
        torch.from_numpy(X), scale, torch.zeros(64, dtype=torch.int32), 0, -127, 127
    )
    error = (tensor - rounded.double()).square().mean().sqrt().item()
    np.testing.assert_allclose(statistics.rmse_token, error, rtol=1e-5)
    std = tensor.std(dim=1, correction=0).mean().item()
    np.testing.assert_allclose(statistics.std, std, rtol=1e-12)
    np.testing.assert_allclose(statistics.kurtosis, kurtosis(X.astype(float), axis=1).mean())
    median = tensor.abs().median().item()
    np.testing.assert_allclose(statistics.median, median, rtol=HALF_BIN * 1.0001)


def test_batches_and_merges():
    X, exact = _inputs(300, 49)
    parts, left, right = (ptqkit.ActivationStatistics(49, absmax=40.0) for _ in range(3))
    for start, stop in [(0, 1), (1, 4), (4, 131), (131, 300)]:
        parts.update(X[start:stop].reshape(1, stop - start, 49))
    left.update(X[:111])
    right.update(X[111:])
    kept = left.copy()
    left.merge(right)
    for statistics, rows in ((parts, exact), (left, exact), (right, exact[111:])):
        _check(statistics, rows)
    _check(kept, exact[:111])
    empty = ptqkit.ActivationStatistics(49, absmax=40.0)
    empty.merge(empty.copy())
    assert empty.tokens == 0
    empty.merge(right)
    _check(empty, exact[111:])


def test_without_a_range_every_update_is_a_tensor():
    X, exact = _inputs(60, 20)
    X[30:] *= 50
    exact[30:] = X[30:]
    statistics = ptqkit.ActivationStatistics(20)
    for rows in (X[:30], X[30:]):
        statistics.update(rows)
    _check(statistics, exact, tensor=False)
    halves = [
        reference.activation_statistics(rows)["rmse_tensor"] for rows in (exact[:30], exact[30:])
    ]
    _errors(statistics.rmse_tensor, np.sqrt(np.mean(np.square(halves))), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_tokens_do_not_count(dtype):
    X, exact = _inputs(120, 30, dtype)
    mask = np.random.default_rng(1).random((4, 30)) < 0.7
    statistics = ptqkit.ActivationStatistics(30)
    statistics.update(X.reshape(4, 30, 30), mask)
    _check(statistics, exact[mask.reshape(-1)])
    padded = exact.astype(np.float32)
    padded[~mask.reshape(-1)] = np.nan  # what padding holds must not matter
    dirty = ptqkit.ActivationStatistics(30)
    dirty.update(padded, mask.reshape(-1))
    assert dirty.kurtosis == statistics.kurtosis and dirty.rmse_token == statistics.rmse_token
    dirty.update(padded, np.zeros(120, bool))
    assert dirty.tokens == mask.sum()


def test_strides_make_no_difference():
    X, exact = _inputs(40, 33)
    wide = np.zeros((40, 40), np.float32)
    wide[:, 3:36] = X
    for view in (wide[:, 3:36], np.asfortranarray(X), X.astype(np.float64)):
        statistics = ptqkit.ActivationStatistics(33)
        statistics.update(view)
        _check(statistics, exact)


def _everything(statistics):
    edges, counts = statistics.histogram(32)
    names = ("rms", "rmse_token", "rmse_tensor", "std", "kurtosis", "median")
    numbers = [getattr(statistics, name) for name in names]
    arrays = [statistics.channel_absmax, statistics.channel_counts, edges, counts]
    return np.concatenate([numbers, *arrays, np.ravel(statistics.largest)])


def test_no_number_of_threads_changes_a_bit():
    X, _ = _inputs(3000, 70)
    found = []
    for threads in (1, 2, 3, 7):
        statistics = ptqkit.ActivationStatistics(70, threads=threads)
        statistics.update(X)
        found.append(_everything(statistics))
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_no_cpu_level_changes_a_bit():
    X, _ = _inputs(200, 71, "float16")
    found, before = [], str(ptqkit.show_config()["cpu_level"])
    try:
        for level in LEVELS:
            if level in ptqkit.show_config()["cpu_levels"]:
                _core.set_cpu_level(level)
                statistics = ptqkit.ActivationStatistics(71)
                statistics.update(X)
                found.append(_everything(statistics))
    finally:
        _core.set_cpu_level(before)
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_constant_tokens_and_zeros():
    X = np.zeros((5, 12), np.float32)
    X[1] = 0.1  # the mean of equal values is not always equal to them
    X[2, 3] = 7.0
    statistics = ptqkit.ActivationStatistics(12)
    statistics.update(X)
    _check(statistics, X.astype(np.float64))
    assert statistics.median == 0.0 and statistics.max_to_median == math.inf
    nothing = ptqkit.ActivationStatistics(12)
    nothing.update(X[:1])
    assert math.isnan(nothing.kurtosis) and nothing.largest == [] and nothing.rmse_tensor == 0
    assert [len(part) for part in nothing.histogram()] == [1, 0]


def test_equal_magnitudes_are_listed_in_order():
    X = np.zeros((40, 5), np.float32)
    X[[30, 2, 18, 2], [1, 4, 0, 0]] = [-3, 3, 3, -3]
    statistics = ptqkit.ActivationStatistics(5)
    statistics.update(X[:20])
    statistics.update(X[20:])
    assert statistics.largest == [(3.0, 2, 0), (3.0, 2, 4), (3.0, 18, 0)]


@pytest.mark.parametrize("width", [1, 2, 8, 32])
def test_histogram(width):
    X, exact = _inputs(40, 50)
    X[0, :3] = 0
    exact[0, :3] = 0
    statistics = ptqkit.ActivationStatistics(50)
    statistics.update(X)
    edges, counts = statistics.histogram(width)
    nonzero = np.abs(exact[exact != 0])
    assert counts.sum() == nonzero.size and counts[0] > 0 and counts[-1] > 0
    inside = [np.sum((nonzero >= a) & (nonzero < b)) for a, b in pairwise(edges)]
    np.testing.assert_array_equal(counts, inside)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(dtype, value):
    X, exact = _inputs(30, 17, dtype)
    statistics = ptqkit.ActivationStatistics(17)
    statistics.update(X)
    bad = X.clone() if dtype == "bfloat16" else X.copy()
    bad[29, 16] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        statistics.update(bad)
    _check(statistics, exact)


def test_an_interrupted_update_changes_nothing(monkeypatch):
    X, exact = _inputs(30, 6)
    statistics = ptqkit.ActivationStatistics(6)
    statistics.update(X)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_core, "activation_statistics", interrupted)
    with pytest.raises(KeyboardInterrupt):
        statistics.update(X)
    _check(statistics, exact)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels"),
        ({"bits": 1}, ValueError, "bits"),
        ({"bits": 8.0}, TypeError, "bits"),
        ({"threshold": 0}, ValueError, "threshold must be a positive"),
        ({"threshold": "six"}, TypeError, "threshold"),
        ({"absmax": math.inf}, ValueError, "absmax"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        ptqkit.ActivationStatistics(**{"channels": 4, **options})


def test_what_does_not_fit():
    statistics = ptqkit.ActivationStatistics(4)
    with pytest.raises(CalibrationError, match="no token"):
        _ = statistics.std
    with pytest.raises(ValueError, match="cannot merge bits=4 into 8"):
        statistics.merge(ptqkit.ActivationStatistics(4, bits=4))
    with pytest.raises(TypeError, match="ActivationStatistics, not dict"):
        statistics.merge({})
    with pytest.raises(ValueError, match="last axis"):
        statistics.update(np.zeros((3, 5), np.float32))
    statistics.update(np.ones((3, 4), np.float32))
    with pytest.raises(ValueError, match="bins_per_octave"):
        statistics.histogram(3)


def _hidden(seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(8, 200, 30)).astype(np.float32)
    hidden[:2, :, 3] += 9  # in 2 of 8 layers, in 25 % of all tokens
    hidden[:1, :, 7] += 9  # in 1 of 8 layers
    hidden[:, :10, 11] += 12  # in all layers, in 5 % of the tokens
    hidden[:, :20, 12] += 12
    return hidden


@pytest.mark.parametrize("value", [6.0, 4.0, 8.0])
@pytest.mark.parametrize("layers", [0.0, 0.125, 0.25, 1.0])
@pytest.mark.parametrize("tokens", [0.0, 0.05, 0.06])
def test_outlier_dimensions(value, layers, tokens):
    hidden, seen = _hidden(), []
    for layer in hidden:
        seen.append(ptqkit.ActivationStatistics(30, threshold=value))
        seen[-1].update(layer)
    found = ptqkit.outlier_dimensions(
        [s.channel_counts for s in seen], [s.tokens for s in seen], layers=layers, tokens=tokens
    )
    expected = reference.outlier_dimensions(hidden, value=value, layers=layers, tokens=tokens)
    # the twin calls a dimension without any large value an outlier if no share is asked for
    large = (np.abs(hidden) >= value).any(axis=(0, 1))
    np.testing.assert_array_equal(found, expected[large[expected]])
    if (value, layers, tokens) == (6.0, 0.25, 0.06):
        assert found.tolist() == [3, 12]


def test_outlier_dimensions_refuse():
    counts = [np.array([1, 2]), np.array([0, 3])]
    for options, message in (
        ({"layers": 1.5}, "layers must be a share"),
        ({"tokens": -0.1}, "tokens must be a share"),
    ):
        with pytest.raises(ValueError, match=message):
            ptqkit.outlier_dimensions(counts, 10, **options)
    with pytest.raises(ValueError, match="one length"):
        ptqkit.outlier_dimensions([*counts, np.zeros(3, int)], 10)
    with pytest.raises(ValueError, match="tokens_seen"):
        ptqkit.outlier_dimensions(counts, 2)


def test_relative_outliers():
    absmax = np.array([1.0, 2.0, 1.0, 6.0, 5.9, 1.0, 1.0], np.float32)
    assert ptqkit.relative_outliers(absmax).tolist() == [3]
    assert ptqkit.relative_outliers(absmax, 5).tolist() == [3, 4]
    assert ptqkit.relative_outliers(np.array([0, 0, 0, 1.0])).tolist() == []
    for bad in ([np.nan, 1.0], np.ones((2, 2))):
        with pytest.raises(ValueError, match="finite numbers"):
            ptqkit.relative_outliers(bad)
    with pytest.raises(ValueError, match="ratio must be above 1"):
        ptqkit.relative_outliers(absmax, 1)
