"""Linear layers that gained a bias, and equalized models, save and load as they are."""

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
)
from helpers.data import SHARED
from safetensors.torch import load_file
from torch import nn

from ptqkit.hf.checkpoint.biases import GainedBiases, find_gained_biases, plan_biases
from ptqkit.hf.checkpoint.reader import load, read_matrices
from ptqkit.hf.checkpoint.save import save_checkpoint
from ptqkit.recipe.options import ActivationQuantization

W4 = {"bits": 4, "group_size": 32, "symmetric": True}
GPTQ = {"bits": 4, "group_size": 32, "scale_dtype": "float16", "min_zero_point": 1}
Auto = transformers.AutoModelForCausalLM


def _gain(model, *endings):
    """Give a bias to every linear without one whose name ends so."""
    generator = torch.Generator().manual_seed(3)
    names = [n for n, m in model.named_modules() if n.endswith(endings) and m.bias is None]
    for name in names:
        module = model.get_submodule(name)
        value = torch.randn(module.out_features, generator=generator).to(module.weight.dtype) / 4
        module.bias = nn.Parameter(value)
    assert names
    return names


def _case(kind, *endings, dtype=torch.float32, **options):
    model = build(kind, dtype)
    layers = fake_quantize(model, **options)
    before = logits(model)
    names = _gain(model, *endings)
    assert not torch.equal(logits(model), before)
    return model, layers, names


def _config(folder):
    return json.loads((folder / "config.json").read_text())


def _assert_loads(folder, model, layers, stock=True):
    loaders = [load] + ([lambda path: Auto.from_pretrained(path, dtype="auto")] if stock else [])
    for loader in loaders:
        assert torch.equal(logits(loader(folder)), logits(model))
    assert_same_matrices(read_matrices(folder), layers)


