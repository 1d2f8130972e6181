"""SQNR against its float64 twin, streaming and at once."""

from __future__ import annotations

import math

import numpy as np
import pytest

import ptqkit
import ptqkit.reference as reference

SHAPES = [(1, 1), (3, 7), (5, 16), (4, 33), (2, 3, 5), (6, 4, 9, 3), (2, 70000), (5000, 130)]


def _pair(shape, noise=0.01, dtype=np.float32, seed=0):
    rng = np.random.default_rng([seed, *shape])
    x = rng.normal(size=shape).astype(dtype)
    return x, (x + noise * rng.normal(size=shape)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_twin(shape, dtype):
    x, y = _pair(shape, dtype=dtype)
    for per in ("sample", "tensor", "channel"):
        for axis in range(-1, len(shape)) if per == "channel" else (-1,):
            got = ptqkit.sqnr(x, y, per, channel_axis=axis)
            want = reference.sqnr(x, y, per, axis)
            np.testing.assert_allclose(got, want, rtol=1e-12)
            if per == "channel":
                assert got.shape == (shape[axis],)
            else:
                assert isinstance(got, float)


def test_the_mean_is_of_ratios_inside_the_logarithm():
    x = np.ones((2, 4))
    y = x + np.array([[0.1], [1.0]])
    assert ptqkit.sqnr(x, y) == pytest.approx(10 * math.log10((100 + 1) / 2), rel=1e-12)
    assert ptqkit.sqnr(x, y, "tensor") == pytest.approx(10 * math.log10(8 / 4.04), rel=1e-12)
    np.testing.assert_allclose(ptqkit.sqnr(x, y, "channel"), [10 * math.log10(2 / 1.01)] * 4)


def test_scale_errors_are_seen():
    x, _ = _pair((8, 100))
    assert ptqkit.sqnr(x, 1.1 * x) == pytest.approx(20, abs=1e-5)
    assert ptqkit.sqnr(x, -x) == pytest.approx(10 * math.log10(0.25), abs=1e-9)


@pytest.mark.parametrize("per", ["sample", "tensor", "channel"])
def test_streams_and_merges_are_the_batch(per):
    x, y = _pair((50, 3, 8))
    whole, parts, left, right = (ptqkit.SQNR(per, channel_axis=1) for _ in range(4))
    whole.update(x, y)
    for i in range(0, 50, 7):
        parts.update(x[i : i + 7], y[i : i + 7])
    left.update(x[:20], y[:20])
    right.update(x[20:], y[20:])
    left.merge(right)
    left.merge(ptqkit.SQNR(per, channel_axis=1))
    empty = ptqkit.SQNR(per, channel_axis=1)
    empty.merge(whole)
    for other in (parts, left, empty):
        np.testing.assert_allclose(other.decibel, whole.decibel, rtol=1e-13)
        assert other.count == 50
    np.testing.assert_allclose(whole.decibel, ptqkit.sqnr(x, y, per, channel_axis=1))
    right.update(x, y)  # and the merged one has not changed with it
    np.testing.assert_allclose(left.decibel, whole.decibel, rtol=1e-13)


def test_zero_errors_are_counted():
    x, y = _pair((5, 9))
    y[[1, 4]] = x[[1, 4]]
    meter = ptqkit.SQNR()
    meter.update(x, y)
    assert meter.decibel == math.inf and meter.infinite == 2 and meter.count == 5
    rest = [0, 2, 3]
    assert meter.finite_decibel == pytest.approx(ptqkit.sqnr(x[rest], y[rest]), rel=1e-12)
    same = ptqkit.SQNR()
    same.update(x, x)
    assert same.decibel == math.inf and math.isnan(same.finite_decibel) and same.infinite == 5
    channels = ptqkit.SQNR("channel")
    z = x.copy()
    z[:, 3:] += 0.5
    channels.update(x, z)
    assert channels.infinite == 3 and np.all(np.isinf(channels.decibel[:3]))
    assert np.isfinite(channels.decibel[3:]).all()
    for per in ("sample", "tensor"):  # no signal but an error
        assert ptqkit.sqnr(np.zeros((2, 3)), np.ones((2, 3)), per) == -math.inf
        assert ptqkit.sqnr(np.zeros((2, 3)), np.zeros((2, 3)), per) == math.inf


def test_types():
    torch = pytest.importorskip("torch")
    x, y = _pair((6, 40))
    want = ptqkit.sqnr(x, y)
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    for a, b in [
        (tensors[0], y),
        (tensors[0].clone().requires_grad_(), tensors[1]),
        (np.asfortranarray(x), y),
        (x.astype(">f4"), y),
    ]:
        assert ptqkit.sqnr(a, b) == want
    tiny = x.astype(np.float64) * (1 + 1e-10)  # lost in float32
    assert ptqkit.sqnr(x.astype(np.float64), tiny) == pytest.approx(200, abs=1e-3)
    assert ptqkit.sqnr(x, tiny) == pytest.approx(200, abs=1e-3)
    assert ptqkit.sqnr(x, tiny.astype(np.float32)) > 140
    for half in (torch.bfloat16, torch.float16):
        rounded = torch.from_numpy(x).to(half)
        assert ptqkit.sqnr(x, rounded) == ptqkit.sqnr(x, rounded.float())
    np.testing.assert_allclose(
        ptqkit.sqnr(x.astype(np.float16), y.astype(np.float16)), want, rtol=0.1
    )


def test_sums_are_in_double():
    x = np.ones((1, 3_000_000), np.float32)
    y = x + np.float32(2.0**-12)
    assert ptqkit.sqnr(x, y) == pytest.approx(240 * math.log10(2), abs=1e-9)
    assert ptqkit.sqnr(x.T, y.T, "channel")[0] == pytest.approx(240 * math.log10(2), abs=1e-9)


BAD = [
    (
        (np.ones((2, 3)), np.ones((2, 4))),
        {},
        ValueError,
        r"quantized must have .* \(2, 3\)",
    ),
    ((np.ones((0, 3)), np.ones((0, 3))), {}, ValueError, "at least one element"),
    ((np.float32(1), np.float32(1)), {}, ValueError, "at least one element and one axis"),
    ((np.ones(3, int), np.ones(3)), {}, TypeError, "reference must be floating point"),
    ((np.ones(3), "text"), {}, TypeError, "quantized must be floating point"),
    ((np.array([1, np.nan]), np.ones(2)), {}, ValueError, "NaN or Inf"),
    ((np.ones(2), np.array([1, np.inf])), {}, ValueError, "NaN or Inf"),
    ((np.full(2, 1e200), np.ones(2)), {}, ValueError, "square overflows"),
    ((np.ones(2), np.ones(2)), {"per": "row"}, ValueError, "per must be one of"),
    ((np.ones(2), np.ones(2)), {"per": "channel", "channel_axis": 1}, ValueError, "channel_axis"),
    ((np.ones(2), np.ones(2)), {"threads": -1}, ValueError, "threads"),
]


@pytest.mark.parametrize(("arrays", "options", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(arrays, options, error, message):
    with pytest.raises(error, match=message):
        ptqkit.sqnr(*arrays, **options)


def test_a_bad_batch_leaves_everything_as_it_was():
    x, y = _pair((4, 6))
    for per in ("sample", "tensor", "channel"):
        meter = ptqkit.SQNR(per)
        with pytest.raises(ptqkit.CalibrationError, match="no sample"):
            meter.decibel  # noqa: B018
        meter.update(x, y)
        before = meter.decibel
        with pytest.raises(ValueError):
            meter.update(x, np.where(y > 0, y, np.nan))
        if per == "channel":
            with pytest.raises(ValueError, match="6 channels before, now 5"):
                meter.update(x[:, :5], y[:, :5])
        else:
            with pytest.raises(ValueError, match="cannot merge"):
                meter.merge(ptqkit.SQNR("channel"))
        assert meter.count == 4
        np.testing.assert_array_equal(meter.decibel, before)
    with pytest.raises(TypeError):
        meter.merge(1)
    with pytest.raises(ValueError, match="per sample"):
        meter.finite_decibel  # noqa: B018
