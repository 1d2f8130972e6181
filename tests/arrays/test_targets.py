"""Weights corrected for errors around them, against the twins, least squares and other papers."""

from __future__ import annotations

import numpy as np
import pytest

import ptqkit
import ptqkit._core as _core
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


def stream(W, X, X_q, noise=0.3, seed=5):
    """r and r~ of which a part depends on the inputs, and D."""
    rng = np.random.default_rng(seed)
    r = rng.normal(size=(len(X), len(W)))
    r_q = r + noise * X_q @ rng.normal(size=(X.shape[1], len(W))) + 0.1 * rng.normal(size=r.shape)
    return r, r_q, 2 / len(X) * (r - r_q).T @ X_q


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 20), (33, 65), (70, 130)])
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("given", ["G", "D", "GD"])
def test_residual_targets_against_the_twin(shape, damping, given):
    W, X, X_q, H, G = case(*shape)
    parts = {"G": G, "D": stream(W, X, X_q)[2]}
    parts = {key: parts[key] for key in given}
    expected = reference.target_weights(W, H, **parts, alpha=0.6, damping=damping)
    found = ptqkit.target_weights(W, H, **parts, alpha=0.6, damping=damping)
    assert found.dtype == np.float32 and found.shape == W.shape
    np.testing.assert_allclose(found, expected, rtol=EPS, atol=1e-9)
    assert np.abs(found - W).max() > 1e-3


def test_residual_targets_are_the_least_squares_of_output_and_stream():
    W, X, X_q, H, G = case(noise=0.5)
    r, r_q, D = stream(W, X, X_q)
    wanted = X @ W.T.astype(np.float64) + r - r_q
    best = np.linalg.lstsq(X_q, wanted, rcond=None)[0].T
    found = ptqkit.target_weights(W, H, G, D, alpha=1.0, damping=0.0)
    np.testing.assert_allclose(found, best, atol=1e-4)

    def loss(V):
        return float(((wanted - X_q @ V.T) ** 2).sum())

    whole, qep = (ptqkit.target_weights(W, H, G, d, damping=0.0) for d in (D, None))
    assert loss(whole) < loss(qep) and loss(whole) < loss(W)


def test_paths_that_agree_give_w_itself():
    W, X, X_q, H, _ = case()
    r, _, _ = stream(W, X, X_q)
    same, stream_same = ptqkit.Drift(20, 20), ptqkit.Drift(len(W), 20)
    same.update(X_q, X_q)
    stream_same.update(r, r, X_q)
    for method in ("least-squares", "qronos", "gptaq"):
        np.testing.assert_array_equal(ptqkit.target_weights(W, H, same, method=method), W)
    np.testing.assert_array_equal(ptqkit.target_weights(W, H, same, stream_same), W)
    np.testing.assert_array_equal(ptqkit.target_weights(W, H), W)


def test_accumulated_drifts_are_what_arrays_are():
    W, X, X_q, H, G = case()
    r, r_q, D = stream(W, X, X_q)
    inputs, residual = ptqkit.Drift(20, 20), ptqkit.Drift(len(W), 20)
    inputs.update(X, X_q)
    residual.update(r, r_q, X_q)
    expected = ptqkit.target_weights(W, H, G, D, alpha=0.5)
    found = ptqkit.target_weights(W, H, inputs, residual, alpha=0.5)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    again = ptqkit.target_weights(W, H, inputs.matrix + H, residual.matrix, alpha=0.5)
    np.testing.assert_allclose(found, again, rtol=4 * EPS, atol=1e-8)


