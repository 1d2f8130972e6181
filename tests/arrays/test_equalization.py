"""Equalization scales and the search for them, against the float64 twin."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.batches import LEVELS
from helpers.core_cases import EPS
from helpers.data import SHARED

import ptqkit
import ptqkit.reference as reference
from ptqkit.arrays.equalization import SCALE_LIMITS

STATS = SHARED / "act_stats"


def _problem(tokens=60, n=48, rows=(30,), seed=0):
    """Layers, inputs with a few channels far larger than the rest, and the inputs' ranges."""
    rng = np.random.default_rng([seed, tokens, n])
    X = (rng.normal(size=(tokens, n)) + rng.normal(size=n)).astype(np.float32)
    X[:, :: max(2, n // 4)] *= 30
    weights = [(rng.normal(size=(r, n)) * rng.uniform(0.2, 2, n)).astype(np.float32) for r in rows]
    ranges = ptqkit.ChannelRanges(n)
    ranges.update(X)
    return weights, X, ranges


# ---- spans and scales -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_weight_extent(dtype):
    torch = pytest.importorskip("torch")
    weights, _, _ = _problem(rows=(30, 7, 1))
    cast = [torch.from_numpy(w).to(getattr(torch, dtype)) for w in weights]
    want = reference.weight_span([w.double().numpy() for w in cast])
    got = ptqkit.weight_span(cast)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want.astype(np.float32))
    pooled = torch.cat(cast)
    np.testing.assert_array_equal(got, ptqkit.weight_span(pooled))
    np.testing.assert_array_equal(got, (pooled.amax(0) - pooled.amin(0).double()).float().numpy())
    np.testing.assert_array_equal(ptqkit.weight_span(np.full((3, 2), 3e38)), 0)
    huge = np.array([[3e38], [-3e38]], np.float32)
    assert np.isfinite(ptqkit.weight_span(huge)).all()


@pytest.mark.parametrize("alpha", [0, 0.05, 0.3, 0.5, 0.85, 1])
def test_scales_are_the_twins(alpha):
    rng = np.random.default_rng(1)
    rx, rw = (np.exp(rng.normal(size=300) * 3) for _ in range(2))
    s = ptqkit.equalization_scales(rx, rw, alpha)
    assert s.dtype == np.float32
    np.testing.assert_allclose(s, reference.equalization_scales(rx, rw, alpha), rtol=1e-7)
    # the ends: equal activations, equal columns of the weights
    if alpha in (0, 1):
        equal = rx / s if alpha else rw * s
        np.testing.assert_allclose(equal, 1, rtol=1e-6)


def test_equation_10_minimises_the_product_of_the_largest_ranges():
    rng = np.random.default_rng(2)
    rx, rw = rng.uniform(0.1, 50, 40), rng.uniform(0.01, 2, 40)
    s = ptqkit.equalization_scales(rx, rw)
    np.testing.assert_allclose(s, np.sqrt(rx / rw), rtol=1e-7)
    best = (rx / s).max() * (rw * s).max()
    assert best == pytest.approx((rx * rw).max(), rel=1e-6)  # nothing can be lower
    for _ in range(200):
        other = s * np.exp(rng.normal(size=40) * 0.2)
        assert (rx / other).max() * (rw * other).max() >= best * (1 - 1e-6)


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
def test_precision_is_the_twins_and_largest_for_every_exponent(alpha):
    rng = np.random.default_rng(3)
    rx, rw = (np.exp(rng.normal(size=70) * 2) for _ in range(2))
    s = reference.equalization_scales(rx, rw, alpha)
    found = ptqkit.equalization_precision(rx, rw, s)
    px, pw, total = reference.equalization_precision(rx, rw, s)
    np.testing.assert_allclose(found.activation, px, rtol=1e-12)
    np.testing.assert_allclose(found.weight, pw, rtol=1e-12)
    assert found.total == pytest.approx(total, rel=1e-12)
    assert found.bound == pytest.approx((rx * rw).sum() / (rx * rw).max(), rel=1e-12)
    # every exponent reaches the bound; eq. 10 alone treats both sides alike
    assert found.reached == pytest.approx(1, rel=1e-12)
    assert np.allclose(found.activation, found.weight, rtol=1e-9) == (alpha == 0.5)
    before = ptqkit.equalization_precision(rx, rw)
    assert before.total == pytest.approx(reference.equalization_precision(rx, rw, np.ones(70))[2])
    assert before.reached < 0.9
    for _ in range(100):  # no scales reach more than the bound
        other = np.exp(rng.normal(size=70) * rng.uniform(0, 3))
        assert ptqkit.equalization_precision(rx, rw, other).reached <= 1 + 1e-12


def test_precision_of_dead_channels_and_bad_scales():
    rx, rw = np.array([0.0, 4.0, 1.0]), np.array([1.0, 0.0, 2.0])
    found = ptqkit.equalization_precision(rx, rw)
    assert found.activation.tolist() == [0, 1, 0.25] and found.weight.tolist() == [0.5, 0, 1]
    assert (found.total, found.bound) == (0.25, 1)
    nothing = ptqkit.equalization_precision(np.zeros(2), np.ones(2))
    assert (nothing.total, nothing.bound, nothing.reached) == (0, 0, 1)
    with pytest.raises(ValueError, match="positive"):
        ptqkit.equalization_precision(rx, rw, np.array([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        ptqkit.equalization_precision(rx, rw, np.ones(2))


@pytest.mark.parametrize("alpha", [0, 0.5, 0.7, 1])
def test_dead_channels_keep_their_scale(alpha):
    rx = np.array([0.0, 4.0, 0.0, 9.0, 0.0])
    rw = np.array([1.0, 0.0, 0.0, 4.0, 7.0])
    s = ptqkit.equalization_scales(rx, rw, alpha)
    np.testing.assert_array_equal(s[[0, 1, 2, 4]], 1)
    assert s[3] == np.float32(9**alpha / 4 ** (1 - alpha))


def test_scales_are_clamped():
    extremes = np.array([1e-38, 1e-20, 1.0, 1e20, 3.4e38])
    for alpha, (a, b) in itertools.product((0, 0.5, 1), itertools.product(extremes, extremes)):
        s = ptqkit.equalization_scales(np.array([a]), np.array([b]), alpha)
        assert SCALE_LIMITS[0] <= s[0] <= SCALE_LIMITS[1]
        assert s[0] == np.float32(reference.equalization_scales([a], [b], alpha)[0])
    assert SCALE_LIMITS == reference.equalization.SCALE_LIMITS


def test_tied_channels_share_a_scale():
    rng = np.random.default_rng(3)
    rx, rw = rng.uniform(0.1, 9, 12), rng.uniform(0.1, 2, 12)
    rx[1] = rw[7] = 0  # dead alone, but not with the channel that they are tied to
    rx[[2, 8]] = 0  # a dead group
    owner = np.array([5, 0, 3, -1, 9, 2] * 2)  # two query heads of one v head
    s = ptqkit.equalization_scales(rx, rw, 0.5, channel_of=owner)
    np.testing.assert_array_equal(s[:6], s[6:])
    want = np.sqrt(np.maximum(rx[:6], rx[6:]) / np.maximum(rw[:6], rw[6:]))
    want[2] = 1
    np.testing.assert_allclose(s[:6], want, rtol=1e-7)
    np.testing.assert_allclose(
        s, reference.equalization_scales(rx, rw, 0.5, channel_of=owner), rtol=1e-7
    )
    free = ptqkit.equalization_scales(rx, rw, channel_of=np.arange(12))
    np.testing.assert_array_equal(free, ptqkit.equalization_scales(rx, rw))


@pytest.mark.parametrize("model", ["opt-125m", "opt-1.3b"])
def test_scales_of_real_ranges_are_finite_and_sensible(model):
    path = STATS / f"{model}.safetensors"
    if not path.exists():
        pytest.skip("the statistics are not here (expected under ../shared/data/act_stats)")
    stats = pytest.importorskip("safetensors.numpy").load_file(path)
    rng = np.random.default_rng(4)
    layers = {k: 2 * v for k, v in stats.items() if k.startswith("absmax/")}
    assert len(layers) > 70
    for name, rx in layers.items():
        rw = rng.uniform(0.05, 0.5, len(rx))
        rw[:3] = 0, 1e-7, 40
        for alpha in (0, 0.25, 0.5, 0.75, 1):
            s = ptqkit.equalization_scales(rx, rw, alpha)
            assert np.isfinite(s).all() and np.all(s > 0), name
            assert np.all((s >= SCALE_LIMITS[0]) & (s <= SCALE_LIMITS[1])), name
        live = (rx > 0) & (rw > 1e-6)
        s = ptqkit.equalization_scales(rx, rw)
        if live.any():
            before = (rx[live].max() * rw[live].max()).astype(float)
            after = (rx / s)[live].max() * (rw * s)[live].max()
            assert after <= before * (1 + 1e-6), name
        assert np.all(s[~((rx > 0) & (rw > 0))] == 1)


GOOD = np.ones(3)
BAD_EXTENTS = [
    ((-GOOD, GOOD), ValueError, "activation_span must not be negative"),
    ((GOOD, GOOD * np.nan), ValueError, "weight_span holds NaN"),
    ((GOOD * np.inf, GOOD), ValueError, "activation_span holds NaN or Inf"),
    ((GOOD, GOOD[:2]), ValueError, "3 channels, but weight_span has 2"),
    ((GOOD[None], GOOD), ValueError, r"shape \(channels,\)"),
    ((GOOD[:0], GOOD[:0]), ValueError, r"shape \(channels,\)"),
    ((np.ones(3, int), GOOD), TypeError, "floating point"),
    ((GOOD, GOOD, 1.5), ValueError, "alpha"),
    ((GOOD, GOOD, -0.1), ValueError, "alpha"),
    ((GOOD, GOOD, float("nan")), ValueError, "alpha"),
    ((GOOD, GOOD, "0.5"), TypeError, "alpha"),
    ((GOOD, GOOD, None), TypeError, "alpha"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD_EXTENTS)
def test_bad_extents(arguments, error, text):
    with pytest.raises(error, match=text):
        ptqkit.equalization_scales(*arguments)


def test_bad_ties():
    for owner, error in (([0, 1], ValueError), ([0.0, 1, 2], TypeError), ([[0, 1, 2]], ValueError)):
        with pytest.raises(error, match="channel_of"):
            ptqkit.equalization_scales(GOOD, GOOD, channel_of=owner)


def test_bad_weights():
    W = np.ones((2, 3), np.float32)
    for weights, error, text in [
        ([], ValueError, "at least one layer"),
        ([W, W[:, :2]], ValueError, "same inputs"),
        ([W, W * np.nan], ValueError, r"W\[1\] holds NaN"),
        (W[0], ValueError, "matrix"),
        (W[:0], ValueError, "non-empty"),
        (W.astype(int), TypeError, "floating point"),
        ([W] * 65, ValueError, "64"),
    ]:
        with pytest.raises(error, match=text):
            ptqkit.weight_span(weights)


# ---- the search ---------------------------------------------------------------------------------

WEIGHTS = {
    "channel": {"bits": 4},
    "symmetric": {"bits": 3, "symmetric": True},
    "groups": {"bits": 2, "group_size": 12},
    "tensor": {"bits": 8, "per_tensor": True, "symmetric": True},
    "tensor asymmetric": {"bits": 5, "per_tensor": True},
    "ternary": {"bits": "ternary", "group_size": 8},
}
ACTIVATIONS = {
    "none": {},
    "token": {"activation_bits": 8},
    "token asymmetric": {"activation_bits": 5, "activation_symmetric": False},
    "static": {"activation_bits": 8, "activation_granularity": "tensor"},
    "static symmetric": {
        "activation_bits": 4,
        "activation_granularity": "tensor",
        "activation_symmetric": True,
    },
    "fine": {"activation_bits": 16},
    "coarse": {"activation_bits": 2, "activation_granularity": "tensor"},
}
RTOL = 1e-4  # float32 products, and codes on the other side of a tie; measured: up to 3.5e-5


def _twin(weights, X, ranges, s, *, bits, **options):
    """The twin's error of one candidate, from the options of the search."""
    act = options.pop("activation_bits", None)
    static = options.pop("activation_granularity", "token") == "tensor"
    options.setdefault("activation_symmetric", not static)
    options["symmetric"] = options.get("symmetric", False) or bits == "ternary"
    limits = reference.static_range(ranges.minimum, ranges.maximum, s) if static else None
    return reference.equalization_error(
        weights,
        X,
        s,
        max_code=2 if bits == "ternary" else 2**bits - 1,
        activation_max_code=None if act is None else 2**act - 1,
        activation_range=limits,
        **options,
    )


def _check_search(weights, X, ranges, channel_of=None, **options):
    """Every error is the twin's, the choice is the least, never above eq. 10 or nothing."""
    alphas = [0, 0.25, 0.5, 0.8, 1]
    found = ptqkit.search_equalization(
        weights, X, ranges, alphas=alphas, channel_of=channel_of, **options
    )
    np.testing.assert_array_equal(found.alphas, [np.nan, 0.5, 0, 0.25, 0.8, 1])
    rw = ptqkit.weight_span(weights)
    # what the rounding of the float32 products alone may leave
    floor = sum(float(np.square(4 * EPS * np.abs(X) @ np.abs(w.T)).sum()) for w in weights)
    for alpha, error in zip(found.alphas, found.errors, strict=True):
        s = np.ones(len(rw), np.float32)
        if not np.isnan(alpha):
            s = ptqkit.equalization_scales(ranges.span, rw, alpha, channel_of=channel_of)
        want = _twin(weights, X, ranges, s, **options)
        assert error == pytest.approx(want, rel=RTOL, abs=floor), alpha
        if alpha == found.alpha or (np.isnan(alpha) and np.isnan(found.alpha)):
            np.testing.assert_array_equal(found.scales, s)
            assert error == found.error
    assert found.error == found.errors.min() <= min(found.errors[:2])
    return found


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_errors_are_the_twins(weights, activations):
    layers, X, ranges = _problem(rows=(30,))
    _check_search(layers, X, ranges, **WEIGHTS[weights], **ACTIVATIONS[activations])


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits(bits):
    layers, X, ranges = _problem(tokens=33, rows=(20, 9))
    for act in (None, bits, 2 * bits):
        _check_search(layers, X, ranges, bits=bits, activation_bits=act)


SHAPES = [(1, 1, (1,)), (7, 5, (8,)), (8, 23, (47, 1)), (9, 24, (48, 3, 49)), (65, 97, (100, 24))]


@pytest.mark.parametrize(("tokens", "n", "rows"), SHAPES)
def test_shapes(tokens, n, rows):
    layers, X, ranges = _problem(tokens, n, rows)
    for options in ({"bits": 4}, {"bits": 8, "per_tensor": True, "activation_bits": 8}):
        _check_search(layers, X, ranges, **options)


def test_layers_have_their_own_grid_per_tensor():
    layers, X, ranges = _problem(rows=(20, 20))
    layers[1] = layers[1] * np.float32(100)
    found = _check_search(layers, X, ranges, bits=4, per_tensor=True)
    apart = sum(
        _twin([w], X, ranges, found.scales, bits=4, per_tensor=True) for w in layers
    )  # one grid for both would cost the first layer everything
    assert found.error == pytest.approx(apart, rel=RTOL)


def test_tied_channels_in_the_search():
    layers, X, ranges = _problem(n=48)
    owner = np.tile(np.arange(24), 2)
    found = _check_search(layers, X, ranges, owner, bits=4, activation_bits=8)
    np.testing.assert_array_equal(found.scales[:24], found.scales[24:])


def test_static_grids_come_from_the_ranges():
    layers, X, ranges = _problem()
    wide = ptqkit.ChannelRanges.from_arrays(
        ranges.minimum * 3 - 9, ranges.maximum * 3 + 9, ranges.mean, ranges.tokens
    )
    options = {"bits": 8, "activation_bits": 8, "activation_granularity": "tensor"}
    narrow_error = ptqkit.search_equalization(layers, X, ranges, **options).errors[0]
    found = _check_search(layers, X, wide, **options)
    assert found.errors[0] > 3 * narrow_error


def test_equalization_recovers_outlier_channels():
    layers, X, ranges = _problem(tokens=200, n=96, rows=(64,))
    options = {"bits": 8, "per_tensor": True, "symmetric": True}
    static = {"activation_bits": 8, "activation_granularity": "tensor"}
    found = ptqkit.search_equalization(layers, X, ranges, **options, **static)
    assert len(found.alphas) == 22 and 0 < found.alpha <= 1
    assert found.error < found.errors[0] / 3


def test_ties_go_to_no_equalization_then_to_one_half():
    layers, X, ranges = _problem()
    X = np.zeros_like(X)  # every error is 0
    found = ptqkit.search_equalization(layers, X, ranges, bits=4)
    assert np.isnan(found.alpha) and np.all(found.scales == 1) and np.all(found.errors == 0)
    for act in (8, None):
        constant = ptqkit.search_equalization(
            layers, X, ranges, bits=2, activation_bits=act, activation_granularity="tensor"
        )
        assert np.isnan(constant.alpha)


def test_dead_channels_and_zero_rows():
    layers, X, ranges = _problem()
    X = X.copy()
    X[:, 3] = 0
    X[5] = 0  # an all-zero token, as after ReLU
    layers[0][:, 7] = 0  # dead in the weights only
    layers[0][4] = 0
    ranges = ptqkit.ChannelRanges(48)
    ranges.update(X)
    for options in ({"activation_bits": 8}, {"group_size": 8}, {"per_tensor": True}):
        found = _check_search(layers, X, ranges, bits=4, **options)
        assert np.isfinite(found.errors).all() and np.all(found.scales[[3, 7]] == 1)


def test_one_calibration_token():
    layers, X, _ = _problem()
    ranges = ptqkit.ChannelRanges(48)
    ranges.update(X[:1])  # every span is 0: nothing to equalize
    found = _check_search(layers, X[:1], ranges, bits=4, activation_bits=8)
    assert np.isnan(found.alpha) and np.all(found.scales == 1)


def test_rounding_is_rtns():
    layers, X, ranges = _problem()
    found = ptqkit.search_equalization(layers, X, ranges, bits=3, group_size=16)
    scaled = layers[0] * found.scales
    W_hat = ptqkit.rtn(scaled, bits=3, group_size=16).dequantize()
    exact = (X / found.scales).astype(float) @ W_hat.T.astype(float) - X.astype(float) @ layers[0].T
    assert found.error == pytest.approx(np.square(exact).sum(), rel=RTOL)


def test_inputs_are_left_alone_and_half_types_are_taken():
    torch = pytest.importorskip("torch")
    layers, X, ranges = _problem()
    for a in (*layers, X):
        a.flags.writeable = False
    one = ptqkit.search_equalization(layers, X, ranges, bits=4)
    same = ptqkit.search_equalization(layers[0], X.reshape(3, 20, 48), ranges, bits=4)
    np.testing.assert_array_equal(one.errors, same.errors)
    half = [torch.from_numpy(np.array(a)).to(torch.bfloat16) for a in (layers[0], X)]
    widened = [a.float().numpy() for a in half]
    np.testing.assert_array_equal(
        ptqkit.search_equalization(half[0], half[1], ranges, bits=4).errors,
        ptqkit.search_equalization(widened[0], widened[1], ranges, bits=4).errors,
    )


@pytest.mark.parametrize("options", [{"group_size": 8}, {"per_tensor": True, "activation_bits": 8}])
def test_the_number_of_threads_changes_no_bit(options):
    layers, X, ranges = _problem(tokens=130, n=64, rows=(150, 100))
    found = [
        ptqkit.search_equalization(layers, X, ranges, bits=4, threads=t, **options)
        for t in (1, 2, 3, 8)
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(other.errors, found[0].errors)
        np.testing.assert_array_equal(other.scales, found[0].scales)


LEVEL = """
import sys
import numpy as np, ptqkit
d = np.load(sys.argv[1])
ranges = ptqkit.ChannelRanges(48)
ranges.update(d["X"])
found = [ptqkit.search_equalization([d["V"], d["W"]], d["X"], ranges, bits=4, **o).errors
         for o in ({"group_size": 8}, {"activation_bits": 8},
                   {"per_tensor": True, "activation_bits": 8, "activation_granularity": "tensor"})]
np.save(sys.argv[2], np.stack(found))
print(ptqkit.show_config()["cpu_level"])
"""


def test_cpu_levels_agree(script, tmp_path):
    layers, X, _ = _problem(rows=(30, 50))
    np.savez(tmp_path / "in.npz", X=X, V=layers[0], W=layers[1])
    found = []
    for level in LEVELS:
        if level in ptqkit.show_config()["cpu_levels"]:
            arguments = (str(tmp_path / "in.npz"), str(tmp_path / "out.npy"))
            assert script(LEVEL, *arguments, PTQKIT_CPU=level).stdout.strip() == level
            found.append(np.load(tmp_path / "out.npy"))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5)


INTERRUPT = """
import signal, threading, time
import numpy as np, ptqkit
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
rng = np.random.default_rng(0)
X = rng.normal(size=(4096, 1024)).astype(np.float32)
W = rng.normal(size=(1024, 1024)).astype(np.float32)
ranges = ptqkit.ChannelRanges(1024)
ranges.update(X)
sent = []
def fire():
    sent.append(time.perf_counter())
    signal.raise_signal(signal.SIGINT)
threading.Timer(0.4, fire).start()
try:
    ptqkit.search_equalization(W, X, ranges, bits=4, alphas=np.linspace(0, 1, 3001))
except KeyboardInterrupt:
    assert time.perf_counter() - sent[0] < 2.0
else:
    raise SystemExit("not interrupted")
ticks, stop = [], threading.Event()
def tick():
    while not stop.is_set():
        ticks.append(time.perf_counter())
        time.sleep(0.0005)
for call in (lambda: ranges.update(X), lambda: ptqkit.search_equalization(W, X[:64], ranges)):
    ticks.clear()
    stop.clear()
    ticker = threading.Thread(target=tick)
    ticker.start()
    begin, calls = time.perf_counter(), 0
    while time.perf_counter() - begin < 0.3:
        call()
        calls += 1
    stop.set()
    ticker.join()
    # with the GIL held, the ticker would wake once a call at most
    assert len(ticks) > min(2 * calls, 20), (len(ticks), calls)
"""


def test_ctrl_c_and_the_gil(script):
    script(INTERRUPT, timeout=120)


LAYERS, INPUTS, RANGES = _problem()
BAD_SEARCHES = [
    ({"X": INPUTS[:, :9]}, ValueError, r"X must have shape \(\.\.\., 48\)"),
    ({"X": INPUTS[:0]}, ValueError, "X must be a non-empty matrix"),
    ({"X": INPUTS * np.nan}, ValueError, "X holds NaN"),
    ({"X": INPUTS.astype(int)}, TypeError, "X must be floating point"),
    ({"X": 1.0}, ValueError, "X must have shape"),
    ({"weights": []}, ValueError, "at least one layer"),
    ({"weights": LAYERS[0] * np.inf}, ValueError, "W holds NaN or Inf"),
    ({"ranges": ptqkit.ChannelRanges(47)}, ValueError, "47 channels"),
    ({"ranges": ptqkit.ChannelRanges(48)}, ValueError, "no token"),
    ({"ranges": None}, TypeError, "ChannelRanges"),
    ({"bits": 1}, ValueError, "bits"),
    ({"bits": 9}, ValueError, "bits"),
    ({"group_size": 7}, ValueError, "does not divide"),
    ({"group_size": 8, "per_tensor": True}, ValueError, "per_tensor=True is one grid for all of W"),
    ({"activation_bits": 1}, ValueError, "activation_bits"),
    ({"activation_bits": 17}, ValueError, "activation_bits"),
    ({"activation_bits": "8"}, TypeError, "activation_bits"),
    ({"activation_granularity": "row"}, ValueError, "activation_granularity"),
    ({"alphas": [0.5, 2]}, ValueError, "alpha"),
    ({"alphas": ["a"]}, TypeError, "alpha"),
    ({"channel_of": [0]}, ValueError, "channel_of"),
    ({"threads": -1}, ValueError, "threads"),
    (
        {"X": INPUTS * np.float32(1e30), "weights": LAYERS[0] * np.float32(1e30)},
        ValueError,
        "overflow",
    ),
]


@pytest.mark.parametrize(("changes", "error", "text"), BAD_SEARCHES)
def test_bad_searches(changes, error, text):
    given = {"weights": LAYERS, "X": INPUTS, "ranges": RANGES, "name": "block.3.q", **changes}
    with pytest.raises(error, match=text) as raised:
        ptqkit.search_equalization(**given)
    named = not set(changes) & {"bits", "threads", "alphas", "channel_of", "activation_bits"}
    if named and text != "no token":
        assert str(raised.value).startswith("block.3.q: ")
