"""Equalization of models: the float model stays, ranges become equal, and what is refused."""

from __future__ import annotations

import json
import math
import os
import signal

import numpy as np
import pytest
import torch
import transformers
from helpers.data import SHARED
from helpers.driver_models import WordTokenizer, numbers, padded_batches, tokens
from helpers.fold_models import change, logits, make, one_batch

import ptqkit
from ptqkit import Recipe
from ptqkit.errors import CalibrationError, PtqkitError, UnsupportedModuleError
from ptqkit.hf import equalize, find_folds
from ptqkit.hf.data.calibration import prepare_calibration
from ptqkit.hf.equalization import run as equalization_run
from ptqkit.hf.equalization.driver import EqualizationInterrupted, equalize_calibrated
from ptqkit.hf.equalization.fold import apply_fold
from ptqkit.hf.equalization.inputs import measure_inputs
from ptqkit.hf.equalization.run import EqualizationError
from ptqkit.recipe.options import Equalization

W8A8 = Recipe.preset(
    "rtn",
    bits=8,
    per_tensor=True,
    symmetric=True,
    activations={"bits": 8, "granularity": "tensor"},
)
WAYS = {
    "eq. 10": {},
    "search": {"alpha": "search", "recipe": W8A8},
    "smoothquant": {"method": "smoothquant"},
}
FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "phi3",
    "opt",
    "gpt2",
    "bloom",
    "gpt_neox",
    "falcon",
    "mpt",
    "mixtral",
    "opt-post",
    "opt-plain-norm",
    "bloom-post",
    "bert",
    "t5",
]


def run(model, data=None, **options):
    return equalize(model, padded_batches() if data is None else data, progress=False, **options)


def inputs_of(model, names, batches):
    """Every input of the named layers without padding, float64 (tokens, in), by plain hooks."""
    seen = {name: [] for name in names}
    mask = []
    handles = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda m, a, n=n: seen[n].append(a[0].reshape(-1, a[0].shape[-1])[mask[-1]])
        )
        for n in names
    ]
    for batch in batches:
        given = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        mask.append(given.reshape(-1).bool())
        with torch.no_grad():
            model(**batch)
    for handle in handles:
        handle.remove()
    return {n: torch.cat(v).double().numpy() for n, v in seen.items()}


def weight_of(model, name):
    module = model.get_submodule(name)
    weight = module.weight.detach().double().numpy()
    return weight.T if type(module).__name__ == "Conv1D" else weight


def largest(values, fold):
    """Largest value of the inputs that share a channel of the producer, back at the inputs."""
    most = np.zeros(fold.channels)
    np.maximum.at(most, fold.channel_of, values)
    return most[fold.channel_of]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_float_model_stays(name, way):
    model, batch, data = make(name), one_batch(name), padded_batches(name)
    before = logits(model, batch)
    if name in ("opt-plain-norm", "opt-post", "bert", "bloom-post") and way == "smoothquant":
        report = run(model, data, **WAYS[way])
        assert not report.groups and "unchanged" in report.warnings[0]
        assert not hasattr(model.config, "ptqkit_equalized")
        return
    report = run(model, data, **WAYS[way])
    difference = change(logits(model, batch), before)
    assert 0 < difference <= 1e-4 and report.logits_difference <= 1e-4
    assert len(report.groups) >= 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["stories260k", "babyllama105", "nanosort_gpt2"])
def test_real_models_stay(name, way):
    if not (SHARED / name).exists():
        pytest.skip("../shared/data is not here")
    model = transformers.AutoModelForCausalLM.from_pretrained(SHARED / name, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    high, length = (3, 11) if "sort" in name else (105, 64)
    ids = torch.randint(0, high, (8, length), generator=generator)
    before = logits(model, {"input_ids": ids})
    report = run(model, ids, **WAYS[way])
    assert 0 < change(logits(model, {"input_ids": ids}), before) <= 1e-4
    assert all(g.tokens == ids.numel() for g in report.groups)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "bloom", "phi3", "qwen3", "gpt_neox"])
def test_activations_and_weights_share_the_range(name):
    """Eq. 10 makes both ranges sqrt(r_x r_w), of the weights as they are when all is folded."""
    model, batches = make(name), padded_batches()
    folds = find_folds(model, batches[0]).folds
    run(model, batches)
    inputs = inputs_of(model, [f.consumers[0] for f in folds], batches)
    for fold in folds:
        x = inputs[fold.consumers[0]]
        w = np.concatenate([weight_of(model, c) for c in fold.consumers])
        rx, rw = largest(np.ptp(x, axis=0), fold), largest(np.ptp(w, axis=0), fold)
        live = rx > 0
        assert live.mean() > 0.5
        np.testing.assert_allclose(rx[live], rw[live], rtol=1e-4)


