"""Integer codes of activations: grids, codes, outlier columns."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest

import ptqkit
import ptqkit.reference as reference

SHAPES = [(1, 1), (3, 7), (17, 64), (33, 65), (5, 129), (40, 300)]
GRIDS = [(True, False), (True, True), (False, False)]  # symmetric, narrow


def tokens(rows: int, n: int, seed: int = 0) -> np.ndarray:
    """Rows of very different sizes, shifted channels, one row of zeros and one all above 0."""
    rng = np.random.default_rng([seed, rows, n])
    X = rng.normal(size=(rows, n)) + rng.normal(size=n)
    X *= 10.0 ** rng.integers(-3, 4, (rows, 1))
    X[0] = np.abs(X[0])
    X[-1] *= rows == 1
    return X.astype(np.float32)


def twin(X, dtype=np.float32, **options):
    return reference.quantize_activations(X, dtype=dtype, **options)


def assert_same(q, codes, scales, zeros):
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_array_equal(q.scales.reshape(-1), scales.reshape(-1))
    np.testing.assert_array_equal(q.zero_points.reshape(-1), zeros.reshape(-1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize(("symmetric", "narrow"), GRIDS)
def test_against_the_twin(shape, granularity, symmetric, narrow):
    X = tokens(*shape)
    options = {"granularity": granularity, "symmetric": symmetric, "narrow_range": narrow}
    for bits in (2, 3, 4, 7, 8, 9, 12, 16):
        q = ptqkit.quantize_activations(X, bits, **options)
        assert_same(q, *twin(X, bits=bits, **options))
        assert q.codes.dtype == q.zero_points.dtype == (np.int8 if bits <= 8 else np.int16)
        assert q.scales.dtype == np.float32 and q.shape == X.shape
        assert q.scales.shape == ((len(X), 1) if granularity == "token" else (1,))
        # the float64 twin: the same but near ties
        codes, scales, zeros = twin(X, np.float64, bits=bits, **options)
        np.testing.assert_allclose(q.scales.reshape(scales.shape), scales, rtol=3e-7)
        steps = X / scales + zeros
        # rounding of x / s + z, of s, and the sum of two such
        near = np.abs(steps - np.floor(steps) - 0.5) < 2.0**-21 * (np.abs(steps) + 1)
        near |= zeros != q.zero_points.reshape(zeros.shape)
        np.testing.assert_array_equal(q.codes[~near], codes[~near])
        assert near.mean() < 0.2 or X.size < 30 or (symmetric and bits == 2)


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize(("symmetric", "narrow"), GRIDS)
def test_bit_for_bit_as_pytorch(granularity, symmetric, narrow):
    torch = pytest.importorskip("torch")
    X = torch.from_numpy(tokens(23, 77))
    for bits, kind in product((3, 8, 16), (torch.float32, torch.float16, torch.bfloat16)):
        given = (X / X.abs().max() * 900).to(kind)
        x = given.float()
        ends = x.aminmax(dim=1, keepdim=True) if granularity == "token" else x.aminmax()
        low, high = ends.min.clamp(max=0), ends.max.clamp(min=0)
        top = 2.0 ** (bits - 1) - 1
        bottom = -top if narrow else -top - 1
        if symmetric:
            scale = torch.maximum(-low, high) / ((top - bottom) / 2)
            zero = torch.zeros_like(scale)
        else:
            scale = (high - low) / (top - bottom)
            zero = torch.round(torch.clamp(bottom - low / scale, bottom, top))
        codes = torch.clamp(torch.round(x / scale + zero), bottom, top)
        value = (codes - zero) * scale
        options = {"symmetric": symmetric, "narrow_range": narrow, "granularity": granularity}
        q = ptqkit.quantize_activations(given, bits, **options)
        live = np.asarray((scale > 0).expand(len(x), 1)[:, 0])
        np.testing.assert_array_equal(q.codes[live], codes.numpy()[live])
        np.testing.assert_array_equal(q.dequantize()[live], value.numpy()[live])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_the_same_as_compressed_tensors(symmetric, granularity):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    X = torch.from_numpy(tokens(9, 70)[None, :-1])
    for bits in (4, 8):
        args = library.QuantizationArgs(
            num_bits=bits, symmetric=symmetric, strategy=granularity, dynamic=True
        )
        scale, zero = helpers.compute_dynamic_scales_and_zp(X, args, torch.nn.Identity())
        want = forward.fake_quantize(X, scale, zero, args)
        q = ptqkit.quantize_activations(X, bits, symmetric=symmetric, granularity=granularity)
        np.testing.assert_array_equal(q.scales.reshape(-1), scale.numpy().reshape(-1))
        np.testing.assert_array_equal(q.zero_points.reshape(-1), zero.numpy().reshape(-1))
        np.testing.assert_array_equal(q.dequantize(), want.numpy())


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_same_as_the_quantizer_of_models(symmetric):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    grids = pytest.importorskip("ptqkit.nn.activation_grids")
    X = tokens(19, 83)
    for bits in (4, 8, 16):
        x = torch.from_numpy(X)
        want = grids.fake_quantize(x, *grids.dynamic_grid(x, bits, symmetric), bits)
        q = ptqkit.quantize_activations(X, bits, symmetric=symmetric)
        np.testing.assert_array_equal(q.dequantize(), want.numpy())
        ends = {"bits": bits, "symmetric": symmetric}
        scale, zero = ptqkit.activation_grid(X.min(axis=0), X.max(axis=0), **ends)
        low, high = float(X.min()), float(X.max())
        assert grids.static_grid(low, high, dtype=torch.float32, **ends) == (scale, zero)


def test_conventions():
    X = np.array([[127.0, -127.0, 63.5, 64.5, 0.5, 1.5, -2.5, 0.0]])
    q = ptqkit.quantize_activations(X, narrow_range=True)  # scale 1: ties to even
    assert q.codes.tolist() == [[127, -127, 64, 64, 0, 2, -2, 0]] and q.scales == 1
    q = ptqkit.quantize_activations(np.array([[127.5, -127.5, 0.5]]))
    assert q.codes.tolist() == [[127, -128, 0]] and q.scales == 1
    # the zero-point is added before rounding: 0.5 + 1 is nearer (even) to 2
    q = ptqkit.quantize_activations(
        np.array([[0.5, 1.5, -1.5]]), granularity="tensor", symmetric=False, scale=1, zero_point=1
    )
    assert q.codes.tolist() == [[2, 2, 0]]
    q = ptqkit.quantize_activations(np.array([[0.0, 255.0, 51.0]]), symmetric=False)
    assert q.codes.tolist() == [[-128, 127, -77]] and q.zero_points == -128 and q.scales == 1
    assert q.dequantize().tolist() == [[0, 255, 51]]


@pytest.mark.parametrize(("symmetric", "narrow"), GRIDS)
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_empty_ranges_dequantize_to_zero(symmetric, narrow, granularity):
    X = np.zeros((3, 40), np.float32)
    X[2] = -0.0
    options = {"symmetric": symmetric, "narrow_range": narrow, "granularity": granularity}
    for bits in (2, 8, 16):
        X[1, 3] = 1e-45 if bits > 2 else 0  # its scale underflows
        q = ptqkit.quantize_activations(X, bits, **options)
        assert np.all(q.scales > 0) and np.isfinite(q.scales).all()
        assert np.all(q.codes == q.zero_points) and np.all(q.dequantize() == 0)
        assert_same(q, *twin(X, bits=bits, **options))


@pytest.mark.parametrize("sign", [1, -1])
def test_ranges_of_one_sign_hold_zero(sign):
    X = sign * (np.arange(10, dtype=np.float32) + 100)[None]
    q = ptqkit.quantize_activations(X, symmetric=False)
    assert q.zero_points == (-128 if sign > 0 else 127)
    assert np.abs(q.dequantize() - X).max() <= q.scales / 2 * (1 + 1e-6)


def test_static_grids():
    X = tokens(12, 50)
    low, high = X.min(axis=0), X.max(axis=0)
    for bits, (symmetric, narrow) in product((4, 8, 16), GRIDS):
        options = {"bits": bits, "symmetric": symmetric, "narrow_range": narrow}
        scale, zero = ptqkit.activation_grid(low, high, **options)
        assert isinstance(scale, np.float32) and isinstance(zero, int)
        assert (scale, zero) == ptqkit.activation_grid(low.min(), float(high.max()), **options)
        dynamic = ptqkit.quantize_activations(X, granularity="tensor", **options)
        assert dynamic.scales == scale and dynamic.zero_points == zero
        grid = {"scale": scale, "zero_point": None if symmetric else zero}
        q = ptqkit.quantize_activations(X, granularity="tensor", **options, **grid)
        assert q.codes.tobytes() == dynamic.codes.tobytes()
        # values beyond a static grid are clamped to its ends
        far = ptqkit.quantize_activations(3 * X, granularity="tensor", **options, **grid)
        ends = reference.code_limits(bits, narrow)
        assert far.codes.min() >= ends[0] and far.codes.max() == ends[1]
        assert_same(far, *twin(3 * X, **options, scale=scale, zero_point=zero))
    tiny = ptqkit.quantize_activations(X, granularity="tensor", scale=1e-45)
    assert set(np.unique(tiny.codes)) == {-128, 0, 127}
    torch = pytest.importorskip("torch")
    want = ptqkit.activation_grid(low, high)
    assert ptqkit.activation_grid(torch.from_numpy(low), torch.from_numpy(high)) == want


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_outlier_columns_stay_float(granularity, symmetric):
    X = np.random.default_rng(5).normal(size=(4, 6, 90)).astype(np.float32)
    X[..., [3, 40, 89]] *= 60
    X[1, 2, 17] = 6.0  # exactly the threshold
    mask = ptqkit.outlier_columns(X)
    np.testing.assert_array_equal(mask, reference.outlier_columns(X.reshape(-1, 90)))
    assert set(np.flatnonzero(mask)) == {3, 17, 40, 89}
    options = {"granularity": granularity, "symmetric": symmetric}
    q = ptqkit.quantize_activations(X, outliers=mask, **options)
    back, plain = q.dequantize(), ptqkit.quantize_activations(X, **options).dequantize()
    np.testing.assert_array_equal(back[..., mask], X[..., mask])
    rest = ~mask
    assert np.abs(back - X)[..., rest].max() < 0.1 * np.abs(plain - X)[..., rest].max()
    alone = ptqkit.quantize_activations(X[..., rest], **options)
    if symmetric or granularity == "tensor":
        np.testing.assert_array_equal(q.codes[..., rest], alone.codes)
    np.testing.assert_array_equal(q.scales, alone.scales)
    assert np.all(q.codes[..., mask] == q.zero_points)
    assert q.outlier_values.shape == (4, 6, 4)
    none = ptqkit.quantize_activations(X, outliers=np.zeros(90, bool), **options)
    np.testing.assert_array_equal(none.dequantize(), plain)
    every = ptqkit.quantize_activations(X, outliers=np.ones(90, bool), **options)
    np.testing.assert_array_equal(every.dequantize(), X)


def test_outlier_thresholds():
    X = tokens(30, 70)
    for threshold in (1e-3, 0.5, 6, 1e3, np.inf, np.float32(2)):
        want = reference.outlier_columns(X, threshold)
        np.testing.assert_array_equal(ptqkit.outlier_columns(X, threshold), want)
    assert not ptqkit.outlier_columns(np.zeros((0, 5))).any()
    assert ptqkit.outlier_columns([[7.0, -6.5, 5.9]]).tolist() == [True, True, False]


def test_inputs_of_every_kind():
    X = tokens(24, 35)
    mask = np.arange(35) % 9 == 2
    options = {"symmetric": False, "outliers": mask}
    want = ptqkit.quantize_activations(X, **options)
    strided = np.repeat(X, 2, axis=1)[:, ::2]
    for same in (
        X.reshape(2, 3, 4, 35),
        X.astype(float),
        X.tolist(),
        X.astype(">f4"),
        strided,
        np.asfortranarray(X),
    ):
        q = ptqkit.quantize_activations(same, **options)
        assert q.shape == np.shape(same) and q.scales.shape == (*np.shape(same)[:-1], 1)
        assert_same(q, want.codes.reshape(q.shape), want.scales, want.zero_points)
        np.testing.assert_array_equal(q.dequantize().reshape(X.shape), want.dequantize())
    one = ptqkit.quantize_activations(X[3], **options)
    assert one.shape == (35,) and one.scales.shape == (1,)
    np.testing.assert_array_equal(one.dequantize(), want.dequantize()[3])
    half = np.clip(X, -6e4, 6e4).astype(np.float16)
    half[0, :4] = [6e-8, -6e-8, 65504, 0]  # subnormals, the largest
    assert_same(ptqkit.quantize_activations(half), *twin(half.astype(np.float32)))
    np.testing.assert_array_equal(
        ptqkit.outlier_columns(half), reference.outlier_columns(half.astype(np.float64))
    )
    empty = ptqkit.quantize_activations(np.zeros((0, 4, 5)))
    assert empty.dequantize().shape == (0, 4, 5) and empty.scales.shape == (0, 4, 1)
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(X.copy()).requires_grad_()
    q = ptqkit.quantize_activations(tensor, outliers=torch.from_numpy(mask), symmetric=False)
    assert_same(q, want.codes, want.scales, want.zero_points)
    bf16 = tensor.detach().to(torch.bfloat16)
    q = ptqkit.quantize_activations(bf16, **options)
    wide = bf16.float().numpy()
    assert_same(q, *twin(wide, symmetric=False, outliers=mask))
    np.testing.assert_array_equal(q.outlier_values, wide[:, mask])


def test_inputs_are_left_alone():
    X, mask = tokens(20, 30), np.arange(30) == 4
    before = X.copy()
    q = ptqkit.quantize_activations(X, outliers=mask)
    mask[:] = True
    np.testing.assert_array_equal(X, before)
    assert q.outliers.sum() == 1


BAD = [
    ({"X": [[1, 2]]}, TypeError, "X must be floating point"),
    ({"X": 3.0}, ValueError, "X must have shape (..., channels)"),
    ({"X": np.zeros((4, 0))}, ValueError, "X must have shape (..., channels)"),
    ({"X": [[1.0], [1.0, 2.0]]}, ValueError, "X must be an array"),
    ({"X": "text"}, ValueError, "X must have shape"),
    ({"X": None}, ValueError, "X must have shape"),
    ({"X": [[1.0, np.nan]]}, ValueError, "NaN or Inf"),
    ({"X": [[1.0, np.inf]], "granularity": "tensor"}, ValueError, "NaN or Inf"),
    ({"X": [[1.0, -1e39]]}, ValueError, "NaN or Inf"),
    ({"X": np.float16([[1, np.nan]]), "outliers": [False, True]}, ValueError, "NaN or Inf"),
    ({"X": [[3e38, -3e38]], "symmetric": False}, ValueError, "overflows float32"),
    ({"X": [[3e38, -3e38]], "symmetric": False, "granularity": "tensor"}, ValueError, "overflows"),
    ({"bits": 1}, ValueError, "bits must lie in [2, 16]"),
    ({"bits": 17}, ValueError, "bits"),
    ({"bits": 8.0}, TypeError, "bits must be an integer"),
    ({"bits": True}, TypeError, "bits"),
    ({"granularity": "channel"}, ValueError, "granularity must be one of 'token', 'tensor'"),
    ({"granularity": []}, ValueError, "granularity"),
    ({"symmetric": False, "narrow_range": True}, ValueError, "narrow_range=True needs"),
    ({"scale": 1.0}, ValueError, 'granularity="tensor"'),
    ({"zero_point": 0}, ValueError, "zero_point was given without scale"),
    ({"granularity": "tensor", "scale": 0.0}, ValueError, "scale must be positive"),
    ({"granularity": "tensor", "scale": -1.0}, ValueError, "scale must be positive"),
    ({"granularity": "tensor", "scale": np.nan}, ValueError, "scale must be positive"),
    ({"granularity": "tensor", "scale": 1e-60}, ValueError, "scale must be positive"),
    ({"granularity": "tensor", "scale": 1e60}, ValueError, "scale must be positive"),
    ({"granularity": "tensor", "scale": "1"}, TypeError, "scale must be a number"),
    ({"granularity": "tensor", "scale": [1.0, 2.0]}, ValueError, "one number"),
    ({"granularity": "tensor", "scale": 1.0, "symmetric": False}, ValueError, "needs zero_point"),
    ({"granularity": "tensor", "scale": 1.0, "zero_point": 3}, ValueError, "symmetric=True"),
    (
        {"granularity": "tensor", "scale": 1.0, "zero_point": 128, "symmetric": False},
        ValueError,
        "zero_point must lie in [-128, 127]",
    ),
    (
        {"granularity": "tensor", "scale": 1.0, "zero_point": 0.5, "symmetric": False},
        TypeError,
        "zero_point must be an integer",
    ),
    ({"outliers": [0, 1]}, TypeError, "outliers must be boolean"),
    ({"outliers": [True]}, ValueError, "outliers must have shape (2,)"),
    ({"outliers": True}, ValueError, "outliers must have shape (2,)"),
    ({"threads": -1}, ValueError, "threads"),
    ({"threads": 1.5}, TypeError, "threads"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD, ids=range(len(BAD)))
def test_bad_input(change, error, text):
    options = {"X": [[1.0, -2.0]]} | change
    with pytest.raises(error, match=re.escape(text)):
        ptqkit.quantize_activations(**options)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([[1.0]], 0), ValueError, "threshold must be above 0"),
        (([[1.0]], -6.0), ValueError, "threshold"),
        (([[1.0]], np.nan), ValueError, "threshold"),
        (([[1.0]], "6"), TypeError, "threshold must be a number"),
        (([[1.0, np.nan]],), ValueError, "NaN or Inf"),
        (([[1, 2]],), TypeError, "floating point"),
        ((5.0,), ValueError, "channels"),
    ],
)
def test_bad_input_of_outlier_columns(arguments, error, text):
    with pytest.raises(error, match=text):
        ptqkit.outlier_columns(*arguments)


@pytest.mark.parametrize(
    ("low", "high", "options", "error", "text"),
    [
        (1.0, -1.0, {}, ValueError, "lies above"),
        (np.nan, 1.0, {}, ValueError, "minimum must be finite"),
        (0.0, np.inf, {}, ValueError, "maximum must be finite"),
        (-1e39, 1.0, {}, ValueError, "minimum must be finite"),
        (-3e38, 3e38, {}, ValueError, "overflows float32"),
        ([], [], {}, ValueError, "minimum is empty"),
        ("a", 1.0, {}, TypeError, "minimum must be a number"),
        (0.0, None, {}, TypeError, "maximum must be a number"),
        (0.0, 1j, {}, TypeError, "maximum must be a number"),
        (False, 1.0, {}, TypeError, "minimum must be a number"),
        (-1.0, 1.0, {"bits": 1}, ValueError, "bits"),
        (-1.0, 1.0, {"narrow_range": True}, ValueError, "narrow_range"),
    ],
)
def test_bad_input_of_activation_grid(low, high, options, error, text):
    with pytest.raises(error, match=text):
        ptqkit.activation_grid(low, high, **options)


def test_threads_change_nothing():
    X = tokens(700, 1030)[:, ::-1] * np.linspace(0.01, 1, 1030)
    mask = ptqkit.outlier_columns(X, 1500, threads=1)
    assert 0 < mask.sum() < 1030
    for options in (
        {"outliers": mask},
        {"symmetric": False, "bits": 12},
        {"granularity": "tensor", "symmetric": False, "outliers": mask},
    ):
        one = ptqkit.quantize_activations(X, threads=1, **options)
        for threads in (2, 3, 8):
            many = ptqkit.quantize_activations(X, threads=threads, **options)
            assert_same(many, one.codes, one.scales, one.zero_points)
            np.testing.assert_array_equal(ptqkit.outlier_columns(X, 1500, threads=threads), mask)


LEVEL = """
import hashlib, sys
import numpy as np, ptqkit
rng = np.random.default_rng(3)
X = (rng.normal(size=(37, 203)) * 10.0 ** rng.integers(-3, 4, (37, 1))).astype(np.float32)
mask = ptqkit.outlier_columns(X, 1500.0)
seen = hashlib.sha256(mask.tobytes())
for bits in (2, 4, 8, 11, 16):
    for symmetric in (True, False):
        for granularity in ("token", "tensor"):
            for data in (X, X.astype(np.float16)):
                q = ptqkit.quantize_activations(data, bits, symmetric=symmetric,
                                                granularity=granularity, outliers=mask)
                for a in (q.codes, q.scales, q.zero_points):
                    seen.update(a.tobytes())
