"""Loaded models that run packed: close to the simulated ones, saved again as they were."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from helpers.checkpoint_models import (
    TOKENS,
    assert_same_matrices,
    build,
    fake_quantize,
    logits,
    quantize_inputs,
)
from safetensors.torch import load_file

from ptqkit.hf.checkpoint.reader import load, read_matrices
from ptqkit.hf.checkpoint.resave import save_loaded
from ptqkit.hf.checkpoint.running import set_compute
from ptqkit.hf.checkpoint.save import save_checkpoint
from ptqkit.nn.packed_linear import PackedLinear
from ptqkit.nn.qlinear import QLinear
from ptqkit.recipe.options import ActivationQuantization

FORMATS = {
    "ptqkit": {"bits": 3, "group_size": 32},
    "ptqkit_v3": {"bits": 3, "group_size": 32},
    "compressed-tensors": {"bits": 4, "group_size": 32, "symmetric": True},
    "gptq": {"bits": 4, "group_size": 32, "min_zero_point": 1, "scale_dtype": "float16"},
    "gptq_v2": {"bits": 2, "group_size": 32, "act_order": True, "scale_dtype": "float16"},
}


def close(found, expected):
    """Within 1e-4 of the logits' size."""
    scale = expected.float().std()
    assert (found.float() - expected.float()).abs().max() <= 1e-4 * scale


def saved(tmp_path, form, kind="llama", dtype=torch.float32, **changes):
    model = build(kind, dtype)
    layers = fake_quantize(model, **{**FORMATS[form], **changes})
    out = tmp_path / form
    save_checkpoint(model, layers, None, out, checkpoint_format=form)
    return model, layers, out


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_runs_packed(form, tmp_path):
    model, layers, out = saved(tmp_path, form)
    loaded = load(out, compute="packed")
    assert set(loaded.ptqkit_compute.layers) == set(layers)
    assert set(loaded.ptqkit_compute.layers.values()) == {"packed"}
    assert f"{len(layers)} x packed" in str(loaded.ptqkit_compute)
    for name in layers:
        module = loaded.get_submodule(name)
        assert isinstance(module, PackedLinear)
        assert module._packed.dtype == torch.int32 and not module.training
    close(logits(loaded), logits(model))
    assert_same_matrices(read_matrices(out), layers)
    made = [
        m.generate(TOKENS, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        for m in (model, loaded)
    ]
    assert torch.equal(*made)
    assert torch.equal(logits(load(out, compute="dequantize")), logits(model))
    set_compute(loaded, "dequantize")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "qwen2", "bloom", "gpt_neox"])
@pytest.mark.parametrize("form", ["ptqkit", "ptqkit_v3"])
def test_other_families(kind, form, tmp_path):
    model, layers, out = saved(tmp_path, form, kind, group_size=16, act_order=True)
    close(logits(load(out, compute="packed")), logits(model))
    assert torch.equal(logits(load(out, compute="dequantize")), logits(model))
    assert_same_matrices(read_matrices(out), layers)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, "ternary"])
def test_version_3_holds_every_width(bits, tmp_path):
    model, layers, out = saved(tmp_path, "ptqkit_v3", bits=bits, group_size=16)
    assert_same_matrices(read_matrices(out), layers)
    loaded = load(out)
    assert loaded.ptqkit_compute.asked == ("dequantize" if bits == 5 else "auto")
    close(logits(loaded), logits(model))
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["format_version"] == (1 if bits == 5 else 3)
    if bits == 5:
        with pytest.warns(UserWarning, match="5 bits have no packed layout"):
            load(out, compute="packed")


def digests(folder):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.safetensors")
    }


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("form", ["ptqkit", "ptqkit_v3"])
def test_saved_again_the_bytes_are_the_same(form, act_order, tmp_path):
    _, _, out = saved(tmp_path, form, act_order=act_order)
    loaded = load(out, compute="packed")
    loaded.save_pretrained(tmp_path / "again")
    assert digests(tmp_path / "again") == digests(out)
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads(
        (out / "config.json").read_text()
    )


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "gptq_v2"])
def test_other_formats_are_saved_as_version_3(form, tmp_path):
    _, layers, out = saved(tmp_path, form)
    loaded = load(out, compute="auto")
    loaded.save_pretrained(tmp_path / "again")
    assert_same_matrices(read_matrices(tmp_path / "again"), layers)
    assert torch.equal(logits(load(tmp_path / "again")), logits(loaded))


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_written_again_from_the_codes(form, tmp_path):
    _, _, out = saved(tmp_path, form)
    loaded = load(out, compute="packed")
    before = logits(loaded)
    info = save_loaded(loaded, tmp_path / "again", checkpoint_format=form)
    assert info.format == form and digests(info.directory) == digests(out)
    assert torch.equal(logits(loaded), before)
    loaded.save_pretrained(tmp_path / "own")
    other = save_loaded(loaded, tmp_path / "other", checkpoint_format="ptqkit_v3")
    assert digests(other.directory) == digests(save_v3(out, tmp_path))