def test_smoothquant_balances_absolute_maxima_of_norms_only():
    model, batches = make("opt"), padded_batches()
    folds = [f for f in find_folds(model, batches[0]).folds if f.kind == "norm"]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = run(model, batches, method="smoothquant", alpha=0.5)
    assert [g.producer for g in report.groups] == [f.producer for f in folds]
    inputs = inputs_of(model, [f.consumers[0] for f in folds], batches)
    for fold in folds:
        x = np.abs(inputs[fold.consumers[0]]).max(axis=0)
        w = np.max([np.abs(weight_of(model, c)).max(axis=0) for c in fold.consumers], axis=0)
        np.testing.assert_allclose(x, w, rtol=1e-4)
    fc2 = "model.decoder.layers.0.fc2"
    assert torch.equal(model.get_submodule(fc2).weight, before[f"{fc2}.weight"])
    assert "SmoothQuant" in report.left_alone[fc2]


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_alpha_moves_the_range(alpha):
    """alpha = 0 makes the columns of W equal in range, 1 the channels of X."""
    model, batches = make("llama"), padded_batches()
    fold = find_folds(model, batches[0]).folds[0]
    name = fold.consumers[0]
    x = np.ptp(inputs_of(model, [name], batches)[name], axis=0)
    run(model, batches, alpha=alpha)
    after = np.ptp(inputs_of(model, [name], batches)[name], axis=0)
    w = np.ptp(np.concatenate([weight_of(model, c) for c in fold.consumers]), axis=0)
    scales = x / after
    np.testing.assert_allclose(scales, x**alpha / (w / scales) ** (1 - alpha), rtol=1e-4)


def test_padding_is_left_out():
    """Tokens under the mask change nothing, in the ranges and in the sample."""
    results = []
    for fill in (5, 40):
        model, batches = make("llama"), padded_batches()
        for batch in batches:
            batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, fill)
        run(model, batches, alpha="search", recipe=W8A8)
        results.append(model.state_dict())
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())


def test_sample_is_spread_evenly_over_the_tokens():
    model, batches = make("llama"), padded_batches()
    name = "model.layers.1.mlp.down_proj"
    module = {name: model.get_submodule(name)}
    calibration = prepare_calibration(batches)
    everything = inputs_of(model, [name], batches)[name]
    picks = np.linspace(0, len(everything) - 1, 20).round().astype(int)
    found = measure_inputs(model, module, calibration, 20)[name]
    assert found.sample.dtype == torch.float32
    np.testing.assert_array_equal(found.sample.numpy(), everything[picks])
    np.testing.assert_array_equal(found.ranges.minimum, everything.min(axis=0))
    np.testing.assert_allclose(found.ranges.mean, everything.mean(axis=0), atol=1e-7)
    half = measure_inputs(model.bfloat16(), module, calibration, 1000)[name].sample
    assert half.dtype == torch.bfloat16 and len(half) == calibration.tokens
    assert not measure_inputs(model, module, calibration, 0)[name].parts


def test_search_is_never_worse_and_measures_what_the_recipe_says(monkeypatch):
    calls = []
    original = ptqkit.search_equalization

    def search(weights, x, ranges, **options):
        calls.append((weights, x, options))
        return original(weights, x, ranges, **options)

    monkeypatch.setattr(equalization_run, "search_equalization", search)
    recipe = Recipe.preset(
        "rtn",
        bits=3,
        group_size=16,
        activations={"bits": 6, "granularity": "token"},
        overrides={"*.k_proj": "skip", "*.0.mlp.down_proj": {"bits": 5}, "*.1.mlp.*": "skip"},
    )
    model = make("llama")
    report = run(model, alpha="search", recipe=recipe, tokens=50)
    for group in report.groups:
        assert group.error <= min(group.error_none, group.error_closed_form)
    assert any(group.error < 0.95 * group.error_closed_form for group in report.groups)
    assert report.search_tokens == 50 and all(len(x) == 50 for _, x, _ in calls)
    options = {c[2]["name"].partition("layers.")[2]: c[2] for c in calls}
    assert {o["bits"] for n, o in options.items() if n != "0.mlp.down_proj"} == {3}
    assert options["0.mlp.down_proj"]["bits"] == 5
    assert all(o["group_size"] == 16 and not o["symmetric"] for o in options.values())
    assert all(
        (o["activation_bits"], o["activation_granularity"], o["activation_symmetric"])
        == (6, "token", True)
        for o in options.values()
    )
    assert not any(o["per_tensor"] for o in options.values())
    by_name = {c[2]["name"]: c[0] for c in calls}
    assert len(by_name["model.layers.0.self_attn.q_proj"]) == 2, "k_proj is skipped"
    skipped = [k for k, v in report.left_alone.items() if "skips every layer" in v]
    assert len(skipped) == 2 and all("layers.1.mlp" in k for k in skipped)


