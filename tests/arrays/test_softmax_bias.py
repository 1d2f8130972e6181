"""The bias of a rounded softmax against its float64 twin."""

from __future__ import annotations

import numpy as np
import pytest

import ptqkit
import ptqkit._core as _core
import ptqkit.reference as reference
from ptqkit.arrays.softmax_bias import LENGTH_CLASSES, length_class

GRID = ptqkit.softmax_grid(8)


def _allowed(kind, shape, seed=0):
    """Arguments of update, and the boolean array that they mean."""
    rng = np.random.default_rng(seed)
    batch, _, q, k = shape
    options = {}
    if kind == "keys":
        options["allowed"] = rng.random((batch, k)) < 0.8
        options["allowed"][:, 0] = True
    elif kind in ("entries", "heads"):
        heads = 1 if kind == "entries" else shape[1]
        options["allowed"] = rng.random((batch, heads, q, k)) < 0.5
        options["allowed"][0, 0, 1] = False  # a row with nothing allowed
    if kind in ("causal", "keys"):
        options["causal"] = True
    return options, reference.allowed_keys(shape, options.get("allowed"), options.get("causal", 0))


def _probabilities(shape, seen, seed=0, spread=2.0):
    x = np.random.default_rng([seed, *shape]).normal(0, spread, shape)
    return reference.softmax(x, seen).astype(np.float32)


def _sums(P, seen, grid):
    return reference.softmax_statistics(P, grid.scale, grid.zero_point, grid.max_code, seen)


KINDS = ["none", "causal", "keys", "entries", "heads"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("shape", [(2, 3, 20, 20), (1, 2, 5, 300), (2, 1, 3, 1029), (1, 2, 33, 9)])
def test_counts_are_those_of_the_twin(kind, bits, shape):
    for grid in (ptqkit.softmax_grid(bits), ptqkit.softmax_grid(bits, -0.05, 0.4)):
        options, seen = _allowed(kind, shape)
        P = _probabilities(shape, seen)
        meter = ptqkit.SoftmaxBias(shape[1], grid=grid)
        meter.update(P, **options)
        want = _sums(P, seen, grid)
        np.testing.assert_array_equal(meter._sums[0], want)
        count = seen.sum(axis=-1)
        assert meter.rows == (count > 0).sum() and meter.entries == count.sum()
        assert meter.empty_rows == (count == 0).sum()
        if kind in ("entries", "heads"):
            assert meter.empty_rows > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [3, 8])
