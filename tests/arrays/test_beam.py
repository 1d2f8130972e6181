"""Several partial roundings of a row instead of one."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from helpers.core_cases import layer, same_result, true_objective

import ptqkit
import ptqkit.reference as reference

ORDERS = [
    (None, "act", False),
    (16, "natural", False),
    (16, "act", False),  # g_idx
    (16, "act", True),  # groups that the order takes apart
    (16, "group-act", False),
]


def both(W, H, width=16, **options):
    """The result before the search, and with it."""
    return (ptqkit.gptq(W, H, refine_passes=1, beam_width=b, **options) for b in (1, width))


@pytest.mark.parametrize("kind", ["white", "correlated", "outlier", "dead", "ill"])
@pytest.mark.parametrize("bits", [2, 4, "ternary"])
def test_no_objective_rises_and_the_sum_falls(kind, bits):
    W, H = layer(60, 64, kind)
    for size, order, static in ORDERS:
        options = {"bits": bits, "group_size": size, "order": order, "static_groups": static}
        start, found = both(W, H, 8, refit_rounds=1, **options)
        assert found.row_objectives.shape == (5, 60)
        np.testing.assert_array_equal(found.row_objectives[:4], start.row_objectives)
        assert np.all(np.diff(found.row_objectives, axis=0) <= 0)
        true = true_objective(W, H, found)
        np.testing.assert_allclose(found.row_objectives[-1], true, rtol=0, atol=2e-4 * true.mean())
        assert true.sum() < true_objective(W, H, start).sum() or kind == "white"
        for name in ("scales", "zero_points", "g_idx"):
            np.testing.assert_array_equal(getattr(found, name), getattr(start, name))


@pytest.mark.parametrize("kind", ["correlated", "outlier", "dead"])
@pytest.mark.parametrize("shape", [(1, 16), (6, 48)])
@pytest.mark.parametrize("width", [2, 16])
def test_equals_the_twin(kind, shape, width):
    W, H = layer(*shape, kind)
    exact = H.astype(np.float64)
    for (size, order, static), bits in product(ORDERS[:1] + ORDERS[2:], (2, 4)):
        options = {"bits": bits, "group_size": size, "order": order, "static_groups": static}
        start, found = both(W, H, width, **options)
        damped, dead = reference.dampen(exact, 0.01)
        live = np.where(dead, 0.0, W.astype(np.float64))
        rank = ptqkit.factorize(H, order=order, group_size=size).order
        codes = reference.best_paths(
            live, start.codes, start.scales, start.zero_points, start.g_idx, exact, damped, rank,
            2**bits - 1, width,
        )  # fmt: skip
        same = (codes == found.codes).all(axis=1)
        assert same.mean() > 0.8  # two paths may cost the same to float32's last bits
        E = live - start.scales[:, start.g_idx] * (
            codes.astype(float) - start.zero_points[:, start.g_idx]
        )
        twin = reference.objective(E, exact).sum()
        np.testing.assert_allclose(found.objective, twin, rtol=2e-3)


def test_a_wide_beam_finds_the_best_codes_of_a_few_columns():
    W, H = layer(40, 4)
    exact = H.astype(np.float64)
    reached = []
    for width in (1, 16):
        q = ptqkit.gptq(W, H, bits=2, group_size=None, beam_width=width, damping=1e-4)
        best = 0
        for w, s, z, objective in zip(
            W.astype(np.float64), q.scales[:, 0], q.zero_points[:, 0], q.row_objectives[-1],
            strict=True,
        ):  # fmt: skip
            codes = reference.brute_force(w, s, z, exact, 3)
            least = reference.objective((w - s * (codes.astype(float) - z))[None], exact)[0]
            assert objective >= least * (1 - 1e-5)
            best += objective <= least * (1 + 1e-5)
        reached.append(best)
    assert reached[1] >= 38 > reached[0]


@pytest.mark.parametrize("threads", [2, 8])
def test_threads_change_no_bit(threads):
    W, H = layer(200, 96, "outlier")
    options = {"bits": 3, "group_size": 48, "order": "group-act", "beam_width": 5}
    one, many = (ptqkit.gptq(W, H, threads=t, **options) for t in (1, threads))
    assert same_result(one, many)
    np.testing.assert_array_equal(one.row_objectives, many.row_objectives)


def test_rows_do_not_depend_on_each_other():
    W, H = layer(60, 64)
    whole = ptqkit.gptq(W, H, group_size=16, beam_width=4)
    part = ptqkit.gptq(W[7:20], H, group_size=16, beam_width=4)
    np.testing.assert_array_equal(part.codes, whole.codes[7:20])


def test_wider_is_better_on_the_whole():
    W, H = layer(100, 96)
    sums = [ptqkit.gptq(W, H, bits=2, group_size=None, beam_width=b).objective for b in (1, 4, 16)]
    assert sums[2] < sums[1] < 0.99 * sums[0]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_weights_of_any_size(scale):
    W, H = layer(20, 32)
    q = ptqkit.gptq(W, H, group_size=8, beam_width=4)
    other = ptqkit.gptq((W * np.float32(scale)), H, group_size=8, beam_width=4)
    np.testing.assert_allclose(other.objective, q.objective * scale**2, rtol=0.02)


@pytest.mark.parametrize("width", [0, 17, 1.5, True, None])
def test_refused(width):
    W, H = layer(3, 8)
    with pytest.raises((TypeError, ValueError), match="beam_width"):
        ptqkit.gptq(W, H, group_size=None, beam_width=width)


def test_needs_feedback():
    W, H = layer(3, 8)
    with pytest.raises(ValueError, match="feedback"):
        ptqkit.gptq(W, H, group_size=None, beam_width=2, feedback=False)
