"""Softmax, rounded and corrected, against the float64 twin and PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

import ptqkit
import ptqkit._core as _core
import ptqkit.reference as reference

EPS = float(np.finfo(np.float32).eps)
# Relative error of a probability before rounding: exponential, factor and their product. Measured
# on all cases below: 2.3e-7 at most.
RELATIVE = 6 * EPS
KEYS = [1, 2, 7, 15, 16, 17, 31, 63, 64, 65, 127, 129, 511, 513, 1030]


def _scores(*shape, spread=3.0, seed=0):
    return np.random.default_rng([seed, *shape]).normal(0, spread, shape).astype(np.float32)


def _twin(x, grid, **options):
    return reference.softmax_on_grid(x, grid.scale, grid.zero_point, grid.max_code, **options)


def _check_codes(codes, x, grid, seen):
    """Every code is that of the twin, or the exact value lies next to a tie."""
    exact = reference.softmax(x, seen) / grid.scale
    low, high = -grid.zero_point, grid.max_code - grid.zero_point
    steps = codes.astype(np.int64) - grid.zero_point
    distance = np.abs(np.clip(exact, low, high) - steps) - 0.5
    assert np.all(distance[seen] <= (RELATIVE * exact + 1e-12)[seen])
    assert np.all(steps[~seen] == 0)


def _quantize(x, grid, **options):
    """Values and codes of the core; the two must agree bit for bit."""
    values = ptqkit.softmax_on_grid(x, grid, **options)
    q = ptqkit.softmax_on_grid(x, grid, codes=True, **options)
    mask = {k: v for k, v in options.items() if k in ("allowed", "causal")}
    np.testing.assert_array_equal(q.dequantize(**mask), values)
    assert values.dtype == np.float32 and values.shape == x.shape
    return values, q


def _mask(rng, shape, share=0.6):
    return rng.random(shape) < share


# ---- the exponential -------------------------------------------------------------------------


def _exp(x):
    out = np.empty_like(x)
    _core.softmax_exp(x, out, 0)
    return out


def test_exponential_over_its_whole_range():
    # every 307th float from -0 to ln(2^-126.5); the worst of all is 0.89 (base: 1.19) ulp
    bits = np.arange(0x80000000, 0xC2AF5DC0, 307, dtype=np.uint32)
    x = bits.view(np.float32)
    exact = np.exp(x.astype(np.float64))
    got = _exp(x)
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert np.max(np.abs(got - exact) / ulp) <= 1.2
    assert np.all(got <= 1)


def test_exponential_of_what_is_out_of_range():
    x = np.array([-87.69, -88, -104, -1e4, -3e38, -np.inf], np.float32)
    np.testing.assert_array_equal(_exp(x), 0)
    np.testing.assert_array_equal(_exp(np.array([0.0, -0.0], np.float32)), 1)
    assert np.isnan(_exp(np.full(17, np.nan, np.float32))).all()


# ---- values and codes ------------------------------------------------------------------------


@pytest.mark.parametrize("k", KEYS)
def test_lengths_of_rows(k):
    x, grid = _scores(2, 3, 5, k), ptqkit.softmax_grid(8)
    values, q = _quantize(x, grid)
    want, _, _ = _twin(x, grid)
    _check_codes(q.codes, x, grid, np.ones(x.shape, bool))
    same = q.codes * grid.scale == want
    assert same.mean() > 0.99 or x.size < 200
    np.testing.assert_array_equal(values, np.float32(grid.scale) * q.codes.astype(np.float32))
    assert q.empty_rows == 0 and q.codes.dtype == np.uint8


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 12, 16])
@pytest.mark.parametrize("low", [0.0, -0.1])
@pytest.mark.parametrize("high", [1.0, 0.3])
def test_grids(bits, low, high):
    grid = ptqkit.softmax_grid(bits, low, high)
    scale, zero = reference.softmax_grid(bits, low, high)
    assert abs(grid.scale - scale) <= EPS * scale and grid.zero_point == zero
    x = _scores(1, 2, 6, 90)
    values, q = _quantize(x, grid)
    assert q.codes.dtype == (np.uint8 if bits <= 8 else np.uint16)
    _check_codes(q.codes, x, grid, np.ones(x.shape, bool))
    assert np.abs(values).max() <= high + grid.scale
    # the grid's own methods are the same rounding
    P = reference.softmax(x, np.ones(x.shape, bool)).astype(np.float32)
    codes = grid.quantize(P)
    np.testing.assert_array_equal(
        codes, reference.softmax_codes(P, grid.scale, zero, grid.max_code)
    )
    bias = 1e-3
    exact = grid.scale * codes.astype(float) - grid.offset(bias)
    np.testing.assert_allclose(grid.dequantize(codes, bias), exact, rtol=4 * EPS, atol=EPS)
    assert grid.offset() == grid.scale * zero


@pytest.mark.parametrize("correction", ["bias", "row_sum", "row_length"])
@pytest.mark.parametrize("mask", ["none", "causal", "keys", "entries", "both"])
def test_corrections_and_masks(correction, mask):
    rng = np.random.default_rng(5)
    x, grid = _scores(2, 3, 9, 40), ptqkit.softmax_grid(8)
    options = {"correction": correction}
    if correction == "bias":
        options["bias"] = rng.random(3) * 1e-3
    elif correction == "row_length":
        options["bias"] = rng.random((3, 41)) * 1e-3
    if mask in ("causal", "both"):
        options["causal"] = True
    if mask == "keys":
        options["allowed"] = _mask(rng, (2, 40))
    elif mask == "entries":
        options["allowed"] = _mask(rng, (2, 1, 9, 40))
    elif mask == "both":
        options["allowed"] = _mask(rng, (2, 3, 9, 40), 0.03)
    values, q = _quantize(x, grid, **options)
    want, codes, beta = _twin(x, grid, **options)
    seen = reference.allowed_keys(x.shape, options.get("allowed"), options.get("causal", False))
    _check_codes(q.codes, x, grid, seen)
    assert np.all(values[~seen] == 0)
    empty = ~seen.any(axis=-1)
    assert q.empty_rows == empty.sum() and (mask != "both" or empty.any())
    assert np.all(values[empty] == 0) and np.all(q.corrections[empty] == 0)
    same = (q.codes == codes).all(axis=-1)
    assert same.mean() > 0.9
    np.testing.assert_allclose(values[same], want[same], rtol=4 * EPS, atol=2 * EPS)
    np.testing.assert_allclose(q.corrections[same], beta[same], rtol=4 * EPS, atol=2e-9)
    np.testing.assert_allclose(q.offsets, -q.corrections.astype(float), rtol=EPS)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_row_sums_are_one(bits):
    x, grid = _scores(1, 4, 64, 700, spread=1.0), ptqkit.softmax_grid(bits)
    for causal in (False, True):
        plain = ptqkit.softmax_on_grid(x, grid, causal=causal).astype(np.float64).sum(axis=-1)
        y = ptqkit.softmax_on_grid(x, grid, correction="row_sum", causal=causal)
        assert np.abs(plain - 1).max() > 1e-5  # there was something to correct
        assert np.abs(y.astype(np.float64).sum(axis=-1) - 1).max() <= 4 * EPS


def test_minus_infinity_is_not_allowed():
    rng = np.random.default_rng(0)
    x, grid = _scores(2, 2, 6, 50), ptqkit.softmax_grid(8)
    mask = _mask(rng, x.shape)
    mask[0, 0, 0] = False
    for correction, bias in ((None, None), ("row_sum", None), ("bias", 0.01)):
        options = {"correction": correction, "bias": bias}
        added = ptqkit.softmax_on_grid(np.where(mask, x, -np.inf), grid, **options)
        named = ptqkit.softmax_on_grid(x, grid, allowed=mask, **options)
        np.testing.assert_array_equal(added, named)
        assert np.all(added[0, 0, 0] == 0)
        if correction:
            with pytest.raises(ValueError, match=r"scores\[0, 0, 1\] is -Inf at an allowed key"):
                ptqkit.softmax_on_grid(np.where(mask, x, -np.inf), grid, codes=True, **options)
    codes = ptqkit.softmax_on_grid(np.where(mask, x, -np.inf), grid, codes=True)
    np.testing.assert_array_equal(codes.dequantize(), ptqkit.softmax_on_grid(x, grid, allowed=mask))


@pytest.mark.parametrize("correction", [None, "bias", "row_sum", "row_length"])
def test_masked_entries_leak_nothing(correction):
    rng = np.random.default_rng(1)
    x, grid, k = _scores(2, 2, 33, 33), ptqkit.softmax_grid(8), 33
    bias = {"bias": [1e-3, 2e-3], "row_length": rng.random(k + 1)}.get(correction)
    options = {"correction": correction, "bias": bias}
    before = ptqkit.softmax_on_grid(x, grid, causal=True, **options)
    for last in (0, 1, 15, 31):
        for junk in (rng.normal(0, 50, x.shape), np.nan, np.inf, -np.inf, 3e38):
            later = np.where(np.arange(k) > last, junk, x).astype(np.float32)
            rows = slice(None, last + 1)
            after = ptqkit.softmax_on_grid(
                later[:, :, rows],
                grid,
                causal=False,
                allowed=np.tri(last + 1, k, dtype=bool)[None, None],
                **options,
            )
            assert after.tobytes() == before[:, :, rows].tobytes()
    # padding, and the one row of a cache of keys
    keys = np.arange(k) < 20
    for junk in (0, np.nan, np.inf, 1e30):
        padded = np.where(keys, x, junk).astype(np.float32)
        a = ptqkit.softmax_on_grid(padded, grid, allowed=np.tile(keys, (2, 1)), **options)
        short = {**options}
        if correction == "row_length":
            short["bias"] = bias[:21]
        b = ptqkit.softmax_on_grid(np.ascontiguousarray(x[..., :20]), grid, **short)
        assert a[..., :20].tobytes() == b.tobytes() and not a[..., 20:].any()
    for n in (1, 16, 33):
        row = np.ascontiguousarray(x[:, :, n - 1 : n, :n])
        one = ptqkit.softmax_on_grid(row, grid, causal=True, **options)
        assert one.tobytes() == before[:, :, n - 1 : n, :n].tobytes()


def test_causal_offset():
    x, grid = _scores(1, 1, 4, 7), ptqkit.softmax_grid(8)
    y = ptqkit.softmax_on_grid(x, grid, causal=True, correction="bias", bias=0.5)
    np.testing.assert_array_equal(y[0, 0] != 0, np.tri(4, 7, 3, dtype=bool))
    q = ptqkit.softmax_on_grid(_scores(1, 1, 5, 3), grid, causal=True, codes=True)
    assert q.empty_rows == 2 and np.all(q.codes[0, 0, :2] == 0)


# ---- against PyTorch -------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_torch_gives_the_same(bits):
    torch = pytest.importorskip("torch")
    x, grid = _scores(2, 4, 32, 200), ptqkit.softmax_grid(bits)
    got, _ = _quantize(x, grid, correction="bias", bias=1e-3)
    P = torch.softmax(torch.from_numpy(x), -1)
    fake = torch.fake_quantize_per_tensor_affine(
        P, grid.scale, grid.zero_point, 0, grid.max_code
    ).numpy() + np.float32(1e-3)
    near = np.abs(P.numpy() / grid.scale % 1 - 0.5) < 1e-4
    np.testing.assert_allclose(got[~near], fake[~near], rtol=4 * EPS)
    assert near.mean() < 0.01
    tensors = [
        torch.from_numpy(x),
        torch.from_numpy(x).requires_grad_(),
        torch.from_numpy(x).double(),
    ]
    for tensor in tensors:
        y = ptqkit.softmax_on_grid(tensor, grid, correction="bias", bias=1e-3)
        np.testing.assert_array_equal(y, got)
    for half in (torch.bfloat16, torch.float16):
        tensor = torch.from_numpy(x).to(half)
        np.testing.assert_array_equal(
            ptqkit.softmax_on_grid(tensor, grid),
            ptqkit.softmax_on_grid(tensor.float(), grid),
        )
    mask = torch.from_numpy(x > 0)
    np.testing.assert_array_equal(
        ptqkit.softmax_on_grid(x, grid, allowed=mask.int()),
        ptqkit.softmax_on_grid(x, grid, allowed=x > 0),
    )


# ---- invariance ------------------------------------------------------------------------------

MANY = """
import numpy as np, ptqkit
def everything(threads):
    rng, found = np.random.default_rng(0), []
    x = rng.normal(0, 3, (2, 3, 50, 777)).astype(np.float32)
    mask = rng.random((2, 1, 50, 777)) < 0.7
    for bits in (4, 8, 12):
        grid = ptqkit.softmax_grid(bits, -0.05, 0.9)
        for options in ({}, {"causal": True}, {"allowed": mask}):
            for correction, bias in ((None, None), ("bias", 1e-3), ("row_sum", None)):
                found.append(ptqkit.softmax_on_grid(
                    x, grid, correction=correction, bias=bias, threads=threads, **options))
            P = ptqkit.softmax_on_grid(x, ptqkit.softmax_grid(16), correction="row_sum",
                                         threads=threads, **options)
            found.append(np.abs(P))
            meter = ptqkit.SoftmaxBias(3, grid=grid, threads=threads)
            P = np.maximum(P, 0)
            P /= np.maximum(P.sum(-1, keepdims=True), 1e-9)
            meter.update(P, queries=P.any((1, 3)), **options)
            found += [v for _, v in sorted(meter._sums.items())]
    y = found[0]
    for dtype in (np.float32, np.float64):
        for per, axis in (("sample", -1), ("tensor", -1), ("channel", -1), ("channel", 1)):
            found.append(ptqkit.sqnr(x.astype(dtype), y, per, channel_axis=axis, threads=threads))
    big = rng.normal(size=(2, 150000)).astype(np.float32)
    found.append(ptqkit.sqnr(big, np.round(big, 2), threads=threads))
    return b"".join(np.asarray(f).tobytes() for f in found)