def test_bias_against_the_definition(kind, bits):
    shape = (3, 4, 40, 200)
    grid = ptqkit.softmax_grid(bits)
    options, seen = _allowed(kind, shape)
    P = _probabilities(shape, seen)
    meter = ptqkit.SoftmaxBias(4, grid=grid)
    meter.update(P, **options)
    Q = grid.scale * grid.quantize(P).astype(np.float64)
    tensor, head = reference.softmax_bias(P, Q, seen)
    np.testing.assert_allclose(meter.bias(), tensor, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(meter.bias("head"), head, rtol=1e-9, atol=1e-15)
    rows = (seen.any(axis=-1)).sum(axis=(0, 2))
    sums = np.where(seen, Q, 0).sum(axis=(0, 2, 3))
    np.testing.assert_allclose(meter.row_sums("head"), sums / rows)
    np.testing.assert_allclose(meter.mean_row_sum, sums.sum() / rows.sum())
    zeros = ((Q == 0) & seen).sum(axis=(0, 2, 3))
    np.testing.assert_allclose(meter.shares_zero("head"), zeros / seen.sum(axis=(0, 2, 3)))
    np.testing.assert_allclose(meter.zero_fraction, zeros.sum() / seen.sum())
    # the correction makes the mean error on the data itself zero
    for beta in (meter.bias(), meter.bias("head")[:, None, None]):
        left = np.where(seen, Q + beta - P, 0)
        assert abs(left.sum() / seen.sum()) < 1e-9
        assert abs(np.where(seen, Q - P, 0).sum() / seen.sum()) > 1e-6
    left = np.where(seen, Q + meter.bias("head")[:, None, None] - P, 0).sum(axis=(0, 2, 3))
    assert np.abs(left).max() < 1e-9 * seen.sum()


def test_the_fused_softmax_applies_what_was_estimated():
    x = np.random.default_rng(0).normal(0, 1.5, (2, 4, 64, 300)).astype(np.float32)
    P = reference.softmax(x, np.ones(x.shape, bool)).astype(np.float32)
    meter = ptqkit.SoftmaxBias(4, grid=GRID)
    meter.update(P)
    for correction, bias in [
        ("bias", meter.bias()),
        ("bias", meter.bias("head")),
        ("row_length", meter.bias_by_length(300)),
        ("row_length", meter.bias_by_length(300, "head")),
    ]:
        y = ptqkit.softmax_on_grid(x, GRID, correction=correction, bias=bias)
        error = (y.astype(np.float64) - P).mean()
        assert abs(error) < 1e-8
        if np.ndim(bias) > (correction == "row_length"):
            assert np.abs((y.astype(np.float64) - P).mean(axis=(0, 2, 3))).max() < 1e-8
    plain = ptqkit.softmax_on_grid(x, GRID).astype(np.float64)
    assert abs((plain - P).mean()) > 1e-4


def test_everything_rounds_to_zero():
    meter = ptqkit.SoftmaxBias(2, grid=GRID)
    meter.update(np.full((1, 2, 600, 600), 1 / 600))
    assert meter.zero_fraction == 1 and meter.mean_row_sum == 0 and meter.bias() == 1 / 600
    one = ptqkit.SoftmaxBias(1, grid=GRID)
    one.update(np.ones((1, 1, 3, 1)))
    assert one.zero_fraction == 0 and abs(one.bias()) < 1e-7


def test_steps():
    rng = np.random.default_rng(0)
    meter = ptqkit.SoftmaxBias(2, grid=GRID, steps=3)
    batches = {}
    for step in (2, 0, 1, 0):
        P = _probabilities((1, 2, 8, 90), np.ones((1, 2, 8, 90), bool), rng.integers(1 << 30))
        meter.update(P, step=step)
        batches.setdefault(step, []).append(P)
    alone = []
    for step in range(3):
        one = ptqkit.SoftmaxBias(2, grid=GRID)
        for P in batches[step]:
            one.update(P)
        alone.append(one)
    np.testing.assert_array_equal(meter.bias("step"), [m.bias() for m in alone])
    np.testing.assert_array_equal(meter.bias("step_head"), [m.bias("head") for m in alone])
    np.testing.assert_array_equal(meter.row_sums("step"), [m.mean_row_sum for m in alone])
    total = ptqkit.SoftmaxBias(2, grid=GRID)
    for P in (P for batch in batches.values() for P in batch):
        total.update(P)
    for granularity in ("tensor", "head"):
        np.testing.assert_array_equal(meter.bias(granularity), total.bias(granularity))
        np.testing.assert_array_equal(
            meter.shares_zero(granularity), total.shares_zero(granularity)
        )
    np.testing.assert_array_equal(meter.bias_by_length(90), total.bias_by_length(90))
    assert meter.bias("step").shape == (3,) and meter.bias("step_head").shape == (3, 2)


@pytest.mark.parametrize("steps", [None, 2])
def test_streams_and_merges_are_the_batch_bit_for_bit(steps):
    shape = (5, 3, 17, 60)
    options, seen = _allowed("entries", shape)
    P, mask = _probabilities(shape, seen), options["allowed"]
    step = {"step": 1} if steps else {}
    whole, parts = (ptqkit.SoftmaxBias(3, grid=GRID, steps=steps) for _ in range(2))
    whole.update(P, mask, **step)
    for i in (3, 0, 4, 1, 2):
        parts.update(P[i : i + 1], mask[i : i + 1], **step)
    left, right = (ptqkit.SoftmaxBias(3, grid=GRID, steps=steps) for _ in range(2))
    left.update(P[:2], mask[:2], **step)
    right.update(P[2:, :, :9], mask[2:, :, :9], **step)
    right.update(P[2:, :, 9:], mask[2:, :, 9:], **step)
    kept = right.copy()
    left.merge(right)
    for other in (parts, left):
        assert other.rows == whole.rows and other.empty_rows == whole.empty_rows
        assert [*other._sums] == [*whole._sums]
        for key, value in whole._sums.items():
            np.testing.assert_array_equal(other._sums[key], value)
    left.update(P, mask, **step)
    assert right.rows == kept.rows and left.rows == 2 * whole.rows
    empty = ptqkit.SoftmaxBias(3, grid=GRID, steps=steps)
    empty.merge(whole)
    empty.update(P, mask, **step)  # and not into the arrays of the one merged
    np.testing.assert_array_equal(
        whole._sums[step.get("step", 0)], parts._sums[step.get("step", 0)]
    )


def test_what_is_masked_counts_for_nothing():
    shape = (2, 2, 11, 11)
    for kind in ("causal", "keys", "entries"):
        options, seen = _allowed(kind, shape)
        P = _probabilities(shape, seen)
        clean = ptqkit.SoftmaxBias(2, grid=GRID)
        clean.update(P, **options)
        for junk in (np.nan, np.inf, -5.0, 1e30):
            meter = ptqkit.SoftmaxBias(2, grid=GRID)
            meter.update(np.where(seen, P, np.float32(junk)), **options)
            np.testing.assert_array_equal(meter._sums[0], clean._sums[0])
    rows = np.arange(11) < 7
    some = ptqkit.SoftmaxBias(2, grid=GRID)
    dirty = P.copy()
    dirty[:, :, 7:] = np.nan
    some.update(dirty, queries=np.tile(rows, (2, 1)), **options)
    fewer = ptqkit.SoftmaxBias(2, grid=GRID)
    fewer.update(P[:, :, :7], options["allowed"][:, :, :7])
    np.testing.assert_array_equal(some._sums[0], fewer._sums[0])


def test_types_and_layouts():
    torch = pytest.importorskip("torch")
    shape = (2, 3, 9, 70)
    P = _probabilities(shape, np.ones(shape, bool))
    want = ptqkit.SoftmaxBias(3, grid=GRID)
    want.update(P)
    tensor = torch.from_numpy(P)
    for view in (
        np.asfortranarray(P),
        np.repeat(P, 2, -1)[..., ::2],
        P.astype(">f4"),
        tensor,
        tensor.double(),
        tensor.clone().requires_grad_(),
        P[None],
    ):
        meter = ptqkit.SoftmaxBias(3, grid=GRID)
        meter.update(view)
        np.testing.assert_array_equal(meter._sums[0], want._sums[0])
    for half in (torch.bfloat16, torch.float16):
        meter, wide = ptqkit.SoftmaxBias(3, grid=GRID), ptqkit.SoftmaxBias(3, grid=GRID)
        meter.update(tensor.to(half))
        exact = tensor.to(half).float()
        np.testing.assert_array_equal(
            meter._sums[0], _sums(exact.numpy(), np.ones(shape, bool), GRID)
        )
        if half == torch.bfloat16:  # sums of float32 are held to a tighter tolerance
            with pytest.raises(ValueError, match="sum to"):
                wide.update(exact)
    single = ptqkit.SoftmaxBias(1, grid=GRID)
    single.update(P[0, 0])
    assert single.rows == 9


def test_length_classes():
    previous = -1
    for n in [*range(2000), *range(2000, 70000, 97)]:
        found = reference.length_class(n)
        assert previous <= found <= previous + (1 if n < 2000 else 3)
        previous = found
    assert reference.length_class(2**31) < LENGTH_CLASSES
    powers = 2 ** np.arange(4, 62)
    lengths = np.concatenate([np.arange(5000), powers - 1, powers, powers + 1])
    assert length_class(lengths).tolist() == [reference.length_class(int(n)) for n in lengths]


def test_bias_by_length():
    k = 100
    seen = np.tri(k, dtype=bool)[None, None].repeat(2, 1)
    P = _probabilities((1, 2, k, k), seen, spread=1.0)
    meter = ptqkit.SoftmaxBias(2, grid=GRID)
    meter.update(P, causal=True)
    Q = GRID.scale * GRID.quantize(P).astype(np.float64)
    missing = 1 - Q.sum(axis=-1)  # (1, 2, k), row i has i + 1 keys
    table = meter.bias_by_length(400)
    heads = meter.bias_by_length(400, "head")
    assert table.shape == (401,) and heads.shape == (2, 401) and table[0] == 0
    classes = np.array([reference.length_class(n) for n in range(1, k + 1)])
    for c in np.unique(classes):
        lengths = np.flatnonzero(classes == c) + 1
        rows = missing[..., lengths - 1]
        np.testing.assert_allclose(table[lengths] * lengths, rows.mean(), atol=1e-12)
        np.testing.assert_allclose(
            (heads[:, lengths] * lengths).mean(axis=1), rows.mean(axis=(0, 2)), atol=1e-12
        )
    far = np.arange(k + 8, 401)  # beyond what was seen, the mass of the longest
    np.testing.assert_allclose(table[far] * far, table[k] * k)
    # lengths between those seen
    gap = ptqkit.SoftmaxBias(1, grid=GRID)
    for n, mass in ((32, 0.25), (256, 0.5)):
        row = np.full((1, 1, 1, n), 1e-4)
        row[..., 0] = 1 - 1e-4 * (n - 1)
        gap.update(row)
        del mass
    filled = gap.bias_by_length(256) * np.arange(257)
    middle = filled[33:256]
    assert np.all(np.diff(middle) >= -1e-15) and filled[32] < middle[100] < filled[256]
    with pytest.raises(ValueError, match="granularity"):
        meter.bias_by_length(10, "step")
    with pytest.raises(ValueError, match="keys"):
        meter.bias_by_length(0)


# ---- bad input -------------------------------------------------------------------------------

UNIFORM = np.full((2, 3, 4, 5), 0.2, np.float32)


def _bad_row(value, first=0.2):
    P = UNIFORM.copy()
    P[1, 2, 3, [0, -1]] = first, value
    return P


BAD = [
    ({"P": _bad_row(np.nan)}, ValueError, r"P\[1, 2, 3\] holds NaN"),
    ({"P": _bad_row(np.inf)}, ValueError, r"P\[1, 2, 3\] holds NaN or Inf"),
    ({"P": _bad_row(-0.2, first=0.6)}, ValueError, r"P\[1, 2, 3\] holds a negative value"),
    ({"P": _bad_row(-1e-30, first=0.4)}, ValueError, r"P\[1, 2, 3\] holds a negative value"),
    ({"P": _bad_row(0.202)}, ValueError, r"P\[1, 2, 3\]: the allowed entries sum to 1.002, not 1"),
    ({"P": UNIFORM * 0}, ValueError, r"P\[0, 0, 0\]: the allowed entries sum to 0"),
    ({"P": UNIFORM, "causal": True}, ValueError, r"P\[0, 0, 0\]: the allowed entries sum to 0.4"),
    ({"P": UNIFORM, "allowed": np.arange(5)[None].repeat(2, 0)}, ValueError, "sum to 0.8"),
    ({"P": UNIFORM[:, :2]}, ValueError, "3 head"),
    ({"P": UNIFORM[0, 0]}, ValueError, "3 head"),
    ({"P": UNIFORM[:, :0]}, ValueError, "at least one head"),
    ({"P": UNIFORM[..., :0]}, ValueError, "at least one head and one key"),
    ({"P": UNIFORM.astype(int)}, TypeError, "P must be floating point"),
    ({"P": UNIFORM, "allowed": np.ones((3, 5), bool)}, ValueError, "allowed must have shape"),
    ({"P": UNIFORM, "allowed": np.zeros((2, 5))}, TypeError, "allowed must be boolean"),
    ({"P": UNIFORM, "queries": np.ones((2, 5), bool)}, ValueError, "queries must have shape"),
    ({"P": UNIFORM, "queries": np.ones((2, 4))}, TypeError, "queries must be boolean"),
    ({"P": UNIFORM, "step": 0}, ValueError, "without steps="),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_batches_leave_everything_as_it_was(arguments, error, message):
    meter = ptqkit.SoftmaxBias(3, grid=GRID)
    meter.update(UNIFORM)
    before = meter._sums[0].copy()
    for threads in (1, 3):
        meter.threads = threads
        with pytest.raises(error, match=message):
            meter.update(**arguments)
    np.testing.assert_array_equal(meter._sums[0], before)
    assert meter.empty_rows == 0


def test_the_first_bad_row_is_named_for_any_number_of_threads():
    P = np.full((4, 3, 200, 300), 1 / 300, np.float32)
    P[1:, 1, 150] = 0
    for threads in (1, 2, 8):
        with pytest.raises(ValueError, match=r"P\[1, 1, 150\]"):
            ptqkit.SoftmaxBias(3, grid=GRID, threads=threads).update(P)


def test_bad_steps_and_granularities():
    meter = ptqkit.SoftmaxBias(3, grid=GRID, steps=2)
    for step, error in ((-1, ValueError), (2, ValueError), (0.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="step"):
            meter.update(UNIFORM, step=step)
    with pytest.raises(ValueError, match="step must be given"):
        meter.update(UNIFORM)
    with pytest.raises(ptqkit.CalibrationError, match="no row"):
        meter.bias()
    meter.update(UNIFORM, step=1)
    with pytest.raises(ptqkit.CalibrationError, match=r"for step \[0\]"):
        meter.bias("step")
    with pytest.raises(ptqkit.CalibrationError, match=r"for step_head \[0 0\]"):
        meter.row_sums("step_head")
    assert meter.bias("head").shape == (3,)
    plain = ptqkit.SoftmaxBias(3, grid=GRID)
    plain.update(UNIFORM)
    with pytest.raises(ValueError, match="needs SoftmaxBias"):
        plain.bias("step")
    with pytest.raises(ValueError, match="granularity must be one of"):
        plain.bias("channel")
    for arguments in ({"heads": 0}, {"heads": -1}, {"steps": 0}, {"steps": -3}, {"threads": -1}):
        with pytest.raises(ValueError):
            ptqkit.SoftmaxBias(**{"heads": 2, "grid": GRID, **arguments})
    with pytest.raises(TypeError, match="softmax_grid"):
        ptqkit.SoftmaxBias(2, grid=8)
    others = [
        ptqkit.SoftmaxBias(2, grid=GRID),
        ptqkit.SoftmaxBias(3, grid=ptqkit.softmax_grid(7)),
        ptqkit.SoftmaxBias(3, grid=GRID, steps=2),
    ]
    for other in others:
        with pytest.raises(ValueError, match="cannot merge"):
            plain.merge(other)
    with pytest.raises(TypeError):
        plain.merge(None)
    assert repr(meter) == "SoftmaxBias(heads=3, bits=8, steps=2, rows=24)"


def test_an_interrupted_update_leaves_everything_as_it_was(monkeypatch):
    meter = ptqkit.SoftmaxBias(3, grid=GRID)
    meter.update(UNIFORM)
    before = meter._sums[0].copy()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_core, "softmax_statistics", stop)
    with pytest.raises(KeyboardInterrupt):
        meter.update(UNIFORM)
    monkeypatch.undo()
    np.testing.assert_array_equal(meter._sums[0], before)
