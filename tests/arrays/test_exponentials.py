"""Softmax with exponentials, or their roots, on the grid: float64 twins, PyTorch, a V of ones."""

from __future__ import annotations

import numpy as np
import pytest

import ptqkit
import ptqkit.reference as reference

EPS = float(np.finfo(np.float32).eps)
# Of an exponential: 1.2 ulp, its product with 1 / s, and that rounded. As in test_softmax.py.
RELATIVE = 6 * EPS
CORRECTIONS = (None, "row_sum", "code_sum")
GRIDS = ("exponentials", "squares")
TWINS = {"exponentials": reference.exponentials_on_grid, "squares": reference.squares_on_grid}


def _scores(*shape, spread=3.0, seed=0):
    return np.random.default_rng([seed, *shape]).normal(0, spread, shape).astype(np.float32)


def _grid(bits, of="exponentials"):
    return ptqkit.softmax_grid(bits, of=of)


def _masks(name, shape):
    rng = np.random.default_rng(3)
    batch, heads, q, k = shape
    return {
        "none": {},
        "causal": {"causal": True},
        "keys": {"allowed": rng.random((batch, k)) < 0.6},
        "sparse": {"allowed": rng.random((batch, heads, q, k)) < 0.04, "causal": True},
    }[name]


@pytest.mark.parametrize("of", GRIDS)
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("mask", ["none", "causal", "keys", "sparse"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 12])
def test_twin(bits, mask, correction, of):
    x, grid = _scores(2, 3, 9, 70), _grid(bits, of)
    options = _masks(mask, x.shape)
    values = ptqkit.softmax_on_grid(x, grid, correction=correction, **options)
    q = ptqkit.softmax_on_grid(x, grid, correction=correction, codes=True, **options)
    np.testing.assert_array_equal(q.dequantize(**options), values)
    want, codes, scales, beta = TWINS[of](
        x, grid.scale, grid.max_code, correction=correction, **options
    )
    seen = reference.allowed_keys(x.shape, **options)
    exact = reference.softmax(x, seen)
    exact /= np.maximum(exact.max(axis=-1, keepdims=True), 1e-300)
    exact = (np.sqrt(exact) if of == "squares" else exact) / grid.scale
    distance = np.abs(np.clip(exact, 0, grid.max_code) - q.codes) - 0.5
    assert np.all(distance[seen] <= (RELATIVE * exact + 1e-12)[seen])
    assert not values[~seen].any() and not q.codes[~seen].any()
    same = (codes == q.codes).all(axis=-1)
    assert same.mean() > 0.95
    np.testing.assert_allclose(values[same], want[same], rtol=8 * EPS, atol=4 * EPS)
    full = same & seen.any(axis=-1)
    np.testing.assert_allclose(q.scales[full], scales[full], rtol=4 * EPS)
    np.testing.assert_allclose(q.corrections[same], beta[same], rtol=4 * EPS, atol=2 * EPS)
    assert q.empty_rows == (~seen.any(axis=-1)).sum() and (mask != "sparse" or q.empty_rows)


def test_the_largest_key_of_every_row_has_the_last_code():
    q = ptqkit.softmax_on_grid(_scores(1, 4, 32, 513), _grid(4), codes=True)
    assert np.all(q.codes.max(axis=-1) == 15)
    # on [0, 1] rows of so many keys have none but the lowest codes
    spread = _scores(1, 4, 32, 513, spread=0.5)
    assert ptqkit.softmax_on_grid(spread, ptqkit.softmax_grid(4), codes=True).codes.max() == 0