def test_dead_inputs_have_no_part_in_d():
    W, X, X_q, _, _ = case(noise=0.5)
    X_q[:, 3] = 0
    H = (2 / len(X) * X_q.T @ X_q).astype(np.float32)
    D = stream(W, X, X_q)[2]
    expected = ptqkit.target_weights(W, H, None, D)
    np.testing.assert_array_equal(expected[:, 3], W[:, 3])
    D[:, 3] = 1.0  # cannot be: whatever stands there must not count
    np.testing.assert_array_equal(ptqkit.target_weights(W, H, None, D), expected)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_bit(threads):
    W, X, X_q, H, G = case(70, 130, 600)
    D = stream(W, X, X_q)[2]
    for method, extra in (("least-squares", D), ("qronos", None), ("gptaq", None)):
        one = ptqkit.target_weights(W, H, G, extra, method=method, threads=1)
        many = ptqkit.target_weights(W, H, G, extra, method=method, threads=threads)
        np.testing.assert_array_equal(one, many)


def test_scipy_blas_gives_the_same_targets():
    W, X, X_q, H, G = case(70, 130, 600)
    D = stream(W, X, X_q)[2]
    own = ptqkit.target_weights(W, H, G, D)
    try:
        assert _core.use_scipy_blas()
        found = ptqkit.target_weights(W, H, G, D)
    finally:
        _core.use_builtin_blas()
    np.testing.assert_allclose(found, own, rtol=EPS, atol=1e-9)


# ---- what other papers do column by column ----------------------------------------------------


def grids(W, size=None):
    scales, zeros = reference.fit_groups(W.astype(np.float64), size or W.shape[1], max_code=7)
    group = np.arange(W.shape[1]) // (size or W.shape[1])
    return scales[:, group], zeros[:, group]


def on_grid(values, scale, zero, j):
    codes = reference.quantize(values, scale[:, j], zero[:, j], 7)
    return codes, reference.dequantize(codes, scale[:, j], zero[:, j])


def qronos_codes(W, X, X_q, scale, zero, order):
    """[Qronos], algorithm 1: round a column, then solve for all later ones, with data."""
    W, V, codes = W.astype(np.float64), W.astype(np.float64).copy(), np.zeros(W.shape, np.uint8)
    fixed = np.zeros((len(X), len(W)))
    for t, j in enumerate(order):
        rest = order[t + 1 :]
        if t == 0:  # against the float outputs, the later weights as they are
            wanted = X @ W.T - X_q[:, rest] @ W[:, rest].T
            V[:, j] = X_q[:, j] @ wanted / (X_q[:, j] @ X_q[:, j])
        codes[:, j], q = on_grid(V[:, j], scale, zero, j)
        fixed += np.outer(X_q[:, j], q)
        if len(rest):
            V[:, rest] = np.linalg.lstsq(X_q[:, rest], X @ W.T - fixed, rcond=None)[0].T
    return codes


def gptaq_codes(W, H, G, scale, zero, order, damping, updated=False):
    """[GPTAQ], algorithm 1, a block of one column; ``updated``: P multiplies the weight as it is
    when its column is reached, as in the authors' code.
    """
    damped, _ = reference.dampen(H, damping)
    original, V = W[:, order].astype(np.float64), W[:, order].astype(np.float64)
    L = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)]))
    P = np.triu((G - H)[np.ix_(order, order)] @ L, 1) @ L.T
    codes = np.zeros(W.shape, np.uint8)
    for t, j in enumerate(order):
        now = V[:, t].copy()
        codes[:, j], q = on_grid(now, scale, zero, j)
        weight = now if updated else original[:, t]
        V[:, t:] += np.outer(weight, P[t, t:]) - np.outer((now - q) / L[t, t], L[t:, t])
    return codes


def solve(target, H, scale, zero, order, damping):
    """Babai's nearest plane in float64 on given grids."""
    damped, _ = reference.dampen(H, damping)
    R = reference.upper_factor(damped[np.ix_(order, order)])
    codes, E = np.zeros(target.shape, np.uint8), np.zeros(target.shape)
    for t, j in enumerate(order):
        value = target[:, j] + E[:, :t] @ R[:t, t] / R[t, t]
        codes[:, j], q = on_grid(value, scale, zero, j)
        E[:, t] = target[:, j] - q
    return codes


