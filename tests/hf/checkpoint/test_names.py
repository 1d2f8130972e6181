"""Files have the names and forms of ``save_pretrained``, and the class is shown to load them."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as t
from helpers.checkpoint_models import build, fake_quantize
from safetensors import safe_open

import ptqkit
from ptqkit.hf.checkpoint.experts import converted_problems
from ptqkit.hf.checkpoint.names import saved_names
from ptqkit.hf.checkpoint.reader import load, read_matrices
from ptqkit.hf.checkpoint.save import save_checkpoint

TOKENS = torch.arange(3, 23)[None]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
MODELS = {
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen2_moe": lambda: t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=64)
    ),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**SIZES, **EXPERTS)),
    "llava": lambda: t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**VISION),
            text_config=t.LlamaConfig(**SIZES),
            image_token_index=95,
        )
    ),
    "qwen2_vl": lambda: t.Qwen2VLForConditionalGeneration(
        t.Qwen2VLConfig(
            text_config={
                **SIZES,
                "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]},
            },
            vision_config={"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 2},
        )
    ),
    "t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(
            vocab_size=96, d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2,
            pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
        )
    ),
    "rwkv": lambda: t.RwkvForCausalLM(
        t.RwkvConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, context_length=64)
    ),
}  # fmt: skip


def make(kind):
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def quantize(model):
    experts = {"*.experts": "skip"} if hasattr(model.config, "num_experts_per_tok") else {}
    return ptqkit.quantize(model, "rtn", bits=4, group_size=16, symmetric=True, overrides=experts)


@torch.no_grad()
def logits(model):
    more = {"decoder_input_ids": TOKENS} if model.config.model_type == "t5" else {}
    return model(TOKENS, **more)[0]


def tensors(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@pytest.mark.parametrize("form", ["compressed-tensors", "ptqkit"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "llava", "qwen2_vl"])
def test_names_and_forms_are_those_of_save_pretrained(kind, form, tmp_path):
    model = make(kind)
    result = quantize(model)
    result.save(tmp_path / "out", form)
    model.save_pretrained(tmp_path / "float")
    expected, found = tensors(tmp_path / "float"), tensors(tmp_path / "out")
    packed = {f"{name}.weight" for name in read_matrices(tmp_path / "out")}
    assert len(packed) == len(result.matrices) and packed <= expected.keys()
    for name in expected.keys() - packed:
        assert torch.equal(found[name], expected[name]), name
    modules = {name.removesuffix(".weight") for name in packed}
    extra = {name for name in found if name.rpartition(".")[0] not in modules}
    assert extra <= expected.keys()
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    if form == "compressed-tensors":
        targets = {n for group in settings["config_groups"].values() for n in group["targets"]}
        assert modules <= targets and targets - modules <= result.matrices.keys()
        assert not targets & set(settings["ignore"])
    loaded = load(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_stock_transformers_finds_renamed_layers(kind, tmp_path):
    model = make(kind)
    info = quantize(model).save(tmp_path / "out")
    assert info.format == "compressed-tensors"
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("form", ["compressed-tensors", "ptqkit"])
@pytest.mark.parametrize("kind", ["mixtral", "llava"])
def test_a_loaded_file_is_saved_again(kind, form, tmp_path):
    model = make(kind)
    quantize(model).save(tmp_path / "out", form)
    loaded = load(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    first, again = (
        json.loads((tmp_path / d / "config.json").read_text()) for d in ("out", "again")
    )
    assert first["quantization_config"]["quant_method"] == form
    assert again["quantization_config"]["quant_method"] == form
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_auto_says_that_transformers_alone_does_not_load_float_experts(tmp_path):
    model = make("qwen3_moe")
    result = quantize(model)
    info = result.save(tmp_path / "out")
    stock = bool(converted_problems(model, saved_names(model)))
    assert info.format == ("ptqkit" if stock else "compressed-tensors")
    if stock:
        assert "Qwen3MoeForCausalLM: it joins float weights" in info.reason
        result.save(tmp_path / "stock", "compressed-tensors")
        with pytest.raises(RuntimeError, match="automatic conversion"):
            type(model).from_pretrained(tmp_path / "stock")


@pytest.mark.parametrize("kind", ["t5", "rwkv"])
def test_classes_that_read_weights_take_the_own_format_and_run(kind, tmp_path):
    model = make(kind)
    result = quantize(model)
    info = result.save(tmp_path / "out")
    assert info.format == "ptqkit" and "without a float weight" in info.reason
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    with pytest.raises(ValueError, match="without a float weight"):
        result.save(tmp_path / "stock", "compressed-tensors")
    assert not (tmp_path / "stock").exists()


def test_the_weight_of_a_packed_layer_is_a_weight(tmp_path):
    for kind in ("llama", "gpt2"):
        model = build(kind, torch.bfloat16)
        layers = fake_quantize(model, bits=3, group_size=16)
        save_checkpoint(model, layers, None, tmp_path / kind, checkpoint_format="ptqkit")
        loaded = load(tmp_path / kind)
        for name in layers:
            module = loaded.get_submodule(name)
            assert torch.equal(module.weight, model.get_submodule(name).weight)
            assert module.state_dict()["weight"].dtype == torch.uint8


def test_experts_that_are_split_are_made_once_and_dropped():
    model = make("qwen3_moe")
    from ptqkit.hf.checkpoint.files import TensorPlan
    from ptqkit.hf.checkpoint.names import convert_plans

    made = []

    def plan(name, tensor):
        def give():
            made.append(name)
            return tensor

        return TensorPlan(name, tensor.dtype, tuple(tensor.shape), give)

    state = model.state_dict()
    plans = convert_plans(model, [plan(n, v) for n, v in state.items()], saved_names(model))
    assert not made
    names = [p.name for p in plans]
    assert len(set(names)) == len(names)
    for p in plans:
        value = p.make()
        assert tuple(value.shape) == p.shape and value.dtype == p.dtype
    assert sorted(made) == sorted(state)


@pytest.mark.filterwarnings("error")
def test_fused_siblings_with_different_schemes_are_named(tmp_path):
    model = build("llama")
    options = {"bits": 4, "group_size": 16, "symmetric": True}
    layers = fake_quantize(model, overrides={"q_proj": {"bits": 8}, "up_proj": None}, **options)
    with pytest.warns(UserWarning) as caught:
        info = save_checkpoint(model, layers, None, tmp_path / "out")
    texts = [str(w.message) for w in caught]
    assert tuple(texts) == info.warnings and len(texts) == 2
    assert "0.self_attn.q_proj, model.layers.0.self_attn.k_proj" in texts[0]
    assert "0.mlp.gate_proj, model.layers.0.mlp.up_proj (and in 1 more places)" in texts[1]
    assert "vLLM and SGLang" in texts[0]
    same = build("llama")
    layers = fake_quantize(same, overrides={"down_proj": {"bits": 8}, "o_proj": None}, **options)
    assert save_checkpoint(same, layers, None, tmp_path / "same").warnings == ()
    # The own format is read by no one else.
    own = save_checkpoint(
        model, layers_of(model), None, tmp_path / "own", checkpoint_format="ptqkit"
    )
    assert own.warnings == ()


def layers_of(model):
    return fake_quantize(
        model, overrides={"q_proj": {"bits": 8}}, bits=4, group_size=16, symmetric=True
    )
