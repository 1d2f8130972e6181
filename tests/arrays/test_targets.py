"""Weights corrected for errors in their inputs, against the twin and plain least squares."""

from __future__ import annotations

import numpy as np
import pytest

import ptqkit
import ptqkit.reference as reference

EPS = np.finfo(np.float32).eps


def case(rows=6, n=20, tokens=300, noise=0.2, seed=0):
    """Weights, float and quantized inputs (correlated), and their two moments in float32."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(tokens, n)) @ (np.eye(n) + 0.4 * rng.normal(size=(n, n)))
    X_q = X * (1 - noise / 2) + noise * rng.normal(size=X.shape)
    W = rng.normal(size=(rows, n)).astype(np.float32)
    H = (2 / tokens * X_q.T @ X_q).astype(np.float32)
    return W, X, X_q, H, 2 / tokens * X.T @ X_q


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 20), (33, 65)])
@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_against_the_twin(shape, alpha, damping):
    W, _, _, H, G = case(*shape)
    expected = reference.propagate_error(W, H, G, alpha, damping)
    found = ptqkit.propagate_error(W, H, G, alpha, damping)
    assert found.dtype == np.float32 and found.shape == W.shape
    # Both are float64 inside; what is left is the rounding of the result.
    np.testing.assert_allclose(found, expected, rtol=EPS, atol=1e-9)
    assert np.abs(found - W).max() > 1e-3


def test_alpha_is_the_share_of_the_way():
    W, _, _, H, G = case()
    whole, half = (ptqkit.propagate_error(W, H, G, a) for a in (1.0, 0.5))
    np.testing.assert_allclose(half - W, (whole - W) / 2, atol=4 * EPS)
    zero = ptqkit.propagate_error(W, H, G, 0)
    np.testing.assert_array_equal(zero, W)
    assert not np.shares_memory(zero, W)


def test_no_error_in_the_inputs_changes_nothing():
    W, _, _, H, _ = case()
    np.testing.assert_array_equal(ptqkit.propagate_error(W, H, H, 1.0), W)
    np.testing.assert_array_equal(ptqkit.propagate_error(W, H, H.astype(np.float64), 1.0), W)


def test_it_is_the_least_squares_solution():
    W, X, X_q, H, G = case(noise=0.5)
    best = np.linalg.lstsq(X_q, X @ W.T.astype(np.float64), rcond=None)[0].T
    found = ptqkit.propagate_error(W, H, G, 1.0, 0.0)
    np.testing.assert_allclose(found, best, atol=1e-4)

    def loss(V):
        return float(((X @ W.T - X_q @ V.T) ** 2).sum())

    part = ptqkit.propagate_error(W, H, G, 0.5, 0.0)
    assert loss(found) < loss(part) < loss(W)
    rng = np.random.default_rng(1)
    for _ in range(10):
        assert loss(found + 1e-2 * rng.normal(size=W.shape)) > loss(found)


def test_float64_keeps_small_differences():
    """Differences below the rounding of G in float32 are not lost."""
    W, _, _, H, _ = case()
    drift = 1e-8 * np.abs(H).max() * np.random.default_rng(2).normal(size=H.shape)
    G = H.astype(np.float64) + drift
    moved = ptqkit.propagate_error(1e6 * W, H, G, 1.0) - 1e6 * W
    expected = reference.propagate_error(1e6 * W, H, G, 1.0, 0.01) - 1e6 * W
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(moved, expected, atol=1e6 * EPS * np.abs(W).max())


def test_inputs_are_as_a_hessian_or_factorization_has_them():
    W, X, X_q, _, _ = case()
    H = ptqkit.Hessian(20)
    H.update(X_q)
    G = (2 / len(X) * X.T @ X_q).astype(np.float32)
    expected = ptqkit.propagate_error(W, H.matrix, G, 0.5)
    np.testing.assert_array_equal(ptqkit.propagate_error(W, H, G, 0.5), expected)
    factor = ptqkit.factorize(H, group_size=None)
    np.testing.assert_array_equal(ptqkit.propagate_error(W, factor, G, 0.5), expected)
    before = [a.copy() for a in (W, H.matrix, G)]
    ptqkit.propagate_error(W, H, G, 0.5)
    for now, old in zip((W, H.matrix, G), before, strict=True):
        np.testing.assert_array_equal(now, old)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_dead_inputs(damping):
    """Input 3 is dead in the quantized model only: its part of the output moves to the others."""
    W, X, X_q, _, _ = case(noise=0.5)
    X_q[:, 3] = 0
    H = (2 / len(X) * X_q.T @ X_q).astype(np.float32)
    G = 2 / len(X) * X.T @ X_q
    found = ptqkit.propagate_error(W, H, G, 1.0, damping)
    np.testing.assert_allclose(
        found, reference.propagate_error(W, H, G, 1.0, damping), rtol=EPS, atol=1e-9
    )
    np.testing.assert_array_equal(found[:, 3], W[:, 3])
    live = np.arange(20) != 3
    if damping == 0:
        best = np.linalg.lstsq(X_q[:, live], X @ W.T.astype(np.float64), rcond=None)[0].T
        np.testing.assert_allclose(found[:, live], best, atol=1e-4)
    G[:, 3] = 1.0  # cannot be: whatever stands there must not count
    np.testing.assert_array_equal(ptqkit.propagate_error(W, H, G, 1.0, damping), found)
    all_dead = ptqkit.propagate_error(W, np.zeros_like(H), np.zeros_like(H), 1.0, damping)
    np.testing.assert_array_equal(all_dead, W)


def test_scaling_and_rows():
    W, _, _, H, G = case()
    found = ptqkit.propagate_error(W, H, G, 0.7)
    np.testing.assert_array_equal(ptqkit.propagate_error(W, 4 * H, 4 * G, 0.7), found)
    np.testing.assert_allclose(ptqkit.propagate_error(W[2:4], H, G, 0.7), found[2:4], rtol=1e-6)


def test_singular():
    W, _, X_q, _, _ = case(tokens=5)
    H = (2 / 5 * X_q.T @ X_q).astype(np.float32) - 1e-3 * np.eye(20, dtype=np.float32)
    G = H + np.float32(0.1)
    with pytest.raises(ptqkit.NotPositiveDefiniteError, match=r"fc1: .*raise damping") as error:
        ptqkit.propagate_error(W, H, G, 0.5, 0.0, name="fc1")
    assert 0 <= error.value.index < 20 and error.value.damping == 0
    assert np.isfinite(ptqkit.propagate_error(W, H, G, 0.5, 0.1)).all()


_W, _, _, _H, _G = case()
_NAN = np.where(np.eye(20, dtype=bool), np.nan, _G)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((_W, _H, _G, -0.1), ValueError, r"alpha must lie in \[0, 1\], not -0.1"),
        ((_W, _H, _G, 1.5), ValueError, "alpha must lie in"),
        ((_W, _H, _G, float("nan")), ValueError, "alpha must lie in"),
        ((_W, _H, _G, "1"), TypeError, "alpha must be a number"),
        ((_W, _H, _G, True), TypeError, "alpha must be a number"),
        ((_W, _H, _G, 1.0, -1.0), ValueError, "damping must be"),
        ((_W, _H, _G, 1.0, None), TypeError, "damping must be a number"),
        ((_W, _H, _G[:5], 1.0), ValueError, r"G must have the shape \(20, 20\) of H"),
        ((_W, _H, _NAN, 1.0), ValueError, "G holds NaN or Inf"),
        ((_W, _H, _G.astype(int), 1.0), TypeError, "G must be floating point"),
        ((_W, _G, _G, 1.0), ValueError, "H must be symmetric"),
        ((_W, _H[:5], _G, 1.0), ValueError, "H must be square"),
        ((_W[:, :5], _H, _G, 1.0), ValueError, "H has 20 inputs, but W has 5"),
        ((_W[0], _H, _G, 1.0), ValueError, "W must be a non-empty matrix"),
        ((np.full_like(_W, np.inf), _H, _G, 1.0), ValueError, "W holds NaN or Inf"),
        ((3e38 * np.sign(_W), _H, 9 * _G, 1.0), ValueError, "beyond float32"),
    ],
)
def test_bad_input(arguments, kind, message):
    with pytest.raises(kind, match=f"^fc1: .*{message}"):
        ptqkit.propagate_error(*arguments, name="fc1")


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    expected = ptqkit.propagate_error(_W, _H, _G.astype(np.float32), 0.5)
    tensors = [torch.from_numpy(a) for a in (_W, _H, _G.astype(np.float32))]
    np.testing.assert_array_equal(ptqkit.propagate_error(*tensors, 0.5), expected)
