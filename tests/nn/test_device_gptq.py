"""The solve on a device, in plain torch: against the float64 twin, and the host's core."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.core_cases import assert_solution, layer, same_result, true_objective

import ptqkit
from ptqkit.errors import NotPositiveDefiniteError
from ptqkit.nn import device_gptq, row_products
from ptqkit.nn.device_gptq import gptq_on, why_on_host
from ptqkit.nn.device_solver import factorize_on
from ptqkit.recipe.recipe import Recipe

CPU = torch.device("cpu")


def recipe(**options):
    return Recipe(**{"scale_dtype": "bfloat16", "refine_passes": 0, **options})


def solved(W, F, options, **more):
    return gptq_on(torch.tensor(W), F, options, **more).finish()


def core(W, F, options):
    names = ("bits", "group_size", "symmetric", "static_groups", "grid", "feedback", "scale_dtype")
    picked = {name: getattr(options, name) for name in (*names, "min_zero_point")}
    return ptqkit.gptq(W, F, **picked)


CASES = [
    {"group_size": 16, "order": "natural", "grid": "minmax", "symmetric": True},
    {"group_size": 16, "order": "group-act", "grid": "hessian"},
    {"group_size": 144, "order": "group-act", "grid": "hessian", "bits": 2},  # over 128 columns
    {"group_size": None, "order": "act", "grid": "hessian", "scale_dtype": "float16"},
    {"group_size": 48, "order": "act", "grid": "mse", "min_zero_point": 1},
    {"group_size": 16, "order": "act", "grid": "minmax", "static_groups": True},
    {"group_size": 8, "order": "natural", "grid": "hessian", "bits": "ternary"},
    {"group_size": 32, "order": "act", "grid": "minmax", "feedback": False},
]


def columns(case):
    return 288 if case["group_size"] == 144 else 96


@pytest.mark.parametrize("kind", ["correlated", "dead", "outlier"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_is_the_result_of_the_core_and_of_the_twin(kind, case):
    W, H = layer(37, columns(case), kind)
    options = recipe(**case)
    F = factorize_on(CPU, H, order=options.order, group_size=options.group_size)
    found, expected = solved(W, F, options), core(W, F, options)
    for name in ("damping", "damping_raised", "dead_inputs", "grid"):
        assert getattr(found, name) == getattr(expected, name)
    np.testing.assert_array_equal(found.g_idx, expected.g_idx)
    # One code on the other side of a tie changes the later ones of its row.
    same = (found.codes == expected.codes).all(1) & (found.scales == expected.scales).all(1)
    assert same.mean() > 0.9
    np.testing.assert_array_equal(found.zero_points[same], expected.zero_points[same])
    own = true_objective(W, H, found)
    assert found.row_objectives.shape == (1, len(W))
    np.testing.assert_allclose(found.row_objectives[0], own, rtol=1e-4, atol=1e-9 * own.max())
    assert (found.rtn_objectives is None) == (expected.rtn_objectives is None)
    if found.rtn_objectives is not None:
        np.testing.assert_allclose(found.rtn_objectives, expected.rtn_objectives, rtol=1e-3)
    if options.feedback:
        static, grid = options.static_groups, options.grid
        assert_solution(W, H, found, F, static=static, grid=grid, tie=2e-3)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_rows_do_not_see_each_other(case, monkeypatch):
    W, H = layer(37, columns(case))
    options = recipe(**case)
    F = ptqkit.factorize(H, order=options.order, group_size=options.group_size)
    whole = solved(W, F, options)
    for count in (1, 20, 36):
        for rows in (slice(0, count), slice(count, 37)):
            assert same_result(solved(W[rows], F, options), whole.rows(rows.start, rows.stop))
    monkeypatch.setattr(row_products, "WEIGHTS_AT_ONCE", 10 * W.shape[1])
    assert same_result(solved(W, F, options), whole)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_huge_and_tiny_values_change_nothing_but_scales(scale_dtype):
    W, H = layer(12, 64)
    F = ptqkit.factorize(H, order="group-act", group_size=16)
    options = recipe(group_size=16, bits=3, scale_dtype=scale_dtype)
    plain = solved(W, F, options)
    powers = np.ldexp(np.float32(1), np.resize([0, 60, -60], len(W)))
    found = solved(W * powers[:, None], F, options)
    np.testing.assert_array_equal(found.codes, plain.codes)
    np.testing.assert_array_equal(found.scales, plain.scales * powers[:, None])
    np.testing.assert_allclose(
        found.row_objectives[0], plain.row_objectives[0] * powers.astype(np.float64) ** 2
    )
    far = ptqkit.factorize(np.ldexp(H, 80), order="group-act", group_size=16)
    found = solved(W, far, options)
    np.testing.assert_array_equal(found.codes, plain.codes)
    np.testing.assert_allclose(found.row_objectives[0], np.ldexp(plain.row_objectives[0], 80))


def test_what_cannot_be_solved_is_told_as_by_the_core():
    W, H = layer(12, 64)
    F = ptqkit.factorize(H, group_size=16)
    options = recipe(group_size=16, order="natural", grid="minmax")
    broken = replace(F, R=np.where(np.eye(64) > 0, np.float32(1e-30), np.float32(1e30)))
    with pytest.raises(NotPositiveDefiniteError, match="layer: the solve overflowed.*Raise damp"):
        solved(W, broken, options, name="layer")
    with pytest.raises(ValueError, match="layer: a scale does not fit float16"):
        solved(W * 1e8, F, replace(options, scale_dtype="float16"), name="layer")
    for value in (np.nan, np.inf, -np.inf):
        spoiled = W.copy()
        spoiled[3, 5] = value
        with pytest.raises(ValueError, match="layer: W holds NaN or Inf"):
            solved(spoiled, F, options, name="layer")
    with pytest.raises(ValueError, match="layer: group_size 24 does not divide 64 inputs"):
        solved(W, F, replace(options, group_size=24), name="layer")


def test_where_the_host_solves_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(device_gptq, "why_no_kernels", lambda device: f"none for {device.type}")
    assert why_on_host(CPU, recipe()) == ""
    assert why_on_host(torch.device("meta"), recipe()) == "none for meta"
    assert why_on_host(CPU, recipe(beam_width=2)) == "beam_width=2"
    assert why_on_host(CPU, recipe(grid="feedback")) == "grid 'feedback'"
    assert why_on_host(CPU, Recipe.preset("rtn")) == "method 'rtn'"
