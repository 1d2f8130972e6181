"""The quantizer as a plugin of transformers, and everything that comes along with the weights."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from helpers.checkpoint_models import build, fake_quantize, logits
from helpers.data import SHARED
from transformers.quantizers import auto

from ptqkit.hf.checkpoint import plugin
from ptqkit.hf.checkpoint.reader import load
from ptqkit.hf.checkpoint.save import save_checkpoint


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("bits", [3, 8, "ternary"])
def test_without_the_plugin_loading_fails_instead_of_guessing(kind, bits, tmp_path, monkeypatch):
    model = build(kind)
    layers = fake_quantize(model, bits=bits, group_size=8)
    save_checkpoint(model, layers, None, tmp_path / "out", checkpoint_format="ptqkit")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "ptqkit")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "ptqkit")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_registering_twice_is_harmless_and_a_stranger_is_noticed(monkeypatch):
    plugin.register_format()
    plugin.register_format()
    assert auto.AUTO_QUANTIZER_MAPPING["ptqkit"] is plugin.PtqkitQuantizer

    class Stranger:
        pass

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "ptqkit", Stranger)
    with pytest.raises(RuntimeError, match="'ptqkit' is taken by.*Stranger"):
        plugin.register_format()


def test_a_new_process_needs_one_call(tmp_path):
    model = build("gpt2")
    layers = fake_quantize(model, bits=3, group_size=16)
    save_checkpoint(model, layers, None, tmp_path / "out")
    torch.save(logits(model), tmp_path / "logits.pt")
    code = """
import sys, torch
from ptqkit.hf.checkpoint.reader import load
state = torch.get_rng_state()
threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
model = load(sys.argv[1] + "/out")
assert not model.training
assert torch.equal(state, torch.get_rng_state()), "seed"
assert (threads, dtype) == (torch.get_num_threads(), torch.get_default_dtype())
with torch.no_grad():
    found = model(torch.arange(3, 23)[None]).logits
assert torch.allclose(found, torch.load(sys.argv[1] + "/logits.pt"), rtol=0, atol=1e-6)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr


def test_saving_leaves_the_model_and_the_seed_as_they_are(tmp_path):
    model = build("llama").train()
    layers = fake_quantize(model, bits=4, group_size=32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, state = model.config.to_dict(), torch.get_rng_state()
    save_checkpoint(model, layers, None, tmp_path / "out")
    assert model.training and model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


class _Report:
    def to_json(self, path):
        path.write_text(json.dumps({"rows": 3}))


class _Recipe:
    def to_dict(self):
        return {"bits": 4}


@pytest.mark.parametrize("format", ["ptqkit", "compressed-tensors"])
def test_everything_comes_along(format, tmp_path):
    if not (SHARED / "stories260k").is_dir():
        pytest.skip("stories260k is not here (expected under ../shared/data)")
    source = SHARED / "stories260k"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    model.generation_config.temperature = 0.7  # set without do_sample: save_pretrained would refuse
    layers = fake_quantize(model, bits=4, group_size=4, symmetric=True)
    info = save_checkpoint(
        model,
        layers,
        _Recipe(),
        tmp_path / "out",
        checkpoint_format=format,
        tokenizer=tokenizer,
        report=_Report(),
    )
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "ptqkit_recipe.json",
        "ptqkit_report.json",
    } <= set(info.files)
    assert json.loads((tmp_path / "out/ptqkit_recipe.json").read_text()) == {"bits": 4}
    assert json.loads((tmp_path / "out/ptqkit_report.json").read_text()) == {"rows": 3}
    assert str(info.directory) in str(info) and format in str(info)
    loaded = load(tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Once upon a time"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert loaded.generation_config.temperature == 0.7
    made = [
        m.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=5, do_sample=False)
        for m in (model, loaded)
    ]
    assert torch.equal(*made)
