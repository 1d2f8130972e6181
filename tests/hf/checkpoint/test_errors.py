"""Refusals, interrupted writes, incomplete directories: clear errors, nothing half-written."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.checkpoint_models import assert_same_matrices, build, fake_quantize, logits

from ptqkit import _folders
from ptqkit.arrays.matrix import WeightGrid
from ptqkit.hf.checkpoint import compressed_tensors, files
from ptqkit.hf.checkpoint.formats import format_problems
from ptqkit.hf.checkpoint.reader import load, read_matrices
from ptqkit.hf.checkpoint.save import save_checkpoint
from ptqkit.hf.checkpoint.spec import LayerSpec

SYMMETRIC = {"bits": 4, "group_size": 32, "symmetric": True}
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def quantized():
    model = build("llama")
    return model, fake_quantize(model, **SYMMETRIC)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _refused(model, layers, folder, format, *patterns):
    with pytest.raises(ValueError) as caught:
        save_checkpoint(model, layers, None, folder / "out", checkpoint_format=format)
    for pattern in patterns:
        assert pattern in str(caught.value), str(caught.value)
    assert list(folder.iterdir()) == []


def test_compressed_tensors_refuses_and_names_cause_and_layers(tmp_path):
    model = build("llama")
    overrides = {
        "q_proj": {"symmetric": False},
        "k_proj": {"bits": "ternary", "group_size": 8},
    }
    layers = fake_quantize(model, overrides=overrides, **SYMMETRIC)
    _refused(
        model,
        layers,
        tmp_path,
        "compressed-tensors",
        "2 problem(s)",
        f"{Q_PROJ}: compressed-tensors loads asymmetric",
        "model.layers.0.self_attn.k_proj: compressed-tensors has no ternary type",
        "(and model.layers.1.self_attn.k_proj)",
    )
    model = build("llama")
    layers = fake_quantize(model, act_order=True, **SYMMETRIC)
    _refused(
        model, layers, tmp_path, "compressed-tensors", "cannot carry g_idx", "(and 13 more layers)"
    )
    model = build("gpt2")
    layers = fake_quantize(model, **SYMMETRIC)
    _refused(model, layers, tmp_path, "compressed-tensors", "nn.Linear only, not Conv1D")


@pytest.mark.parametrize("name", ["auto", "compressed-tensors", "gptq", "ptqkit"])
def test_modules_that_the_class_does_not_build_are_refused(tmp_path, name):
    model = build("llama")
    for block in model.model.layers:
        block.mlp.other = block.mlp.up_proj
        del block.mlp.up_proj
    layers = fake_quantize(model, scale_dtype="float16", **SYMMETRIC)
    words = "layers.0.mlp.other: LlamaForCausalLM does not build this module"
    _refused(model, layers, tmp_path, name, words)


def test_gptq_refuses_what_it_cannot_carry(tmp_path):
    model = build("llama")
    layers = fake_quantize(model, bits=4, group_size=32, scale_dtype="float16")
    name = next(n for n, q in layers.items() if q.zero_points.min() > 1)
    zeros = layers[name].zero_points.copy()
    zeros[0, 0] = 0
    layers[name] = dataclasses.replace(layers[name], zero_points=zeros)
    weight = torch.from_numpy(layers[name].dequantize())
    model.get_submodule(name).weight.data.copy_(weight)
    _refused(
        model, layers, tmp_path, "gptq", "1 problem(s)", name, "zero-point of 0", "min_zero_point=1"
    )
    assert save_checkpoint(model, layers, None, tmp_path / "v2", checkpoint_format="gptq_v2").format
    assert_same_matrices(read_matrices(tmp_path / "v2"), layers)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("llama", {"bits": 5, "group_size": 32}, "no 5-bit layout"),
        ("llama", {"bits": "ternary", "group_size": 8}, "no ternary type"),
        ("gpt2", {"bits": 4, "group_size": 32}, "not Conv1D"),
        (
            "llama",
            {"bits": 4, "group_size": 32, "overrides": {"up_proj": {"bits": 3}}},
            "one bits and group_size for all layers: 3 bit group 32, 4 bit group 32",
        ),
    ],
)
def test_gptq_refusals(kind, options, expected, tmp_path):
    model = build(kind)
    layers = fake_quantize(model, scale_dtype="float16", min_zero_point=1, **options)
    _refused(model, layers, tmp_path, "gptq", expected)


def test_scales_must_be_representable_where_they_are_stored(tmp_path):
    model = build("llama", torch.bfloat16)
    layers = fake_quantize(model, scale_dtype="float32", **SYMMETRIC)
    _refused(model, layers, tmp_path, "compressed-tensors", "scale_dtype='bfloat16'", Q_PROJ)
    info = save_checkpoint(model, layers, None, tmp_path / "out")
    assert info.format == "ptqkit" and "not exactly representable in bfloat16" in info.reason
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    model = build("llama")
    layers = fake_quantize(model, **SYMMETRIC)
    _refused(model, layers, build_dir(tmp_path), "gptq", "scale_dtype='float16'")


def build_dir(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_a_model_that_does_not_hold_the_codes_is_refused(quantized, tmp_path):
    model, layers = quantized
    model.get_submodule(Q_PROJ).weight.data[0, 0] += 1e-3
    _refused(model, layers, tmp_path, "auto", "not the dequantized codes for 1 layer(s)", Q_PROJ)


def test_false_fields_are_refused(quantized, tmp_path):
    model, layers = quantized
    q = layers[Q_PROJ]
    _refused(model, {}, tmp_path, "auto", "layers is empty")
    _refused(
        model, {"model.nothing": q}, tmp_path, "auto", "'model.nothing', which is not a module"
    )
    _refused(model, {Q_PROJ: q.rows(0, 3)}, tmp_path, "auto", "codes have shape (3, 64)")
    _refused(
        model,
        layers,
        tmp_path,
        "awq",
        "checkpoint_format must be one of 'compressed-tensors', 'gptq', ",
        "'awq'",
    )
    wrong = dataclasses.replace(q, zero_points=q.zero_points + np.uint8(1))
    _refused(model, {Q_PROJ: wrong}, tmp_path, "auto", "not the middle of the grid")
    wrong = dataclasses.replace(q, scales=q.scales * np.float32("nan"))
    _refused(model, {Q_PROJ: wrong}, tmp_path, "auto", "scales are not finite")
    norm = {"model.embed_tokens": q}
    _refused(model, norm, tmp_path, "auto", "Embedding module is neither nn.Linear nor Conv1D")


def test_tied_layers_are_refused(tmp_path):
    import ptqkit

    model = build("qwen2")
    q = ptqkit.rtn(model.lm_head.weight.detach().numpy(), **SYMMETRIC)
    _refused(model, {"lm_head": q}, tmp_path, "auto", "lm_head: its weight is tied")


def test_problems_are_known_from_the_recipe_alone():
    spec = LayerSpec("a.0.b", 64, 48, WeightGrid(4, 32, True))
    assert format_problems([spec], "ptqkit") == []
    [problem] = format_problems([spec], "compressed-tensors")
    assert problem == "a.0.b: group_size 32 does not divide 48 inputs"
    odd = LayerSpec("a.0.b", 63, 60, WeightGrid(3, None, False))
    problems = format_problems([odd], "gptq")
    assert len(problems) == 2 and all("not whole words" in p for p in problems)


class _Full:
    """A file that runs out of space after some bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def _fail_in_the_middle(monkeypatch, error):
    if error is OSError:

        def opener(path, mode):
            return _Full(open(path, mode), 60_000)

        monkeypatch.setattr(files, "open", opener, raising=False)
        return "No space left"

    packed, calls = compressed_tensors.compressed_pack, []

    def pack(codes, bits):
        calls.append(1)
        if len(calls) == 5:
            raise error("stopped in the middle")
        return packed(codes, bits)

    monkeypatch.setattr(compressed_tensors, "compressed_pack", pack)
    return "stopped in the middle"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_write_leaves_nothing(existing, error, quantized, tmp_path, monkeypatch):
    model, layers = quantized
    target = tmp_path / "out"
    if existing:
        save_checkpoint(model, layers, {"run": 1}, target)
    before = _contents(tmp_path)
    with monkeypatch.context() as patch:
        message = _fail_in_the_middle(patch, error)
        with pytest.raises(error, match=message):
            save_checkpoint(model, layers, {"run": 2}, target, overwrite=True)
    assert _contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if existing else [])
    save_checkpoint(model, layers, {"run": 2}, target, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert json.loads((target / "ptqkit_recipe.json").read_text()) == {"run": 2}


def test_a_failed_rename_puts_the_old_checkpoint_back(quantized, tmp_path, monkeypatch):
    model, layers = quantized
    target = tmp_path / "out"
    save_checkpoint(model, layers, None, target)
    before, rename = _contents(tmp_path), os.rename

    def failing(source, destination):
        if str(source).endswith(".tmp"):
            raise PermissionError("no")
        rename(source, destination)

    monkeypatch.setattr(_folders, "_exchange", lambda one, other: False)
    monkeypatch.setattr(_folders.os, "rename", failing)
    with pytest.raises(PermissionError):
        save_checkpoint(model, layers, {"run": 2}, target, overwrite=True)
    assert _contents(tmp_path) == before


def test_names_that_are_taken(quantized, tmp_path):
    model, layers = quantized
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    (tmp_path / "empty").mkdir()
    before = _contents(tmp_path)
    for name, overwrite, message in (
        ("file", True, "is a file"),
        ("mine", False, "not empty: give overwrite=True"),
        ("mine", True, "no config.json: not a checkpoint, kept"),
    ):
        with pytest.raises(FileExistsError, match=message):
            save_checkpoint(model, layers, None, tmp_path / name, overwrite=overwrite)
    assert _contents(tmp_path) == before
    save_checkpoint(model, layers, None, tmp_path / "empty")
    save_checkpoint(model, layers, None, tmp_path / "new" / "deep")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_checkpoint(model, layers, None, tmp_path / "empty")


def test_space_is_checked_before_writing(quantized, tmp_path, monkeypatch):
    model, layers = quantized
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(_folders.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"bytes needed, 1,000 free") as caught:
        save_checkpoint(model, layers, None, tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, None, "much"])
