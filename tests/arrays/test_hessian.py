"""Accumulating the Hessian against the float64 twin."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.batches import DTYPES, as_given
from helpers.core_cases import EPS

import ptqkit
import ptqkit.reference as reference

INPUTS = [1, 7, 8, 9, 23, 24, 25, 47, 48, 49, 95, 96, 97, 191, 193]
TOKENS = [1, 2, 255, 256, 257, 1024, 1025]


def _inputs(tokens, n, dtype, seed=0):
    """What update() takes, and the same values in float64."""
    X = np.random.default_rng([seed, tokens, n]).normal(size=(tokens, n)).astype(np.float32)
    return as_given(X, dtype)


def _bound(X):
    """Rounding bound of a float32 sum of products: c K eps sum |x||y|, c = 1."""
    A = np.abs(X)
    return 2.0 / len(X) * (A.T @ A) * EPS * (len(X) + 2)


def _check(H, X):
    error = np.abs(H.matrix - reference.hessian(X))
    assert np.all(error <= _bound(X))
    np.testing.assert_array_equal(H.matrix, H.matrix.T)
    assert H.tokens == len(X) and H.matrix.dtype == np.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", INPUTS)
def test_widths(n, dtype, blas):
    X, exact = _inputs(67, n, dtype)
    H = ptqkit.Hessian(n)
    H.update(X)
    _check(H, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_token_counts(tokens, dtype, blas):
    X, exact = _inputs(tokens, 50, dtype)
    H = ptqkit.Hessian(50)
    H.update(X[:0])
    assert H.tokens == 0
    H.update(X)
    _check(H, exact)


def test_float64_is_rounded_to_float32():
    X = np.random.default_rng(0).normal(size=(40, 12))
    H, single = ptqkit.Hessian(12), ptqkit.Hessian(12)
    H.update(X)
    single.update(X.astype(np.float32))
    np.testing.assert_array_equal(H.matrix, single.matrix)


def test_float16_subnormals_and_extremes_are_exact():
    X = np.array([[2.0**-24, 65504, -(2.0**-14), 0.0], [3 * 2.0**-24, -1, 1, -0.0]], np.float16)
    for row in X:
        H = ptqkit.Hessian(4)
        H.update(row)
        np.testing.assert_array_equal(
            H.matrix, reference.hessian(row.astype(float)).astype(np.float32)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_batching_and_merging(dtype, blas):
    X, exact = _inputs(300, 49, dtype)
    parts, left, right = ptqkit.Hessian(49), ptqkit.Hessian(49), ptqkit.Hessian(49)
    for start, stop in [(0, 1), (1, 4), (4, 131), (131, 300)]:
        parts.update(X[start:stop].reshape(1, stop - start, 49))
    left.update(X[:111])
    right.update(X[111:])
    left.merge(right)
    _check(parts, exact)
    _check(left, exact)
    want = reference.merge(reference.hessian(exact[:111]), 111, reference.hessian(exact[111:]), 189)
    assert np.all(np.abs(left.matrix - want) <= _bound(exact))
    assert right.tokens == 189  # the other one is left as it was


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bool", "int", "tensor"])
def test_masked_tokens_do_not_count(dtype, kind, blas):
    X, exact = _inputs(120, 30, dtype)
    mask = np.random.default_rng(1).random((4, 30)) < 0.7
    H, shaped = ptqkit.Hessian(30), mask
    if kind == "int":
        shaped = mask.astype(np.int64)
    elif kind == "tensor":
        shaped = pytest.importorskip("torch").from_numpy(mask)
    H.update(X.reshape(4, 30, 30), shaped)
    _check(H, exact[mask.reshape(-1)])
    flat = ptqkit.Hessian(30)
    flat.update(X, mask.reshape(-1))
    np.testing.assert_array_equal(flat.matrix, H.matrix)
    padded = np.array(exact.astype(np.float32))
    padded[~mask.reshape(-1)] = 1e4  # what padding holds must not matter
    clean, dirty = ptqkit.Hessian(30), ptqkit.Hessian(30)
    clean.update(exact.astype(np.float32), mask.reshape(-1))
    dirty.update(padded, mask.reshape(-1))
    np.testing.assert_array_equal(clean.matrix, dirty.matrix)


def test_a_full_mask_and_an_empty_one():
    X, exact = _inputs(20, 9, "float32")
    H = ptqkit.Hessian(9)
    H.update(X, np.zeros(20, bool))
    assert H.tokens == 0
    H.update(X, np.ones(20, bool))
    _check(H, exact)


def _layouts(X):
    yield "fortran", np.asfortranarray(X)
    yield "reversed", X[::-1]
    yield "columns", np.repeat(X, 2, axis=1)[:, ::2]
    wide = np.zeros((len(X), X.shape[1] + 5), X.dtype)
    wide[:, 2:-3] = X
    yield "slice", wide[:, 2:-3]
    yield "swapped", X.astype(X.dtype.newbyteorder())
    buffer = np.zeros(X.nbytes + 1, np.uint8)
    odd = buffer[1:].view(X.dtype).reshape(X.shape)
    odd[...] = X
    yield "unaligned", odd
    readonly = X.copy()
    readonly.flags.writeable = False
    yield "read-only", readonly


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_memory_layouts_make_no_difference(dtype):
    X = np.random.default_rng(3).normal(size=(70, 33)).astype(dtype)
    plain = ptqkit.Hessian(33)
    plain.update(X)
    for name, view in _layouts(X):
        before, H = view.copy(), ptqkit.Hessian(33)
        H.update(view)
        np.testing.assert_array_equal(view, before)
        want = plain
        if name == "reversed":
            want = ptqkit.Hessian(33)
            want.update(X[::-1].copy())
        np.testing.assert_array_equal(H.matrix, want.matrix, err_msg=name)
    once = ptqkit.Hessian(33)
    once.update(np.broadcast_to(X[0], (70, 33)))
    once_copied = ptqkit.Hessian(33)
    once_copied.update(np.tile(X[0], (70, 1)))
    np.testing.assert_array_equal(once.matrix, once_copied.matrix)


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    X, _ = _inputs(64, 20, "float32")
    plain = ptqkit.Hessian(20)
    plain.update(X)
    for tensor in [
        torch.from_numpy(X),
        torch.from_numpy(X).reshape(4, 16, 20),
        torch.from_numpy(X).requires_grad_(),
        torch.from_numpy(np.asfortranarray(X)),
    ]:
        H = ptqkit.Hessian(20)
        H.update(tensor)
        np.testing.assert_array_equal(H.matrix, plain.matrix)
    wide = torch.zeros(64, 40, dtype=torch.bfloat16)
    wide[:, ::2] = torch.from_numpy(X).to(torch.bfloat16)
    H = ptqkit.Hessian(20)
    H.update(wide[:, ::2])
    _check(H, as_given(X, "bfloat16")[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_batch_with_nan_leaves_the_value_untouched(dtype, value, blas):
    good, _ = _inputs(40, 17, dtype)
    bad, _ = _inputs(1300, 17, dtype, seed=1)
    bad[1299, 16] = value
    H = ptqkit.Hessian(17)
    H.update(good)
    before = H.matrix.copy()
    with pytest.raises(ValueError, match="NaN or Inf"):
        H.update(bad)
    assert H.tokens == 40
    np.testing.assert_array_equal(H.matrix, before)
    mask = np.ones(1300, bool)
    mask[1299] = False
    H.update(bad, mask)  # a padded NaN does not count
    assert H.tokens == 1339 and np.isfinite(H.matrix).all()


def test_from_matrix_and_copy():
    X, exact = _inputs(100, 25, "float32")
    H = ptqkit.Hessian(25)
    H.update(X[:60])
    given = ptqkit.Hessian.from_matrix(reference.hessian(exact[:60]), 60)
    np.testing.assert_allclose(given.matrix, reference.hessian(exact[:60]), rtol=3e-7)
    twin = H.copy()
    assert twin.tokens == 60 and twin.in_features == 25
    for one in (given, twin):
        one.update(X[60:])
        _check(one, exact)
    assert H.tokens == 60  # the copy was changed, not this one
    assert np.all(np.abs(H.matrix - reference.hessian(exact[:60])) <= _bound(exact[:60]))


def test_the_matrix_is_cached_read_only_and_follows_updates():
    X, exact = _inputs(30, 6, "float32")
    H = ptqkit.Hessian(6)
    H.update(X[:10])
    first = H.matrix
    assert H.matrix is first and not first.flags.writeable
    kept = first.copy()
    H.update(X[10:])
    np.testing.assert_array_equal(first, kept)
    _check(H, exact)
    assert repr(H) == "Hessian(in_features=6, tokens=30)"