W = rng.normal(size=(50, 203)).astype(np.float32)
for symmetric in (True, False):
    qx = ptqkit.quantize_activations(X, symmetric=symmetric, outliers=mask)
    qw = ptqkit.quantize_activations(W, symmetric=symmetric)
    seen.update(ptqkit.int8_matmul(qx, qw).tobytes())
    p = ptqkit.rtn(W, bits=8, group_size=None, per_tensor=True, symmetric=symmetric)
    seen.update(p.codes.tobytes() + p.scales.tobytes() + p.zero_points.tobytes())
seen.update(ptqkit.bias_correction(W, p.dequantize(), X[0]).tobytes())
print(seen.hexdigest())
"""


def test_every_cpu_level_gives_the_same_bits(script):
    levels = ptqkit.show_config()["cpu_levels"]
    digests = {level: script(LEVEL, PTQKIT_CPU=level).stdout for level in levels}
    assert len(set(digests.values())) == 1, digests


def _bf16_tokens(rows: int, n: int, seed: int = 0) -> np.ndarray:
    X = reference.to_bfloat16(tokens(rows, n, seed))
    X[rows // 2, : n // 2] = np.float32(2.0**-133)  # the smallest above 0
    return X


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_bfloat16_arithmetic_is_that_of_the_twin_and_of_pytorch(shape, symmetric):
    torch = pytest.importorskip("torch")
    from ptqkit.nn.activation_grids import dynamic_grid, grid_codes

    X = _bf16_tokens(*shape)
    x = torch.from_numpy(X).bfloat16()
    different = 0
    for bits in (2, 3, 4, 7, 8):
        options = {"bits": bits, "symmetric": symmetric}
        q = ptqkit.quantize_activations(x, arithmetic="bfloat16", **options)
        assert_same(q, *reference.quantize_activations_bf16(X, **options))
        scale, zero = dynamic_grid(x, bits, symmetric)
        none = torch.zeros_like(scale)
        assert_same(
            q,
            grid_codes(x, scale, zero, bits).to(torch.int8).numpy(),
            scale.float().numpy(),
            (none if zero is None else zero).to(torch.int8).numpy(),
        )
        different += int((q.codes != ptqkit.quantize_activations(x, **options).codes).sum())
        step, middle = float(scale.flatten()[0]), 0 if symmetric else 1
        q = ptqkit.quantize_activations(
            x, granularity="tensor", scale=step, zero_point=middle, arithmetic="bfloat16", **options
        )
        want = reference.quantize_activations_bf16(X, scale=step, zero_point=middle, **options)
        np.testing.assert_array_equal(q.codes, want[0])
    assert different or X.size < 300  # the arithmetic matters


def test_bfloat16_arithmetic_has_no_wide_or_narrow_grids():
    X = np.ones((2, 4), np.float32)
    for options in ({"bits": 9}, {"narrow_range": True}):
        with pytest.raises(ValueError, match="arithmetic='bfloat16' takes at most 8 bits"):
            ptqkit.quantize_activations(X, arithmetic="bfloat16", **options)
    with pytest.raises(ValueError, match="arithmetic must be"):
        ptqkit.quantize_activations(X, arithmetic="half")