@pytest.mark.parametrize("of", GRIDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("correction", ["row_sum", "code_sum"])
def test_values_of_one_come_out_as_one(bits, correction, of):
    # Peaked rows, as trained attention has them: one key holds most, a long tail the rest.
    x = _scores(1, 4, 64, 1000, spread=1.0)
    x[..., 3] += 7
    ones = np.ones((1000, 5), np.float32)
    for causal in (False, True):
        lost = ptqkit.softmax_on_grid(x, _grid(bits, of), causal=causal) @ ones
        assert np.abs(lost - 1).max() > (0.01 if bits < 8 else 2e-4)
        kept = ptqkit.softmax_on_grid(x, _grid(bits, of), correction=correction, causal=causal)
        np.testing.assert_allclose(kept.astype(np.float64) @ ones, 1, rtol=0, atol=8 * EPS)


@pytest.mark.parametrize("bits", [4, 8])
def test_torch_gives_the_same(bits):
    torch = pytest.importorskip("torch")
    x, grid = _scores(2, 4, 32, 200), _grid(bits)
    t = torch.from_numpy(x)
    e = torch.exp(t - t.amax(-1, keepdim=True))
    fake = torch.fake_quantize_per_tensor_affine(e, grid.scale, 0, 0, grid.max_code)
    near = (np.abs(e.numpy() / grid.scale % 1 - 0.5) < 1e-4).any(axis=-1)
    assert near.mean() < 0.1
    total, count = e.double().sum(-1, keepdim=True), x.shape[-1]
    expected = {
        None: fake / total,
        "row_sum": (fake + (total - fake.double().sum(-1, keepdim=True)) / count) / total,
        "code_sum": fake / fake.double().sum(-1, keepdim=True),
    }
    for correction, want in expected.items():
        got = ptqkit.softmax_on_grid(x, grid, correction=correction)
        np.testing.assert_allclose(got[~near], want.numpy()[~near], rtol=1e-5, atol=4 * EPS)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_squares_leave_less_error_than_even_steps(bits):
    """Where most keys are far below the largest: their steps are finer by 2^bits - 1."""
    x = _scores(1, 4, 32, 400, spread=1.5)
    p = reference.softmax(x, np.ones(x.shape, bool))
    even, squares = (
        ptqkit.softmax_on_grid(x, _grid(bits, of), correction="row_sum") - p for of in GRIDS
    )
    assert np.square(squares).sum() < np.square(even).sum() / 2


@pytest.mark.parametrize("of", GRIDS)
def test_a_grid_rounds_arrays_as_it_rounds_a_softmax(of):
    """Of a row whose sum is known: the exponentials themselves."""
    x, grid = _scores(1, 1, 1, 50), _grid(4, of)
    e = np.exp(x - x.max(), dtype=np.float32)
    q = ptqkit.softmax_on_grid(x, grid, codes=True)
    np.testing.assert_array_equal(grid.quantize(e), q.codes)
    values = q.dequantize() * e.sum(dtype=np.float64)
    np.testing.assert_allclose(grid.dequantize(q.codes), values, rtol=8 * EPS)


@pytest.mark.parametrize("of", GRIDS)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_later_key_changes_no_earlier_row(correction, of):
    x, grid = _scores(2, 2, 33, 33), _grid(4, of)
    before = ptqkit.softmax_on_grid(x, grid, causal=True, correction=correction)
    for last in (0, 15, 31):
        for junk in (50.0, np.nan, np.inf, -np.inf):
            later = np.where(np.arange(33) > last, np.float32(junk), x)[:, :, : last + 1]
            mask = np.tri(last + 1, 33, dtype=bool)[None, None]
            after = ptqkit.softmax_on_grid(later, grid, allowed=mask, correction=correction)
            assert after.tobytes() == before[:, :, : last + 1].tobytes()
    masked = np.where(np.tri(33, dtype=bool), x, -np.inf)
    added = ptqkit.softmax_on_grid(masked, grid, correction=correction)
    np.testing.assert_array_equal(added, before)


@pytest.mark.parametrize("of", GRIDS)
def test_threads_and_memory_change_nothing(of):
    x, grid = _scores(2, 3, 40, 777), _grid(3, of)
    for correction in CORRECTIONS:
        one = ptqkit.softmax_on_grid(x, grid, correction=correction, threads=1)
        two = ptqkit.softmax_on_grid(x, grid, correction=correction, threads=2)
        over = x.copy()
        ptqkit.softmax_on_grid(over, grid, correction=correction, out=over)
        assert one.tobytes() == two.tobytes() == over.tobytes()


def test_wrong_grids_and_corrections_say_what_to_do():
    with pytest.raises(ValueError, match="zero_point 0 and a scale of at most 1"):
        ptqkit.softmax_grid(2, 0, 4, of="exponentials")
    with pytest.raises(ValueError, match="a grid of squares must have zero_point 0"):
        ptqkit.softmax_grid(8, -0.1, 1, of="squares")
    with pytest.raises(ValueError, match="did you mean 'exponentials'"):
        ptqkit.softmax_grid(8, of="exponential")
    x = _scores(1, 1, 2, 3)
    with pytest.raises(ValueError, match="of a grid of exponentials must be one of"):
        ptqkit.softmax_on_grid(x, _grid(8), correction="bias", bias=0.1)
    with pytest.raises(ValueError, match="of a grid of squares must be one of"):
        ptqkit.softmax_on_grid(x, _grid(8, "squares"), correction="bias", bias=0.1)
    with pytest.raises(ValueError, match="of a grid of probabilities must be one of"):
        ptqkit.softmax_on_grid(x, ptqkit.softmax_grid(8), correction="code_sum")
    with pytest.raises(ValueError, match="row_sum"):
        ptqkit.SoftmaxBias(2, grid=_grid(8))
