"""Sampling, calibration latents, rounded weights, and the tables made of them."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from helpers.data import ROOT
from helpers.diffusion_models import (
    STEPS,
    calibration,
    forward,
    inputs,
    tiny_model,
    tiny_scheduler,
)

from ptqkit import diffusion
from ptqkit.nn.attention import AttentionHook
from ptqkit.nn.softmax.compare import softmax_hooks

BENCHMARKS = ROOT / "benchmarks"
NAN = float("nan")


def script(name, monkeypatch):
    """Load a benchmark as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


with pytest.MonkeyPatch.context() as patch:
    tables = script("unet_tables", patch)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def experiment(model):
    return tables.Experiment(model, samples=3, steps=2, latents=4)


def draw(model, **options):
    noise, context = inputs(model)
    return diffusion.sample(model.unet, model.scheduler, noise, context, steps=STEPS, **options)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_sampling_by_hand(model, prediction):
    """DDIM as Song et al. write it, eq. 12 with sigma = 0."""
    scheduler = tiny_scheduler(prediction_type=prediction, clip_sample=False)
    noise, context = inputs(model, 2)
    found = diffusion.sample(model.unet, scheduler, noise, context, steps=STEPS)
    alphas = scheduler.alphas_cumprod.double()
    x, times = noise.double(), [999, 666, 332]
    for time, after in zip(times, [*times[1:], -1], strict=True):
        with torch.no_grad():
            out = model.unet(x.float(), time, context).sample.double()
        a, a_after = alphas[time], alphas[after] if after >= 0 else torch.tensor(1.0).double()
        if prediction == "epsilon":
            start, eps = (x - (1 - a).sqrt() * out) / a.sqrt(), out
        else:
            start = a.sqrt() * x - (1 - a).sqrt() * out
            eps = a.sqrt() * out + (1 - a).sqrt() * x
        x = a_after.sqrt() * start + (1 - a_after).sqrt() * eps
    scale = x.abs().max().item()
    torch.testing.assert_close(found.double() / scale, x / scale, rtol=0, atol=2e-3)


def test_sampling_leaves_everything_as_it_was(model):
    state = torch.random.get_rng_state()
    model.unet.train()
    before = copy.deepcopy(model.scheduler.__dict__)
    first = draw(model)
    assert model.unet.training and torch.equal(torch.random.get_rng_state(), state)
    assert str(before) == str(model.scheduler.__dict__)
    model.unet.eval()
    assert torch.equal(first, draw(model)) and first.dtype == torch.float32
    torch.testing.assert_close(first, draw(model, batch_size=3), rtol=1e-4, atol=1e-4)


def test_starting_noise_does_not_depend_on_the_count():
    few, many = (diffusion.starting_noise(n, (1, 3, 5), seed=4) for n in (2, 6))
    assert torch.equal(few, many[:2]) and abs(many.mean()) < 0.5
    assert not torch.equal(few, diffusion.starting_noise(2, (1, 3, 5), seed=5))


def test_guidance_by_hand(model):
    """One step: the guided output is the free one plus the weighted difference."""
    noise, context = inputs(model, 2)
    scheduler = tiny_scheduler(prediction_type="sample", clip_sample=False)
    free = model.labels[-1]
    run = dict(steps=1, no_class=free)
    found = diffusion.sample(model.unet, scheduler, noise, context, guidance=3.0, **run)
    with torch.no_grad():
        given = model.unet(noise, 999, context).sample
        other = model.unet(noise, 999, free.expand_as(context)).sample
    torch.testing.assert_close(found, other + 3 * (given - other), rtol=1e-4, atol=1e-4)
    assert (
        found - diffusion.sample(model.unet, scheduler, noise, context, **run)
    ).abs().max() > 0.01


@pytest.mark.parametrize("count", [3, 7, 12])
def test_calibration_is_uniform_over_the_steps(model, count):
    latents = calibration(model, count)
    times, counts = np.unique(latents.timesteps.numpy(), return_counts=True)
    assert latents.steps == (999, 666, 332) and len(latents) == count
    assert counts.max() - counts.min() <= 1 and sorted(times, reverse=True) == [*latents.steps]


