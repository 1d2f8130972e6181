"""Quantized activations, per-tensor weights and bias correction in the driver."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from helpers import driver_models as M

import ptqkit
from ptqkit import RTN, ActivationQuantization, BiasCorrection
from ptqkit.errors import CalibrationError, PreflightError
from ptqkit.hf import quantize
from ptqkit.hf.models.probe import probe_model
from ptqkit.hf.models.structure import find_structure
from ptqkit.nn import remove_quantizers
from ptqkit.nn.activations import ActivationQuantizer, install_quantizer, installed_quantizer
from ptqkit.nn.linear import LinearView
from ptqkit.nn.statistics import TorchRanges
from ptqkit.recipe import as_recipe
from ptqkit.recipe.recipe import Recipe

STATIC = ActivationQuantization(8, "tensor")
PER_TENSOR = {"bits": 8, "per_tensor": True, "symmetric": True}


def run(model, parts, **options):
    options.setdefault("batch_size", 2)
    return quantize(model, parts, M.tokens(), progress=False, **options)


def by_hand(model, parts, batches):
    """Round to nearest, layer after layer, with a whole forward per group: the plainest form."""
    recipe = as_recipe(parts)
    structure = find_structure(model, recipe)
    modules = {n: t.module for n, t in structure.targets.items()}
    blocks = {b: model.get_submodule(b) for b in structure.blocks}
    for group in probe_model(model, modules, batches[0], blocks).groups:
        ranges = None
        for batch in batches:
            seen = []
            handle = modules[group[0]].register_forward_pre_hook(
                lambda m, a, s=seen: s.append(a[0])
            )
            with torch.no_grad():
                model(**batch)
            handle.remove()
            ranges = ranges or ptqkit.ChannelRanges(seen[0].shape[-1])
            mask = batch.get("attention_mask")
            x = seen[0]
            ranges.update(x, None if mask is None else mask.bool().reshape(x.shape[:-1]))
        for name in group:
            view = LinearView(modules[name])
            weight = view.read().copy()
            options = {"bits": recipe.bits, "symmetric": True, "group_size": recipe.group_size}
            matrix = ptqkit.rtn(weight, per_tensor=recipe.per_tensor, **options)
            view.write(matrix.dequantize())
            if recipe.bias_correction:
                error = matrix.dequantize().astype(np.float64) - weight
                view.subtract_bias(error @ ranges.mean)
            if recipe.activations is not None:
                spec, dtype = recipe.activations, torch.float32
                install_quantizer(view.module, ActivationQuantizer.calibrate(spec, ranges, dtype))


@pytest.mark.parametrize("schedule", ["one-pass", "replay"])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3"])
@pytest.mark.parametrize(
    "activations", [STATIC, ActivationQuantization(6, "token")], ids=["static", "token"]
)
def test_equals_the_plain_form_by_hand(name, schedule, activations):
    parts = [RTN(**PER_TENSOR), activations, BiasCorrection()]
    batches = M.padded_batches(name)
    model, plain = M.build(name), M.build(name)
    result = quantize(model, parts, batches, schedule=schedule, progress=False)
    by_hand(plain, parts, batches)
    for (key, found), expected in zip(
        model.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        # The order of a double sum differs; a bias may round to the other neighbour.
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, msg=key)
    with torch.no_grad():
        found, expected = (m(**batches[0]).logits for m in (result.model, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_schedules_agree_bit_for_bit(name):
    parts = [RTN(bits=4, group_size=8), STATIC, BiasCorrection()]
    models = [M.build(name) for _ in range(2)]
    results = [
        run(m, parts, schedule=s) for m, s in zip(models, ("one-pass", "replay"), strict=True)
    ]
    assert [r.report.schedule for r in results] == ["one-pass", "replay"]
    for key, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[key]), key
    first, second = (r.activations for r in results)
    assert first.keys() == second.keys() == results[0].matrices.keys()
    for key, quantizer in first.items():
        assert torch.equal(quantizer.scale, second[key].scale), key
        assert torch.equal(quantizer.zero_point, second[key].zero_point), key


def test_activations_change_the_logits_and_come_off():
    model = M.build()
    batch = M.padded_batches()[0]
    result = run(model, [RTN(**PER_TENSOR), ActivationQuantization(4, "token")])
    row = result.report.layers[0]
    assert (row.activations, row.per_tensor) == ("4 token", True)
    assert "group tensor, act 4 token" in result.report.table()
    with torch.no_grad():
        quantized = model(**batch).logits
        remove_quantizers(model)
        weights_only = model(**batch).logits
    plain = M.build()
    run(plain, [RTN(**PER_TENSOR)])
    with torch.no_grad():
        assert not torch.equal(quantized, weights_only)
        assert torch.equal(weights_only, plain(**batch).logits)


def test_layers_that_share_an_input_keep_their_own_tensor_scale():
    result = run(M.build(), [RTN(**PER_TENSOR)])
    shared = [r for r in result.report.quantized if r.shares_input_with]
    assert shared
    for row in shared:
        matrix = result.matrices[row.name]
        assert matrix.per_tensor and np.unique(matrix.scales).size == 1
        weight = M.build().get_submodule(row.name).weight.detach().abs().max()
        assert matrix.scales[0, 0] == pytest.approx(float(weight) / 127.5, rel=1e-6)


def test_bias_correction_takes_the_mean_error_away():
    model = M.build("opt")
    # Channels with a mean: what bias correction is about.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm.bias" in name:
                parameter.add_(1.0)
    parts = [RTN(bits=3, group_size=None)]
    results = {}
    for key, more in (("plain", []), ("corrected", [BiasCorrection()])):
        other = copy.deepcopy(model)
        results[key] = (other, run(other, [*parts, *more]))
    result = results["corrected"][1]
    name = "model.decoder.layers.0.self_attn.q_proj"
    row = result.report[name]
    assert 0.05 < row.bias_share < 1

    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        model(input_ids=M.tokens())
        handle.remove()
        x = seen[0]
        exact = model.get_submodule(name)(x)
        errors = {
            key: (other.get_submodule(name)(x) - exact).double().flatten(0, 1)
            for key, (other, _) in results.items()
        }
    # The first layer sees what the float model sees: no mean is left, and the share is exact.
    assert errors["corrected"].mean(0).abs().max() < 1e-5 < errors["plain"].mean(0).abs().max()
    power = {key: float(e.square().mean(0).sum()) for key, e in errors.items()}
    assert power["corrected"] == pytest.approx((1 - row.bias_share) * power["plain"], rel=1e-3)


def test_a_layer_gains_a_bias():
    model = M.build("llama")
    run(model, [RTN(bits=3, group_size=None), BiasCorrection()])
    linear = model.model.layers[0].mlp.down_proj
    assert linear.bias.shape == (32,) and linear.bias.dtype == linear.weight.dtype
    assert linear.bias.abs().max() > 0 and "model.layers.0.mlp.down_proj.bias" in model.state_dict()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([RTN(**PER_TENSOR), STATIC], "static grid of activations needs calibration"),
        ([RTN(**PER_TENSOR), BiasCorrection()], "bias_correction needs calibration"),
        ([ptqkit.AWE(), RTN(**PER_TENSOR)], "equalization needs calibration"),
    ],
)
def test_calibration_is_asked_for(parts, message):
    with pytest.raises(PreflightError, match=message):
        quantize(M.build(), parts, progress=False)


def test_twice_is_refused():
    model = M.build()
    quantize(model, [RTN(**PER_TENSOR), ActivationQuantization()], progress=False)
    with pytest.raises(PreflightError, match="its activations are quantized already"):
        quantize(model, [RTN(**PER_TENSOR)], progress=False)


def test_a_failed_layer_stays_float_altogether(monkeypatch):
    import ptqkit.hf.quantization.solve as solve

    def fail(weight, w_hat, mean):
        if weight.shape == (32, 64):
            raise ValueError("no luck")
        return np.zeros(len(weight))

    monkeypatch.setattr(solve, "bias_correction", fail)
    model = M.build()
    parts = [RTN(**PER_TENSOR), STATIC, BiasCorrection()]
    result = run(model, parts, on_error="leave_float")
    down = model.model.layers[0].mlp.down_proj
    assert down.bias is None and installed_quantizer(down) is None
    assert torch.equal(down.weight, M.build().model.layers[0].mlp.down_proj.weight)
    assert [r.name.rpartition(".")[2] for r in result.report.failed] == ["down_proj"] * 2


def test_ranges_by_torch_equal_the_core():
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)) + 2
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    core, by_torch = ptqkit.ChannelRanges(5), TorchRanges(5, "cpu")
    for ranges in (core, by_torch):
        ranges.update(x, mask)
        ranges.update(-x[:1])
    found = by_torch.finish()
    assert found.tokens == core.tokens == 25
    assert np.array_equal(found.minimum, core.minimum)
    assert np.array_equal(found.maximum, core.maximum)
    # The core sums a few tokens in float32 before it goes on in float64.
    np.testing.assert_allclose(found.mean, core.mean, rtol=1e-6)
    by_torch.update(torch.full((1, 5), torch.nan))
    with pytest.raises(CalibrationError, match="not finite"):
        by_torch.finish()


@pytest.mark.parametrize(
    ("name", "parts", "out_format", "message"),
    [
        (
            "llama",
            [RTN(**PER_TENSOR), ActivationQuantization()],
            "gptq",
            "has no quantized activations",
        ),
        ("llama", [RTN(bits=4, group_size=8), BiasCorrection()], "compressed-tensors", "symmetric"),
        (
            "mistral",
            [RTN(**PER_TENSOR), BiasCorrection()],
            "compressed-tensors",
            "model.layers.0.self_attn.q_proj",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_found_before_the_run(name, parts, out_format, message):
    with pytest.raises(PreflightError, match=message):
        run(M.build(name), parts, checkpoint_format=out_format)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "mistral"])
def test_aweq_saves_and_loads_with_the_same_logits(tmp_path, name):
    model = M.build(name)
    result = run(model, "aweq")
    result.save(tmp_path / "q")
    loaded = ptqkit.load(tmp_path / "q")
    with torch.no_grad():
        expected, found = (m(input_ids=M.tokens()).logits for m in (model, loaded))
    assert torch.equal(found, expected)
    assert loaded.config.ptqkit_equalized["method"] == "awe"


@pytest.mark.parametrize("options", [{"memory_budget": "1KB"}, {"schedule": "one-pass"}])
def test_a_schedule_that_cannot_be_had_is_refused_before_anything_folds(monkeypatch, options):
    model = M.build()
    if "schedule" in options:
        monkeypatch.setattr("ptqkit.hf.quantization.plan._has_greenlet", lambda: False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(Exception, match="memory_budget|is not possible"):
        run(model, "aweq", **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not hasattr(model.config, "ptqkit_equalized")


def test_interruption_after_the_folds_says_so(monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ptqkit.hf.quantization.run.solve_group", interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"but the model is equalized \(8 folds\)"):
        run(M.build(), "aweq")


def test_activations_in_overrides_reach_the_files(tmp_path):
    other = {"*.down_proj": {"activations": ActivationQuantization(8, outlier_threshold=6.0)}}
    result = run(M.build(), "vector-wise", overrides=other)
    result.save(tmp_path / "q")
    assert Recipe.from_dict(json.loads((tmp_path / "q" / "ptqkit_recipe.json").read_text()))


def test_warnings_of_the_equalization_are_in_the_report():
    overrides = {"*.q_proj": {"activations": None}}
    parts = [ptqkit.AWE(), RTN(**PER_TENSOR, overrides=overrides), STATIC]
    warnings = run(M.build(), parts).report.warnings
    assert any(w.startswith("equalization: the search measured") for w in warnings)
    assert not run(M.build(), [ptqkit.AWE(), RTN(**PER_TENSOR), STATIC]).report.warnings


def test_the_bar_closes_when_the_equalization_fails(monkeypatch):
    class Bar:
        closed = 0

        def __call__(self, event):
            raise RuntimeError("the caller's")

        def close(self):
            self.closed += 1

    bar = Bar()
    with pytest.raises(RuntimeError, match="the caller's"):
        ptqkit.equalize(M.build(), M.tokens(), progress=bar)
    assert bar.closed


def test_a_model_that_gives_nan_is_not_equalized():
    model = M.build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = torch.nan
    with pytest.raises(CalibrationError, match="hold NaN or Inf"):
        ptqkit.equalize(model, M.tokens())


def test_compressed_tensors_with_activations_before_and_after_the_run(tmp_path):
    with pytest.raises(PreflightError, match="cannot leave outlier columns of activations"):
        run(M.build(), "llm.int8", checkpoint_format="compressed-tensors")
    model = M.build()
    parts = [RTN(bits=4, group_size=16), ActivationQuantization()]
    run(model, parts, checkpoint_format="compressed-tensors", out_dir=tmp_path / "q")
    loaded = ptqkit.load(tmp_path / "q")
    with torch.no_grad():
        expected, found = (m(input_ids=M.tokens()).logits for m in (model, loaded))
    assert torch.equal(found, expected)