@pytest.mark.parametrize(
    ("endings", "settings"),
    [
        (("down_proj",), {"mlp_bias"}),
        (("o_proj", "q_proj"), {"attention_bias"}),
        (("o_proj", "up_proj"), {"attention_bias", "mlp_bias"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_settings_of_the_model_class_create_the_biases(endings, settings, dtype, tmp_path):
    model, layers, names = _case("llama", *endings, dtype=dtype, **W4)
    state = torch.get_rng_state()
    info = save_checkpoint(model, layers, None, tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), state)
    assert info.format == "compressed-tensors"
    config = _config(tmp_path / "out")
    assert {k for k in ("attention_bias", "mlp_bias") if config[k]} == settings
    assert not model.config.attention_bias and not model.config.mlp_bias
    _, report = Auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    _assert_loads(tmp_path / "out", model, layers)
    biases = {k: v for k, v in load_file(tmp_path / "out/model.safetensors").items() if "bias" in k}
    assert len(biases) == 8 * ("attention_bias" in settings) + 6 * ("mlp_bias" in settings)
    for name, value in biases.items():
        assert value.dtype == dtype
        assert bool(value.any()) == (name.removesuffix(".bias") in names)


def test_some_layers_of_a_kind_and_float_layers_too(tmp_path):
    model, layers, names = _case(
        "llama", "layers.1.mlp.down_proj", "v_proj", overrides={"v_proj": None}, **W4
    )
    assert len(names) == 3 and not set(names) <= layers.keys()
    for format in ("compressed-tensors", "ptqkit"):
        save_checkpoint(model, layers, None, tmp_path / format, checkpoint_format=format)
        _assert_loads(tmp_path / format, model, layers)


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_gptq_files(format, tmp_path):
    model, layers, _ = _case("llama", "down_proj", **GPTQ)
    save_checkpoint(model, layers, None, tmp_path / "out", checkpoint_format=format)
    assert _config(tmp_path / "out")["mlp_bias"] is True
    _assert_loads(tmp_path / "out", model, layers, stock=False)


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_a_bias_that_the_class_never_creates(kind, tmp_path):
    model, layers, names = _case(kind, "o_proj", "down_proj", **W4)
    for format in ("compressed-tensors", "gptq_v2"):
        with pytest.raises(ValueError) as caught:
            save_checkpoint(model, layers, None, tmp_path / "no", checkpoint_format=format)
        assert f"{names[0]}: it gained a bias, and no setting" in str(caught.value)
        assert f"(and {len(names) - 1} more layers)" in str(caught.value)
        assert not (tmp_path / "no").exists()
    out = tmp_path / "out"
    info = save_checkpoint(model, layers, None, out)
    assert info.format == "ptqkit" and "gained a bias" in info.reason
    settings = _config(out)["quantization_config"]
    assert sorted(settings["gained_biases"]) == sorted(names) and settings["format_version"] == 2
    _, report = Auto.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    _assert_loads(out, model, layers)
    load(out).save_pretrained(tmp_path / "again")
    _assert_loads(tmp_path / "again", model, layers)
    assert torch.equal(logits(load(out).dequantize()), logits(model))


def test_own_format_lists_them_and_leaves_the_configuration(tmp_path):
    model, layers, names = _case("llama", "down_proj", bits=3, group_size=32)
    info = save_checkpoint(model, layers, None, tmp_path / "out")
    assert info.format == "ptqkit"
    config = _config(tmp_path / "out")
    assert config["mlp_bias"] is False
    assert config["quantization_config"]["gained_biases"] == names
    _assert_loads(tmp_path / "out", model, layers)
    config["quantization_config"]["gained_biases"] = ["model.norm"]
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model.norm: saved with a bias of its own"):
        load(tmp_path / "out")


@pytest.mark.parametrize("spec", [ActivationQuantization(8), ActivationQuantization(8, "tensor")])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_with_quantized_inputs(kind, spec, tmp_path):
    model, layers, _ = _case(kind, "down_proj", bits=8, group_size=None, symmetric=True)
    quantizers = quantize_inputs(model, layers, spec)
    info = save_checkpoint(model, layers, None, tmp_path / "out", activations=quantizers)
    assert info.format == ("compressed-tensors" if kind == "llama" else "ptqkit")
    _assert_loads(tmp_path / "out", model, layers)


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen2", "gpt2", "bloom", "bert", "gpt_neox"])
def test_models_as_built_have_gained_nothing(kind):
    assert find_gained_biases(build(kind)) == GainedBiases()


def test_a_plan_is_known_before_there_is_a_bias():
    names = [f"model.layers.{i}.{n}" for i in range(2) for n in ("self_attn.q_proj", "mlp.up_proj")]
    found = plan_biases(build("llama"), names)
    assert found.settings == ("attention_bias", "mlp_bias") and found.orphans == ()
    assert len(found.zeros) == 10 and found.names == tuple(names)
    found = plan_biases(build("qwen2"), names)
    assert found.names == found.orphans == tuple(names[1::2]) and found.settings == ()


def test_a_setting_that_changes_more_than_biases_is_left_alone(monkeypatch):
    model = build("llama")
    names = _gain(model, "down_proj")

    class Wider(type(model)):
        def __init__(self, config):
            super().__init__(config)
            if config.mlp_bias:
                self.extra = nn.Linear(2, 2)

    model.__class__ = Wider
    found = find_gained_biases(model)
    assert found.settings == () and found.zeros == {}
    assert found.names == found.orphans == tuple(names)
    assert len(found.problems()) == 2


@torch.no_grad()
def _equalize(model, scale_value):
    """Fold 1/s into the norms before attention and MLP, s into the linears they feed."""
    generator = torch.Generator().manual_seed(5)
    for block in model.model.layers:
        for norm, linears in (
            (block.input_layernorm, ("q_proj", "k_proj", "v_proj")),
            (block.post_attention_layernorm, ("gate_proj", "up_proj")),
        ):
            s = scale_value ** torch.randn(norm.weight.shape, generator=generator)
            norm.weight.div_(s)
            for name, module in block.named_modules():
                if name.endswith(linears):
                    module.weight.mul_(s)


@pytest.mark.parametrize("format", ["compressed-tensors", "ptqkit"])
@pytest.mark.parametrize("name", ["llama", "stories260k"])
def test_equalized_models(name, format, tmp_path):
    if name == "llama":
        model = build("llama")
    elif not (SHARED / name).is_dir():
        pytest.skip(f"{name} is not here (expected under ../shared/data)")
    else:
        model = Auto.from_pretrained(SHARED / name, dtype=torch.float32).eval()
    plain = logits(model)
    norm = model.model.layers[0].input_layernorm.weight.clone()
    _equalize(model, 3.0)
    assert not torch.equal(model.model.layers[0].input_layernorm.weight, norm)
    torch.testing.assert_close(logits(model), plain, rtol=1e-3, atol=1e-4)
    layers = fake_quantize(model, bits=4, group_size=4, symmetric=True)
    save_checkpoint(model, layers, None, tmp_path / "out", checkpoint_format=format)
    _assert_loads(tmp_path / "out", model, layers)