def save_v3(out, tmp_path):
    return save_loaded(
        load(out, compute="packed"), tmp_path / "third", checkpoint_format="ptqkit_v3"
    ).directory


SPECS = {
    "token": ActivationQuantization(8),
    "token asym": ActivationQuantization(8, symmetric=False),
    "tensor": ActivationQuantization(8, "tensor"),
    "tensor sym": ActivationQuantization(8, "tensor", True),
}


@pytest.mark.parametrize("form", ["ptqkit", "ptqkit_v3", "compressed-tensors"])
@pytest.mark.parametrize("name", SPECS)
def test_quantized_inputs_run_as_integers(name, form, tmp_path):
    model = build("llama")
    layers = fake_quantize(model, bits=8, group_size=None, symmetric=True)
    quantizers = quantize_inputs(model, layers, SPECS[name])
    out = tmp_path / "out"
    save_checkpoint(model, layers, None, out, checkpoint_format=form, activations=quantizers)
    loaded = load(out, compute="packed")
    assert set(loaded.ptqkit_compute.layers.values()) == {"int8 inputs as simulated"}
    close(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", compute="packed")), logits(loaded))
    info = save_loaded(loaded, tmp_path / "same", checkpoint_format=form)
    assert digests(info.directory) == digests(out)


def test_int8_is_another_model_and_says_so(tmp_path):
    model, _, out = saved(tmp_path, "ptqkit_v3", bits=4)
    loaded = load(out, compute="int8")
    assert set(loaded.ptqkit_compute.layers.values()) == {"packed, int8 inputs"}
    error = (logits(loaded) - logits(model)).abs().max() / logits(model).std()
    assert 1e-4 < error < 0.2


def test_mapped_weights_are_not_read_or_copied(tmp_path):
    _, _, out = saved(tmp_path, "ptqkit_v3")
    loaded = load(out)
    with open("/proc/self/maps") as maps:
        mapped = [line.split() for line in maps if line.strip().endswith("model.safetensors")]
    places = [tuple(int(end, 16) for end in line[0].split("-")) for line in mapped]
    for _, module in loaded.named_modules():
        if isinstance(module, QLinear):
            at = module._packed.data_ptr()
            assert any(low <= at < high for low, high in places)
            assert module.matrix().words.__array_interface__["data"][0] == at


def test_dtypes_and_copies(tmp_path):
    model, _, out = saved(tmp_path, "ptqkit_v3", dtype=torch.bfloat16)
    for loaded in (load(out), load(out, dtype=torch.float32).to(torch.bfloat16)):
        assert loaded.dtype == torch.bfloat16
        module = loaded.get_submodule("model.layers.0.mlp.up_proj")
        assert module._packed.dtype == torch.int32 and module.scales.dtype == torch.bfloat16
        error = (logits(loaded).float() - logits(model).float()).abs().max()
        assert error < 0.05 * logits(model).float().std()


def test_choices_are_checked(tmp_path):
    model, _, out = saved(tmp_path, "ptqkit")
    with pytest.raises(ValueError, match="compute"):
        load(out, compute="packd")
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="no quantized checkpoint"):
        load(tmp_path / "float", compute="packed")
    load(tmp_path / "float", compute="auto")
    assert load(out).ptqkit_compute.asked == "dequantize"


def _damage(out, change):
    """Write the tensors anew after ``change(tensors, settings)``."""
    from safetensors.torch import save_file

    tensors = {k: v.clone() for k, v in load_file(out / "model.safetensors").items()}
    config = json.loads((out / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))


P = "model.layers.1.mlp.up_proj"


