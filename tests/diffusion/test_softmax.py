"""The quantized softmax of UNets: statistics, corrections by head and step, saved and restored."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.diffusion_models import (
    HEADS,
    STEPS,
    calibration,
    forward,
    tiny_model,
    tiny_unet,
)

import ptqkit
from ptqkit import diffusion
from ptqkit.nn.attention import AttentionHook
from ptqkit.nn.softmax.compare import OutputSQNR, softmax_hooks
from ptqkit.nn.softmax.quantizer import SoftmaxQuantizer

SELF = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
GRANULARITIES = ("tensor", "head", "step", "step_head")
LEVELS = 255
STEP = 666


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def latents(model):
    return calibration(model)


@pytest.fixture(scope="module")
def study(model, latents):
    return diffusion.SoftmaxCalibration(model.unet, latents)


class Collector(AttentionHook):
    """Keeps the probabilities of every batch."""

    def __init__(self):
        self.p = []

    def softmax(self, p, call):
        self.p.append(p.double())
        return p


def probabilities(model, latents):
    """Per module and time step, those of all latents: (n, heads, q, k)."""
    hooks = {name: Collector() for name in diffusion.find_attention(model.unet)}
    diffusion.run_calibration(model.unet, latents, hooks)
    times = [step for _, step, _ in latents.batches()]
    return {
        name: {
            t: torch.cat([p for p, at in zip(hook.p, times, strict=True) if at == t])
            for t in latents.steps
        }
        for name, hook in hooks.items()
    }


def rounded(p):
    return torch.round(p.float() * LEVELS).double() / LEVELS


def at(quantizer, step):
    """What quantizes at a time step."""
    return quantizer.at((step,)) if hasattr(quantizer, "at") else quantizer


def counted(p, grid):
    """Sums over the entries of a tensor in double: p, its codes, and what they may be off by.

    The core rounds ``fl(p * fl(1 / scale))``, two roundings from the quotient, so that a code may
    differ if the quotient is within 2**-23 of itself, and a little, from a tie.
    """
    steps = p / grid.scale
    from_tie = (steps - steps.floor() - 0.5).abs()
    ties = (from_tie <= 1.01 * 2.0**-23 * steps).sum().item()
    # The statistics take every row to sum to 1.
    rows = (p.sum(-1) - 1).abs().sum().item()
    return p.sum().item(), steps.round().sum().item(), ties * grid.scale + rows


def test_bias_by_hand(model, latents, study):
    seen = probabilities(model, latents)
    for name, statistics in study.statistics.items():
        grid, found = statistics.grid, statistics.bias.bias("step_head")
        totals = np.zeros(3)
        for place, step in enumerate(latents.steps):
            for head, p in enumerate(seen[name][step].unbind(1)):
                total, codes, bound = counted(p, grid)
                error = (total - grid.scale * codes) / p.numel()
                assert abs(found[place, head] - error) <= bound / p.numel() + 1e-15
                totals += total, codes, bound
        everything = torch.cat([*seen[name].values()])
        count = everything.numel()
        error = (totals[0] - grid.scale * totals[1]) / count
        assert abs(float(statistics.bias.bias("tensor")) - error) <= totals[2] / count + 1e-15
        assert totals[2] / count < 1e-6 + 20 * grid.scale / count
        zero = (everything / grid.scale).round().eq(0).double().mean().item()
        ties = ((everything / grid.scale - 0.5).abs() < 1e-7).sum().item()
        assert abs(statistics.bias.zero_fraction - zero) <= ties / count
        assert statistics.longest == everything.shape[-1]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_correction_makes_the_mean_error_zero_on_the_calibration_set(
    model, latents, study, granularity
):
    quantizers = study.quantizers("bias", granularity)
    axes = {"tensor": (0, 1, 2), "head": (0, 2), "step": (1, 2), "step_head": (2,)}[granularity]
    for name, by_step in probabilities(model, latents).items():
        error, plain, weight = [], [], []
        for step, p in by_step.items():
            quantizer = at(quantizers[name], step)
            error.append((quantizer(p.float()).double() - p).mean(-1).transpose(0, 1))
            plain.append((rounded(p) - p).mean(-1).transpose(0, 1))
            weight.append(len(p))
        # (steps, heads): means over samples and rows, then over what the granularity averages
        parts = [torch.stack([e.flatten(1).mean(1) for e in part]) for part in (error, plain)]
        counts = torch.tensor(weight, dtype=torch.float64)[:, None] / sum(weight) * STEPS
        keep = [a for a in (0, 1) if a in axes]
        means = [(part * counts).mean(keep) if keep else part for part in parts]
        assert means[0].abs().max() < 2e-8
        assert by_step[latents.steps[0]].shape[-1] < 64 or means[1].abs().max() > 1e-6


def test_the_bias_of_the_time_step_at_hand_is_used(model, latents, study):
    quantizers = study.quantizers("bias", "step_head")
    p = torch.rand(2, HEADS, 3, 9, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for place, step in enumerate(latents.steps):
        seen = {}

        class Apply(AttentionHook):
            def softmax(self, x, call, seen=seen):
                seen["y"] = quantizers[SELF].at(call.steps)(p)
                return x

        with diffusion.attention_hooks(model.unet, {SELF: Apply()}):
            forward(model, step=step)
        bias = study.statistics[SELF].bias.bias("step_head")[place]
        expected = rounded(p) + torch.tensor(bias)[:, None, None]
        torch.testing.assert_close(seen["y"].double(), expected, rtol=0, atol=1e-7)
    assert len({tuple(row) for row in study.statistics[SELF].bias.bias("step_head")}) == STEPS


def test_a_batch_of_several_time_steps_is_as_its_samples_alone(model, study):
    quantizer = study.quantizers("bias", "step_head")[SELF]
    p = torch.rand(3, HEADS, 4, 9, generator=torch.Generator().manual_seed(1)).softmax(-1)
    allowed = torch.ones(3, 1, 1, 9, dtype=torch.bool)
    allowed[1, ..., 5:] = False
    steps = [quantizer.steps[i] for i in (2, 0, 2)]
    together = quantizer.at(steps)(p, allowed)
    for i, step in enumerate(steps):
        alone = at(quantizer, step)(p[i : i + 1], allowed[i : i + 1])
        assert torch.equal(alone, together[i : i + 1])
    assert not together[1, ..., 5:].any() and together[1, ..., :5].all()


def test_row_sum_makes_rows_sum_to_one(study):
    p = torch.rand(1, HEADS, 5, 300, generator=torch.Generator().manual_seed(2)).softmax(-1)
    y = study.quantizers("row_sum")[SELF](p)
    assert (y.double().sum(-1) - 1).abs().max() < 1e-5 and rounded(p).sum(-1).max() < 1.2
    assert (rounded(p).sum(-1) - 1).abs().min() > 0.1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("correction", "granularity"),
    [(None, "head"), ("row_sum", "head"), *(("bias", g) for g in GRANULARITIES)],
)
def test_fused_softmax_is_the_plain_one(study, correction, granularity, masked):
    quantizer = at(study.quantizers(correction, granularity)[SELF], STEP)
    scores = torch.randn(2, HEADS, 40, 500, generator=torch.Generator().manual_seed(3)) * 2
    allowed = torch.ones(2, 1, 1, 500, dtype=torch.bool) if masked else None
    if masked:
        allowed[0, ..., 100:] = False
        scores = scores.masked_fill(~allowed, -10_000.0)
    plain = quantizer(scores.softmax(-1), allowed)
    fused = quantizer.fused(scores.clone(), allowed)
    apart = (plain - fused).abs()
    # A code on the other side of a tie is one step away, and moves its whole row with "row_sum".
    assert (apart > 2e-5).double().mean() < 1e-4 and apart.max() < 1.1 / LEVELS
    if masked:
        assert not fused[0, ..., 100:].any() and not plain[0, ..., 100:].any()


def test_fused_softmax_only_where_it_can(model, study):
    quantizer = study.quantizers("bias", "step")[SELF]
    scores = torch.zeros(2, HEADS, 3, 4)
    assert not hasattr(quantizer.at(quantizer.steps[:2]), "fused")
    quantizer = at(quantizer, STEP)
    assert quantizer.fused(scores.bfloat16()) is None and quantizer.fused(scores) is scores
    assert quantizer.fused(torch.zeros(2, HEADS, 3, 4, requires_grad=True)) is None


def test_gradients_pass_a_hooked_unet(model, study):
    """Not through the rounding, but around it; and the fused routine stays out of the way."""
    noise, context = model.noise(1), model.context(1).requires_grad_()
    with diffusion.attention_hooks(model.unet, softmax_hooks(study.quantizers("row_sum"))):
        model.unet(noise, 500, context).sample.sum().backward()
    assert torch.isfinite(context.grad).all() and context.grad.abs().max() > 0


def test_quantized_model_and_removal(model, latents):
    plain = forward(model)
    result = diffusion.quantize_softmax(model.unet, latents, granularity="step_head")
    changed = forward(model)
    assert not torch.equal(changed, plain)
    with pytest.raises(ValueError, match="has hooks already"):
        diffusion.quantize_softmax(model.unet, latents)
    rows = result.report.layers
    assert len(rows) == len(diffusion.find_attention(model.unet))
    assert all(row.sqnr_corrected_db >= row.sqnr_db for row in rows)
    assert all(0 <= row.zero_fraction <= 1 and 0 < row.mean_row_sum < 2 for row in rows)
    assert result.remove() == len(rows)
    assert torch.equal(forward(model), plain)
    result.install()
    assert torch.equal(forward(model), changed)
    result.remove()


def test_sqnr_of_a_layer_by_hand(model, latents):
    """The ratio of eq. 1 for the output of one module, from the probabilities and the values."""
    hook = Both()
    diffusion.run_calibration(model.unet, latents, {SELF: hook})
    study = diffusion.SoftmaxCalibration(model.unet, latents, layers=[SELF])
    row = study.compare(study.quantizers("bias", "tensor"), guard=False)[SELF]
    beta = float(study.statistics[SELF].bias.bias())
    for bias, found in ((0.0, row.sqnr_db), (beta, row.sqnr_corrected_db)):
        ratios = []
        for p, v in zip(hook.p, hook.v, strict=True):
            p, v = p.double(), v.double()
            exact, noise = p @ v, (rounded(p) + bias - p) @ v
            ratios += ((exact**2).flatten(1).sum(1) / (noise**2).flatten(1).sum(1)).tolist()
        assert found == pytest.approx(10 * np.log10(np.mean(ratios)), abs=1e-3)


def test_guard_takes_out_a_correction_that_hurts(model, latents, study):
    quantizers = study.quantizers("bias", "tensor")
    quantizers[SELF] = SoftmaxQuantizer(quantizers[SELF].grid, "bias", 0.1)
    report = study.compare(quantizers)
    assert quantizers[SELF].correction is None and "left out" in report[SELF].notes
    assert report[SELF].sqnr_corrected_db == report[SELF].sqnr_db


def test_sqnr_of_the_unet_by_hand(model, latents, study):
    exact = diffusion.run_calibration(model.unet, latents).double()
    quantizers = study.quantizers("row_sum")
    report = study.compare(quantizers, guard=False)
    decibels = (report.output_db, report.output_corrected_db)
    assert decibels[0] != decibels[1]
    for chosen, decibel in zip((study.quantizers(None), quantizers), decibels, strict=True):
        noise = (
            diffusion.run_calibration(model.unet, latents, softmax_hooks(chosen)).double() - exact
        )
        ratios = (exact**2).flatten(1).sum(1) / (noise**2).flatten(1).sum(1)
        assert decibel == pytest.approx(10 * np.log10(ratios.mean().item()), abs=0.05)
    assert "nan" not in report.table().splitlines()[-1]


def test_guard_takes_out_corrections_that_hurt_the_output_together(model, study, monkeypatch):
    """Where no layer alone is worse, but the UNet is."""
    quantizers = study.quantizers("bias", "head")
    quantizers[SELF] = SoftmaxQuantizer(quantizers[SELF].grid, "bias", 0.1)
    below, whole = OutputSQNR.below, "output of the model"
    monkeypatch.setattr(OutputSQNR, "below", lambda a, b, how: a.name == whole and below(a, b, how))
    report = study.compare(quantizers)
    assert all(q.correction is None for q in quantizers.values())
    assert all("left out" in row.notes and row.correction is None for row in report.layers)
    assert report.output_corrected_db == report.output_db and "left out" in report.notes
    unguarded = study.quantizers("bias", "head")
    unguarded[SELF] = SoftmaxQuantizer(unguarded[SELF].grid, "bias", 0.1)
    report = study.compare(unguarded, guard=False)
    assert report.output_corrected_db < report.output_db and not report.notes
    assert unguarded[SELF].correction == "bias"


def test_one_exact_sample_decides_nothing():
    """Eq. 1 is infinite then, whichever of the two the sample is exact in."""
    x = np.ones((2, 8), np.float32)
    exact, other = OutputSQNR("output"), OutputSQNR("output")
    exact.update(x, x + np.array([[0.0], [0.5]], np.float32))
    other.update(x, x + np.full((2, 1), 0.1, np.float32))
    assert np.isinf(exact.decibel)
    for by_total in (True, False):
        assert exact.below(other, by_total) and not other.below(exact, by_total)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"diagnostics": False}, {"grid_range": "search", "diagnostics": False}]
)
def test_half_precision_with_upcast_attention(model, latents, dtype, options):
    unet = tiny_unet(upcast_attention=True).to(dtype)
    result = diffusion.quantize_softmax(unet, latents, **options)
    assert result.remove() == 8
    if not options:
        assert all(np.isfinite(row.sqnr_corrected_db) for row in result.report.layers)


@pytest.mark.parametrize("span", ["fixed", "calibrated", "search"])
@pytest.mark.parametrize("part", ["to_q", "to_v"])
def test_attention_that_is_not_finite_is_named(latents, span, part):
    unet = tiny_unet()
    getattr(unet.get_submodule(SELF), part).weight.data[0, 0] = float("nan")
    with pytest.raises(ptqkit.CalibrationError, match=r"down_.*Check the weights") as caught:
        diffusion.quantize_softmax(unet, latents, grid_range=span)
    assert SELF in str(caught.value) or part == "to_v"
    assert not diffusion.installed_attention(unet) and not unet._forward_pre_hooks


def test_an_output_that_is_not_finite_is_named(latents):
    unet = tiny_unet()
    unet.conv_out.bias.data[0] = float("inf")
    with pytest.raises(ptqkit.CalibrationError, match="output of the model: .*NaN or Inf"):
        diffusion.quantize_softmax(unet, latents)
    assert not diffusion.installed_attention(unet)


def test_calibrated_range_and_bits(model, latents):
    wide = diffusion.SoftmaxCalibration(model.unet, latents, bits=4)
    fitted = diffusion.SoftmaxCalibration(model.unet, latents, bits=4, grid_range="calibrated")
    largest = {
        name: max(p.max().item() for p in by_step.values())
        for name, by_step in probabilities(model, latents).items()
    }
    for name, statistics in fitted.statistics.items():
        assert statistics.grid.scale == pytest.approx(largest[name] / 15, rel=1e-6)
        assert statistics.bias.zero_fraction <= wide.statistics[name].bias.zero_fraction
        assert wide.statistics[name].grid.scale == pytest.approx(1 / 15, rel=1e-6)


def test_searched_range_has_the_least_error_of_its_candidates(model, latents):
    """Never worse than [0, 1] and than the whole range seen, on the calibration set."""
    decibel, scales = {}, {}
    for span in ("fixed", "calibrated", "search"):
        study = diffusion.SoftmaxCalibration(
            model.unet, latents, bits=4, grid_range=span, layers="self"
        )
        values, seen = {}, {}
        hooks = {name: Both() for name in study.modules}
        diffusion.run_calibration(model.unet, latents, hooks)
        for name, quantizer in study.quantizers("bias", "head").items():
            hook = hooks[name]
            exact = torch.cat([p @ v for p, v in zip(hook.p, hook.v, strict=True)])
            other = [quantizer(p) @ v for p, v in zip(hook.p, hook.v, strict=True)]
            noise = (torch.cat(other) - exact).double()
            seen[name] = ((exact.double() ** 2).sum() / (noise**2).sum()).log10().item() * 10
            values[name] = study.statistics[name].grid.scale
        decibel[span], scales[span] = seen, values
    for name, found in decibel["search"].items():
        assert found >= max(decibel["fixed"][name], decibel["calibrated"][name]) - 1e-4
    assert scales["search"] != scales["calibrated"] and scales["search"] != scales["fixed"]


class Both(AttentionHook):
    """Keeps probabilities and values of every batch."""

    def __init__(self):
        self.p, self.v = [], []

    def value(self, x, call):
        self.v.append(x)
        return x

    def softmax(self, p, call):
        self.p.append(p)
        return p


def test_layers_can_be_chosen(model, latents):
    chosen = {
        wanted: [*diffusion.SoftmaxCalibration(model.unet, latents, layers=wanted).statistics]
        for wanted in ("self", "cross", SELF)
    }
    assert chosen[SELF] == [SELF]
    assert all(name.endswith("attn1") for name in chosen["self"])
    assert all(name.endswith("attn2") for name in chosen["cross"])
    assert len(chosen["self"]) == len(chosen["cross"]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"correction": "row_length"}, "correction must be one of"),
        ({"granularity": "channel"}, "granularity must be one of"),
        ({"grid_range": "wide"}, "grid_range must be one of"),
        ({"bits": 1}, "bits must"),
        (
            {"layers": ["attn9"]},
            "'attn9' matches no attention module; .* 'self' name all",
        ),
        ({"layers": []}, "layers is empty"),
    ],
)
def test_bad_options_are_refused(model, latents, options, message):
    with pytest.raises(ValueError, match=message):
        diffusion.quantize_softmax(model.unet, latents, **options)
    assert not diffusion.installed_attention(model.unet)


def test_bad_calibration_is_refused(model, latents):
    with pytest.raises(TypeError, match="CalibrationLatents"):
        diffusion.quantize_softmax(model.unet, [latents.latents])
    grid = ptqkit.softmax_grid(8)
    for shape in ((3,), (3, HEADS), ()):
        with pytest.raises(ValueError, match="a row for every time step"):
            diffusion.StepSoftmaxQuantizer(grid, np.zeros(shape), [1, 2])
    with pytest.raises(ValueError, match="finite"):
        diffusion.StepSoftmaxQuantizer(grid, [0.0, np.nan], [1, 2])
    wrong = SoftmaxQuantizer(grid, "bias", np.zeros(HEADS + 1))
    result = diffusion.UNetSoftmaxQuantization(model.unet, {SELF: wrong})
    with pytest.raises(ValueError, match=f"has {HEADS} heads, its softmax correction is for 3"):
        result.install()


@pytest.mark.parametrize(
    ("correction", "granularity"), [*(("bias", g) for g in GRANULARITIES), ("row_sum", "head")]
)
def test_saved_corrections_give_the_same_bits(
    model, latents, study, tmp_path, correction, granularity
):
    quantizers = study.quantizers(correction, granularity)
    result = diffusion.UNetSoftmaxQuantization(model.unet, quantizers, steps=latents.steps)
    path = result.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["ptqkit_softmax.json"]
    result.install()
    expected = [forward(model, step=step) for step in latents.steps]
    result.remove()
    other = tiny_model()
    loaded = diffusion.load_softmax(other.unet, path.parent)
    for step, output in zip(latents.steps, expected, strict=True):
        assert torch.equal(forward(other, step=step), output)
    assert loaded.remove() == len(quantizers)


def edit(**changes):
    return lambda content: content["layers"][SELF].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "has version 2"),
        (lambda c: c.update(format="other"), "is not a ptqkit-softmax-unet file"),
        (lambda c: c.update(layers={}), "names no layers"),
        (lambda c: c.update(steps=[5, -1, 3]), "from 0"),
        (lambda c: c.update(steps=[5]), "a row for every time step"),
        (edit(heads=3), "bias is for 2 heads, not 3"),
        (edit(bits=99), "attn1: .*bits"),
        (edit(scale=-1.0), "attn1: .*scale"),
        (edit(granularity="tensor"), "attn1: .*bias"),
        (edit(granularity="step"), "shape of granularity"),
        (edit(bias=[[0.0] * 3] * STEPS), "bias is for 3 heads, not 2"),
        (edit(bias=None), "attn1"),
        (edit(more=1), "unknown field 'more'"),
        (lambda c: c["layers"][SELF].pop("scale"), "'scale' is missing"),
        (lambda c: c["layers"].update(other=c["layers"][SELF]), "no such attention module"),
    ],
)
def test_damaged_files_are_refused(model, latents, study, tmp_path, change, message):
    quantizers = study.quantizers("bias", "step_head")
    path = diffusion.save_softmax(model.unet, quantizers, latents.steps, tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        diffusion.load_softmax(model.unet, tmp_path)
    assert not diffusion.installed_attention(model.unet)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        diffusion.load_softmax(model.unet, tmp_path)


def test_no_file_is_no_error(model, tmp_path):
    assert diffusion.load_softmax(model.unet, tmp_path) is None


def test_saving_needs_a_folder(model, latents, study, tmp_path):
    missing = tmp_path / "nowhere"
    with pytest.raises(NotADirectoryError, match="nowhere is not a folder"):
        diffusion.save_softmax(model.unet, study.quantizers(), latents.steps, missing)
    assert not missing.exists()
