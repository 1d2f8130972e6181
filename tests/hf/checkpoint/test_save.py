"""What is saved loads as exactly the fake-quantized model, in every format and architecture."""

from __future__ import annotations

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
import transformers
from helpers.checkpoint_models import (
    assert_same_matrices,
    assign,
    build,
    fake_quantize,
    logits,
    matrix,
    targets,
)
from helpers.data import SHARED
from safetensors import safe_open

import ptqkit
from ptqkit.hf.checkpoint.reader import load, read_matrices
from ptqkit.hf.checkpoint.save import save_checkpoint
from ptqkit.nn.qlinear import QLinear

ARCHITECTURES = ["llama", "opt", "gpt2", "qwen2", "bloom", "gpt_neox", "bert"]
GRIDS = {
    "w4 sym": {"bits": 4, "group_size": 32, "symmetric": True},
    "w3 channel sym": {"bits": 3, "group_size": None, "symmetric": True},
    "w3 asym": {"bits": 3, "group_size": 32},
    "w8 channel asym": {"bits": 8, "group_size": None},
    "w2 g_idx": {"bits": 2, "group_size": 16, "act_order": True},
    "ternary": {"bits": "ternary", "group_size": 8},
}


def _auto(kind):
    if kind == "bert":
        return transformers.AutoModelForMaskedLM
    return transformers.AutoModelForCausalLM