def _shorter(part):
    def change(tensors, settings):
        tensors[f"{P}.{part}"] = tensors[f"{P}.{part}"][:-1].clone()

    return change


def _fill(part, value):
    def change(tensors, settings):
        tensors[f"{P}.{part}"].fill_(value)

    return change


def _cast(part, dtype):
    def change(tensors, settings):
        tensors[f"{P}.{part}"] = tensors[f"{P}.{part}"].to(dtype)

    return change


def _shape(*shape):
    def change(tensors, settings):
        settings["layers"][P]["shape"] = list(shape)

    return change


def _set(key, value):
    def change(tensors, settings):
        settings["layers"][P][key] = value

    return change


HOSTILE = {
    "short words": _shorter("weight"),
    "short scales": _shorter("scales"),
    "short zeros": _shorter("zero_points"),
    "short g_idx": _shorter("g_idx"),
    "words of another type": _cast("weight", torch.float32),
    "g_idx beyond": _fill("g_idx", 2),
    "g_idx far beyond": _fill("g_idx", 2**31 - 1),
    "g_idx below": _fill("g_idx", -1),
    "g_idx of one group": _fill("g_idx", 0),
    "NaN": _fill("scales", float("nan")),
    "no scale": _fill("scales", 0.0),
    "zero beyond": _fill("zero_points", 200),
    "huge": _shape(2**40, 2**40),
    "negative": _shape(-128, -64),
    "not a shape": _shape("a"),
    "swapped": _shape(64, 128),
    "other bits": _set("bits", 8),
    "impossible bits": _set("bits", 5),
    "no bits": _set("bits", 0),
    "no group": _set("group_size", 0),
    "huge group": _set("group_size", 2**62),
    "other layout": _set("layout", "rows"),
    "unknown layout": _set("layout", "tiles"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_before_a_kernel_runs(name, tmp_path, monkeypatch):
    import ptqkit._core as _core

    _, _, out = saved(tmp_path, "ptqkit_v3", bits=4, act_order=True)
    _damage(out, HOSTILE[name])

    def never(*args):
        raise AssertionError("a kernel ran")

    for kernel in ("packed_matmul", "packed_dequantize", "words_unpack"):
        monkeypatch.setattr(_core, kernel, never)
    with pytest.raises((ValueError, RuntimeError)):
        load(out, compute="packed")
    if name not in ("swapped", "zero beyond"):
        with pytest.raises(ValueError):
            read_matrices(out)


def test_truncated_files_are_refused(tmp_path):
    _, _, out = saved(tmp_path, "ptqkit_v3")
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load(out)


def test_perplexity_is_equal_to_four_digits(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ptqkit.demo import MODEL_DIR, text
    from ptqkit.hf.evaluation.likelihood import perplexity

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    layers = fake_quantize(model, bits=3, group_size=64)
    save_checkpoint(model, layers, None, tmp_path / "out", checkpoint_format="ptqkit_v3")
    found, expected = (
        perplexity(m, tokenizer, [text("test")], window=256, max_tokens=500, progress=False)
        for m in (load(tmp_path / "out", compute="packed"), model)
    )
    assert f"{found.perplexity:.4g}" == f"{expected.perplexity:.4g}"
    assert abs(found.perplexity / expected.perplexity - 1) < 1e-4


def _private_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def test_loading_version_3_takes_no_memory(tmp_path):
    from safetensors.torch import save_file

    from ptqkit.hf.checkpoint.formats import PANELS
    from ptqkit.hf.checkpoint.spec import LayerSpec
    from ptqkit.hf.speed.random_model import random_model
    from ptqkit.hf.speed.shapes import ModelShape

    model = random_model(ModelShape(1024, 3072, 5, 16, 16, 64), "W8", positions=64)
    specs = [
        LayerSpec(name, m.out_features, m.in_features, m.read().grid)
        for name, m in model.named_modules()
        if isinstance(m, PackedLinear)
    ]
    model.config.quantization_config = PANELS.config(specs, linears=[])
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = logits(model)
    del model
    size = (tmp_path / "model.safetensors").stat().st_size
    before = _private_bytes()
    loaded = load(tmp_path)
    assert size > 60e6 and _private_bytes() - before < 0.2 * size
    assert torch.equal(logits(loaded), expected)
    assert _private_bytes() - before < 0.2 * size
