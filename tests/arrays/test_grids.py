"""Fitting grids: min-max, MSE and Hessian searches against the float64 twin."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from helpers.core_cases import EPS, assert_grid, grid_errors, layer, max_code, search_rtol

import ptqkit
import ptqkit.reference as reference

BITS = [2, 3, 4, 5, 6, 7, 8, "ternary"]
SCALE_TYPES = ["float32", "float16", "bfloat16"]


def _rtn(W, **options):
    options.setdefault("group_size", None)
    return ptqkit.rtn(W, **options)


def _assert_codes(W, q):
    """Codes are the rounding of W on q's own grid, exactly but for ties met by float32 division."""
    scale = q.scales.astype(np.float64)[:, q.g_idx]
    zero = q.zero_points.astype(np.float64)[:, q.g_idx]
    want = reference.quantize(W.astype(np.float64), scale, zero, q.max_code)
    steps = W / scale
    near_tie = np.abs(steps - np.floor(steps) - 0.5) <= EPS * np.abs(steps)
    assert np.all((q.codes == want) | near_tie)


@pytest.mark.parametrize("scale_dtype", SCALE_TYPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_minmax(bits, symmetric, scale_dtype):
    for (rows, n), min_zero in product([(1, 1), (9, 7), (49, 48), (50, 130)], (0, 1)):
        W, _ = layer(rows, n)
        q = _rtn(
            W, bits=bits, symmetric=symmetric, scale_dtype=scale_dtype, min_zero_point=min_zero
        )
        symmetric = symmetric or bits == "ternary"
        scale, zero, _ = reference.fit_grid(
            W,
            max_code=max_code(bits),
            symmetric=symmetric,
            scale_dtype=scale_dtype,
            min_zero=min_zero,
        )
        rounding = {"float32": 2 * EPS, "float16": 2.0**-10, "bfloat16": 2.0**-7}[scale_dtype]
        np.testing.assert_allclose(q.scales[:, 0], scale, rtol=rounding)
        same = q.scales[:, 0] == scale.astype(np.float32)
        assert same.mean() > 0.9 or scale_dtype == "float32"  # the rest: a tie of the rounding
        np.testing.assert_array_equal(q.zero_points[same, 0], zero[same])
        np.testing.assert_array_equal(q.scales, reference.round_to_dtype(q.scales, scale_dtype))
        _assert_codes(W, q)
        if scale_dtype == "float32" and min_zero == 0:  # a scale rounded down clips the extremes
            assert np.all(np.abs(W - q.dequantize()) <= 0.5001 * q.scales)


@pytest.mark.parametrize("scale_dtype", SCALE_TYPES)
@pytest.mark.parametrize("grid", ["mse", "hessian"])
@pytest.mark.parametrize("bits", BITS)
def test_searches_reach_the_twins_best(bits, grid, scale_dtype):
    for symmetric, (rows, n, size) in product((False, True), [(24, 48, 12), (10, 130, None)]):
        W, H = layer(rows, n)
        for min_zero in (0, 1):
            q = _rtn(
                W,
                bits=bits,
                symmetric=symmetric,
                grid=grid,
                H=H,
                group_size=size,
                scale_dtype=scale_dtype,
                min_zero_point=min_zero,
            )
            _assert_codes(W, q)
            width = size or n
            for g in range(n // width):
                part = slice(g * width, (g + 1) * width)
                # in half precision a scale may round to the neighbour of the twin's
                rtol = search_rtol(bits) if scale_dtype == "float32" else 0.02
                assert_grid(
                    W[:, part].astype(float),
                    H[part, part].astype(float),
                    q.scales[:, g],
                    q.zero_points[:, g],
                    bits=bits,
                    method=grid,
                    symmetric=q.symmetric,
                    rtol=rtol,
                    scale_dtype=scale_dtype,
                    min_zero=min_zero,
                )


@pytest.mark.parametrize("grid", ["mse", "hessian"])
def test_at_few_bits_the_search_is_within_1e_5(grid):
    W, H = layer(40, 64)
    for bits, candidates in product((2, 3, "ternary"), (1, 4, 40)):
        q = _rtn(W, bits=bits, grid=grid, H=H, grid_candidates=candidates)
        assert_grid(
            W.astype(float),
            H.astype(float),
            q.scales[:, 0],
            q.zero_points[:, 0],
            bits=bits,
            method=grid,
            symmetric=q.symmetric,
            rtol=1e-5,
            candidates=candidates,
        )


@pytest.mark.parametrize("norm", [0.5, 1.0, 2.0, 2.4, 4.0])
def test_norm_of_the_mse_search(norm):
    W, _ = layer(40, 64)
    q = _rtn(W, bits=3, grid="mse", grid_norm=norm)
    assert_grid(
        W.astype(float),
        None,
        q.scales[:, 0],
        q.zero_points[:, 0],
        bits=3,
        method="mse",
        symmetric=False,
        rtol=5e-5,
        norm=norm,
    )


@pytest.mark.parametrize("steps", [1, 2, 17, 256])
@pytest.mark.parametrize("grid", ["mse", "hessian"])
def test_steps_of_the_search(steps, grid):
    W, H = layer(20, 32)
    q = _rtn(W, bits=3, grid=grid, H=H, grid_steps=steps, grid_min_shrink=0.1)
    assert_grid(
        W.astype(float),
        H.astype(float),
        q.scales[:, 0],
        q.zero_points[:, 0],
        bits=3,
        method=grid,
        symmetric=False,
        rtol=search_rtol(3),
        steps=steps,
        min_shrink=0.1,
    )
    if steps == 1:
        assert q.scales.tobytes() == _rtn(W, bits=3).scales.tobytes()


def test_searches_improve_their_own_criterion():
    W, H = layer(40, 64)
    for grid in ("mse", "hessian"):
        plain, found = _rtn(W, bits=3), _rtn(W, bits=3, grid=grid, H=H)
        error = [
            grid_errors(W.astype(float), q.scales[:, 0], q.zero_points[:, 0], 7, grid, H)[0].sum()
            for q in (plain, found)
        ]
        assert error[1] < 0.9 * error[0]


SPECIAL = {
    "zero": np.zeros(24),
    "constant": np.full(24, 0.37),
    "negative": np.full(24, -2.5),
    "one-hot": np.eye(24)[3],
    "positive": np.linspace(0.1, 3, 24),
    "tiny": 1e-30 * np.linspace(-1, 2, 24),
    "subnormal": 1e-40 * np.linspace(-1, 2, 24),
    "huge": 1e30 * np.linspace(-1, 2, 24),
    "largest": 3e38 * np.linspace(-0.1, 1, 24),
    "wide": np.geomspace(1e-20, 1e10, 24),
}


@pytest.mark.parametrize("grid", ["minmax", "mse", "hessian"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_rows(kind, grid):
    W = np.stack([SPECIAL[kind], np.zeros(24), SPECIAL["positive"]]).astype(np.float32)
    _, H = layer(3, 24)
    for bits, symmetric in product(BITS, (False, True)):
        q = _rtn(W, bits=bits, symmetric=symmetric, grid=grid, H=H, group_size=8)
        assert np.all(q.scales > 0) and np.isfinite(q.scales).all()
        assert np.all(q.scales >= 2.0**-126)
        assert q.codes.max() <= q.max_code and q.zero_points.max() <= q.max_code
        back = q.dequantize(np.float64)
        assert np.all(back[1] == 0)
        step = q.scales.astype(np.float64)[:, q.g_idx]
        if grid == "minmax":
            assert np.all(np.abs(back - W) <= 0.5001 * step)
            _assert_codes(W, q)
        if kind == "constant" and not q.symmetric and grid == "minmax":
            np.testing.assert_allclose(back[0], W[0], rtol=1e-6)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_scales_of_tiny_rows_stay_normal(scale_dtype):
    q = _rtn(np.full((2, 8), 1e-30, np.float32), scale_dtype=scale_dtype)
    smallest = {"float16": 2.0**-14, "bfloat16": 2.0**-126}[scale_dtype]
    assert np.all(q.scales >= smallest)
    assert np.isfinite(q.dequantize()).all()


def test_a_scale_beyond_its_type_is_an_error():
    W = np.full((2, 8), 6e6, np.float32)
    with pytest.raises(ValueError, match=r"lay: a scale does not fit float16"):
        _rtn(W, bits=4, scale_dtype="float16", name="lay")
    assert _rtn(W, bits=8, scale_dtype="float16").scales.max() <= 65504
    with pytest.raises(ValueError, match="does not fit float32"):
        _rtn(np.array([[-3e38, 3e38]], np.float32), bits=2)


def test_zero_points_reach_both_ends():
    W = np.stack([np.linspace(0, 1, 16), np.linspace(-1, 0, 16)]).astype(np.float32)
    np.testing.assert_array_equal(_rtn(W, bits=4).zero_points[:, 0], [0, 15])
    q = _rtn(W, bits=4, min_zero_point=1)
    np.testing.assert_array_equal(q.zero_points[:, 0], [1, 15])
    assert q.codes.min() >= 0 and q.codes[0, -1] == 15
