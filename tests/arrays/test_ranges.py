"""Channel ranges against the float64 twin."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.core_cases import EPS

import ptqkit
import ptqkit.reference as reference

CHANNELS = [1, 3, 4, 15, 16, 17, 63, 64, 65, 127, 1023, 1025, 2100]
TOKENS = [1, 2, 7, 8, 9, 15, 16, 17, 100]
DTYPES = ["float32", "float16", "bfloat16"]
LEVELS = ["base", "avx2", "avx512", "avx512_bf16", "avx512_vnni_bf16_amx"]


def _inputs(tokens, n, dtype, seed=0):
    """What update() takes, and the same values in float64; channels differ in mean and range."""
    rng = np.random.default_rng([seed, tokens, n])
    X = rng.normal(size=(tokens, n)) * rng.uniform(0.01, 20, n) + rng.normal(size=n)
    if dtype == "bfloat16":
        torch = pytest.importorskip("torch")
        tensor = torch.from_numpy(X).to(torch.bfloat16)
        return tensor, tensor.double().numpy()
    X = X.astype(dtype)
    return X, X.astype(np.float64)


def _check(ranges, X):
    """Extremes are exact; a mean is off by the float32 sums of eight values at most."""
    low, high, mean = reference.channel_ranges(X)
    np.testing.assert_array_equal(ranges.minimum, low)
    np.testing.assert_array_equal(ranges.maximum, high)
    np.testing.assert_array_equal(ranges.absmax, np.abs(X).max(axis=0))
    np.testing.assert_array_equal(ranges.span, (high - low).astype(np.float32))
    assert np.all(np.abs(ranges.mean - mean) <= 7 * EPS / 2 * np.abs(X).mean(axis=0))
    assert ranges.tokens == len(X)
    types = [getattr(ranges, name).dtype for name in ("minimum", "maximum", "absmax", "span")]
    assert types == [np.float32] * 4 and ranges.mean.dtype == np.float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", CHANNELS)
def test_widths(n, dtype):
    X, exact = _inputs(43, n, dtype)
    ranges = ptqkit.ChannelRanges(n)
    ranges.update(X)
    _check(ranges, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_token_counts(tokens, dtype):
    X, exact = _inputs(tokens, 37, dtype)
    ranges = ptqkit.ChannelRanges(37)
    ranges.update(X[:0])
    assert ranges.tokens == 0
    ranges.update(X)
    _check(ranges, exact)


def test_a_mean_over_many_tokens_stays_exact():
    X = np.full((200_001, 3), 0.1, np.float32)  # a float32 sum would be off by one in a thousand
    X[:, 1] += np.arange(len(X)) % 2
    ranges = ptqkit.ChannelRanges(3)
    ranges.update(X)
    _check(ranges, X.astype(np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_batching_merging_and_copies(dtype):
    X, exact = _inputs(300, 49, dtype)
    parts, left, right = (ptqkit.ChannelRanges(49) for _ in range(3))
    for start, stop in [(0, 1), (1, 4), (4, 131), (131, 300)]:
        parts.update(X[start:stop].reshape(1, stop - start, 49))
    left.update(X[:111])
    right.update(X[111:])
    kept = left.copy()
    left.merge(right)
    _check(parts, exact)
    _check(left, exact)
    _check(right, exact[111:])  # the other one is left as it was
    _check(kept, exact[:111])
    kept.update(X[111:])
    _check(kept, exact)
    left.merge(ptqkit.ChannelRanges(49))  # nothing seen, nothing changed
    _check(left, exact)
    empty = ptqkit.ChannelRanges(49)
    empty.merge(right)
    _check(empty, exact[111:])
    empty.merge(empty.copy())
    assert empty.tokens == 378


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bool", "int", "tensor"])
def test_masked_tokens_do_not_count(dtype, kind):
    X, exact = _inputs(120, 30, dtype)
    mask = np.random.default_rng(1).random((4, 30)) < 0.7
    shaped = mask
    if kind == "int":
        shaped = mask.astype(np.int64)
    elif kind == "tensor":
        shaped = pytest.importorskip("torch").from_numpy(mask)
    ranges = ptqkit.ChannelRanges(30)
    ranges.update(X.reshape(4, 30, 30), shaped)
    _check(ranges, exact[mask.reshape(-1)])
    padded = exact.astype(np.float32)
    padded[~mask.reshape(-1)] = np.nan  # what padding holds must not matter
    dirty = ptqkit.ChannelRanges(30)
    dirty.update(padded, mask.reshape(-1))
    for name in ("minimum", "maximum", "mean"):
        np.testing.assert_array_equal(getattr(dirty, name), getattr(ranges, name))


def test_a_full_mask_and_an_empty_one():
    X, exact = _inputs(20, 9, "float32")
    ranges = ptqkit.ChannelRanges(9)
    ranges.update(X, np.zeros(20, bool))
    assert ranges.tokens == 0
    ranges.update(X, np.ones(20, bool))
    _check(ranges, exact)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_memory_layouts_make_no_difference(dtype):
    X = np.random.default_rng(3).normal(size=(70, 33)).astype(dtype)
    wide = np.zeros((70, 38), X.dtype)
    wide[:, 2:-3] = X
    odd = np.zeros(X.nbytes + 1, np.uint8)[1:].view(X.dtype).reshape(X.shape)
    odd[...] = X
    views = [np.asfortranarray(X), np.repeat(X, 2, axis=1)[:, ::2], wide[:, 2:-3], odd]
    for view in [*views, X.astype(X.dtype.newbyteorder())]:
        before, ranges = view.copy(), ptqkit.ChannelRanges(33)
        ranges.update(view)
        np.testing.assert_array_equal(view, before)
        _check(ranges, X.astype(np.float32).astype(np.float64))
    for view in (X[::-1], np.broadcast_to(X[0], (70, 33))):
        ranges = ptqkit.ChannelRanges(33)
        ranges.update(view)
        _check(ranges, view.astype(np.float32).astype(np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("token", "channel"), [(0, 0), (77, 16), (80, 32), (3, 32)])
def test_a_batch_with_nan_leaves_the_value_untouched(dtype, value, token, channel):
    good, exact = _inputs(40, 33, dtype)
    bad, _ = _inputs(81, 33, dtype, seed=1)
    bad[token, channel] = value
    ranges = ptqkit.ChannelRanges(33)
    ranges.update(good)
    with pytest.raises(ValueError, match="NaN or Inf"):
        ranges.update(bad)
    _check(ranges, exact)
    mask = np.arange(81) != token
    ranges.update(bad, mask)  # a padded NaN does not count
    assert ranges.tokens == 120 and np.isfinite(ranges.mean).all()


def test_the_largest_values_are_finite():
    for dtype, largest in (("float32", 3.4e38), ("float16", 65504.0)):
        X = np.full((50, 20), largest, dtype)
        X[::3] *= -1
        ranges = ptqkit.ChannelRanges(20)
        ranges.update(X)
        low, high, mean = reference.channel_ranges(X)
        np.testing.assert_array_equal((ranges.minimum, ranges.maximum), (low, high))
        np.testing.assert_allclose(ranges.mean, mean, rtol=1e-6)
        assert np.isfinite(ranges.span).all()


def test_float16_subnormals_are_exact():
    X = np.array([[2.0**-24, -(2.0**-14), 3 * 2.0**-24]] * 9, np.float16)
    ranges = ptqkit.ChannelRanges(3)
    ranges.update(X)
    np.testing.assert_array_equal(ranges.mean, X[0].astype(np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [96, 203, 2500])
def test_the_number_of_threads_changes_no_bit(n, dtype):
    X, _ = _inputs(1601, n, dtype)
    mask = np.arange(1601) % 7 > 0
    results = []
    for threads in (1, 2, 3, 8):
        ranges = ptqkit.ChannelRanges(n, threads=threads)
        ranges.update(X)
        ranges.update(X, mask)
        results.append([getattr(ranges, k).tobytes() for k in ("minimum", "maximum", "mean")])
    assert all(r == results[0] for r in results)


LEVEL = """
import sys
import numpy as np, ptqkit
import ptqkit._core as _core
from ptqkit.arrays.ranges import batch_ranges
inputs = np.load(sys.argv[1])
rows = np.flatnonzero(np.arange(len(inputs["float32"])) % 3)
found = [batch_ranges(inputs[d], i, r, 1)
         for i, d in enumerate(("float32", "float16", "bfloat16")) for r in (None, rows)]
