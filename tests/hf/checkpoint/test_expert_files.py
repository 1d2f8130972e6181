"""Files with one tensor per expert: names, readers, and what each makes of them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers.expert_models import MODELS, TOKENS, build, mixtures
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ptqkit
from ptqkit.hf.checkpoint.reader import load, read_matrices
from ptqkit.nn.experts import ExpertLinears
from ptqkit.nn.qlinear import QLinear

# Those whose ways differ: other names, a shared expert, dense blocks, experts of another class.
ONE_BY_ONE = ["mixtral", "qwen2_moe", "deepseek_v3", "llama4"]
LEAVES = {"mixtral": "block_sparse_moe.experts.2.w1", "llama4": "feed_forward.experts.2.gate_proj"}


def quantize(kind, **options):
    model = build(kind)
    options = {"bits": 4, "group_size": 8, "symmetric": True, **options}
    return ptqkit.quantize(model, "rtn", **options)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def names_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def settings_in(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def same_logits(kind, one, other):
    """Whether two models compute the same, one of which may have its experts one by one.

    Llama 4's own are one batched product, whose sums some CPUs make in another order.
    """
    a, b = logits(one), logits(other)
    return torch.allclose(a, b, rtol=0.0, atol=1e-5) if kind == "llama4" else torch.equal(a, b)


@pytest.mark.parametrize(
    "kind, checkpoint_format",
    [
        *((kind, "ptqkit") for kind in MODELS),
        *((kind, "gptq") for kind in ("mixtral", "deepseek_v3", "gpt_oss")),
        ("gpt_oss", "compressed-tensors"),
    ],
)
def test_every_format_loads_exactly(kind, checkpoint_format, tmp_path):
    result = quantize(kind, checkpoint_format=checkpoint_format)
    result.save(tmp_path / "out", checkpoint_format)
    part = {"ptqkit": "weight", "gptq": "qweight"}.get(checkpoint_format, "weight_packed")
    leaf = LEAVES.get(kind, "mlp.experts.2.gate_proj")
    assert f"model.layers.1.{leaf}.{part}" in names_in(tmp_path / "out")
    model = load(tmp_path / "out")
    assert torch.equal(logits(model), logits(result.model))
    held = {n: m for n, m in model.named_modules() if isinstance(m, QLinear)}
    assert held.keys() == result.matrices.keys()
    for name, module in held.items():
        assert (module.read().codes == result.matrices[name].codes).all()
    assert len(read_matrices(tmp_path / "out")) == len(result.matrices)


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_stock_transformers_joins_the_experts_again(kind, tmp_path):
    result = quantize(kind, bits=3 if kind in ("mixtral", "llama4") else 4)
    info = result.save(tmp_path / "out")
    assert info.format == "compressed-tensors" and "stock transformers" in info.reason
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_logits(kind, model, result.model)
    assert not any(isinstance(m, ExpertLinears) for m in model.modules())
    model = load(tmp_path / "out")
    assert torch.equal(logits(model), logits(result.model))
    assert any(isinstance(m, ExpertLinears) for m in model.modules())


def test_targets_name_what_other_readers_look_for(tmp_path):
    for kind, path in (("mixtral", "block_sparse_moe"), ("qwen3_moe", "mlp")):
        quantize(kind).save(tmp_path / kind, "compressed-tensors")
        settings = settings_in(tmp_path / kind)
        (group,) = settings["config_groups"].values()
        # vLLM joins the experts of model.layers.N.PATH.experts, and asks for these names.
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.1.{path}.experts.0.{leaf}"
            patterns = [t.removeprefix("re:") for t in group["targets"] if t.startswith("re:")]
            assert sum(bool(re.match(p, name)) for p in patterns) == 1
        assert len(patterns) == (4 if kind == "mixtral" else 2)
        assert "model.layers.1.self_attn.q_proj" in group["targets"]
        assert not any("gate" in name or "experts" in name for name in settings["ignore"])


def test_single_experts_left_float_are_named_one_by_one(tmp_path):
    result = quantize("qwen2_moe", overrides={"*.layers.1.mlp.experts.2.*": "skip"})
    assert result.save(tmp_path / "auto").format == "ptqkit"
    result.save(tmp_path / "ct", "compressed-tensors")
    (group,) = settings_in(tmp_path / "ct")["config_groups"].values()
    assert r"re:model\.layers\.0\.mlp\.experts\..*" in group["targets"]
    assert "model.layers.1.mlp.experts.3.up_proj" in group["targets"]
    assert "model.layers.1.mlp.experts.2.up_proj" in settings_in(tmp_path / "ct")["ignore"]
    for folder in ("auto", "ct"):
        assert "model.layers.1.mlp.experts.2.up_proj.weight" in names_in(tmp_path / folder)
        model = load(tmp_path / folder)
        assert torch.equal(logits(model), logits(result.model))
        assert isinstance(
            model.get_submodule("model.layers.1.mlp.experts.2.up_proj"), torch.nn.Linear
        )


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_mixture_left_float_stays_joined(kind, tmp_path):
    result = quantize(kind, overrides={"*.layers.1.mlp.experts": "skip"})
    name = "model.layers.1.mlp.experts"
    assert type(result.model.get_submodule(name)).__name__.endswith("Experts")
    for checkpoint_format in ("ptqkit", "compressed-tensors"):
        folder = tmp_path / checkpoint_format
        result.save(folder, checkpoint_format)
        fused = f"{name}.gate_up_proj" in names_in(folder)
        assert fused == (kind == "gpt_oss")
        assert torch.equal(logits(load(folder)), logits(result.model))


def test_auto_says_what_stock_transformers_would_misread(tmp_path):
    info = quantize("gpt_oss").save(tmp_path / "fused")
    assert info.format == "ptqkit" and "no place for single experts of GptOssE" in info.reason
    two = quantize("qwen3_moe", overrides={"*.experts.*.down_proj": {"bits": 8}})
    info = two.save(tmp_path / "two")
    assert info.format == "ptqkit" and "unpacks all experts by one scheme" in info.reason
    # Another scheme for all else does no harm.
    one = quantize("qwen3_moe", overrides={"*.self_attn.*": {"bits": 8}})
    assert one.save(tmp_path / "one").format == "compressed-tensors"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(logits(model), logits(one.model))


@pytest.mark.parametrize("kind", ["mixtral", "llama4"])
def test_a_loaded_model_is_saved_again(kind, tmp_path):
    result = quantize(kind)
    result.save(tmp_path / "first", "ptqkit")
    model = load(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    assert names_in(tmp_path / "second") == names_in(tmp_path / "first")
    assert torch.equal(logits(load(tmp_path / "second")), logits(result.model))
    info = ptqkit.hf.save_loaded(model, tmp_path / "third")
    assert info.format == "compressed-tensors"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "third")
    assert same_logits(kind, stock, result.model)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4"])
def test_experts_run_from_packed_codes(kind, tmp_path):
    result = quantize(kind)
    result.save(tmp_path / "out", "ptqkit_v3")
    model = load(tmp_path / "out")
    assert set(model.ptqkit_compute.layers) == set(result.matrices)
    assert all(isinstance(m, ExpertLinears) for m in mixtures(model).values())
    assert (logits(model) - logits(result.model)).abs().max() < 1e-4


def test_half_precision_and_shards(tmp_path):
    model = AutoModelForCausalLM.from_config(build("mixtral").config, dtype=torch.bfloat16).eval()
    result = ptqkit.quantize(model, "rtn", bits=4, group_size=8, symmetric=True)
    result.save(tmp_path / "out", "ptqkit", max_shard_size=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    model = load(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(result.model))


def test_float16_files_of_a_float32_model(tmp_path):
    model = build("olmoe")
    result = ptqkit.quantize(
        model,
        "rtn",
        bits=4,
        group_size=8,
        symmetric=True,
        stored_dtype="float16",
        out_dir=tmp_path / "o",
    )
    assert torch.equal(logits(load(tmp_path / "o", dtype=torch.float32)), logits(result.model))
    weight = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    assert torch.equal(
        weight[1],
        torch.from_numpy(result.matrices["model.layers.0.mlp.experts.1.down_proj"].dequantize()),
    )


def test_a_missing_expert_is_named(tmp_path):
    quantize("qwen3_moe").save(tmp_path / "out", "ptqkit")
    path = tmp_path / "out" / "model.safetensors"
    tensors = {n: t for n, t in load_file(path).items() if ".experts.3." not in n}
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks model.layers.0.mlp.experts\.3\.\w+_proj"):
        load(tmp_path / "out")
    # Nor does a float one become random numbers.
    config = tmp_path / "out" / "config.json"
    text = json.loads(config.read_text())
    layers = text["quantization_config"]["layers"]
    text["quantization_config"]["layers"] = {n: v for n, v in layers.items() if ".3." not in n}
    config.write_text(json.dumps(text))
    with pytest.raises(ValueError, match=r"lacks model.layers.0.mlp.experts\.3\.\w+_proj"):
        load(tmp_path / "out")
