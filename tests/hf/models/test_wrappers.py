"""Compiled models run eagerly and stay compiled; adapters and other wrappers are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.driver_models import build, tokens
from torch import nn

import ptqkit
from ptqkit import GPTQ, ActivationQuantization
from ptqkit.errors import PreflightError, UnsupportedModuleError
from ptqkit.nn.forward import calibration_mode

OPTIONS = {"bits": 4, "group_size": 16, "progress": False}


def callback():
    return torch._C._dynamo.eval_frame.get_eval_frame_callback()


def compile_whole(model):
    return torch.compile(model, backend="eager")


def compile_in_place(model):
    model.compile(backend="eager")
    return model


def compile_blocks(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def compile_forward(model):
    layer = model.model.layers[0]
    layer.forward = torch.compile(layer.forward, backend="eager")
    return model


@pytest.mark.parametrize(
    "compiled", [compile_whole, compile_in_place, compile_blocks, compile_forward]
)
def test_compiled_models_run_eagerly_and_stay_compiled(compiled, tmp_path):
    expected = ptqkit.quantize(build(), "quality", tokens(), **OPTIONS)
    model = compiled(build())
    before = [dict(m.__dict__) for m in model.modules()]
    result = ptqkit.quantize(model, "quality", tokens(), **OPTIONS)
    assert callback() is None
    assert result.report.schedule == "one-pass" and list(result.matrices) == list(expected.matrices)
    for name, matrix in result.matrices.items():
        assert np.array_equal(matrix.codes, expected.matrices[name].codes)
    for old, module in zip(before, model.modules(), strict=True):
        for key in ("forward", "_compiled_call_impl"):
            assert module.__dict__.get(key) is old.get(key)
    with torch.no_grad():
        logits = expected.model(tokens(1)).logits
        # Also by what is compiled: it sees the new weights.
        torch.testing.assert_close(model(tokens(1)).logits, logits)
    result.save(tmp_path / "saved")
    assert torch.equal(ptqkit.load(tmp_path / "saved")(tokens(1)).logits, logits)


def test_classes_and_functions_that_are_compiled():
    def count(frames):
        def backend(graph, inputs):
            frames.append(graph)
            return graph.forward

        return backend

    frames = []

    @torch.compile(backend=count(frames))
    def double(x):
        return 2 * x

    class Doubled(nn.Module):
        @torch.compile(backend=count(frames))
        def forward(self, x):
            return double(x)

    module = Doubled()
    with calibration_mode(module):
        assert module(torch.ones(2)).tolist() == [2, 2] and not frames
        assert callback() is None
    assert "forward" not in module.__dict__
    assert module(torch.ones(2)).tolist() == [2, 2] and frames


def test_compiled_code_sees_quantizers_that_came_later():
    model = compile_in_place(build())
    with torch.no_grad():
        model(tokens(1))
        parts = [GPTQ(bits=8, group_size=16), ActivationQuantization(4, "token")]
        result = ptqkit.quantize(model, parts, tokens(), progress=False)
        logits = model(tokens(1)).logits
        model._compiled_call_impl = None
        torch.testing.assert_close(logits, model(tokens(1)).logits)
    assert len(result.activations) == 14


def test_a_compiled_block_that_renames_weights_is_refused():
    model = build()
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")
    for run in (ptqkit.quantize, ptqkit.equalize):
        options = {"recipe": "quality"} if run is ptqkit.quantize else {}
        with pytest.raises((PreflightError, UnsupportedModuleError), match="_orig_mod back"):
            run(model, calibration=tokens(), **options)


class Adapter(nn.Module):
    """What PEFT puts in the place of a linear layer."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.lora_A = base_layer, nn.Linear(32, 4)

    def merge(self):
        pass

    def forward(self, x):
        return self.base_layer(x)


@pytest.mark.parametrize("run", ["quantize", "equalize"])
def test_adapters_are_refused_before_the_run(run):
    model = build()
    attention = model.model.layers[1].self_attn
    attention.q_proj = Adapter(attention.q_proj)
    with pytest.raises((PreflightError, UnsupportedModuleError), match="merge_and_unload") as error:
        getattr(ptqkit, run)(model, calibration=tokens(), progress=False)
    assert "layers.1.self_attn.q_proj" in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=16, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build(), config)
    with pytest.raises(PreflightError, match="merge_and_unload"):
        ptqkit.quantize(model, "quality", tokens(), **OPTIONS)
    merged = model.merge_and_unload()
    assert len(ptqkit.quantize(merged, "quality", tokens(), **OPTIONS).matrices) == 14


def test_parallel_wrappers_are_refused():
    with pytest.raises(PreflightError, match=r"give the model itself, model\.module"):
        ptqkit.quantize(nn.DataParallel(build()), "quality", tokens(), **OPTIONS)