np.save(sys.argv[2], np.stack([np.stack(f) for f in found]))
print(ptqkit.show_config()["cpu_level"])
"""


def test_cpu_levels_agree_bit_for_bit(script, tmp_path):
    X = np.random.default_rng(5).normal(size=(101, 331)).astype(np.float32)
    X[:3, 5], X[50, 6] = 60000, -1e-6
    bf16 = (X.view(np.uint32) >> 16).astype(np.uint16)
    np.savez(tmp_path / "in.npz", float32=X, float16=X.astype(np.float16), bfloat16=bf16)
    found = []
    for level in LEVELS:
        if level not in ptqkit.show_config()["cpu_levels"]:
            continue
        arguments = (str(tmp_path / "in.npz"), str(tmp_path / "out.npy"))
        assert script(LEVEL, *arguments, PTQKIT_CPU=level).stdout.strip() == level
        found.append(np.load(tmp_path / "out.npy"))
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)
    low, high, mean = reference.channel_ranges(X)
    np.testing.assert_array_equal(found[0][0, :2], (low, high))
    np.testing.assert_allclose(found[0][0, 2] / len(X), mean, atol=1e-5, rtol=1e-6)


NONFINITE = """
import numpy as np, ptqkit
for dtype in (np.float32, np.float16):
    for value in (np.nan, np.inf, -np.inf):
        for token in (0, 3, 8):
            for channel in (0, 16, 18):
                X = np.ones((9, 19), dtype)
                X[token, channel] = value
                try:
                    ptqkit.ChannelRanges(19).update(X)
                except ValueError:
                    continue
                raise SystemExit(f"{dtype} {value} at {token}, {channel} was taken")
