"""The damped factor R R^T = P (H + damping) P^T."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.core_cases import EPS, layer

import ptqkit
import ptqkit._core as _core
import ptqkit.reference as reference

ORDERS = ["natural", "act", "group-act"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 24, 48, 49, 95, 96, 97, 128, 193, 260])
def test_against_numpy(n, order, blas):
    _, H = layer(1, n, "outlier")
    size = n if n % 2 else n // 2
    F = ptqkit.factorize(H, order=order, group_size=size)
    perm = reference.make_order(np.diag(H), order, size)
    np.testing.assert_array_equal(F.order, perm)
    damped, _ = reference.dampen(H, 0.01)
    A = damped[np.ix_(perm, perm)]
    R = np.triu(F.R).astype(np.float64)
    # backward error of a Cholesky factorization: c n eps sqrt(a_ii a_jj), c = 1
    scale = np.sqrt(np.outer(np.diag(A), np.diag(A)))
    assert np.all(np.abs(R @ R.T - A) <= (n + 3) * EPS * scale)
    # forward error, with the condition number that the damping leaves
    want = reference.upper_factor(A)
    limit = 4 * EPS * np.sqrt(n) * np.linalg.cond(A) * np.abs(want).max()
    assert np.all(np.abs(R - want) <= limit)
    assert F.damping == 0.01 and F.damping_raised == 0 and not F.dead.any()
    np.testing.assert_allclose(F.damping_value, 0.01 * np.diag(H).astype(float).mean())


def test_ties_in_the_order_keep_the_original_one():
    F = ptqkit.factorize(np.diag([1.0, 2, 1, 2, 1, 2]).astype(np.float32), order="act")
    np.testing.assert_array_equal(F.order, [1, 3, 5, 0, 2, 4])
    F = ptqkit.factorize(np.diag([1.0, 4, 3, 3, 9, 0]), order="group-act", group_size=2)
    np.testing.assert_array_equal(F.order, [4, 5, 2, 3, 1, 0])


def _bad_pivot(n, perm, position):
    """A matrix whose factorization fails first at perm[position], given that it runs backwards."""
    _, H = layer(1, n)
    A = H.astype(np.float64)[np.ix_(perm, perm)]
    later = slice(position + 1, n)
    row = A[position, later]
    schur = A[position, position] - row @ np.linalg.solve(A[later, later], row)
    A[position, position] -= 1.5 * schur
    broken = np.empty_like(A)
    broken[np.ix_(perm, perm)] = A
    return broken.astype(np.float32)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("position", [0, 3, 8, 31, 47, 48, 50, 95, 109])
def test_the_failing_pivot_is_named(position, reverse, blas):
    n = 110
    perm = np.random.default_rng(0).permutation(n) if reverse else np.arange(n)
    H = _bad_pivot(n, perm, position)
    R = np.zeros((n, n), np.float32)
    found = _core.factor(H, perm.astype(np.int64), np.zeros(n), R, 0)
    assert found == perm[position]
    if not reverse:
        with pytest.raises(ptqkit.NotPositiveDefiniteError, match=rf"input {found} failed") as e:
            ptqkit.factorize(H, damping=0, max_damping=0, name="blocks.3.down")
        assert e.value.index == found and e.value.damping == 0
        assert str(e.value).startswith("blocks.3.down: ")


@pytest.mark.parametrize("order", ORDERS)
def test_damping_is_raised_in_steps_and_reported(order, blas):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(20, 64))
    H = reference.hessian(X) - 0.05 * np.eye(64)  # indefinite: about -0.025 of the mean diagonal
    F = ptqkit.factorize(H, order=order, group_size=16)
    assert F.damping == pytest.approx(0.1) and F.damping_raised == 1
    q = ptqkit.gptq(rng.normal(size=(4, 64)), F, group_size=16)
    assert q.damping == F.damping and q.damping_raised == 1
    assert ptqkit.gptq(np.ones((4, 64)), H, group_size=16).damping_raised == 1
    with pytest.raises(ptqkit.NotPositiveDefiniteError, match=r"damping up to 0\.02 ") as e:
        ptqkit.factorize(H, order=order, group_size=16, max_damping=0.02)
    assert e.value.damping == 0.02 and 0 <= e.value.index < 64


def test_a_hopeless_matrix_is_an_error(blas):
    H = np.eye(10)
    H[4, 4] = -30
    with pytest.raises(ptqkit.NotPositiveDefiniteError, match=r"lay: .*input 4 .*raise max_damp"):
        ptqkit.gptq(np.ones((2, 10)), H, group_size=5, name="lay")


@pytest.mark.parametrize("tokens", [1, 3, 30])
def test_a_pivot_at_the_level_of_rounding_is_noise(tokens, blas):
    # Rank-deficient: without damping the pivots are rounding errors of either sign.
    X = np.random.default_rng(tokens).normal(size=(tokens, 64))
    H = reference.hessian(X).astype(np.float32)
    with pytest.raises(ptqkit.NotPositiveDefiniteError):
        ptqkit.factorize(H, damping=0, max_damping=0)
    F = ptqkit.factorize(H, damping=0)
    assert F.damping_raised >= 1 and F.damping >= 1e-4
    assert np.isfinite(np.triu(F.R)).all()


@pytest.mark.parametrize("n", [2, 60])
def test_the_least_pivot_that_is_no_noise(n, blas):
    # Two nearly equal inputs: the pivot of the first is 1 - a^2 of its diagonal.
    for power, kept in [(-24, False), (-23, False), (-20, True)]:
        H = np.eye(n, dtype=np.float32)
        H[0, 1] = H[1, 0] = np.float32(1 - 2.0**power)  # 1.2e-7, 2.4e-7, 1.9e-6
        if kept:
            R = ptqkit.factorize(H, damping=0, max_damping=0).R
            np.testing.assert_allclose(R[0, 0], np.sqrt(1 - float(H[0, 1]) ** 2), rtol=0.1)
            continue
        with pytest.raises(ptqkit.NotPositiveDefiniteError, match="pivot of input 0"):
            ptqkit.factorize(H, damping=0, max_damping=0)


def test_dead_inputs_get_a_unit_pivot(blas):
    _, H = layer(1, 40, "dead")
    F = ptqkit.factorize(H)
    np.testing.assert_array_equal(F.dead, np.arange(40) % 5 == 0)
    np.testing.assert_array_equal(np.diag(F.R)[::5], 1)
    live = np.diag(H)[~F.dead].astype(float)
    np.testing.assert_allclose(F.damping_value, 0.01 * live.mean())


def test_threads_change_no_bit():
    _, H = layer(1, 260)
    first = np.triu(ptqkit.factorize(H, threads=1).R)
    for threads in (2, 3, 8):
        np.testing.assert_array_equal(np.triu(ptqkit.factorize(H, threads=threads).R), first)