def test_a_shard_size_that_cannot_be(quantized, tmp_path, size):
    model, layers = quantized
    with pytest.raises(ValueError, match="max_shard_size must be"):
        save_checkpoint(model, layers, None, tmp_path / "out", max_shard_size=size)
    assert list(tmp_path.iterdir()) == []


def test_shards(quantized, tmp_path):
    model, layers = quantized
    info = save_checkpoint(model, layers, None, tmp_path / "out", max_shard_size="40KB")
    shards = [f for f in info.files if f.endswith(".safetensors")]
    assert len(shards) > 2 and "model.safetensors.index.json" in info.files
    assert info.bytes == sum(len(b) for b in _contents(tmp_path / "out").values())
    loaded, found = load(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())
    assert torch.equal(logits(loaded), logits(model))
    assert_same_matrices(read_matrices(tmp_path / "out"), layers)
    (tmp_path / "out" / shards[1]).unlink()
    for function in (load, read_matrices):
        with pytest.raises(FileNotFoundError, match=f"lacks {shards[1]}"):
            function(tmp_path / "out")


def test_load_errors(quantized, tmp_path):
    model, layers = quantized
    for function in (load, read_matrices):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            function(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="no config.json"):
            function(tmp_path)
    out = tmp_path / "out"
    save_checkpoint(model, layers, None, out, checkpoint_format="ptqkit")
    config = json.loads((out / "config.json").read_text())
    (out / "model.safetensors").rename(tmp_path / "aside")
    for function in (load, read_matrices):
        with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
            function(out)
    (tmp_path / "aside").rename(out / "model.safetensors")

    config["quantization_config"]["format_version"] = 4
    (out / "config.json").write_text(json.dumps(config))
    for function in (load, read_matrices, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="format version 4.*newer ptqkit"):
            function(out)
    config["quantization_config"] = {"quant_method": "awq"}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'awq' is not read"):
        read_matrices(out)
    (out / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        load(out)


def test_a_checkpoint_that_does_not_fit_the_model_is_an_error(quantized, tmp_path):
    model, layers = quantized
    out = tmp_path / "out"
    save_checkpoint(model, layers, None, out, checkpoint_format="ptqkit")
    config = json.loads((out / "config.json").read_text())
    for key, value, message in (
        ("num_hidden_layers", 1, "layers.1.* has no such module"),
        (
            "intermediate_size",
            64,
            r"down_proj: saved with shape \[64, 128\], the model has \[64, 64\]",
        ),
        ("num_hidden_layers", 3, "random numbers"),
    ):
        (out / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ValueError, match=message):
            load(out)
