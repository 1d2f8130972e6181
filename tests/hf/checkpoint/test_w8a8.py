"""Quantized activations in checkpoints: what is loaded computes what was simulated."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from helpers.checkpoint_models import (
    assert_same_matrices,
    build,
    fake_quantize,
    logits,
    quantize_inputs,
    targets,
)
from helpers.data import SHARED
from safetensors.torch import load_file, save_file

from ptqkit.arrays.matrix import WeightGrid
from ptqkit.hf.checkpoint.formats import format_problems
from ptqkit.hf.checkpoint.inputs import measure_flat_inputs
from ptqkit.hf.checkpoint.reader import load, read_matrices
from ptqkit.hf.checkpoint.save import save_checkpoint
from ptqkit.hf.checkpoint.spec import LayerSpec
from ptqkit.nn.activations import ActivationQuantizer, installed_quantizer, remove_quantizers
from ptqkit.nn.qlinear import QLinear
from ptqkit.recipe.options import ActivationQuantization

WEIGHTS = {
    "w8 channel": {"bits": 8, "group_size": None, "symmetric": True},
    "w8 channel asym": {"bits": 8, "group_size": None},
    "w8 tensor": {"bits": 8, "group_size": None, "symmetric": True, "per_tensor": True},
    "w8 tensor asym": {"bits": 8, "group_size": None, "per_tensor": True},
    "w4 group": {"bits": 4, "group_size": 32, "symmetric": True},
    "w3 group asym": {"bits": 3, "group_size": 32},
}
INPUTS = {
    "token": ActivationQuantization(8),
    "token asym": ActivationQuantization(8, symmetric=False),
    "tensor": ActivationQuantization(8, "tensor"),
    "tensor sym": ActivationQuantization(8, "tensor", True),
    "tensor 6 bit": ActivationQuantization(6, "tensor"),
}
W8 = WEIGHTS["w8 channel"]
NAME = "model.layers.1.mlp.up_proj"
Auto = transformers.AutoModelForCausalLM


def _simulate(kind, weights, inputs, dtype=torch.float32, overrides=None):
    """Model, matrices and quantizers; the inputs matter for the logits."""
    model = build(kind, dtype)
    layers = fake_quantize(model, overrides=overrides, **weights)
    before = logits(model)
    quantizers = quantize_inputs(model, layers, inputs)
    assert quantizers and not torch.equal(logits(model), before)
    return model, layers, quantizers


def _settings(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def _assert_loads(folder, model, layers, stock=True):
    loaders = [load] + ([lambda path: Auto.from_pretrained(path, dtype="auto")] if stock else [])
    for loader in loaders:
        loaded = loader(folder)
        assert loaded.dtype == model.dtype
        assert torch.equal(logits(loaded), logits(model))
        assert torch.equal(logits(loaded), logits(model)), "second forward"
    assert_same_matrices(read_matrices(folder), layers)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_stock_transformers_computes_the_simulation(weights, inputs, tmp_path):
    model, layers, quantizers = _simulate("llama", WEIGHTS[weights], INPUTS[inputs])
    out = tmp_path / "out"
    info = save_checkpoint(model, layers, None, out, activations=quantizers)
    assert info.format == "compressed-tensors"
    _, report = Auto.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    _assert_loads(out, model, layers)
    [group] = _settings(out)["config_groups"].values()
    assert group["input_activations"]["num_bits"] == INPUTS[inputs].bits
    assert group["input_activations"]["dynamic"] == INPUTS[inputs].dynamic
    assert group["format"] == _settings(out)["format"]
    tensors = load_file(out / "model.safetensors")
    packed = weights == "w4 group"
    assert _settings(out)["format"] == ("pack-quantized" if packed else "int-quantized")
    if not packed:
        assert tensors[f"{NAME}.weight"].dtype == torch.int8
    shape = (1,) if WEIGHTS[weights].get("per_tensor") else layers[NAME].scales.shape
    assert tensors[f"{NAME}.weight_scale"].shape == shape
    static = [n for n in tensors if n.endswith((".input_scale", ".input_zero_point"))]
    expected = 0 if INPUTS[inputs].dynamic else 1 if INPUTS[inputs].symmetric else 2
    assert len(static) == expected * len(layers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inputs", ["token", "tensor", "tensor sym"])
@pytest.mark.parametrize("weights", ["w8 channel", "w8 tensor asym", "w4 group"])
def test_half_precision_too(weights, inputs, dtype, tmp_path):
    model, layers, quantizers = _simulate("llama", WEIGHTS[weights], INPUTS[inputs], dtype)
    info = save_checkpoint(model, layers, None, tmp_path / "out", activations=quantizers)
    assert info.format == "compressed-tensors"
    _assert_loads(tmp_path / "out", model, layers)


@pytest.mark.parametrize("kind", ["qwen2", "opt", "bloom", "gpt_neox"])
@pytest.mark.parametrize("weights", ["w8 channel asym", "w8 tensor"])
def test_other_families_with_static_inputs(kind, weights, tmp_path):
    model, layers, quantizers = _simulate(
        kind, WEIGHTS[weights], ActivationQuantization(8, "tensor")
    )
    info = save_checkpoint(model, layers, None, tmp_path / "out", activations=quantizers)
    assert info.format == "compressed-tensors"
    _assert_loads(tmp_path / "out", model, layers)


def test_inputs_without_a_batch_axis_are_not_left_to_compressed_tensors(tmp_path):
    model, layers, quantizers = _simulate("opt", W8, ActivationQuantization(8))
    with pytest.raises(ValueError) as caught:
        save_checkpoint(
            model,
            layers,
            None,
            tmp_path / "no",
            checkpoint_format="compressed-tensors",
            activations=quantizers,
        )
    text = str(caught.value)
    assert "1 problem(s)" in text and "use static activations" in text
    assert "layers.0.fc1: its inputs have no batch axis" in text and "(and 3 more layers)" in text
    assert not (tmp_path / "no").exists()
    info = save_checkpoint(model, layers, None, tmp_path / "out", activations=quantizers)
    assert info.format == "ptqkit" and "no batch axis" in info.reason
    _assert_loads(tmp_path / "out", model, layers)
    # Static there and dynamic elsewhere fits again.
    mixed = {
        "": ActivationQuantization(8),
        "fc1": ActivationQuantization(8, "tensor"),
        "fc2": ActivationQuantization(8, "tensor"),
    }
    model, layers, quantizers = _simulate("opt", W8, mixed)
    info = save_checkpoint(model, layers, None, tmp_path / "mixed", activations=quantizers)
    assert info.format == "compressed-tensors"
    assert len(_settings(tmp_path / "mixed")["config_groups"]) == 2
    _assert_loads(tmp_path / "mixed", model, layers)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_the_model_is_run_once_to_see_its_inputs(kind, tmp_path):
    model = build(kind).train()
    layers = fake_quantize(model, **W8)
    quantizers = {name: ActivationQuantizer(ActivationQuantization(8)) for name in layers}
    state = torch.get_rng_state()
    info = save_checkpoint(model, layers, None, tmp_path / "out", activations=quantizers)
    assert info.format == ("ptqkit" if kind == "opt" else "compressed-tensors")
    assert torch.equal(torch.get_rng_state(), state) and model.training


def test_an_input_shape_that_cannot_be_found_is_refused(tmp_path, monkeypatch):
    model = build("llama")
    layers = fake_quantize(model, **W8)
    quantizers = {name: ActivationQuantizer(ActivationQuantization(8)) for name in layers}

    def fails(*args, **kwargs):
        raise ValueError("needs pixels")

    monkeypatch.setattr(model, "forward", fails)
    with pytest.raises(ValueError, match=r"q_proj: the shape of its inputs could not be.*13 more"):
        save_checkpoint(
            model,
            layers,
            None,
            tmp_path / "out",
            checkpoint_format="compressed-tensors",
            activations=quantizers,
        )
    info = save_checkpoint(model, layers, None, tmp_path / "out", activations=quantizers)
    assert info.format == "ptqkit" and "could not be measured" in info.reason


def test_layers_with_and_without_quantized_inputs(tmp_path):
    overrides = {"up_proj": WEIGHTS["w4 group"], "q_proj": None, "down_proj": WEIGHTS["w4 group"]}
    inputs = {
        "": ActivationQuantization(8),
        "up_proj": None,
        "o_proj": ActivationQuantization(8, "tensor"),
    }
    model, layers, quantizers = _simulate("llama", W8, inputs, overrides=overrides)
    assert NAME not in quantizers and len(quantizers) == len(layers) - 2
    info = save_checkpoint(model, layers, None, tmp_path / "out", activations=quantizers)
    assert info.format == "compressed-tensors"
    settings = _settings(tmp_path / "out")
    assert settings["format"] == "mixed-precision"
    groups = settings["config_groups"].values()
    assert len(groups) == 4 and {t for g in groups for t in g["targets"]} == set(layers)
    assert {"lm_head", "model.layers.0.self_attn.q_proj"} <= set(settings["ignore"])
    _assert_loads(tmp_path / "out", model, layers)


@pytest.mark.parametrize(
    ("kind", "weights", "inputs", "dtype", "reason"),
    [
        (
            "llama",
            W8,
            ActivationQuantization(8, outlier_threshold=1.5),
            torch.float32,
            "outlier columns",
        ),
        (
            "llama",
            W8,
            ActivationQuantization(16),
            torch.bfloat16,
            "no room for activations of 16 bits",
        ),
        (
            "llama",
            W8,
            ActivationQuantization(16, "tensor"),
            torch.float16,
            "no room for activations of 16 bits",
        ),
        ("gpt2", W8, ActivationQuantization(8, "tensor"), torch.float32, "not Conv1D"),
        (
            "gpt2",
            WEIGHTS["w8 tensor asym"],
            ActivationQuantization(8),
            torch.bfloat16,
            "not Conv1D",
        ),
        (
            "llama",
            {"bits": "ternary", "group_size": 8},
            ActivationQuantization(4),
            torch.float32,
            "no ternary",
        ),
        (
            "llama",
            {"bits": 2, "group_size": 16, "act_order": True},
            ActivationQuantization(8, "tensor"),
            torch.float32,
            "g_idx",
        ),
    ],
)
def test_own_format_carries_the_rest(kind, weights, inputs, dtype, reason, tmp_path):
    model, layers, quantizers = _simulate(kind, weights, inputs, dtype)
    out = tmp_path / "out"
    info = save_checkpoint(model, layers, None, out, activations=quantizers)
    assert info.format == "ptqkit" and reason in info.reason
    assert _settings(out)["format_version"] == 2
    _, report = Auto.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    _assert_loads(out, model, layers)
    first = load(out, cache=True)
    for name, module in first.named_modules():
        if isinstance(module, QLinear):
            assert module.input_quantizer().spec == quantizers[name].spec
            assert "ActivationQuantization" in repr(module)
    assert torch.equal(logits(first), logits(model))
    first.save_pretrained(tmp_path / "again")
    _assert_loads(tmp_path / "again", model, layers)
    plain = load(out).dequantize()
    assert torch.equal(logits(plain), logits(model))
    assert remove_quantizers(plain) == len(layers)


def test_sixteen_bits_fit_stock_transformers_in_float32(tmp_path):
    model, layers, quantizers = _simulate("llama", W8, ActivationQuantization(16, "tensor"))
    info = save_checkpoint(model, layers, None, tmp_path / "out", activations=quantizers)
    assert info.format == "compressed-tensors"
    _assert_loads(tmp_path / "out", model, layers)


def test_own_format_of_every_spec_and_casts(tmp_path):
    for number, inputs in enumerate(INPUTS.values()):
        model, layers, quantizers = _simulate("llama", W8, inputs)
        out = tmp_path / str(number)
        save_checkpoint(
            model, layers, None, out, checkpoint_format="ptqkit", activations=quantizers
        )
        _assert_loads(out, model, layers)
        moved, asked = load(out).to(torch.bfloat16), load(out, dtype=torch.bfloat16)
        # The simulated model cast the same way: grids round to the type of the inputs.
        for found in (moved, asked):
            module = found.get_submodule(NAME)
            x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
            twin = model.get_submodule(NAME)
            expected = torch.nn.functional.linear(
                installed_quantizer(twin)(x), twin.weight.bfloat16()
            )
            assert torch.equal(module(x), expected)
            assert module.input_scale is None or module.input_scale.dtype == torch.float32


def test_files_without_quantized_inputs_are_as_before(tmp_path):
    model = build("llama")
    layers = fake_quantize(model, bits=3, group_size=32)
    save_checkpoint(model, layers, None, tmp_path / "out")
    settings = _settings(tmp_path / "out")
    assert settings["format_version"] == 1
    assert settings["defaults"] == {
        "bits": 3,
        "group_size": 32,
        "symmetric": False,
        "permuted": False,
        "kind": "linear",
        "scale_dtype": "float32",
    }
    assert set(settings) == {"quant_method", "format_version", "defaults", "layers"}
    assert all(set(options) == {"shape"} for options in settings["layers"].values())


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_gptq_files_have_no_quantized_inputs(format, tmp_path):
    weights = {"bits": 4, "group_size": 32, "scale_dtype": "float16", "min_zero_point": 1}
    model, layers, quantizers = _simulate("llama", weights, ActivationQuantization(8))
    with pytest.raises(ValueError, match=r"has no quantized activations.*\(and 13 more layers\)"):
        save_checkpoint(
            model, layers, None, tmp_path / "out", checkpoint_format=format, activations=quantizers
        )
    assert not (tmp_path / "out").exists()


def test_specs_alone_tell_the_problems():
    spec = LayerSpec("a.0.b", 64, 64, WeightGrid(8, None, False))
    assert "asymmetric" in format_problems([spec], "compressed-tensors")[0]
    for activations in (ActivationQuantization(8), ActivationQuantization(8, "tensor")):
        spec = LayerSpec("a.0.b", 64, 64, WeightGrid(8, None, False), activations=activations)
        assert format_problems([spec], "compressed-tensors") == []
        flat = LayerSpec(
            "a.0.b", 64, 64, WeightGrid(8, None, True), activations=activations, flat_input=True
        )
        assert bool(format_problems([flat], "compressed-tensors")) == activations.dynamic
        assert format_problems([flat], "ptqkit") == []


def test_a_file_that_would_be_another_model_is_refused(tmp_path):
    model, layers, quantizers = _simulate("llama", W8, ActivationQuantization(8, "tensor"))

    def refused(match, activations, error=ValueError):
        with pytest.raises(error, match=match):
            save_checkpoint(model, layers, None, tmp_path / "out", activations=activations)
        assert not list(tmp_path.iterdir())

    refused("otherwise than `activations` says: model.layers.0.*up_proj", None)
    less = {k: v for k, v in quantizers.items() if k != NAME}
    refused(f"otherwise than `activations` says: {NAME};", less)
    q = quantizers[NAME]
    for other in (
        ActivationQuantizer(ActivationQuantization(8)),
        ActivationQuantizer(q.spec, 2 * q.scale, q.zero_point.item()),
        ActivationQuantizer(q.spec, q.scale, q.zero_point.item() + 1),
    ):
        refused(f"says: {NAME};", {**quantizers, NAME: other})
    refused(
        "without quantized weights: lm_head, nowhere;",
        {
            **quantizers,
            "lm_head": q,
            "nowhere": q,
        },
    )
    refused(
        "must be an ActivationQuantizer, not ActivationQuantization",
        {
            **quantizers,
            NAME: ActivationQuantization(8),
        },
        TypeError,
    )


def test_a_grid_that_the_dtype_cannot_hold_goes_to_the_own_format(tmp_path):
    model, layers, quantizers = _simulate(
        "llama", W8, ActivationQuantization(8, "tensor"), torch.bfloat16
    )
    q = quantizers[NAME]
    q.scale = torch.tensor([0.1])
    info = save_checkpoint(model, layers, None, tmp_path / "out", activations=quantizers)
    assert info.format == "ptqkit" and "calibrate with dtype=torch.bfloat16" in info.reason
    _assert_loads(tmp_path / "out", model, layers)


@pytest.mark.parametrize("format", ["compressed-tensors", "ptqkit"])
def test_damaged_input_grids(format, tmp_path):
    model, layers, quantizers = _simulate("llama", W8, ActivationQuantization(8, "tensor"))
    out = tmp_path / "out"
    save_checkpoint(model, layers, None, out, checkpoint_format=format, activations=quantizers)
    file = out / "model.safetensors"
    # Copies: what load_file returns lies in the very file that is written over.
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    for bad in (float("nan"), 0.0, -1.0, float("inf")):
        save_file({**tensors, f"{NAME}.input_scale": torch.tensor([bad])}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=f"{NAME}.input_scale must be positive"):
            load(out)
        if format == "ptqkit":
            with pytest.raises(ValueError, match=f"{NAME}: the activation scale.*damaged"):
                Auto.from_pretrained(out)
    for part in ("input_scale", "input_zero_point"):
        less = {k: v for k, v in tensors.items() if k != f"{NAME}.{part}"}
        save_file(less, file, {"format": "pt"})
        with pytest.raises(ValueError, match=f"lacks {NAME}.{part}"):
            load(out)


def test_damaged_descriptions(tmp_path):
    model, layers, quantizers = _simulate("llama", W8, ActivationQuantization(8, "tensor"))
    out = tmp_path / "out"
    save_checkpoint(model, layers, None, out, checkpoint_format="ptqkit", activations=quantizers)
    path = out / "config.json"
    good = path.read_text()
    for change, match in (
        ({"activations": {"bits": 8, "per": "token"}}, f"{NAME}: activations has no option 'per'"),
        ({"activations": {"bits": 40}}, f"{NAME}: activation bits must be"),
        (
            {"activations": "token"},
            f"{NAME}: activations must be ActivationQuantization or a mapping",
        ),
    ):
        config = json.loads(good)
        config["quantization_config"]["layers"][NAME].update(change)
        path.write_text(json.dumps(config))
        for function in (load, read_matrices, Auto.from_pretrained):
            with pytest.raises(ValueError, match=match):
                function(out)


def test_unreadable_int_quantized_files(tmp_path):
    model, layers, quantizers = _simulate(
        "llama", WEIGHTS["w3 group asym"], ActivationQuantization(8)
    )
    out = tmp_path / "out"
    save_checkpoint(model, layers, None, out, activations=quantizers)
    file = out / "model.safetensors"
    # Copies: what load_file returns lies in the very file that is written over.
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    for part in ("weight", "weight_zero_point"):
        wrong = tensors[f"{NAME}.{part}"].clone()
        wrong[0, 0] = 4
        save_file({**tensors, f"{NAME}.{part}": wrong}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=f"{NAME}.{part} holds numbers .* of 3 bits"):
            read_matrices(out)
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    [group] = config["quantization_config"]["config_groups"].values()
    group["weights"]["strategy"] = "block"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="block are not read"):
        read_matrices(out)


def test_inputs_without_a_batch_axis_are_found():
    found = {}
    for kind in ("llama", "opt"):
        model = build(kind)
        for name, flat in measure_flat_inputs(model, targets(model)).items():
            found[kind, name.rsplit(".")[-1]] = flat
    assert {name for (kind, name), flat in found.items() if flat} == {"fc1", "fc2"}
    assert not any(flat for (kind, _), flat in found.items() if kind == "llama")
    assert len(found) == 7 + 6
    assert measure_flat_inputs(torch.nn.Sequential(torch.nn.Linear(2, 2)), ["0"]) == {}


@pytest.mark.parametrize("inputs", ["token", "tensor"])
@pytest.mark.parametrize("weights", ["w8 channel", "w8 tensor asym"])
@pytest.mark.parametrize("name", ["stories260k", "babyllama105", "nanosort_gpt2"])
def test_real_models(name, weights, inputs, tmp_path):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{name} is not here (expected under ../shared/data)")
    model = Auto.from_pretrained(SHARED / name, dtype=torch.float32).eval()
    tokens = torch.arange(11)[None] % 3
    layers = fake_quantize(model, **WEIGHTS[weights])
    assert layers.keys() == targets(model).keys()
    quantizers = quantize_inputs(model, layers, INPUTS[inputs], tokens)
    info = save_checkpoint(model, layers, None, tmp_path / "out", activations=quantizers)
    assert info.format == ("ptqkit" if "gpt2" in name else "compressed-tensors")
    for loaded in (Auto.from_pretrained(tmp_path / "out"), load(tmp_path / "out")):
        assert torch.equal(logits(loaded, tokens), logits(model, tokens))
