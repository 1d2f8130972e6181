"""Packed weights: the layout, products against float64 and exact integers, hostile input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ptqkit
import ptqkit._core as _core
import ptqkit.reference as reference

BITS = [2, 3, 4, 8]
STEP = {2: 16, 3: 32, 4: 8, 8: 4}
U = 2.0**-24


def matrix(outputs, inputs, groups, bits, order="natural", kind="float16", seed=0):
    """Codes, scales, zeros and g_idx; groups of ceil(inputs / groups) inputs, the last shorter."""
    rng = np.random.default_rng([seed, outputs, inputs, groups, bits])
    top = 1 << bits
    codes = rng.integers(0, top, (outputs, inputs), dtype=np.uint8)
    scales = (rng.random((outputs, groups)) * 0.1 + 0.001).astype(np.float32)
    if kind == "float16":
        scales = scales.astype(np.float16).astype(np.float32)
    if kind == "bfloat16":
        scales = (scales.view(np.uint32) & 0xFFFF0000).view(np.float32)
    zeros = rng.integers(0, top, (outputs, groups), dtype=np.uint8)
    if kind == "symmetric":
        zeros[:] = top // 2
    g_idx = (np.arange(inputs) // -(-inputs // groups)).astype(np.int32)
    if order == "permuted":
        g_idx = rng.permutation(g_idx)
    if order == "ragged":
        g_idx = np.sort(rng.integers(0, groups, inputs)).astype(np.int32)
    return codes, scales, zeros, g_idx


def pack(m, bits):
    codes, scales, zeros, g_idx = m
    return ptqkit.PackedMatrix.pack(codes, scales, zeros, bits=bits, g_idx=g_idx)


def tokens(count, inputs, seed=0):
    rng = np.random.default_rng([seed, count, inputs])
    x = rng.normal(size=(count, inputs)).astype(np.float32)
    return x * np.exp(rng.normal(size=inputs)).astype(np.float32)


def bound(m, x, bits):
    """The bound of PackedMatrix.matmul: 2 (k + 8) u sum_g 2^bits |scale_g| sum |x|."""
    codes, scales, _zeros, g_idx = m
    reach = np.abs(x).astype(float) @ np.abs(scales.astype(float))[:, g_idx].T
    places = codes.shape[1] + scales.shape[1] * STEP[bits]
    return 2 * (places + 8) * U * 2**bits * reach + 1e-37


def check_products(m, x, bits):
    packed = pack(m, bits)
    y = packed.matmul(x)
    assert y.dtype == np.float32 and y.shape == (len(x), len(m[0]))
    assert np.all(np.abs(y - reference.packed_matmul(*m, x)) <= bound(m, x, bits))
    y = packed.matmul(x, activations="int8")
    np.testing.assert_array_equal(y, reference.packed_matmul_int8(*m, x))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("order", ["natural", "permuted", "ragged"])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "symmetric"])
def test_packing_keeps_everything(bits, order, kind):
    m = matrix(37, 100, 5, bits, order, kind)
    packed = pack(m, bits)
    for got, want in zip(packed.unpack(), m, strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype
    codes, scales, zeros, g_idx = m
    want = (codes.astype(np.int16) - zeros.astype(np.int16)[:, g_idx]).astype(np.float32)
    np.testing.assert_array_equal(packed.dequantize(), want * scales[:, g_idx])
    size = {"float32": 4, "symmetric": 4}.get(kind, 2)
    assert packed.scales.dtype.itemsize == size
    assert packed.words.ctypes.data % 64 == 0


@pytest.mark.parametrize("bits", BITS)
def test_the_layout_of_the_words(bits):
    m = matrix(20, 3 * STEP[bits] - 1, 1, bits)
    codes = reference.word_codes(pack(m, bits).words, bits)
    assert codes.shape == (32, 3 * STEP[bits])
    np.testing.assert_array_equal(codes[:20, :-1], m[0])
    assert not codes[:, -1].any() and not codes[20:].any()
    # group by group from whole steps, in the order of the inputs
    m = matrix(20, 50, 3, bits, "permuted")
    codes = reference.word_codes(pack(m, bits).words, bits)
    at = 0
    for g in range(3):
        part = m[0][:, m[3] == g]
        np.testing.assert_array_equal(codes[:20, at : at + part.shape[1]], part)
        at += -(-part.shape[1] // STEP[bits]) * STEP[bits]
    assert codes.shape[1] == at


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(BITS),
    st.integers(1, 150),
    st.integers(1, 300),
    st.integers(1, 200),
    st.sampled_from(["natural", "permuted", "ragged"]),
    st.sampled_from(["float32", "float16", "bfloat16", "symmetric"]),
    st.data(),
)
def test_products_of_any_shape(bits, outputs, inputs, count, order, kind, data):
    groups = data.draw(st.integers(1, min(inputs, 9)))
    groups = -(-inputs // -(-inputs // groups))
    m = matrix(outputs, inputs, groups, bits, order, kind)
    check_products(m, tokens(count, inputs), bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 128, 512])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 16, 31, 33, 64, 300])
def test_products_of_usual_groups(bits, group, count):
    m = matrix(200, 512, 512 // group, bits)
    check_products(m, tokens(count, 512), bits)


def test_ternary_is_stored_in_two_bits():
    rng = np.random.default_rng(0)
    q = ptqkit.rtn(rng.normal(size=(30, 64)), bits="ternary", group_size=32)
    packed = ptqkit.PackedMatrix.pack(
        q.codes, q.scales, q.zero_points, bits="ternary", g_idx=q.g_idx
    )
    assert packed.bits == 2
    np.testing.assert_array_equal(packed.dequantize(), q.dequantize())


@pytest.mark.parametrize("bits", BITS)
def test_results_of_gptq_with_act_order(bits):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 96)).astype(np.float32) * np.arange(1, 97, dtype=np.float32)
    H = ptqkit.Hessian(96)
    H.update(X)
    F = ptqkit.factorize(H, order="act", group_size=32)
    q = ptqkit.gptq(rng.normal(size=(20, 96)), F, bits=bits, group_size=32)
    assert q.permuted_groups
    m = (q.codes, q.scales, q.zero_points, q.g_idx)
    np.testing.assert_array_equal(pack(m, bits).dequantize(), q.dequantize())
    check_products(m, X[:20], bits)


@pytest.mark.parametrize("bits", BITS)
def test_int8_sums_at_their_largest(bits):
    """All codes and activations at the ends of their ranges, in the longest group."""
    top, inputs = (1 << bits) - 1, 66304
    codes = np.full((17, inputs), top, np.uint8)
    codes[1::2] = 0
    zeros = np.zeros((17, 1), np.uint8)
    zeros[2::3] = top
    m = (codes, np.ones((17, 1), np.float32), zeros, np.zeros(inputs, np.int32))
    x = np.full((3, inputs), 5.0, np.float32)
    x[1] *= -1
    x[2, ::2] *= -1
    packed, expected = pack(m, bits), reference.packed_matmul_int8(*m, x)
    np.testing.assert_array_equal(packed.matmul(x, activations="int8"), expected)
    for row, of_row in zip(x, expected, strict=True):  # kernels of one token sum in another way
        np.testing.assert_array_equal(packed.matmul(row, activations="int8"), of_row)


def test_too_long_groups_for_int8():
    inputs = 66312
    packed = ptqkit.PackedMatrix.pack(
        np.zeros((1, inputs), np.uint8), np.ones((1, 1)), np.zeros((1, 1), int), bits=8
    )
    x = np.ones((1, inputs), np.float32)
    assert packed.matmul(x) == 0
    with pytest.raises(ValueError, match="more than 66311 inputs can leave int32"):
        packed.matmul(x, activations="int8")
    arguments = [x, 0, 1, np.zeros((1, 1), np.float32), packed.words, None, 8, packed.scales]
    with pytest.raises(ValueError, match="out of range"):
        _core.packed_matmul(*arguments, packed.zeros, np.array([0, inputs], np.int32), 1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("order", ["natural", "permuted"])
def test_threads_change_nothing(bits, order):
    m = matrix(700, 256, 2, bits, order)
    packed = pack(m, bits)
    for count in (1, 5, 40, 300):
        x = tokens(count, 256)
        for activations in ("float", "int8"):
            one = packed.matmul(x, activations=activations, threads=1)
            for threads in (2, 7):
                y = packed.matmul(x, activations=activations, threads=threads)
                np.testing.assert_array_equal(y, one)


def test_the_error_of_int8_activations():
    m = matrix(64, 512, 4, 4)
    x = tokens(50, 512)
    y = pack(m, 4).matmul(x, activations="int8")
    exact = reference.packed_matmul(*m, x)
    assert np.linalg.norm(y - exact) < 0.02 * np.linalg.norm(exact)
    steps = np.abs(x).reshape(50, 4, 128).max(axis=2) / 127 * 0.5001
    weights = np.abs(pack(m, 4).dequantize()).astype(float).reshape(64, 4, 128).sum(axis=2)
    assert np.all(np.abs(y - exact) <= steps @ weights.T + bound(m, x, 4))


def test_dtypes_of_activations():
    m = matrix(33, 64, 2, 4)
    packed = pack(m, 4)
    x = tokens(6, 64)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    for activations in ("float", "int8"):
        want = packed.matmul(wide, activations=activations)
        got = packed.matmul(bits, activations=activations, dtype="bfloat16")
        np.testing.assert_array_equal(got, want)
        half = x.astype(np.float16)
        want = packed.matmul(half.astype(np.float32), activations=activations)
        np.testing.assert_array_equal(packed.matmul(half, activations=activations), want)
        want = packed.matmul(x, activations=activations)
        np.testing.assert_array_equal(packed.matmul(x.astype(float), activations=activations), want)
        np.testing.assert_array_equal(packed.matmul(x[::-1], activations=activations), want[::-1])


def test_shapes_and_out():
    m = matrix(33, 64, 2, 3)
    packed = pack(m, 3)
    x = tokens(24, 64)
    want = packed.matmul(x)
    np.testing.assert_array_equal(packed.matmul(x.reshape(2, 3, 4, 64)), want.reshape(2, 3, 4, 33))
    assert packed.matmul(x[3]).shape == (33,)
    assert packed.matmul(np.zeros((0, 64), np.float32)).shape == (0, 33)
    out = np.empty((24, 33), np.float32)
    assert packed.matmul(x, out=out) is out
    np.testing.assert_array_equal(out, want)
    for wrong in (np.empty((24, 32), np.float32), np.empty((24, 33)), out.T.copy().T):
        with pytest.raises(ValueError, match="out must be"):
            packed.matmul(x, out=wrong)


def test_nan_and_infinity_of_activations():
    packed = pack(matrix(33, 64, 2, 4), 4)
    x = tokens(3, 64)
    for value in (np.nan, np.inf):
        x[1, 7] = value
        y = packed.matmul(x)
        assert np.isfinite(y[[0, 2]]).all() and not np.isfinite(y[1]).any()
        with pytest.raises(FloatingPointError):
            packed.matmul(x, activations="int8")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("largest", [1.0, 1.983, 1.985, 1.9925, 2.0 - 2.0**-23, 1e30, 1e-30])
def test_activations_at_the_ends_of_fixed_point(bits, largest):
    """A largest value of any mantissa, alone or among others of its size, of either sign."""
    m = matrix(40, 256, 2, bits)
    for few in (False, True):
        x = np.random.default_rng(0).uniform(-1, 1, (4, 256)) * largest
        x[:, ::7] = largest
        x[::2, 1::7] = -largest
        if few:
            x[:, np.arange(256) % 128 > 1] *= 1e-4
        x = x.astype(np.float32)
        for count in (1, 2, 4):
            check_products(m, x[:count], bits)
            check_products(m, x[-count:], bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 128, 1024])
def test_float_products_are_as_good_as_float32(bits, group):
    """Far below the bound: the lowest digit of fixed point is a 2e-5th of the largest value."""
    m = matrix(48, 1024, 1024 // group, bits, kind="symmetric")
    packed = pack(m, bits)
    for count in (1, 2, 4, 8, 40):
        x = np.random.default_rng(count).normal(size=(count, 1024)).astype(np.float32)
        want = reference.packed_matmul(*m, x)
        assert np.linalg.norm(packed.matmul(x) - want) < 2e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("bits", BITS)
def test_longer_groups_than_fixed_point_takes(bits):
    inputs = 65536 + 64
    m = matrix(17, inputs, 1, bits)
    x = np.ones((1, inputs), np.float32)
    y = pack(m, bits).matmul(x)
    assert np.all(np.abs(y - reference.packed_matmul(*m, x)) <= bound(m, x, bits))


def test_zeros_and_the_smallest_activations():
    packed = pack(matrix(33, 64, 2, 4), 4)
    for size in (0.0, 1e-45, 1e-38):
        for activations in ("float", "int8"):
            y = packed.matmul(np.full((2, 64), size, np.float32), activations=activations)
            assert np.all(np.abs(y) <= 64 * 16 * 0.2 * size)


def test_size_in_memory():
    packed = pack(matrix(64, 1024, 8, 4), 4)
    assert packed.nbytes == 64 * 1024 // 2 + 64 * 8 * 3
    assert str(packed.nbytes) in repr(packed) and "4 bits" in repr(packed)


def test_arrays_may_be_mapped(tmp_path):
    m = matrix(40, 96, 3, 3, "permuted")
    packed = pack(m, 3)
    arrays = {}
    for name in ("words", "scales", "zeros"):
        np.save(tmp_path / f"{name}.npy", getattr(packed, name))
        arrays[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    mapped = ptqkit.PackedMatrix(**arrays, bits=3, shape=(40, 96), g_idx=m[3])
    assert mapped.words is arrays["words"]
    x = tokens(5, 96)
    np.testing.assert_array_equal(mapped.matmul(x), packed.matmul(x))


CODES, SCALES, ZEROS, G_IDX = matrix(20, 64, 2, 4)
PACKED = pack((CODES, SCALES, ZEROS, G_IDX), 4)
NAN = SCALES.copy()
NAN[3, 1] = np.nan
BAD_PACKS = [
    ({"codes": CODES.astype(float)}, ValueError, "codes must be a non-empty 2-D array of int"),
    ({"codes": CODES[0]}, ValueError, "codes must be a non-empty 2-D"),
    ({"codes": CODES[:0]}, ValueError, "codes must be a non-empty 2-D"),
    ({"codes": CODES + 16}, ValueError, r"codes must lie in \[0, 15\] to fit 4 bits"),
    ({"codes": CODES.astype(int) - 99}, ValueError, "codes must lie in"),
    ({"zeros": ZEROS + 16}, ValueError, "zeros must lie in"),
    ({"zeros": ZEROS[:, :1]}, ValueError, "must have one shape"),
    ({"codes": CODES[:19]}, ValueError, "must have one shape"),
    ({"scales": NAN}, ValueError, "scales hold NaN or Inf"),
    ({"scales": SCALES.astype(float) * 1e300}, ValueError, "scales hold NaN or Inf"),
    ({"scales": SCALES.astype(int)}, TypeError, "scales must be floating point"),
    ({"g_idx": G_IDX + 1}, ValueError, r"g_idx must lie in \[0, 1\]"),
    ({"g_idx": G_IDX - 1}, ValueError, "g_idx must lie in"),
    ({"g_idx": G_IDX[1:]}, ValueError, "g_idx must be an integer array of shape"),
    ({"g_idx": G_IDX.astype(float)}, ValueError, "g_idx must be an integer array"),
    ({"codes": CODES[:, :63], "g_idx": None}, ValueError, "do not divide 63 inputs evenly"),
    ({"bits": 5}, ValueError, "bits must be 2, 3, 4, 8 or 'ternary', not 5"),
    ({"bits": True}, ValueError, "bits must be"),
    ({"bits": "4"}, ValueError, "bits must be"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_PACKS, ids=range(len(BAD_PACKS)))
def test_bad_input_of_pack(change, error, message):
    call = {"codes": CODES, "scales": SCALES, "zeros": ZEROS, "bits": 4, "g_idx": G_IDX} | change
    with pytest.raises(error, match=message):
        ptqkit.PackedMatrix.pack(call.pop("codes"), call.pop("scales"), call.pop("zeros"), **call)


BAD_ARRAYS = [
    ({"words": PACKED.words[:, :-1].copy()}, ValueError, "too few for 64 inputs"),
    ({"words": PACKED.words[:1]}, ValueError, "words must have shape"),
    ({"words": np.tile(PACKED.words, (1, 2, 1))}, ValueError, "words must have shape"),
    ({"words": PACKED.words.view(np.int32)}, TypeError, "words must be uint32"),
    ({"words": PACKED.words[0]}, ValueError, "words must be a C-contiguous array of 3"),
    ({"words": list(PACKED.words)}, ValueError, "words must be a C-contiguous array of 3"),
    ({"scales": PACKED.scales[:, :1].copy()}, ValueError, "zeros must have shape"),
    ({"scales": PACKED.scales[:, :0].copy()}, ValueError, "scales must have at least one group"),
    ({"scales": PACKED.scales.astype(float)}, TypeError, "scales must be float32, float16"),
    ({"scales": np.full_like(PACKED.scales, np.inf)}, ValueError, "scales hold NaN or Inf"),
    ({"zeros": PACKED.zeros + 16}, ValueError, r"zeros must lie in \[0, 15\]"),
    ({"shape": (21, 63)}, ValueError, "do not divide 63"),
    ({"shape": (33, 64)}, ValueError, "words must have shape"),
    ({"shape": (20, 2**27)}, ValueError, "too few for 134217728 inputs"),
    ({"shape": (2**60, 64)}, ValueError, "shape must be two sizes"),
    ({"shape": (20, 2**60)}, ValueError, "shape must be two sizes"),
    ({"shape": (0, 64)}, ValueError, "shape must be two sizes"),
    ({"shape": (-16, 64)}, ValueError, "shape must be two sizes"),
    ({"g_idx": np.full(64, 2)}, ValueError, r"g_idx must lie in \[0, 1\]"),
    ({"bits": 8}, ValueError, "words of shape .* too few"),
    ({"bits": 3}, ValueError, "words must have shape"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARRAYS, ids=range(len(BAD_ARRAYS)))
def test_bad_arrays_of_the_class(change, error, message):
    call = {"words": PACKED.words, "scales": PACKED.scales, "zeros": PACKED.zeros}
    with pytest.raises(error, match=message):
        ptqkit.PackedMatrix(**(call | {"bits": 4, "shape": (20, 64)} | change))


def test_bad_input_of_matmul():
    x = tokens(3, 64)
    cases = [
        ((x[:, 1:],), {}, ValueError, r"x must have shape \(..., 64\)"),
        ((np.float32(1),), {}, ValueError, "x must have shape"),
        ((x.astype(int),), {}, TypeError, "x must be floating point"),
        ((x.astype(complex),), {}, TypeError, "x must be floating point"),
        ((x,), {"activations": "int4"}, ValueError, "activations"),
        ((x,), {"dtype": "int8"}, ValueError, "dtype"),
        ((x,), {"dtype": "bfloat16"}, TypeError, "must be an array of uint16"),
        ((x,), {"threads": -1}, ValueError, "threads"),
        ((x,), {"threads": 1.5}, TypeError, "threads"),
    ]
    for arguments, options, error, message in cases:
        with pytest.raises(error, match=message):
            PACKED.matmul(*arguments, **options)