@pytest.fixture
def warned(caplog, monkeypatch):
    """Warnings of transformers, whose loggers do not propagate by default."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        yield lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_default_load_is_exact(kind, grid, tmp_path, warned):
    model = build(kind)
    layers = fake_quantize(model, **GRIDS[grid])
    expected = logits(model)
    info = save_checkpoint(model, layers, None, tmp_path / "out")
    stock = GRIDS[grid].get("symmetric") and kind != "gpt2"
    assert info.format == ("compressed-tensors" if stock else "ptqkit")
    assert info.quantized_layers == len(layers)
    assert bool("compressed-tensors cannot carry" in info.reason) != bool(stock)

    before = len(warned())
    loaded, report = _auto(kind).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert torch.equal(logits(loaded), expected)
    assert not any(report.values()), report
    assert warned()[before:] == []
    assert type(loaded) is type(model)
    assert torch.equal(logits(load(tmp_path / "out")), expected)
    assert_same_matrices(read_matrices(tmp_path / "out"), layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", ["w4 sym", "w3 asym", "w2 g_idx", "ternary"])
@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_half_precision_models_are_exact(kind, grid, dtype, tmp_path):
    model = build(kind, dtype)
    layers = fake_quantize(model, **GRIDS[grid])
    save_checkpoint(model, layers, None, tmp_path / "out")
    loaded = _auto(kind).from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    assert all(
        q.scale_dtype == layers[n].scale_dtype for n, q in read_matrices(tmp_path / "out").items()
    )


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "group_size": 32, "symmetric": True},
        {"bits": 3, "group_size": 32},
        {"bits": 8, "group_size": None},
        {"bits": 2, "group_size": 16, "act_order": True},
    ],
)
@pytest.mark.parametrize("kind", ["llama", "opt", "bert"])
def test_gptq_files_load_without_gptqmodel(kind, options, format, tmp_path):
    model = build(kind)
    layers = fake_quantize(model, scale_dtype="float16", min_zero_point=1, **options)
    info = save_checkpoint(model, layers, None, tmp_path / "out", checkpoint_format=format)
    assert (info.format, info.reason) == (format, "asked for")
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert settings["checkpoint_format"] == format
    assert settings["desc_act"] is options.get("act_order", False)
    assert settings["group_size"] == (options["group_size"] or -1)
    assert settings["modules_in_block_to_quantize"] is None
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    assert_same_matrices(read_matrices(tmp_path / "out"), layers)


def test_gptq_files_of_half_precision_models(tmp_path):
    model = build("llama", torch.bfloat16)
    layers = fake_quantize(model, bits=4, group_size=32, scale_dtype="float16")
    save_checkpoint(model, layers, None, tmp_path / "out", checkpoint_format="gptq_v2")
    loaded = load(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16 and torch.equal(logits(loaded), logits(model))
    wide = load(tmp_path / "out", dtype=torch.float32)
    for name, q in layers.items():
        found = wide.get_submodule(name).weight
        assert torch.equal(found, torch.from_numpy(q.dequantize()))


def test_gptq_says_which_linears_of_a_block_are_quantized(tmp_path):
    model = build("llama")
    grid = {"bits": 4, "group_size": 32, "scale_dtype": "float16"}
    layers = fake_quantize(model, overrides={"down_proj": None}, **grid)
    save_checkpoint(model, layers, None, tmp_path / "out", checkpoint_format="gptq_v2")
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    [names] = settings["modules_in_block_to_quantize"]
    assert "mlp.up_proj" in names and "mlp.down_proj" not in names and len(names) == 6
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    layers.pop("model.layers.1.mlp.up_proj")
    with pytest.raises(ValueError, match="same layers quantized in every block.*layers.1"):
        save_checkpoint(model, layers, None, tmp_path / "other", checkpoint_format="gptq_v2")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_mixed_precision_and_skipped_layers(kind, tmp_path):
    model = build(kind)
    down, skipped = ("down_proj", "q_proj") if kind == "llama" else ("mlp.c_proj", "c_attn")
    overrides = {down: {"bits": 8, "group_size": None}, skipped: None}
    layers = fake_quantize(model, bits=4, group_size=32, symmetric=True, overrides=overrides)
    info = save_checkpoint(model, layers, None, tmp_path / "out")
    assert info.format == ("compressed-tensors" if kind == "llama" else "ptqkit")
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    if kind == "llama":
        groups = settings["config_groups"].values()
        assert sorted(g["weights"]["num_bits"] for g in groups) == [4, 8]
        assert {t for g in groups for t in g["targets"]} == set(layers)
        assert all(g["format"] == "pack-quantized" for g in groups)
        assert (
            "lm_head" in settings["ignore"]
            and "model.layers.0.self_attn.q_proj" in settings["ignore"]
        )
    loaded = _auto(kind).from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    assert_same_matrices(read_matrices(tmp_path / "out"), layers)


def test_every_width_loads_in_stock_transformers(tmp_path):
    model = build("llama")
    widths = {"q_proj": 2, "k_proj": 3, "v_proj": 5, "o_proj": 6, "up_proj": 7, "down_proj": 8}
    overrides = {name: {"bits": bits} for name, bits in widths.items()}
    layers = fake_quantize(model, bits=4, group_size=16, symmetric=True, overrides=overrides)
    info = save_checkpoint(
        model, layers, None, tmp_path / "out", checkpoint_format="compressed-tensors"
    )
    assert info.format == "compressed-tensors"
    loaded = _auto("llama").from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    assert_same_matrices(read_matrices(tmp_path / "out"), layers)


def test_one_scheme_names_every_layer(tmp_path):
    model = build("llama")
    layers = fake_quantize(model, bits=4, group_size=32, symmetric=True)
    recipe = {"order": "act", "bits": 4}
    save_checkpoint(model, layers, recipe, tmp_path / "out")
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    [group] = settings["config_groups"].values()
    assert group["targets"] == list(layers) and settings["ignore"] == ["lm_head"]
    assert group["format"] == settings["format"] == "pack-quantized"
    assert group["weights"]["actorder"] == "weight"
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    assert json.loads((tmp_path / "out/ptqkit_recipe.json").read_text()) == recipe


@pytest.mark.parametrize("grid", ["w4 sym", "w3 asym"])
def test_an_untied_head_can_be_quantized(grid, tmp_path):
    model = build("llama")
    layers = fake_quantize(model, **GRIDS[grid])
    layers["lm_head"] = ptqkit.rtn(matrix(model.lm_head), **GRIDS[grid])
    assign(model.lm_head, layers["lm_head"])
    save_checkpoint(model, layers, None, tmp_path / "out")
    loaded = _auto("llama").from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    assert_same_matrices(read_matrices(tmp_path / "out"), layers)
    with pytest.raises(ValueError, match="inside the repeated blocks only, not lm_head"):
        layers = fake_quantize(model, bits=4, group_size=32, scale_dtype="float16")
        layers["lm_head"] = ptqkit.rtn(
            matrix(model.lm_head), bits=4, group_size=32, scale_dtype="float16"
        )
        assign(model.lm_head, layers["lm_head"])
        save_checkpoint(model, layers, None, tmp_path / "gptq", checkpoint_format="gptq_v2")
    assert not (tmp_path / "gptq").exists()


@pytest.mark.parametrize("grid", ["w4 sym", "w3 asym"])
def test_tied_embeddings_are_stored_once_and_stay_tied(grid, tmp_path):
    model = build("qwen2")
    layers = fake_quantize(model, **GRIDS[grid])
    save_checkpoint(model, layers, None, tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys() and "model.embed_tokens.weight" in file.keys()
    loaded = load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_untied_copies_of_one_tensor_are_both_kept(tmp_path):
    model = build("llama")
    model.lm_head.weight = model.model.embed_tokens.weight  # shared, but not by configuration
    layers = fake_quantize(model, bits=3, group_size=32)
    save_checkpoint(model, layers, None, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_own_format_saves_again_and_generates(kind, tmp_path):
    model = build(kind)
    layers = fake_quantize(model, act_order=True, bits=3, group_size=16)
    save_checkpoint(model, layers, None, tmp_path / "first")
    first = load(tmp_path / "first")
    first.save_pretrained(tmp_path / "second")
    second = _auto(kind).from_pretrained(tmp_path / "second")
    assert torch.equal(logits(second), logits(model))
    assert_same_matrices(read_matrices(tmp_path / "second"), layers)
    prompt = torch.tensor([[5, 9, 11]])
    made = [m.generate(prompt, max_new_tokens=8, do_sample=False) for m in (model, second)]
    assert torch.equal(*made)
    with pytest.raises(ValueError, match="already: save_pretrained"):
        save_checkpoint(first, layers, None, tmp_path / "third")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dtype_changes_round_the_weight_not_the_grid(kind, tmp_path):
    model = build(kind)
    layers = fake_quantize(model, bits=3, group_size=32)
    save_checkpoint(model, layers, None, tmp_path / "out")
    path = tmp_path / "out"
    asked = _auto(kind).from_pretrained(path, dtype=torch.bfloat16)
    moved = load(path).to(torch.bfloat16)
    for name, q in layers.items():
        expected = torch.from_numpy(q.dequantize()).to(torch.bfloat16)
        for found in (asked, moved):
            module = found.get_submodule(name)
            assert (
                module.state_dict()["weight"].dtype == torch.uint8
                and module.scales.dtype == torch.float32
            )
            assert torch.equal(module.dequantize(), expected)
            assert module.bias is None or module.bias.dtype == torch.bfloat16
    assert logits(moved).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_cache_and_dequantize(kind, tmp_path):
    model = build(kind)
    layers = fake_quantize(model, bits=4, group_size=32)
    save_checkpoint(model, layers, None, tmp_path / "out")
    cached = load(tmp_path / "out", cache=True)
    modules = [m for m in cached.modules() if isinstance(m, QLinear)]
    assert len(modules) == len(layers) and all(m._cached is None for m in modules)
    for _ in range(2):
        assert torch.equal(logits(cached), logits(model))
    assert all(m._cached is not None for m in modules)
    cached.to(torch.float64)
    assert all(m._cached is None for m in modules)
    plain = load(tmp_path / "out").dequantize()
    assert not any(isinstance(m, QLinear) for m in plain.modules())
    assert targets(plain).keys() == layers.keys()
    assert torch.equal(logits(plain), logits(model))
    plain.save_pretrained(tmp_path / "float")
    assert torch.equal(logits(_auto(kind).from_pretrained(tmp_path / "float")), logits(model))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, "ternary"])
def test_qlinear_dequantizes_as_numpy_does(bits):
    rng = np.random.default_rng(0)
    top = 3 if bits == "ternary" else 1 << bits
    for inputs, size in ((48, 16), (37, 8), (33, None)):
        groups = -(-inputs // (size or inputs))
        q = ptqkit.QuantizedMatrix(
            rng.integers(0, top, (6, inputs), dtype=np.uint8),
            rng.uniform(0.01, 1, (6, groups)).astype(np.float32),
            rng.integers(0, top, (6, groups), dtype=np.uint8),
            rng.permutation(np.arange(inputs) // (size or inputs)).astype(np.int32),
            ptqkit.WeightGrid(bits, size),
        )
        for permuted in (True, False):
            if not permuted:
                natural = (np.arange(inputs) // (size or inputs)).astype(np.int32)
                q = dataclasses.replace(q, g_idx=natural)
            module = _loaded(q, permuted)
            np.testing.assert_array_equal(module.dequantize().numpy(), q.dequantize())


def _loaded(q, permuted):
    from ptqkit.arrays.packing import native_pack

    module = QLinear(
        *q.shape[::-1],
        bits=q.bits,
        group_size=q.group_size,
        symmetric=False,
        permuted=permuted,
        bias=False,
    )
    module.state_dict()["weight"].copy_(torch.from_numpy(native_pack(q.codes, q.bits).reshape(-1)))
    module.zero_points.copy_(torch.from_numpy(native_pack(q.zero_points, q.bits).reshape(-1)))
    module.scales.copy_(torch.from_numpy(q.scales))
    if permuted:
        module.g_idx.copy_(torch.from_numpy(q.g_idx))
    return module


@pytest.mark.parametrize("grid", ["w4 sym", "w3 asym", "w2 g_idx", "ternary"])
@pytest.mark.parametrize("name", ["stories260k", "babyllama105", "nanosort_gpt2"])
def test_real_models(name, grid, tmp_path):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{name} is not here (expected under ../shared/data)")
    model = transformers.AutoModelForCausalLM.from_pretrained(SHARED / name, dtype=torch.float32)
    options = {**GRIDS[grid]}
    if options["group_size"] is not None:
        options["group_size"] = 4 if name.startswith("stories") else 16
    layers = fake_quantize(model.eval(), **options)
    tokens = torch.arange(11)[None] % 3
    save_checkpoint(model, layers, None, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