def test_calibration_latents_are_those_of_sampling(model):
    seen = {}

    def keep(time, part, latents):
        for number, latent in zip(part.tolist(), latents, strict=True):
            seen[time, number] = latent.clone()

    noise, context = inputs(model, 4, seed=1)
    diffusion.sample(model.unet, model.scheduler, noise, context, steps=STEPS, on_step=keep)
    latents = calibration(model, 12)
    for i in range(12):
        time, number = int(latents.timesteps[i]), i % 4
        torch.testing.assert_close(latents.latents[i], seen[time, number], rtol=1e-4, atol=1e-4)
        assert torch.equal(latents.context[i], context[number])
    other = calibration(model, 7, seed=8)
    assert not torch.equal(other.latents, calibration(model, 7).latents)


def test_batches_have_one_step_and_miss_nothing(model):
    latents = diffusion.CalibrationLatents(
        torch.randn(7, 1, 16, 16), torch.tensor([5, 1, 5, 5, 9, 1, 5]), torch.randn(7, 4, 8), 3
    )
    batches = [*latents.batches()]
    assert [(step, len(x)) for x, step, _ in batches] == [(9, 1), (5, 3), (5, 1), (1, 2)]
    assert torch.equal(batches[3][0], latents.latents[[1, 5]])
    assert torch.equal(batches[3][2], latents.context[[1, 5]])


X, C, T = torch.zeros(2, 1, 16, 16), torch.zeros(2, 4, 8), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ((X + NAN, T, C), ValueError, "latents hold NaN"),
        ((X, T, C + float("inf")), ValueError, "context hold NaN or Inf"),
        ((X, torch.tensor([1, -2]), C), ValueError, "timesteps must be integers from 0, not -2"),
        ((X, T[:1], C), ValueError, "timesteps must have shape"),
        ((X, T, C[:1]), ValueError, "context must have shape"),
        ((X[:0], T[:0], C[:0]), ValueError, "n > 0"),
        ((X[0], T, C), ValueError, "latents must have shape"),
        ((X.long(), T, C), TypeError, "floating-point"),
        ((X, T, C, 0), ValueError, "batch_size must be a positive integer"),
        ((X, T / 2, C), ValueError, "timesteps must be integers"),
    ],
)
def test_bad_latents_are_refused(values, error, message):
    with pytest.raises(error, match=message):
        diffusion.CalibrationLatents(*values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a positive"),
        ({"steps": -3}, "steps must be a positive"),
        ({"steps": 1001}, "at most 1000"),
        ({"guidance": 2.0}, "needs no_class"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"noise": torch.full((1, 1, 16, 16), NAN)}, "latents hold NaN"),
    ],
)
def test_bad_sampling_is_refused(model, options, message):
    noise, context = inputs(model, 1)
    options = {"noise": noise, "context": context, "steps": 2, **options}
    with pytest.raises(ValueError, match=message):
        diffusion.sample(model.unet, model.scheduler, **options)


def test_bad_draws_are_refused(model):
    with pytest.raises(ValueError, match="9 samples, not 4"):
        calibration(model, 27)
    with pytest.raises(ValueError, match="count must be a positive integer"):
        calibration(model, 0)
    with pytest.raises(FileNotFoundError, match="has no unet"):
        diffusion.load_unet(BENCHMARKS / "results")


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounded_weights(model, symmetric):
    unet = copy.deepcopy(model.unet)
    report = diffusion.quantize_weights(unet, 4, symmetric=symmetric)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    names = [name for name, m in model.unet.named_modules() if isinstance(m, kinds)]
    assert [layer.name for layer in report] == names
    after = dict(unet.named_parameters())
    for name, before in model.unet.named_parameters():
        if name.removesuffix(".weight") not in names:
            assert torch.equal(before, after[name])
            continue
        for row, row_hat in zip(before.flatten(1), after[name].flatten(1), strict=True):
            assert len(row_hat.unique()) <= 16
            span = row.clamp(min=0).max() - row.clamp(max=0).min()
            step = 2 * row.abs().max() / 15 if symmetric else span / 15
            assert (row - row_hat).abs().max() <= step * 0.501
    errors = [layer.error for layer in report]
    assert 0 < min(errors) and max(errors) < 0.02
    assert (forward(model) - forward(model, unet=unet)).abs().max() > 1e-3


