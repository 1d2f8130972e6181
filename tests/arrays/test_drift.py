"""The drift of values against a layer's inputs: values, masks, dtypes, merging, refusals."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import ptqkit
import ptqkit._core as _core
from ptqkit.arrays.drift import moved_outputs

RNG = np.random.default_rng(0)


def tokens(count=70, features=9, inputs=13, dtype=np.float32):
    a, b = (RNG.normal(size=(count, features)).astype(dtype) for _ in range(2))
    return a, b, RNG.normal(size=(count, inputs)).astype(dtype)


def mean(a, b, x, keep=slice(None)):
    """In float64, of the differences as float32 has them."""
    moved = a.astype(np.float32)[keep] - b.astype(np.float32)[keep]
    return 2 / len(moved) * moved.astype(np.float64).T @ x[keep].astype(np.float64)


def drift_of(a, b, x, mask=None, **options):
    drift = ptqkit.Drift(a.shape[-1], x.shape[-1], **options)
    drift.update(a, b, x, mask)
    return drift


@pytest.fixture(params=["builtin", "scipy"])
def blas(request):
    if request.param == "scipy":
        assert _core.use_scipy_blas()
    yield request.param
    _core.use_builtin_blas()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 40), (70, 9, 13), (1500, 65, 33), (9, 200, 7)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_equals_the_mean_in_float64(shape, dtype, blas):
    a, b, x = tokens(*shape, dtype=dtype)
    drift = drift_of(a, b, x)
    expected = mean(a, b, x)
    assert drift.matrix.shape == shape[1:] and drift.matrix.dtype == np.float64
    bound = 2 / len(a) * np.abs(a.astype(float) - b).T @ np.abs(x.astype(float))
    assert (np.abs(drift.matrix - expected) <= 4e-6 * bound).all()
    keep = np.arange(len(a)) % 3 != 1
    masked = drift_of(a, b, x, keep)
    assert masked.tokens == keep.sum()
    bound = 2 / keep.sum() * np.abs(a.astype(float) - b)[keep].T @ np.abs(x.astype(float))[keep]
    assert (np.abs(masked.matrix - mean(a, b, x, keep)) <= 4e-6 * bound).all()


def test_of_the_inputs_themselves_it_is_g_minus_h():
    x = RNG.normal(size=(300, 12)).astype(np.float32)
    x_q = x + 1e-4 * RNG.normal(size=x.shape).astype(np.float32)
    drift = ptqkit.Drift(12, 12)
    drift.update(x, x_q)
    np.testing.assert_allclose(
        drift.matrix, mean(x, x_q, x_q), atol=1e-6 * np.abs(drift.matrix).max()
    )
    none = ptqkit.Drift(12, 12)
    none.update(x, x)
    np.testing.assert_array_equal(none.matrix, 0)


def test_bfloat16_and_unlike_dtypes():
    torch = pytest.importorskip("torch")
    a, b, x = (torch.from_numpy(v).bfloat16() for v in tokens())
    wide = [v.float().numpy() for v in (a, b, x)]
    found = drift_of(a, b, x)
    np.testing.assert_allclose(found.matrix, mean(*wide), atol=2e-6)
    mixed = drift_of(wide[0], b, x.half() * 0 + x)
    np.testing.assert_array_equal(mixed.matrix, drift_of(*wide).matrix)


def test_batches_merge_copy_and_pickle():
    a, b, x = tokens(90)
    whole = drift_of(a, b, x)
    parts = ptqkit.Drift(9, 13)
    parts.update(a[:40].reshape(2, 20, 9), b[:40].reshape(2, 20, 9), x[:40].reshape(2, 20, 13))
    before = parts.copy()
    rest = drift_of(a[40:], b[40:], x[40:])
    parts.merge(rest)
    assert parts.tokens == 90 and before.tokens == 40
    np.testing.assert_allclose(parts.matrix, whole.matrix, atol=1e-6)
    again = pickle.loads(pickle.dumps(parts))
    np.testing.assert_array_equal(again.matrix, parts.matrix)
    given = ptqkit.Drift.from_matrix(whole.matrix, 90)
    np.testing.assert_allclose(given.matrix, whole.matrix, rtol=1e-6)
    assert repr(given) == "Drift(features=9, in_features=13, tokens=90)"
    assert given.finish() is given
    for other, kind in ((ptqkit.Drift(9, 12), ValueError), (whole.matrix, TypeError)):
        with pytest.raises(kind):
            parts.merge(other)


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_threads_change_no_bit(threads, dtype):
    a, b, x = tokens(2100, 70, 201, dtype)
    one, many = (drift_of(a, b, x, threads=t) for t in (1, threads))
    np.testing.assert_array_equal(one.matrix, many.matrix)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_added(position, bad):
    good = tokens()
    drift = drift_of(*good)
    before, wrong = drift.matrix, [v.copy() for v in good]
    wrong[position][69, 3] = bad
    with pytest.raises(ValueError, match="NaN or Inf; the batch was not added"):
        drift.update(*wrong)
    np.testing.assert_array_equal(drift.matrix, before)
    assert drift.tokens == 70
    drift.update(*wrong, mask=np.arange(70) < 69)  # masked out
    assert drift.tokens == 139


def test_sums_beyond_float32_are_not_added():
    a, b, x = tokens()
    drift = drift_of(a, b, x)
    before = drift.matrix
    with pytest.raises(ValueError, match="beyond float32; the batch was not added"):
        drift.update(1e20 * a, b, 1e20 * x)
    np.testing.assert_array_equal(drift.matrix, before)
    large, full = (ptqkit.Drift.from_matrix(np.full((1, 1), 3e38), 2) for _ in range(2))
    with pytest.raises(ValueError, match="the two sums together overflow"):
        large.merge(full)
    assert large.tokens == 2
    full = ptqkit.Drift.from_matrix(np.full((1, 1), 3e38), 2)
    with pytest.raises(ValueError, match="beyond float32"):
        full.update(np.ones((1, 1)), np.zeros((1, 1)), np.ones((1, 1)))
    with pytest.raises(ValueError, match="overflows float32"):
        ptqkit.Drift.from_matrix(np.full((1, 1), 3e38), 100)


def test_refusals():
    a, b, x = tokens()
    drift = ptqkit.Drift(9, 13)
    with pytest.raises(ptqkit.CalibrationError, match="has seen no token"):
        _ = drift.matrix
    with pytest.raises(ValueError, match="same tokens, not of 70, 70 and 69"):
        drift.update(a, b, x[:69])
    with pytest.raises(ValueError, match=r"must have shape \(\.\.\., 9\)"):
        drift.update(a[:, :8], b, x)
    with pytest.raises(TypeError, match="floating point"):
        drift.update(a.astype(int), b, x)
    with pytest.raises(ValueError, match="mask"):
        drift.update(a, b, x, np.ones(69, bool))
    assert drift.tokens == 0
    drift.update(a[:0], b[:0], x[:0])
    drift.update(a, b, x, np.zeros(70, bool))
    assert drift.tokens == 0


@pytest.mark.parametrize(
    ("count", "outputs", "inputs"), [(1, 1, 1), (3, 5, 700), (300, 130, 33), (129, 49, 1030)]
)
def test_outputs_move_by_w_times_the_difference(count, outputs, inputs):
    x, x_q, W = (RNG.normal(size=(n, inputs)).astype("f") for n in (count, count, outputs))
    r = RNG.normal(size=(count, outputs)).astype(np.float32)
    kept = r.copy()
    moved = (x - x_q).astype(np.float64)
    bound = 2e-6 * (np.abs(r) + np.abs(moved) @ np.abs(W).T)
    found = moved_outputs(r, W, x, x_q)
    assert (np.abs(found - (r + moved @ W.T.astype(np.float64))) <= bound).all()
    np.testing.assert_array_equal(r, kept)
    strided = moved_outputs(r, W, np.hstack([x, x])[:, :inputs], x_q)
    np.testing.assert_array_equal(found, strided)
    np.testing.assert_array_equal(moved_outputs(r, W, x_q, x_q), r)


def test_outputs_that_move_are_of_any_leading_shape_and_any_number_of_threads():
    x, x_q = RNG.normal(size=(2, 2, 300, 20)).astype(np.float32)
    r, W = RNG.normal(size=(2, 300, 7)).astype("f"), RNG.normal(size=(7, 20)).astype("f")
    found = moved_outputs(torch.from_numpy(r), W, torch.from_numpy(x), x_q)
    for threads in (1, 2, 5):
        out = r.reshape(-1, 7).copy()
        _core.moved_outputs(x.reshape(-1, 20), x_q.reshape(-1, 20), W, out, threads)
        np.testing.assert_array_equal(found, out)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_outputs_that_move_are_of_any_type(kind):
    x, x_q = torch.tensor(RNG.normal(size=(2, 9, 20)).astype("f")).to(kind)
    r = torch.tensor(RNG.normal(size=(9, 7)).astype("f")).to(kind)
    W = RNG.normal(size=(7, 20)).astype("f")
    wide = [v.float().numpy() for v in (r, x, x_q)]
    found = moved_outputs(r, W, x, x_q)
    np.testing.assert_array_equal(found, moved_outputs(wide[0], W, wide[1], wide[2]))