"""


def test_threads_change_nothing():
    space: dict = {"__name__": "many"}
    exec(MANY, space)
    one = space["everything"](1)
    for threads in (2, 3, 8):
        assert space["everything"](threads) == one


LEVELS = """
import sys
import numpy as np, ptqkit
inputs = dict(np.load(sys.argv[1]))
out, grid = {"level": np.array(ptqkit.show_config()["cpu_level"])}, ptqkit.softmax_grid(8)
q = ptqkit.softmax_on_grid(inputs["x"], grid, codes=True, correction="row_sum", causal=True)
out["codes"], out["corrections"] = q.codes, q.corrections
before = ptqkit.softmax_grid(6, of="exponentials")
q = ptqkit.softmax_on_grid(inputs["x"], before, codes=True, correction="row_sum")
out["before"], out["scales"] = q.codes, q.scales
meter = ptqkit.SoftmaxBias(3, grid=grid)
meter.update(inputs["P"], inputs["mask"])
out["sums"] = meter._sums[0]
for per in ("sample", "tensor", "channel"):
    out[per] = np.array(ptqkit.sqnr(inputs["x"], inputs["P"], per))
np.savez(sys.argv[2], **out)
"""


def test_cpu_levels(script, tmp_path):
    x = _scores(2, 3, 50, 777)
    mask = np.random.default_rng(0).random((2, 777)) < 0.7
    seen = reference.allowed_keys(x.shape, mask)
    P = reference.softmax(x, seen).astype(np.float32)
    np.savez(tmp_path / "in.npz", x=x, P=P, mask=mask)
    found = {}
    for level in ptqkit.show_config()["cpu_levels"]:
        out = tmp_path / f"{level}.npz"
        script(LEVELS, str(tmp_path / "in.npz"), str(out), PTQKIT_CPU=level)
        found[level] = dict(np.load(out))
        assert found[level].pop("level") == level
        _check_codes(found[level]["codes"], x, GRID, reference.allowed_keys(x.shape, causal=True))
    base = found.pop("base")
    for result in found.values():
        for name in ("sums", "sample", "tensor", "channel"):  # the same sums on every level
            np.testing.assert_array_equal(result[name], base[name])
        for name in (
            "codes",
            "corrections",
            "before",
            "scales",
        ):  # the same exponential wherever there is an fma
            np.testing.assert_array_equal(result[name], next(iter(found.values()))[name])


def test_rows_do_not_depend_on_each_other():
    x, grid = _scores(3, 4, 10, 129), ptqkit.softmax_grid(8)
    whole = ptqkit.softmax_on_grid(x, grid, correction="row_sum")
    for b, h, i in [(0, 0, 0), (2, 3, 9), (1, 2, 5)]:
        row = ptqkit.softmax_on_grid(x[b, h, i][None], grid, correction="row_sum")
        np.testing.assert_array_equal(row[0], whole[b, h, i])
    shifted = ptqkit.softmax_on_grid(x + np.float32(64), grid)  # rounds x, no more
    assert np.abs(shifted - ptqkit.softmax_on_grid(x, grid)).max() <= 1.01 * grid.scale
    order = np.random.default_rng(0).permutation(129)
    permuted = ptqkit.softmax_on_grid(x[..., order], grid, codes=True).codes
    plain = ptqkit.softmax_on_grid(x, grid, codes=True).codes[..., order]
    assert np.mean(permuted != plain) < 1e-3


def test_out_and_layouts():
    x, grid = _scores(2, 3, 8, 70), ptqkit.softmax_grid(8)
    mask = np.random.default_rng(0).random((2, 70)) < 0.5
    for options in ({}, {"allowed": mask}, {"causal": True, "correction": "row_sum"}):
        want = ptqkit.softmax_on_grid(x, grid, **options)
        out = np.full_like(x, 7)
        assert ptqkit.softmax_on_grid(x, grid, out=out, **options) is out
        np.testing.assert_array_equal(out, want)
        for name, view in {
            "fortran": np.asfortranarray(x),
            "strided": np.repeat(x, 2, axis=-1)[..., ::2],
            "swapped": x.astype(">f4"),
            "double": x.astype(np.float64),
            "transposed": np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),
        }.items():
            before = view.copy()
            got = ptqkit.softmax_on_grid(view, grid, **options)
            np.testing.assert_array_equal(got, want, err_msg=name)
            np.testing.assert_array_equal(view, before)
        inplace = x.copy()
        ptqkit.softmax_on_grid(inplace, grid, out=inplace, **options)
        np.testing.assert_array_equal(inplace, want)
        holes = np.where(x > 0, x, -np.inf)
        want = ptqkit.softmax_on_grid(holes, grid, **options)
        ptqkit.softmax_on_grid(holes, grid, out=holes, **options)
        np.testing.assert_array_equal(holes, want)
    codes = np.zeros(x.shape, np.uint8)
    q = ptqkit.softmax_on_grid(x, grid, codes=True, out=codes)
    assert q.codes is codes


@pytest.mark.parametrize("shape", [(5, 12), (3, 5, 12), (2, 3, 5, 12), (2, 2, 3, 5, 12)])
def test_leading_axes_and_masks_of_every_shape(shape):
    rng = np.random.default_rng(len(shape))
    x, grid = _scores(*shape), ptqkit.softmax_grid(8)
    full = x.reshape(-1, 3 if len(shape) > 2 else 1, 5, 12)
    masks = [shape, (*(1 for _ in shape[:-2]), 5, 12), (*(1 for _ in shape[:-1]), 12)]
    masks += [(*shape[:-1], 1), (*shape[:-2], 1, 12), (1,) * len(shape)]
    for size in masks:
        mask = _mask(rng, size)
        got = ptqkit.softmax_on_grid(x, grid, allowed=mask)
        seen = np.broadcast_to(mask, shape).reshape(full.shape)
        want = ptqkit.softmax_on_grid(full, grid, allowed=seen)
        np.testing.assert_array_equal(got, want.reshape(shape))
    if len(shape) > 2:
        keys = _mask(rng, (len(full), 12))
        got = ptqkit.softmax_on_grid(x, grid, allowed=keys)
        want = ptqkit.softmax_on_grid(full, grid, allowed=keys[:, None, None])
        np.testing.assert_array_equal(got, want.reshape(shape))


def test_nothing_to_do():
    grid = ptqkit.softmax_grid(8)
    for shape in ((0, 2, 3, 4), (2, 2, 0, 4)):
        assert ptqkit.softmax_on_grid(np.zeros(shape, np.float32), grid).shape == shape
        q = ptqkit.softmax_on_grid(np.zeros(shape, np.float32), grid, codes=True, causal=True)
        assert q.corrections.shape == shape[:-1] and q.dequantize().shape == shape


# ---- bad input -------------------------------------------------------------------------------

GRID = ptqkit.softmax_grid(8)
X = _scores(2, 3, 4, 6)
BAD = [
    ({"scores": X[0, 0, 0]}, ValueError, "at least one head and one key"),
    ({"scores": X[..., :0]}, ValueError, "at least one head and one key"),
    ({"scores": X[:, :0]}, ValueError, "at least one head and one key"),
    ({"scores": X.astype(int)}, TypeError, "scores must be floating point"),
    ({"scores": "text"}, TypeError, "scores must be floating point"),
    ({"scores": X.astype(complex)}, TypeError, "scores must be floating point"),
    ({"scores": X.astype(float) * 1e39}, ValueError, "scores\\[.*holds NaN or"),
    ({"grid": 8}, TypeError, "softmax_grid"),
    ({"correction": "mean"}, ValueError, "correction must be one of None"),
    ({"correction": "bias"}, ValueError, "needs bias="),
    ({"correction": "row_length"}, ValueError, "needs bias="),
    ({"correction": "row_sum", "bias": 0.1}, ValueError, "takes no bias"),
    ({"bias": 0.1}, ValueError, "takes no bias"),
    ({"correction": "bias", "bias": [1, 2]}, ValueError, "bias must have shape .* 3 head"),
    ({"correction": "bias", "bias": np.zeros((2, 3))}, ValueError, "bias must have shape"),
    ({"correction": "bias", "bias": np.nan}, ValueError, "bias holds NaN"),
    ({"correction": "bias", "bias": "much"}, TypeError, "bias must be numbers"),
    ({"correction": "row_length", "bias": 0.5}, ValueError, "bias must have shape"),
    ({"correction": "row_length", "bias": np.zeros(6)}, ValueError, "up to 5 keys, but there are"),
    ({"correction": "row_length", "bias": np.zeros((2, 7))}, ValueError, "bias must have shape"),
    ({"allowed": np.ones((3, 6), bool)}, ValueError, "allowed must have shape \\(2, 6\\)"),
    ({"allowed": np.ones((2, 2, 4, 6), bool)}, ValueError, "allowed must have shape"),
    ({"allowed": np.ones((3, 4, 6), bool)}, ValueError, "allowed must have shape"),
    ({"allowed": np.zeros((2, 1, 4, 6))}, TypeError, "pass mask == 0"),
    ({"out": [1]}, TypeError, "out must be a NumPy array"),
    ({"out": np.zeros((2, 3, 4, 5), np.float32)}, ValueError, "out must be a C-contiguous"),
    ({"out": np.zeros((2, 3, 4, 6))}, ValueError, "out must be a C-contiguous float32"),
    ({"out": np.zeros(X.shape, np.float32), "codes": True}, ValueError, "contiguous uint8"),
    ({"out": np.zeros((2, 3, 6, 4), np.float32).swapaxes(2, 3)}, ValueError, "C-contiguous"),
    ({"threads": -1}, ValueError, "threads"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(change, error, message):
    arguments = {"scores": X, "grid": GRID, **change}
    with pytest.raises(error, match=message):
        ptqkit.softmax_on_grid(**arguments)


def test_out_must_not_overlap_the_scores():
    buffer = np.zeros(2 * X.size, np.float32)
    scores, out = buffer[: X.size].reshape(X.shape), buffer[7 : 7 + X.size].reshape(X.shape)
    with pytest.raises(ValueError, match="part of its memory"):
        ptqkit.softmax_on_grid(scores, GRID, out=out)
    scores.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        ptqkit.softmax_on_grid(scores, GRID, out=scores)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("rest", ["finite", "masked"])
def test_not_finite(value, rest):
    x = X.copy() if rest == "finite" else np.full_like(X, -np.inf)
    x[1, 2, 3, 5] = x[1, 0, 2, 0] = value
    for options in ({}, {"correction": "row_sum", "codes": True}, {"threads": 4}):
        with pytest.raises(ValueError, match=r"scores\[1, 0, 2\] holds NaN or \+Inf"):
            ptqkit.softmax_on_grid(x, GRID, **options)
    with pytest.raises(ValueError, match=r"scores\[1, 2, 3\] holds NaN or \+Inf"):
        ptqkit.softmax_on_grid(x, GRID, allowed=np.tile(np.arange(6) > 0, (2, 1)))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"bits": 1}, ValueError),
        ({"bits": 17}, ValueError),
        ({"bits": 8.0}, TypeError),
        ({"minimum": np.nan}, ValueError),
        ({"maximum": np.inf}, ValueError),
        ({"minimum": 0.5, "maximum": 0.2}, ValueError),
        ({"maximum": 0.0}, ValueError),
        ({"minimum": "0"}, TypeError),
    ],
)
def test_bad_ranges(arguments, error):
    with pytest.raises(error):
        ptqkit.softmax_grid(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [(8, 0.0, 0), (8, -1.0, 0), (8, 0.1, 0), (8, np.nan, 0), (8, 0.5, 256), (1, 0.5, 0)],
)
def test_bad_grids(arguments):
    with pytest.raises(ValueError):
        ptqkit.SoftmaxGrid(*arguments)
    with pytest.raises(ValueError):
        GRID.offset(np.nan)
    with pytest.raises(ValueError):
        GRID.quantize(np.array([np.nan], np.float32))
