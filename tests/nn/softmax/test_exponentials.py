"""The quantized softmax on tensors with the exponentials on the grid, and other papers' grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ptqkit.reference as reference
from ptqkit.arrays.softmax import softmax_grid
from ptqkit.nn.attention import AttentionCall
from ptqkit.nn.softmax.compare import SoftmaxComparison
from ptqkit.nn.softmax.quantizer import SoftmaxQuantizer
from ptqkit.nn.softmax.tables import Log2Grid, TableGridQuantizer, TwinGrid

EPS = float(np.finfo(np.float32).eps)
CORRECTIONS = (None, "row_sum", "code_sum")
TWINS = {"exponentials": reference.exponentials_on_grid, "squares": reference.squares_on_grid}


def _grid(bits, of="exponentials"):
    return softmax_grid(bits, of=of)


def _scores(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32))


def _allowed():
    allowed = torch.ones(13, 40).tril(27).bool().expand(2, 1, 13, 40).clone()
    allowed[1, 0, :, :30] = False  # padded on the left: rows without any key
    return allowed


@pytest.mark.parametrize("of", list(TWINS))
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("bits", [2, 4, 8, 12])
def test_probabilities_and_scores_give_the_twin(bits, correction, of):
    scores, allowed = _scores(2, 3, 13, 40), _allowed()
    quantizer = SoftmaxQuantizer(_grid(bits, of), correction)
    want, codes, _, _ = TWINS[of](
        scores.numpy(),
        quantizer.grid.scale,
        quantizer.grid.max_code,
        correction=correction,
        allowed=allowed.numpy(),
    )
    masked = scores.masked_fill(~allowed, torch.finfo(torch.float32).min)
    from_scores = quantizer.fused(masked.clone(), allowed)
    from_probabilities = quantizer(masked.softmax(-1), allowed)
    # Where no code lies next to a tie; one code is 1 / (2**bits - 1) of the largest.
    p = reference.softmax(scores.numpy(), np.broadcast_to(allowed.numpy(), scores.shape))
    e = p / np.maximum(p.max(-1, keepdims=True), 1e-30)
    steps = (np.sqrt(e) if of == "squares" else e) / quantizer.grid.scale
    # Near it in the units of a code: the error of a step grows with its code.
    clear = (np.abs(steps % 1 - 0.5) > (1e-3 if of == "exponentials" else 1e-6 * steps)).all(-1)
    assert clear.mean() > (0.6 if bits < 12 else 0.3)
    for found in (from_scores, from_probabilities):
        np.testing.assert_allclose(found.numpy()[clear], want[clear], rtol=1e-5, atol=4 * EPS)
        assert not found.numpy()[~np.broadcast_to(allowed.numpy(), found.shape)].any()
    assert codes.max() == quantizer.grid.max_code


@pytest.mark.parametrize("correction", ["row_sum", "code_sum"])
def test_halves_keep_their_dtype_and_mass(correction):
    p = _scores(1, 2, 8, 300).softmax(-1)
    for dtype in (torch.float16, torch.bfloat16):
        found = SoftmaxQuantizer(_grid(4), correction)(p.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.float().sum(-1), torch.ones(1, 2, 8), atol=0.02, rtol=0)


def test_uncorrected_keeps_the_grid():
    quantizer = SoftmaxQuantizer(_grid(4), "row_sum").uncorrected
    assert quantizer.grid == _grid(4) and quantizer.correction is None
    twin = TableGridQuantizer(TwinGrid(4, 3), "row_sum").uncorrected
    assert twin.grid == TwinGrid(4, 3) and twin.correction is None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_published_grids_by_hand(bits):
    p = torch.rand(1, 2, 50, 60, generator=torch.Generator().manual_seed(0)).pow(4)
    p[0, 0, 0, :3] = torch.tensor([0.0, 1.0, 2.0**-20])
    exact = p.numpy().astype(np.float64)
    with np.errstate(divide="ignore"):
        codes = np.clip(np.rint(-np.log2(exact)), 0, 2**bits - 1)
    found = TableGridQuantizer(Log2Grid(bits))(p).numpy()
    assert np.mean(found == 2.0**-codes) > 0.999  # but next to a tie, which is at 2**(n + 1/2)
    assert len(np.unique(found)) <= 2**bits
    for shift in (1, 3, 6):
        fine, coarse = 2.0 ** (1 - bits - shift), 2.0 ** (1 - bits)
        step = np.where(exact < 2.0**-shift, fine, coarse)
        want = np.minimum(np.rint(exact / step), 2 ** (bits - 1) - 1) * step
        found = TableGridQuantizer(TwinGrid(bits, shift))(p).numpy()
        np.testing.assert_array_equal(found, want)
        assert len(np.unique(found)) <= 2**bits


@pytest.mark.parametrize("grid", [Log2Grid(3), TwinGrid(4, 2)])
def test_published_grids_correct_allowed_entries_alone(grid):
    p = _scores(2, 3, 13, 40).masked_fill(~_allowed(), -1e9).softmax(-1)
    found = TableGridQuantizer(grid, "row_sum")(p, _allowed())
    keys = _allowed().any(-1, keepdim=True).float().expand(2, 3, 13, 1)
    torch.testing.assert_close(found.sum(-1, keepdim=True), keys, atol=1e-5, rtol=0)
    assert not found.masked_fill(_allowed(), 0).any()
    with pytest.raises(ValueError, match="correction of a .* grid must be one of None, 'row_sum'"):
        TableGridQuantizer(grid, "bias")


def test_a_comparison_counts_rows():
    p = torch.tensor([[[[0.5, 0.5, 0.0], [0.3, 0.4, 0.3]]]])
    allowed = torch.tensor([[[[True, True, False], [True, True, True]]]])
    rows = torch.tensor([[True, True]])
    call = AttentionCall("a", torch.nn.Identity(), allowed=allowed, rows=rows)
    call.value = torch.eye(3)[None, None]
    hook = SoftmaxComparison("a", [lambda p, allowed: torch.where(p < 0.35, 0.0, p)])
    assert hook.softmax(p, call) is p
    assert hook.sums[0].zero_fraction == 2 / 5
    assert hook.sums[0].mean_row_sum == pytest.approx((1 + 0.4) / 2)