@pytest.mark.parametrize("order", ["natural", "act"])
def test_qronos_is_the_least_squares_up_to_its_first_column(order):
    W, X, X_q, _, _ = case(30, 20, 300, noise=0.4)
    H, G = (2 / 300 * A.T @ X_q for A in (X_q, X))
    scale, zero = grids(W)
    perm = np.arange(20) if order == "natural" else np.argsort(-np.diag(H))
    expected = qronos_codes(W, X, X_q, scale, zero, perm)
    target = reference.qronos_target(W, H, G, perm, damping=0.0)
    np.testing.assert_array_equal(solve(target, H, scale, zero, perm, 0.0), expected)
    whole = reference.target_weights(W, H, G, damping=0.0)
    differ = solve(whole, H, scale, zero, perm, 0.0) != expected
    same_first = ~differ[:, perm[0]]
    assert 0 < differ.any(axis=1).sum() and not differ[same_first].any()


@pytest.mark.parametrize("order", ["natural", "act"])
def test_gptaq_is_a_target(order):
    W, X, X_q, _, _ = case(30, 20, 300, noise=0.1)
    H, G = (2 / 300 * A.T @ X_q for A in (X_q, X))
    scale, zero = grids(W)
    perm = np.arange(20) if order == "natural" else np.argsort(-np.diag(H))
    target = reference.gptaq_target(W, H, G, perm)
    expected = gptaq_codes(W, H, G, scale, zero, perm, 0.01)
    np.testing.assert_array_equal(solve(target, H, scale, zero, perm, 0.01), expected)
    updated = gptaq_codes(W, H, G, scale, zero, perm, 0.01, updated=True)
    plain = solve(W, H, scale, zero, perm, 0.01)
    assert (updated != expected).mean() < 0.3 * (plain != expected).mean()


@pytest.mark.parametrize("order", ["natural", "act", "group-act"])
@pytest.mark.parametrize("shape", [(1, 1), (6, 20), (33, 65)])
def test_other_methods_against_the_twin(order, shape):
    W, _, _, H, G = case(*shape)
    F = ptqkit.factorize(H, order=order, group_size=None)
    for method, twin in (("qronos", reference.qronos_target), ("gptaq", reference.gptaq_target)):
        expected = twin(W, H, G, F.order, alpha=0.7, damping=0.02)
        found = ptqkit.target_weights(W, F, G, alpha=0.7, damping=0.02, method=method)
        np.testing.assert_allclose(found, expected, rtol=EPS, atol=1e-8)
        if order == "natural":
            alone = ptqkit.target_weights(W, H, G, alpha=0.7, damping=0.02, method=method)
            np.testing.assert_array_equal(alone, found)


def test_other_methods_leave_dead_inputs_alone():
    W, X, X_q, _, _ = case(noise=0.5)
    X_q[:, [0, 3]] = 0
    H, G = ((2 / len(X) * A.T @ X_q).astype(np.float32) for A in (X_q, X))
    for method, twin in (("qronos", reference.qronos_target), ("gptaq", reference.gptaq_target)):
        found = ptqkit.target_weights(W, H, G, method=method)
        np.testing.assert_array_equal(found[:, [0, 3]], W[:, [0, 3]])
        np.testing.assert_allclose(found, twin(W, H, G, np.arange(20)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"D": np.ones((5, 20))}, ValueError, r"D must have the shape \(6, 20\) of W"),
        ({"D": np.full((6, 20), np.nan)}, ValueError, "D holds NaN or Inf"),
        ({"D": np.ones((6, 20), int)}, TypeError, "D must be floating point"),
        ({"G": ptqkit.Drift(20, 19)}, ptqkit.CalibrationError, "the drift has seen no token"),
        ({"method": "qep"}, ValueError, "method must be one of|method"),
        ({"D": np.ones((6, 20)), "method": "gptaq"}, ValueError, "'gptaq' takes no D; use 'least"),
        ({"threads": -1}, ValueError, "threads"),
        ({"alpha": 2}, ValueError, "alpha must lie in"),
    ],
)
def test_bad_residuals(arguments, kind, message):
    with pytest.raises(kind, match=message):
        ptqkit.target_weights(_W, _H, **{"G": _G, **arguments})