def test_weights_that_are_kept_or_bad(model):
    unet = copy.deepcopy(model.unet)
    report = diffusion.quantize_weights(unet, keep=lambda name: not name.startswith("conv_in"))
    assert [layer.name for layer in report] == ["conv_in"]
    unet.conv_out.weight.data[0, 0, 0, 0] = NAN
    before = unet.conv_in.weight.clone()
    with pytest.raises(ValueError, match="conv_out: the weight holds NaN"):
        diffusion.quantize_weights(unet, 2)
    assert torch.equal(unet.conv_in.weight, before)
    with pytest.raises(ValueError, match="bits must be"):
        diffusion.quantize_weights(copy.deepcopy(model.unet), 9)
    with pytest.raises(ValueError, match="no linear layer"):
        diffusion.quantize_weights(torch.nn.ReLU())


def by_hand(reference, quantized):
    """Eq. 1 in double."""
    exact, other = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (reference, quantized))
    return 10 * np.log10(np.mean((exact**2).sum(1) / ((other - exact) ** 2).sum(1)))


def test_final_sqnr_by_hand(experiment, model):
    reference = experiment.run()
    latents = experiment.calibration
    result = diffusion.quantize_softmax(model.unet, latents, correction=None, diagnostics=False)
    quantized = experiment.run()
    result.remove()
    rows = tables.granularity_table(experiment)
    assert [row["correction"] for row in rows] == [*tables.VARIANTS]
    assert rows[0]["sqnr_db"] == pytest.approx(by_hand(reference, quantized), abs=1e-6)
    assert all(np.isfinite([*row.values()][3:]).all() for row in rows)
    assert len({row["sqnr_db"] for row in rows}) > 3


def test_the_reference_is_never_that_of_a_model_with_hooks(model):
    fresh = tables.Experiment(model, samples=2, steps=1, latents=2)
    plain = fresh.run()

    class Off(AttentionHook):
        def softmax(self, p, call):
            return 0 * p

    hooks = {name: Off() for name in diffusion.find_attention(model.unet)}
    assert np.isfinite(fresh.final(hooks=hooks))
    np.testing.assert_array_equal(fresh.reference, plain)
    again = tables.Experiment(model, samples=2, steps=1, latents=2)
    with diffusion.attention_hooks(model.unet, hooks):
        for name in ("reference", "calibration", "held_out"):
            with pytest.raises(ValueError, match="has hooks already"):
                getattr(again, name)


def test_sensitivity_and_total_tables(experiment, model):
    plain = forward(model)
    rows = tables.sensitivity_table(experiment, [8, 4])
    kinds = ["query", "key", "value", "scores", "softmax"]
    assert [(row["bits"], row["quantized"]) for row in rows] == [
        (b, k) for b in (8, 4) for k in kinds
    ]
    fine, coarse = rows[:5], rows[5:]
    assert all(a["sqnr_db"] > b["sqnr_db"] for a, b in zip(fine, coarse, strict=True))
    total = {row["model"]: row["sqnr_db"] for row in tables.total_table(experiment)}
    assert [*total] == [
        "FP32",
        "SM8",
        "SM8 + correction",
        "SM8 + row sum",
        "SM8 before + row sum",
        "W8A16",
        "W8A16-SM8",
        "W8A16-SM8 + correction",
        "W8A16-SM8 + row sum",
        "W8A16-SM8 before + row sum",
    ]
    assert total["FP32"] == float("inf") and total["SM8"] == pytest.approx(fine[4]["sqnr_db"])
    assert total["W8A16-SM8"] < total["W8A16"]
    assert torch.equal(forward(model), plain) and not diffusion.installed_attention(model.unet)


