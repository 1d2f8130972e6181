"""The quantized softmax on tensors: corrections, masks, and the routine of the core."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ptqkit
from ptqkit.arrays.softmax import softmax_grid
from ptqkit.nn.attention import AttentionCall, AttentionHook
from ptqkit.nn.attention_quantizer import AttentionQuantizer
from ptqkit.nn.softmax.quantizer import SoftmaxQuantizer
from ptqkit.nn.softmax.statistics import length_edges


def causal(q, k):
    return torch.ones(q, k).tril(k - q).bool()


def probabilities(shape, allowed=None, seed=0, spread=3.0):
    """Random softmax outputs over the allowed entries."""
    generator = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(shape, generator=generator)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(torch.float32).min)
    return scores.softmax(-1)


def twin(p, allowed, bits, low, high, correction, bias=None, longest=None, edges=None):
    """Float64 form of the quantized and corrected softmax, entry by entry."""
    scale = float(np.float32((high - low) / (2**bits - 1)))
    zero = round(-low / scale)
    p = p.astype(np.float64)
    out = np.zeros_like(p)
    for index in np.ndindex(*p.shape[:-1]):
        keys = np.flatnonzero(allowed[index])
        if len(keys) == 0:
            continue
        codes = np.clip(np.rint(p[index][keys] / np.float64(scale)) + zero, 0, 2**bits - 1)
        y = scale * (codes - zero)
        n, head = len(keys), index[1]
        if correction == "row_sum":
            y = y + (1 - y.sum()) / n
        elif correction == "bias":
            beta = bias if np.ndim(bias) == 0 else bias[head]
            y = y + beta * min(1, longest / n)
        elif correction == "row_length":
            place = min(int(np.searchsorted(edges, n)), len(edges) - 1)
            mass = np.asarray(bias) if np.ndim(bias) == 1 else np.asarray(bias)[head]
            y = y + mass[place] / n
        out[index][keys] = y
    return out


CASES = {
    "none": (None, None, {}),
    "bias": ("bias", 0.003, {"longest": 9}),
    "bias per head": ("bias", [0.001, -0.002, 0.003], {"longest": 9}),
    "row_length": ("row_length", [0.0, 0.1, 0.3], {"edges": [1, 5, 10]}),
    "row_length per head": ("row_length", [[0.0, 0.1], [0.2, 0.3], [0.4, 0.5]], {"edges": [2, 7]}),
    "row_sum": ("row_sum", None, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("bits", "low", "high"), [(2, 0, 1), (4, 0, 1), (8, 0, 1), (8, -0.1, 0.7), (16, 0, 1)]
)
def test_twin(case, bits, low, high):
    correction, bias, more = CASES[case]
    allowed = causal(13, 13).expand(2, 1, 13, 13).clone()
    allowed[1, 0, :, :4] = False  # padded on the left: rows without any key
    p = probabilities((2, 3, 13, 13), allowed)
    quantizer = SoftmaxQuantizer(softmax_grid(bits, low, high), correction, bias, **more)
    found = quantizer(p, allowed)
    full = allowed.expand(p.shape).numpy()
    expected = twin(p.numpy(), full, bits, low, high, correction, bias, **more)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-7)
    assert not found.numpy()[~full].any()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", [2, 8, 12])
def test_same_as_the_array_functions(case, bits):
    """Bit for bit, from the same probabilities; the fused routine has its own exponentials."""
    correction, bias, more = CASES[case]
    allowed = causal(9, 9)[None, None]
    scores = 3 * torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(4))
    p = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    grid = softmax_grid(bits)
    found = SoftmaxQuantizer(grid, correction, bias, **more)(p, allowed)
    if correction is None:
        plain = grid.dequantize(grid.quantize(p))
        assert np.array_equal(found.numpy(), np.where(allowed.numpy(), plain, 0))
    table = bias
    if correction == "row_length":
        edges = np.asarray(more["edges"])
        place = np.minimum(np.searchsorted(edges, np.arange(10)), len(edges) - 1)
        table = np.asarray(bias)[..., place] / np.maximum(np.arange(10), 1)
    fused = ptqkit.softmax_on_grid(scores, grid, correction=correction, bias=table, allowed=allowed)
    same = np.abs(found.numpy() - fused).max(-1) < 1e-6
    # A row may have a probability at a tie; none of these seeds has many.
    assert same.mean() > 0.97


def test_everything_allowed_without_a_mask():
    p = probabilities((1, 2, 5, 7))
    for correction, bias, more in CASES.values():
        if np.ndim(bias) and len(bias) == 3 and np.ndim(bias) + (correction == "bias") == 2:
            continue  # three heads
        q = SoftmaxQuantizer(softmax_grid(4), correction, bias, **more)
        assert torch.equal(q(p), q(p, torch.ones(1, 1, 5, 7, dtype=torch.bool)))


def test_half_precision_and_given_tensors():
    p = probabilities((1, 2, 4, 9)).bfloat16()
    before = p.clone()
    q = SoftmaxQuantizer(softmax_grid(8), "row_sum")
    assert q(p).dtype == torch.bfloat16
    assert torch.equal(q(p), q(p.float()).bfloat16())
    assert torch.equal(p, before)


def test_row_sum_makes_rows_sum_to_one():
    allowed = causal(40, 40)
    p = probabilities((2, 4, 40, 40), allowed, spread=1.0)
    plain = SoftmaxQuantizer(softmax_grid(5))(p, allowed).sum(-1)
    fixed = SoftmaxQuantizer(softmax_grid(5), "row_sum")(p, allowed).sum(-1)
    assert (plain - 1).abs().max() > 0.2
    assert (fixed - 1).abs().max() < 1e-6


def test_longer_rows_gain_no_more_mass():
    q = SoftmaxQuantizer(softmax_grid(8), "bias", 0.004, longest=50)
    for n in (10, 50, 51, 200, 1000):
        p = torch.full((1, 1, 1, n), 1e-6)
        assert q(p).sum().item() == pytest.approx(0.004 * min(n, 50), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        (("beta",), {}, "correction must be one of"),
        (("bias",), {}, "needs a bias"),
        (("bias", []), {}, "at least one value"),
        (("bias", [[0.1]]), {}, "must have 0 or 1 dimensions"),
        (("bias", np.nan), {}, "finite"),
        (("bias", 1.5), {}, "from -1 to 1"),
        (("row_sum", 0.1), {}, "no place"),
        ((None, 0.1), {}, "no place"),
        (("row_length", [0.1, 0.2]), {}, "edges must be 2 rising"),
        (("row_length", [0.1, 0.2]), {"edges": [3, 3]}, "edges must be 2 rising"),
        (("row_length", [0.1, 0.2]), {"edges": [0, 3]}, "edges must be 2 rising"),
        (("bias", 0.1), {"edges": [1]}, "edges have no place"),
    ],
)
def test_quantizer_mistakes(arguments, more, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxQuantizer(softmax_grid(8), *arguments, **more)


def test_length_edges_cover_every_length_once():
    for longest in (1, 2, 4, 5, 7, 100, 1024):
        edges = length_edges(longest)
        assert edges == sorted(set(edges)) and edges[0] == 1 and edges[-1] == longest


def ulp(*values):
    """Unit in the last place of the largest of some float32 tensors, entry by entry."""
    largest = torch.stack(torch.broadcast_tensors(*(v.abs() for v in values))).amax(0)
    return torch.from_numpy(np.spacing(largest.numpy()))


MASKS = {
    "none": None,
    "causal": causal(33, 33)[None, None],
    "one query": causal(1, 33)[None, None],
    "padding": torch.arange(33).lt(torch.tensor([[20], [33]]))[:, None, None],
    "by head": torch.rand(2, 3, 33, 33, generator=torch.Generator().manual_seed(1)) < 0.7,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", [2, 8, 12])
def test_fused_agrees_with_separate_softmax(case, bits, mask):
    """Codes but for ties, values without correction to the bit, corrected ones to 2 ulp."""
    correction, bias, more = CASES[case]
    allowed, grid = MASKS[mask], softmax_grid(bits, -0.01, 0.8)
    queries = 1 if mask == "one query" else 33
    scores = 3 * torch.randn(2, 3, queries, 33, generator=torch.Generator().manual_seed(2))
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(torch.float32).min)
    quantizer = SoftmaxQuantizer(grid, correction, bias, **more)
    p = scores.double().softmax(-1)
    steps = p / grid.scale
    tie = ((steps - steps.floor() - 0.5).abs() < 1e-6 * steps.clamp(min=1)).any(-1)
    assert tie.double().mean() < 0.2
    separate = quantizer(scores.softmax(-1), allowed)
    work = scores.clone()
    fused = quantizer.fused(work, allowed)
    assert fused.data_ptr() == work.data_ptr()
    plain = SoftmaxQuantizer(grid)(scores.softmax(-1), allowed)
    apart = (fused - separate).abs()[~tie]
    bound = 0 if correction is None else 2 * ulp(separate, separate - plain)[~tie]
    assert (apart <= bound).all()
    # On the other side of a tie, a code and the values that it moves are one step away.
    assert (fused - separate).abs().max() < 1.01 * grid.scale
    if allowed is not None:
        assert not fused[~allowed.expand_as(fused)].any()


def test_tables_of_lengths_grow_with_the_keys():
    """A cache of keys grows token by token; every length has the values that it has alone."""
    for case in ("bias per head", "row_length per head"):
        correction, bias, more = CASES[case]
        grown = SoftmaxQuantizer(softmax_grid(8), correction, bias, **more)
        for keys in (1, 5, 9, 10, 16, 17, 31, 64, 7):
            scores = torch.randn(1, 3, 2, keys, generator=torch.Generator().manual_seed(keys))
            alone = SoftmaxQuantizer(softmax_grid(8), correction, bias, **more)
            assert torch.equal(grown.fused(scores.clone()), alone.fused(scores.clone()))


def test_fused_only_where_it_can():
    quantizer = SoftmaxQuantizer(softmax_grid(8), "bias", [0.1, 0.2, 0.3])
    scores = torch.zeros(1, 3, 4, 5)
    assert quantizer.fused(scores.half()) is None and quantizer.fused(scores.double()) is None
    assert quantizer.fused(scores.to("meta")) is None
    assert quantizer.fused(scores.clone().requires_grad_()) is None
    with pytest.raises(ValueError, match="for 3 heads, the module has 2"):
        quantizer.fused(scores[:, :2])
    with pytest.raises(ValueError, match="NaN or \\+Inf"):
        quantizer.fused(torch.full((1, 3, 4, 5), torch.nan))
    spread = torch.randn(1, 3, 5, 4).transpose(2, 3)
    kept = spread.clone()
    assert torch.equal(quantizer.fused(spread), quantizer.fused(kept.contiguous()))
    assert torch.equal(spread, kept)  # not contiguous: a copy was quantized


def call(batch, heads, q, k, **facts):
    """Return a call of an attention whose scores are its query, and what it returns."""
    query, key = torch.randn(batch, heads, q, k), torch.zeros(batch, heads, k, 1)
    return AttentionCall("attn", torch.nn.Module(), query, key, torch.zeros(1), **facts)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "softmax",
    [
        lambda x: torch.softmax(x, -1),
        lambda x: torch.nn.functional.softmax(x, dim=-1, dtype=torch.float32),
        lambda x: x.softmax(dim=-1),
        lambda x: torch.softmax(input=x, dim=x.ndim - 1),
    ],
)
def test_every_way_to_call_a_softmax_is_fused(softmax, merged):
    shape = (2, 3, 4, 5)
    found = call(*shape)
    quantizer = SoftmaxQuantizer(softmax_grid(8), "row_sum")
    expected = quantizer.fused(found.query.clone())
    passed = []

    class Hook(AttentionQuantizer):
        def softmax(self, p, call):
            raise AssertionError("the fused routine was left out")

        def fused(self, scores, call):
            passed.append(scores.shape)
            return super().fused(scores, call)

    found.attend = lambda q, k, v: softmax(q.clone().flatten(0, 1) if merged else q.clone())
    result = found.run(Hook({"softmax": quantizer}))
    assert passed == [shape] and result.shape == ((6, 4, 5) if merged else shape)
    assert torch.equal(result.reshape(shape), expected)


def test_other_dtypes_axes_and_shapes_are_not_fused():
    found = call(2, 3, 4, 5)
    hook = AttentionQuantizer({"softmax": SoftmaxQuantizer(softmax_grid(8))})
    found.attend = lambda q, k, v: torch.softmax(q, -1, dtype=torch.float64)
    assert found.run(hook).dtype == torch.float64
    for attend in (
        lambda q, k, v: q.softmax(2),
        lambda q, k, v: q[..., :-1].softmax(-1),
        lambda q, k, v: q.flatten().softmax(-1),
    ):
        found.attend = attend
        with pytest.raises(ptqkit.UnsupportedModuleError, match="attn .*takes its softmax along"):
            found.run(hook)
    for count in (0, 2):
        found.attend = lambda q, k, v, count=count: [q.softmax(-1) for _ in range(count)]
        with pytest.raises(ptqkit.UnsupportedModuleError, match=f"ran {count} softmax functions"):
            found.run(AttentionHook())


def test_scores_that_are_not_finite_are_named():
    found = call(1, 2, 3, 4)
    found.query[0, 1, 2, 3] = torch.nan
    found.attend = lambda q, k, v: q.softmax(-1)
    with pytest.raises(ValueError, match=r"attn: scores\[0, 1, 2\] holds NaN"):
        found.run(AttentionQuantizer({"softmax": SoftmaxQuantizer(softmax_grid(8))}))