def test_search_measures_static_grids(monkeypatch):
    seen = []
    original = ptqkit.search_equalization
    monkeypatch.setattr(
        equalization_run, "search_equalization", lambda *a, **k: seen.append(k) or original(*a, **k)
    )
    run(make("llama"), alpha="search", recipe=W8A8)
    run(make("llama"), alpha="search", recipe=Recipe.preset("rtn", group_size=16))
    for options in seen[:8]:
        assert (options["bits"], options["group_size"], options["per_tensor"]) == (8, None, True)
        assert options["symmetric"] and not options["activation_symmetric"]
        assert (options["activation_bits"], options["activation_granularity"]) == (8, "tensor")
        heads = options["channel_of"]
        assert (heads is None) == (not options["name"].endswith("o_proj"))
    assert len(seen) == 16 and all("activation_bits" not in o for o in seen[8:])


def test_skipped_layers_still_fold():
    """A layer that the recipe leaves float reads the same tensor, so its columns change too."""
    model, batch = make("llama"), one_batch()
    before = logits(model, batch)
    k_proj = model.model.layers[0].self_attn.k_proj.weight.detach().clone()
    run(model, recipe=Recipe.preset("rtn", overrides={"*.k_proj": "skip"}))
    assert not torch.equal(k_proj, model.model.layers[0].self_attn.k_proj.weight)
    assert change(logits(model, batch), before) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model, batch = make("llama", dtype), one_batch()
    before = logits(model, batch)
    report = run(model, alpha="search", recipe=W8A8)
    assert len(report.groups) == 8
    assert change(logits(model, batch), before) < (0.02 if dtype == torch.bfloat16 else 0.004)
    assert str(dtype) in report.warnings[0]
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_equalizing_twice_is_refused_even_after_saving(tmp_path):
    model = make("llama")
    run(model)
    assert model.config.ptqkit_equalized == {"method": "awe", "alpha": 0.5, "folds": 8}
    before = logits(model, one_batch())
    with pytest.raises(UnsupportedModuleError, match="equalized already"):
        run(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, one_batch()), before)
    with pytest.raises(UnsupportedModuleError, match="equalized already"):
        run(loaded, method="smoothquant")
    assert torch.equal(logits(loaded, one_batch()), before)


