"""A model object quantized twice is refused, and there is a way back to the float weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.driver_models import build, tokens

import ptqkit
from ptqkit import GPTQ, ActivationQuantization, BiasCorrection, Equalize
from ptqkit.errors import PreflightError, UnsupportedModuleError
from ptqkit.hf import FloatWeights

OPTIONS = {"group_size": 16, "progress": False}


def quantize(model, bits=4, **options):
    return ptqkit.quantize(model, "quality", tokens(), bits=bits, **{**OPTIONS, **options})


def codes(result):
    return [m.codes for m in result.matrices.values()]


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_model_object_quantized_twice_is_refused():
    model = build()
    quantize(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    # Copies, dtypes and other recipes change nothing about it.
    for again in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16).float()):
        with pytest.raises(PreflightError, match=r"14 of 14 layers .* load the float model") as e:
            ptqkit.quantize(again, "rtn", bits=8, **OPTIONS)
        assert e.value.has(UnsupportedModuleError) and len(e.value.problems) == 1
    with pytest.raises(UnsupportedModuleError, match="equalize the float model"):
        ptqkit.equalize(model, tokens())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert len(quantize(model, requantize=True).matrices) == 14


def test_layers_left_float_may_be_quantized_later():
    model = build()
    quantize(model, overrides={"*mlp*": "skip"})
    assert len(quantize(model, overrides={"*self_attn*": "skip"}).matrices) == 6
    with pytest.raises(PreflightError, match="14 of 14 layers"):
        quantize(model)


def test_an_interrupted_run_counts():
    def stop(event):
        if event.index == 3:
            raise KeyboardInterrupt

    model = build()
    with pytest.raises(ptqkit.hf.QuantizationInterrupted):
        quantize(model, progress=stop)
    with pytest.raises(PreflightError, match="quantized already in this model object"):
        quantize(model)


def load_whole(model, source):
    model.load_state_dict(source.state_dict())


def load_part(model, source):
    model.model.load_state_dict(source.model.state_dict(), assign=True)


def load_tensors(model, source):
    for old, new in zip(model.parameters(), source.parameters(), strict=True):
        old.data.copy_(new.data)


def load_file(model, source, folder):
    source.save_pretrained(folder)
    from safetensors.torch import load_model

    load_model(model, str(folder / "model.safetensors"), strict=False)


@pytest.mark.parametrize("load", [load_whole, load_part, load_tensors, load_file])
def test_the_mark_vanishes_with_weights_loaded_anew(load, tmp_path):
    expected = codes(quantize(build()))
    model = build()
    quantize(model, bits=3)
    load(model, build(), *([tmp_path] if load is load_file else []))
    assert same(codes(quantize(model)), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_float_weights_bring_everything_back(name):
    parts = [
        Equalize(),
        GPTQ(bits=4, group_size=16),
        ActivationQuantization(8, "tensor"),
        BiasCorrection(),
    ]
    model = build(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        logits = model(tokens(1)).logits
    floats = FloatWeights(model)
    first = ptqkit.quantize(model, parts, tokens(), progress=False)
    floats.restore()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert not hasattr(model.config, "ptqkit_equalized")
    with torch.no_grad():
        assert torch.equal(model(tokens(1)).logits, logits)
    again = ptqkit.quantize(model, parts, tokens(), progress=False)
    assert same(codes(first), codes(again))


def test_a_loop_over_bits_in_a_with_block():
    model = build()
    with FloatWeights(model) as floats:
        for bits in (2, 4, 8):
            floats.restore()
            assert same(codes(quantize(model, bits)), codes(quantize(build(), bits)))
    assert torch.equal(model.lm_head.weight, build().lm_head.weight)
    assert len(quantize(model).matrices) == 14


def test_size_of_the_copy_and_models_that_are_not_float():
    model = build()
    embeddings = model.get_input_embeddings().weight
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    floats = FloatWeights(model)
    assert floats.bytes == parameters - embeddings.numel() * embeddings.element_size()
    quantize(model)
    with pytest.raises(UnsupportedModuleError, match=r"14 layers .* quantized already; load"):
        FloatWeights(model)


def test_float16_on_a_cpu_warns():
    model = build().to(torch.float16)
    with pytest.warns(UserWarning, match=r"float16 on a CPU, .* stored_dtype='float16'"):
        result = ptqkit.quantize(model, "rtn", bits=4, **OPTIONS)
    assert any("float16 on a CPU" in text for text in result.report.warnings)
    result = ptqkit.quantize(build(), "rtn", bits=4, stored_dtype="float16", **OPTIONS)
    assert result.report.warnings == [] and result.stored_dtype == "float16"


def test_a_loaded_checkpoint_that_comes_back_float_is_refused(tmp_path):
    result = quantize(build(), checkpoint_format="gptq_v2")
    result.save(tmp_path / "saved", checkpoint_format="gptq_v2")
    loaded = ptqkit.load(tmp_path / "saved")
    with pytest.raises(PreflightError, match="14 of 14 layers .* quantized already"):
        quantize(loaded)
    loaded.load_state_dict(build().state_dict())
    assert len(quantize(loaded).matrices) == 14


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_loaded_checkpoint_is_one_problem(symmetric, tmp_path):
    quantize(build(), symmetric=symmetric).save(tmp_path / "saved")
    with pytest.raises(PreflightError, match="the model is quantized already; load the") as error:
        quantize(ptqkit.load(tmp_path / "saved"))
    assert len(error.value.problems) == 1