def test_figure_has_one_point_per_layer(experiment, model):
    found = tables.row_sum_figure(experiment, 8)
    assert [p["layer"] for p in found["points"]] == [*diffusion.find_attention(model.unet)]
    point = found["points"][0]
    study = experiment.study()
    alone = {point["layer"]: study.quantizers(None)[point["layer"]]}
    output = diffusion.run_calibration(model.unet, experiment.calibration, softmax_hooks(alone))
    plain = diffusion.run_calibration(model.unet, experiment.calibration)
    assert point["sqnr_db"] == pytest.approx(by_hand(plain, output), abs=0.01)
    sums, ratios = ([p[k] for p in found["points"]] for k in ("mean_row_sum", "sqnr_db"))
    assert found["pearson"] == pytest.approx(np.corrcoef(sums, ratios)[0, 1])
    assert found["spearman"] == pytest.approx(spearman(sums, ratios))


def spearman(a, b):
    from scipy.stats import spearmanr

    return spearmanr(a, b).statistic


def test_correlation_of_ties_and_constants():
    a, b = np.array([3.0, 1, 1, 2, 5]), np.array([1.0, 0, 4, 4, 4])
    assert tables.correlation(tables.ranks(a), tables.ranks(b)) == pytest.approx(spearman(a, b))
    assert np.isnan(tables.correlation(a, np.ones(5))) and np.isnan(
        tables.correlation(a[:1], b[:1])
    )


@pytest.mark.parametrize("field", ["samples", "steps", "latents", "batch_size"])
def test_experiments_are_checked(model, field):
    with pytest.raises(ValueError, match=f"{field} must be a positive integer"):
        tables.Experiment(model, **{field: 0})


def test_the_trained_unet_shows_the_effect():
    """Rows of 1,024 keys lose most of their mass at 8 bits; the correction gives some back."""
    if not (BENCHMARKS / "unet").is_dir():
        pytest.skip("the trained UNet is not in this copy of the sources")
    trained = diffusion.load_unet(BENCHMARKS / "unet")
    latents = diffusion.draw_calibration(
        trained.unet, trained.scheduler, *inputs(trained, 1, seed=3), count=2, steps=2
    )
    longest = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    study = diffusion.SoftmaxCalibration(trained.unet, latents, layers=[longest])
    row = study.compare(study.quantizers("bias", "head"))[longest]
    assert row.longest == 1024 and row.heads == 4
    assert row.zero_fraction > 0.8 and row.mean_row_sum < 0.5
    assert row.sqnr_corrected_db > row.sqnr_db + 6


def test_training_script_and_its_folder(monkeypatch, tmp_path, capsys):
    train = script("train_unet", monkeypatch)
    state = torch.random.get_rng_state()
    assert train.main(["--smoke", "--out", str(tmp_path)]) == 0
    torch.random.set_rng_state(state)
    model = diffusion.load_unet(tmp_path)
    assert model.labels.shape == (11, 8, 64) and not model.unet.training
    noise, context = inputs(model, 2)
    images = diffusion.sample(model.unet, model.scheduler, noise, context, steps=2)
    assert torch.isfinite(images).all() and images.abs().max() <= 1
    losses = json.loads((tmp_path / "training.json").read_text())["losses"]
    assert [row["step"] for row in losses] == [1, 2]
    assert "saved in" in capsys.readouterr().out


def test_tables_script(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    tables_script = script("softmax_unet", monkeypatch)
    monkeypatch.setattr(tables_script, "torch_threads", lambda: None)
    arguments = [
        "--table",
        "3",
        "--figure",
        "1",
        "--picture",
        "--smoke",
        "--out",
        str(tmp_path),
    ]
    assert tables_script.main(arguments) == 0
    names = ["figure1.json", "figure1.png", "figure2.json", "samples.png", "table3.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    rows = json.loads((tmp_path / "table3.json").read_text())["rows"]
    assert rows[0] == {"model": "FP32", "sqnr_db": "inf"} and rows[1]["sqnr_db"] > 0
    assert "W8A16-SM8 + row sum" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tables_script.main(["--smoke"])
    with pytest.raises(SystemExit):
        tables_script.main(["--picture", "--smoke"])