"""


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_sees_nan_and_infinity(script, level):
    if level not in ptqkit.show_config()["cpu_levels"]:
        pytest.skip(f"this CPU does not run {level}")
    script(NONFINITE, PTQKIT_CPU=level)


def test_an_interrupted_update_changes_nothing(monkeypatch):
    import ptqkit._core as _core

    X, exact = _inputs(30, 6, "float32")
    ranges = ptqkit.ChannelRanges(6)
    ranges.update(X)
    real = _core.channel_ranges

    def stop(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(_core, "channel_ranges", stop)
    with pytest.raises(KeyboardInterrupt):
        ranges.update(X * 5)
    monkeypatch.undo()
    _check(ranges, exact)


def test_values_are_independent_of_what_follows():
    X, exact = _inputs(30, 6, "float32")
    ranges = ptqkit.ChannelRanges(6)
    ranges.update(X[:10])
    low, high, mean = ranges.minimum, ranges.maximum, ranges.mean
    assert not low.flags.writeable and not high.flags.writeable
    mean[...] = 0  # a copy
    ranges.update(X[10:])
    _check(ranges, exact)
    np.testing.assert_array_equal(low, exact[:10].min(axis=0))
    assert repr(ranges) == "ChannelRanges(channels=6, tokens=30)"


def test_from_arrays():
    X, exact = _inputs(100, 25, "float32")
    low, high, mean = reference.channel_ranges(exact[:60])
    given = ptqkit.ChannelRanges.from_arrays(low, high, mean, 60)
    low[...] = 0  # the arrays were copied
    given.update(X[60:])
    _check(given, exact)
    seen = ptqkit.ChannelRanges(25)
    seen.update(X[:60])
    again = ptqkit.ChannelRanges.from_arrays(seen.minimum, seen.maximum, seen.mean, 60)
    assert again.minimum.tobytes() == seen.minimum.tobytes() and again.tokens == 60
    np.testing.assert_allclose(again.mean, seen.mean, rtol=1e-15)


ZERO, ONE = np.zeros(4, np.float32), np.ones(4, np.float32)
BAD_ARRAYS = [
    ((ONE, ZERO, ZERO, 5), ValueError, "channel 0"),
    ((ZERO, ONE, np.array([0.5, 0.5, 1.1, 0.5]), 5), ValueError, "channel 2"),
    ((ZERO, ONE, -0.1 * ONE, 5), ValueError, "minimum <= mean"),
    ((ZERO, ONE, ONE[:3], 5), ValueError, "one length"),
    ((ZERO, ONE * np.nan, ONE, 5), ValueError, "maximum holds NaN"),
    ((ZERO, np.full(4, 1e300), ONE, 5), ValueError, "beyond float32"),
    ((ZERO[None], ONE, ONE, 5), ValueError, r"minimum must have shape \(channels,\)"),
    ((ZERO[:0], ONE[:0], ONE[:0], 5), ValueError, "minimum must have shape"),
    ((np.zeros(4, int), ONE, ONE, 5), TypeError, "minimum must be floating point"),
    ((ZERO, ONE, ONE, 0), ValueError, "tokens"),
    ((ZERO, ONE, ONE, 2.0), TypeError, "tokens"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD_ARRAYS)
def test_bad_arrays(arguments, error, text):
    with pytest.raises(error, match=text):
        ptqkit.ChannelRanges.from_arrays(*arguments)


BAD_BATCHES = [
    (np.ones((3, 5)), None, ValueError, r"\(\.\.\., 4\)"),
    (np.ones((3, 4), int), None, TypeError, "floating point"),
    (1.0, None, ValueError, "shape"),
    (np.ones((3, 4)), np.ones(2, bool), ValueError, "mask"),
    (np.ones((3, 4)), np.ones(3), TypeError, "mask"),
    (np.full((3, 4), 1e300), None, ValueError, "NaN or Inf"),
]


@pytest.mark.parametrize(("X", "mask", "error", "text"), BAD_BATCHES)
def test_bad_batches(X, mask, error, text):
    ranges = ptqkit.ChannelRanges(4)
    with pytest.raises(error, match=text):
        ranges.update(X, mask)
    assert ranges.tokens == 0


def test_bad_sizes_and_empty_ranges():
    for value, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (None, TypeError)):
        with pytest.raises(error, match="channels"):
            ptqkit.ChannelRanges(value)
    with pytest.raises(ValueError, match="threads"):
        ptqkit.ChannelRanges(4, threads=-1)
    ranges = ptqkit.ChannelRanges(4)
    for name in ("minimum", "maximum", "absmax", "span", "mean"):
        with pytest.raises(ptqkit.CalibrationError, match="no token"):
            getattr(ranges, name)
    with pytest.raises(ValueError, match="cannot merge 5 channels into 4"):
        ranges.merge(ptqkit.ChannelRanges(5))
    with pytest.raises(TypeError, match="ChannelRanges"):
        ranges.merge(ptqkit.Hessian(4))
