"""Damaged and hostile files: one clear error with the tensor's or the file's name."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from helpers.checkpoint_models import build, fake_quantize, quantize_inputs
from safetensors.torch import load_file, save_file

from ptqkit.hf.checkpoint.reader import load, read_matrices
from ptqkit.hf.checkpoint.save import save_checkpoint
from ptqkit.recipe.options import ActivationQuantization

NAME = "model.layers.1.mlp.down_proj"
AUTO = transformers.AutoModelForCausalLM.from_pretrained
# Grid of the weights, quantized inputs or none, format, names of scales and of codes.
FILES = {
    "ptqkit": ({"bits": 3, "group_size": 32, "act_order": True}, None, "scales", "weight"),
    "gptq_v2": (
        {"bits": 4, "group_size": 32, "act_order": True, "scale_dtype": "float16"},
        None,
        "scales",
        "qweight",
    ),
    "compressed-tensors": (
        {"bits": 4, "group_size": 32, "symmetric": True},
        None,
        "weight_scale",
        "weight_packed",
    ),
    "int-quantized": (
        {"bits": 8, "group_size": None},
        ActivationQuantization(8),
        "weight_scale",
        "weight",
    ),
}


@pytest.fixture(scope="module", params=FILES)
def saved(request, tmp_path_factory):
    """Folder of a good checkpoint, its tensors, and the names of its scales and codes."""
    grid, inputs, scales, codes = FILES[request.param]
    model = build("llama")
    layers = fake_quantize(model, **grid)
    quantizers = {} if inputs is None else quantize_inputs(model, layers, inputs)
    name = request.param if inputs is None else "compressed-tensors"
    folder = tmp_path_factory.mktemp("saved") / "out"
    save_checkpoint(model, layers, None, folder, checkpoint_format=name, activations=quantizers)
    # Copies: what load_file returns lies in the very file that is written over.
    tensors = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    yield request.param, folder, tensors, f"{NAME}.{scales}", f"{NAME}.{codes}"


def _refused(saved, name, value, match):
    _, folder, tensors, *_ = saved
    file = folder / "model.safetensors"
    save_file({**tensors, name: value}, file, {"format": "pt"})
    try:
        for function in (load, read_matrices):
            with pytest.raises(ValueError, match=match):
                function(folder)
    finally:
        save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 0.0, -0.5])
def test_scales_that_are_none(saved, bad):
    kind, folder, tensors, scales, _ = saved
    value = tensors[scales].clone()
    value.view(-1)[-1] = bad
    _refused(saved, scales, value, f"{scales} must be positive and finite, not {bad}")
    if kind == "ptqkit":
        save_file({**tensors, scales: value}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"{NAME}: scales must be positive.*damaged"):
            AUTO(folder)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("bad", [-1, 4, 99])
def test_groups_out_of_range(saved, bad):
    kind, folder, tensors, *_ = saved
    name = f"{NAME}.g_idx"
    if name not in tensors:
        assert kind in ("compressed-tensors", "int-quantized")
        return
    value = tensors[name].clone()
    value[3] = bad
    _refused(saved, name, value, rf"{name} must lie in \[0, 4\), not .*{bad}")
    if kind == "ptqkit":
        save_file({**tensors, name: value}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"{NAME}: g_idx must lie in"):
            AUTO(folder)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_other_dtypes(saved):
    kind, _, tensors, scales, codes = saved
    _refused(
        saved, codes, tensors[codes].to(torch.int16), f"{codes} must be u?int.*not torch.int16"
    )
    _refused(saved, scales, tensors[scales].double(), f"{scales} must be .*not torch.float64")
    if kind == "ptqkit":
        _refused(saved, scales, tensors[scales].half(), f"{scales} must be float32, not")


def test_missing_tensors(saved):
    _, folder, tensors, scales, codes = saved
    file = folder / "model.safetensors"
    for name in (codes, scales):
        save_file({k: v for k, v in tensors.items() if k != name}, file, {"format": "pt"})
        # Without its scales a layer is not known to be quantized; its codes are left over then.
        with pytest.raises((ValueError, RuntimeError)):
            load(folder)
    file.write_bytes(file.read_bytes()[:1000])
    for function in (load, read_matrices):
        with pytest.raises(ValueError, match="damaged, or not a safetensors file"):
            function(folder)
    save_file(tensors, file, {"format": "pt"})


def test_malformed_descriptions(saved):
    kind, folder, *_ = saved
    path = folder / "config.json"
    good = path.read_text()
    config = json.loads(good)
    settings = config["quantization_config"]
    key = {"ptqkit": "layers", "gptq_v2": "group_size"}.get(kind, "config_groups")

    def changed(**values):
        return json.dumps({**config, "quantization_config": {**settings, **values}})

    try:
        for text, match in (
            ("", "not valid JSON"),
            ("{", "not valid JSON"),
            ("[" * 100_000, "not valid JSON"),
            ("\x00\x01", "not valid JSON"),
            ("[]", "must hold a JSON object, not list"),
            ('"text"', "must hold a JSON object, not str"),
            (json.dumps({**config, "quantization_config": [1]}), "is not an object: list"),
            (changed(**{key: "x" if kind == "gptq_v2" else [1, 2]}), "config.json"),
        ):
            path.write_text(text)
            for function in (load, read_matrices):
                with pytest.raises(ValueError, match=match):
                    function(folder)
        path.write_bytes(b'{"a": "\xff"}')
        with pytest.raises(ValueError, match="not valid JSON"):
            read_matrices(folder)
        for bad, match in (
            ("LlamaForCausalLM", "list of class names"),
            ([3], "list of class names"),
            (["pipeline"], "names pipeline, not a model"),
            (["LlamaConfig"], "names LlamaConfig, not a model"),
        ):
            path.write_text(json.dumps({**config, "architectures": bad}))
            with pytest.raises(ValueError, match=match):
                load(folder)
    finally:
        path.write_text(good)


def test_an_index_that_leaves_its_folder(saved, tmp_path):
    _, folder, tensors, *_ = saved
    index = folder / "model.safetensors.index.json"
    outside = tmp_path / "secret.safetensors"
    save_file(tensors, outside, {"format": "pt"})
    try:
        for file in (str(outside), f"../../{tmp_path.name}/{outside.name}", "sub/x", "..", ""):
            index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file)}))
            for function in (load, read_matrices):
                with pytest.raises(ValueError, match="must lie in the folder of its index"):
                    function(folder)
        for text, match in (
            ("{}", "has no weight_map"),
            ('{"weight_map": 3}', "has no weight_map"),
            ('{"weight_map": {"a": 3}}', "has no weight_map"),
            ("[1]", "must hold a JSON object"),
        ):
            index.write_text(text)
            with pytest.raises(ValueError, match=match):
                load(folder)
    finally:
        index.unlink()