def test_bad_arguments():
    model = make("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CalibrationError, match="at least 2"):
        run(model, tokens(1, 1))
    with pytest.raises(CalibrationError, match="at least 2"):
        run(model, tokens(4, 1))
    masked = {"input_ids": tokens(1, 4), "attention_mask": torch.tensor([[0, 0, 0, 1]])}
    with pytest.raises(CalibrationError, match="at least 2 calibration tokens, there is 1"):
        run(model, [masked])
    with pytest.raises(CalibrationError, match="missing"):
        equalize(model, None)
    with pytest.raises(ValueError, match="needs recipe"):
        run(model, alpha="search")
    with pytest.raises(ValueError, match="method"):
        run(model, method="awq")
    with pytest.raises(ValueError, match="alpha"):
        run(model, alpha=1.5)
    with pytest.raises(ValueError, match="smoothquant"):
        run(model, method="smoothquant", alpha="search", recipe=W8A8)
    with pytest.raises(ValueError, match=r"down_proj.*group_size"):
        run(model, alpha="search", recipe=Recipe.preset("rtn", group_size=24))
    with pytest.raises(TypeError, match="nn.Module"):
        equalize_calibrated("model", prepare_calibration(tokens()), Equalization())
    with pytest.raises(UnsupportedModuleError, match="no nn.ModuleList"):
        run(torch.nn.Linear(3, 3))
    model.config.quantization_config = {}
    with pytest.raises(UnsupportedModuleError, match="quantized already"):
        run(model)
    del model.config.quantization_config
    with torch.device("meta"):
        empty = make("llama")
    with pytest.raises(UnsupportedModuleError, match="meta"):
        run(empty)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not hasattr(model.config, "ptqkit_equalized")


def test_inputs_that_are_not_finite_name_the_layer():
    model = make("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = torch.nan
    ids = tokens()
    ids[ids == 60] = 5
    ids[-1, -1] = 60  # not among the tokens that the folds are found with
    with pytest.raises(CalibrationError, match=r"layers\.0\.self_attn\.q_proj.*NaN"):
        run(model, ids)


def test_dead_channels_keep_scale_one():
    model, batch = make("llama"), one_batch()
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.input_layernorm.weight[3] = 0
        for module in (layer.mlp.gate_proj, layer.mlp.up_proj):
            module.weight[:, 7] = 0
        layer.mlp.up_proj.weight[11] = 0
    before = logits(model, batch)
    report = run(model, alpha="search", recipe=W8A8)
    assert report["model.layers.0.self_attn.q_proj"].dead_channels == 1
    assert report["model.layers.0.mlp.up_proj"].dead_channels == 1
    assert report["model.layers.0.mlp.down_proj"].dead_channels == 1
    assert layer.input_layernorm.weight[3] == 0
    assert change(logits(model, batch), before) <= 1e-4
    for group in report.groups:
        assert math.isfinite(group.scale_maximum) and group.scale_minimum > 0


def test_model_and_generators_are_left_as_found():
    model = make("llama").train()
    state = torch.get_rng_state()
    events = []
    equalize(model, tokens(), alpha="search", recipe=W8A8, progress=events.append)
    assert torch.equal(state, torch.get_rng_state())
    assert all(m.training for m in model.modules()) and model.config.use_cache
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert [e.index for e in events] == list(range(1, 9)) and events[0].total == 8
    assert {e.name for e in events} >= {"model.layers.1.mlp.down_proj"}


def test_text_and_threads():
    weights = []
    for threads in (1, 2):
        model = make("llama")
        report = run(
            model,
            [numbers(400)],
            tokenizer=WordTokenizer(),
            samples=4,
            sequence_length=16,
            threads=threads,
            alpha="search",
            recipe=W8A8,
        )
        assert report.calibration_tokens == 64
        weights.append(model.state_dict())
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


def test_report():
    report = run(make("gpt2"), alpha="search", recipe=W8A8)
    assert ptqkit.hf.EqualizationReport is type(report) and ptqkit.equalize is equalize
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert len(plain["groups"]) == 6 and plain["method"] == "awe" and plain["alpha"] == "search"
    assert list(plain["seconds"]) == ["folds", "ranges", "scales", "total"]
    table = report.table()
    for text in ("transformer.h.1.ln_2", "NewGELUActivation", "eq. 10", "173", "search"):
        assert text in table
    for group in report.groups:
        assert f"{group.error_closed_form / group.error_none:.3f}" in str(report)
    with pytest.raises(KeyError):
        report["transformer.h.0.mlp.c_proj"]
    unsearched = run(make("gpt2"))
    assert unsearched.to_dict()["groups"][0]["error"] is None and unsearched.search_tokens == 0


def test_ctrl_c_before_anything_is_folded():
    model = make("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def stop(event):
        if event.index == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(EqualizationInterrupted, match="nothing had been folded") as error:
        equalize(model, tokens(), progress=stop)
    assert error.value.folded == []
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not hasattr(model.config, "ptqkit_equalized")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_ctrl_c_between_folds(monkeypatch):
    model, batch = make("llama"), one_batch()
    before, count = logits(model, batch), []

    def fold(*args):
        apply_fold(*args)
        count.append(1)
        if len(count) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(equalization_run, "apply_fold", fold)
    with pytest.raises(EqualizationInterrupted, match="3 of 8 folds are applied") as error:
        run(model)
    assert len(error.value.folded) == 3 == len(count)
    assert model.config.ptqkit_equalized["folds"] == 3
    assert change(logits(model, batch), before) <= 1e-4


def test_an_error_says_what_was_done(monkeypatch):
    model, batch = make("llama"), one_batch()
    before, count = logits(model, batch), []

    def fold(*args):
        if len(count) == 2:
            raise ValueError("out of range")
        count.append(apply_fold(*args))

    monkeypatch.setattr(equalization_run, "apply_fold", fold)
    with pytest.raises(ValueError, match="out of range") as error:
        run(model)
    if hasattr(error.value, "__notes__"):
        assert "2 of 8 folds are applied" in error.value.__notes__[0]
    assert change(logits(model, batch), before) <= 1e-4


def test_a_changed_model_is_an_error(monkeypatch):
    def fold(model, fold, scales):
        apply_fold(model, fold, scales)
        with torch.no_grad():
            model.get_submodule(fold.consumers[0]).weight.mul_(1.01)

    monkeypatch.setattr(equalization_run, "apply_fold", fold)
    with pytest.raises(EqualizationError, match="load the model again") as error:
        run(make("llama"))
    assert isinstance(error.value, (PtqkitError, ArithmeticError))


def test_driver_equalizes_first():
    results = []
    for equalization in (None, {"method": "awe", "alpha": "search"}):
        model = make("llama")
        result = ptqkit.quantize(
            model,
            {**W8A8.to_dict(), "equalization": equalization},
            padded_batches(),
            progress=False,
        )
        results.append(result)
    assert results[0].equalization is None
    assert len(results[1].equalization.groups) == 8
    assert results[1].model.config.ptqkit_equalized["alpha"] == "search"
