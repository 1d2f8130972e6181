"""What must hold for any layer: invariances of the solver, on random shapes and options."""

from __future__ import annotations

import numpy as np
from helpers.core_cases import assert_codes, same_result
from hypothesis import given, settings
from hypothesis import strategies as st

import ptqkit

FEW = settings(max_examples=25, deadline=None, derandomize=True)
GROUPS = st.sampled_from([1, 2, 4, 7, 8, 16])


@st.composite
def layers(draw, orders=("natural", "act", "group-act")):
    """W, X and options of a random small layer."""
    size, groups = draw(GROUPS), draw(st.integers(1, 6))
    n, rows = size * groups, draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    X = rng.normal(size=(2 * n + 3, n)) @ rng.normal(size=(n, n))
    W = rng.normal(size=(rows, n)).astype(np.float32)
    options = {
        "group_size": draw(st.sampled_from([size, None])),
        "bits": draw(st.sampled_from([2, 3, 4, 5, 6, 7, 8, "ternary"])),
        "symmetric": draw(st.booleans()),
        "order": draw(st.sampled_from(orders)),
        "static_groups": draw(st.booleans()),
        "grid": draw(st.sampled_from(["minmax", "mse", "hessian"])),
        "refine_passes": draw(st.integers(0, 2)),
        "scale_dtype": draw(st.sampled_from(["float32", "float16", "bfloat16"])),
    }
    return W, X.astype(np.float32), options


def _hessian(X):
    H = ptqkit.Hessian(X.shape[1])
    H.update(X)
    return H.matrix


@FEW
@given(layers(orders=("natural",)))
def test_independent_inputs_give_rtn(case):
    W, _, options = case
    for name in ("order", "static_groups", "refine_passes"):
        del options[name]
    H = np.eye(W.shape[1], dtype=np.float32)
    q = ptqkit.gptq(W, H, order="act", static_groups=True, **options)
    assert same_result(q, ptqkit.rtn(W, H=H, **options))
    assert same_result(ptqkit.gptq(W, H, **options), q)


@FEW
@given(layers(), st.integers(-10, 10))
def test_scaling_h_by_a_power_of_four_changes_nothing(case, power):
    # The factor scales by the root, so that four is the power that is exact.
    W, X, options = case
    H = _hessian(X)
    q = ptqkit.gptq(W, H, **options)
    other = ptqkit.gptq(W, np.ldexp(H, 2 * power), **options)
    assert same_result(q, other)
    np.testing.assert_array_equal(other.row_objectives, np.ldexp(q.row_objectives, 2 * power))


@FEW
@given(layers(), st.sampled_from([2.0, 0.5, 3.0, 1e-6]))
def test_scaling_h_changes_codes_at_ties_only(case, factor):
    W, X, options = case
    options |= {"refine_passes": 0}
    H = _hessian(X)
    scaled = (H * np.float32(factor)).astype(np.float32)
    F = ptqkit.factorize(H, order=options["order"], group_size=options["group_size"])
    G = ptqkit.factorize(scaled, order=options["order"], group_size=options["group_size"])
    if (F.order == G.order).all():  # rounding may swap inputs of nearly equal importance
        assert_codes(W, H, ptqkit.gptq(W, G, **options), F, 1e-4)


@FEW
@given(layers(), st.integers(-10, 10))
def test_scaling_w_by_a_power_of_two_scales_the_scales(case, power):
    W, X, options = case
    options["scale_dtype"] = "float32"
    H = _hessian(X)
    if options["grid"] == "mse":  # its power is an approximation that does not scale exactly
        options["grid"] = "minmax"
    q = ptqkit.gptq(W, H, **options)
    other = ptqkit.gptq(np.ldexp(W, power), H, **options)
    zero_rows = np.all(q.codes == q.zero_points[:, q.g_idx], axis=1)
    np.testing.assert_array_equal(other.codes, q.codes)
    np.testing.assert_array_equal(other.scales[~zero_rows], np.ldexp(q.scales, power)[~zero_rows])


@FEW
@given(layers(), st.integers(0, 2**32 - 1))
def test_rows_are_independent(case, seed):
    W, X, options = case
    F = _hessian(X)
    q = ptqkit.gptq(W, F, **options)
    order = np.random.default_rng(seed).permutation(len(W))
    moved = ptqkit.gptq(W[order], F, **options)
    np.testing.assert_array_equal(moved.codes, q.codes[order])
    np.testing.assert_array_equal(moved.scales, q.scales[order])
    np.testing.assert_array_equal(moved.zero_points, q.zero_points[order])
    np.testing.assert_array_equal(moved.row_objectives, q.row_objectives[:, order])
    more = ptqkit.gptq(np.concatenate([W, W[:3] * 5, np.zeros_like(W[:1])]), F, **options)
    assert same_result(more.rows(0, len(W)), q)


@FEW
@given(layers())
def test_act_order_is_natural_order_of_permuted_inputs(case):
    W, X, options = case
    options |= {"order": "act", "static_groups": False, "grid": "minmax"}
    H = _hessian(X)
    order = ptqkit.factorize(H, order="act").order
    q = ptqkit.gptq(W, H, **options)
    options["order"] = "natural"
    plain = ptqkit.gptq(W[:, order], H[np.ix_(order, order)], **options)
    np.testing.assert_array_equal(q.codes[:, order], plain.codes)
    np.testing.assert_array_equal(q.scales, plain.scales)
    np.testing.assert_array_equal(q.g_idx[order], plain.g_idx)


@FEW
@given(layers(), st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_a_hessian_does_not_depend_on_the_batching(case, sizes):
    _, X, _ = case
    X = np.round(X)  # integers: their sums are exact in float32, whatever the order
    X = np.clip(X, -30, 30)
    whole, parts, merged = (ptqkit.Hessian(X.shape[1]) for _ in range(3))
    whole.update(X)
    cuts = np.cumsum(sizes)
    for part in np.split(X, cuts[cuts < len(X)]):
        parts.update(part)
        one = ptqkit.Hessian(X.shape[1])
        one.update(part)
        merged.merge(one)
    for other in (parts, merged):
        assert other.tokens == whole.tokens
        np.testing.assert_array_equal(other.matrix, whole.matrix)


@FEW
@given(layers())
def test_result_is_well_formed(case):
    W, X, options = case
    H = _hessian(X)
    before = W.copy(), H.copy()
    q = ptqkit.gptq(W, H, **options)
    np.testing.assert_array_equal(W, before[0])
    np.testing.assert_array_equal(H, before[1])
    groups = W.shape[1] // (options["group_size"] or W.shape[1])
    assert q.codes.shape == W.shape and q.scales.shape == q.zero_points.shape == (len(W), groups)
    assert q.codes.max() <= q.max_code and q.zero_points.max() <= q.max_code
    assert np.all(q.scales > 0) and np.isfinite(q.dequantize()).all()
    np.testing.assert_array_equal(np.bincount(q.g_idx, minlength=groups), W.shape[1] // groups)
    if q.symmetric:
        assert np.all(q.zero_points == (q.max_code + 1) // 2)
