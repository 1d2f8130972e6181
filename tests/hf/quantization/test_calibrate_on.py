"""Layers fitted to the float model's inputs, and OBQ: the same by hand, in both schedules."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.driver_models import build, by_hand, padded_batches, tokens

import ptqkit
from ptqkit.errors import PreflightError
from ptqkit.hf.quantization import run as quantization
from ptqkit.hf.quantization.driver import QuantizationInterrupted, quantize
from ptqkit.recipe.recipe import Recipe

OPTIONS = {"bits": 3, "group_size": 16, "progress": False}
FLOAT = {**OPTIONS, "calibrate_on": "float"}


def same(first, second):
    for name, matrix in first.matrices.items():
        for key in ("codes", "scales", "zero_points", "g_idx", "row_objectives"):
            np.testing.assert_array_equal(
                getattr(matrix, key), getattr(second.matrices[name], key), err_msg=name
            )
    for (name, a), b in zip(
        first.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_schedules_agree_bit_for_bit(name):
    batches = padded_batches(name)
    one = quantize(build(name), "quality", batches, **FLOAT)
    two = quantize(build(name), "quality", batches, **FLOAT, schedule="replay")
    assert (one.report.schedule, two.report.schedule) == ("one-pass", "replay")
    same(one, two)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_every_layer_is_fitted_to_the_float_models_inputs(name):
    batches = padded_batches(name)
    result = quantize(build(name), "reference", batches, **FLOAT)
    rows = result.report.quantized
    groups = {frozenset([r.name, *r.shares_input_with]): r.name for r in rows}
    codes = {}
    for group, first in groups.items():
        ordered = [first, *sorted(group - {first})]
        codes |= by_hand(build(name), [ordered], batches, {"bits": 3, "group_size": 16})
    assert codes.keys() == result.matrices.keys()
    for key, matrix in codes.items():
        np.testing.assert_array_equal(result.matrices[key].codes, matrix.codes, err_msg=key)
        weight = result.model.get_submodule(key).weight
        assert torch.equal(weight, torch.from_numpy(matrix.dequantize()))
    other = quantize(build(name), "reference", batches, **OPTIONS)
    assert any(not np.array_equal(other.matrices[k].codes, codes[k].codes) for k in codes)


def test_quantized_inputs_and_biases_come_from_the_float_model_too():
    parts = {
        "method": "rtn",
        "activations": {"bits": 8, "granularity": "tensor"},
        "bias_correction": True,
        "grid": "minmax",
        **FLOAT,
    }
    one = quantize(build("opt"), Recipe(), padded_batches("opt"), **parts)
    two = quantize(build("opt"), Recipe(), padded_batches("opt"), **parts, schedule="replay")
    same(one, two)
    name = "model.decoder.layers.1.fc2"
    found = [x for r in (one, two) for x in (r.activations[name].scale,)]
    assert torch.equal(*map(torch.as_tensor, found))
    seen = []
    model = build("opt")
    model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        for batch in padded_batches("opt"):
            rows = batch["attention_mask"].bool()
            model(**batch)
            seen[-1] = seen[-1].reshape(*rows.shape, -1)[rows]
    x = torch.cat(seen)
    span = max(float(x.max()), 0) - min(float(x.min()), 0)
    assert float(one.activations[name].scale) == pytest.approx(span / 255, rel=1e-5)


@pytest.mark.parametrize("schedule", ["one-pass", "replay"])
def test_a_run_that_ends_early_leaves_the_model_as_it_was(monkeypatch, schedule):
    real, calls = quantization.solve_group, []

    def solve(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(quantization, "solve_group", solve)
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(QuantizationInterrupted, match="the model is unchanged") as info:
        quantize(model, "quality", tokens(), **FLOAT, schedule=schedule)
    assert info.value.quantized == []
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_it_excludes_propagated_errors_and_holds_for_the_whole_run():
    with pytest.raises(ValueError, match=r"error_propagation=0.5 cannot be combined with calib"):
        Recipe(error_propagation=0.5, calibrate_on="float")
    with pytest.raises(ValueError, match="cannot hold calibrate_on: it holds for the whole run"):
        Recipe(overrides={"*": {"calibrate_on": "float"}})


# --- OBQ ---


@pytest.mark.parametrize("schedule", ["one-pass", "replay"])
def test_obq_is_that_of_the_arrays(schedule):
    model, batches = build(), padded_batches()
    result = quantize(model, "obq", batches, bits=3, progress=False, schedule=schedule)
    again = build()
    name = "model.layers.0.self_attn.q_proj"
    H = ptqkit.Hessian(32)
    hook = again.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    for batch in batches:
        seen = []
        with torch.no_grad():
            again(**batch)
        H.update(seen[0], batch["attention_mask"].bool())
    hook.remove()
    weight = again.get_submodule(name).weight.detach()
    want = ptqkit.obq(weight, H, bits=3)
    np.testing.assert_array_equal(result.matrices[name].codes, want.codes)
    row = result.report[name]
    assert row.method == "obq" and row.damping == 0.01 and row.objective < row.objective_rtn
    assert len(result.matrices) == 14 and result.matrices[name].scales.shape == (32, 1)


def test_obq_may_be_for_some_layers():
    overrides = {"*.o_proj": {"method": "obq"}}
    mixed = quantize(build(), "reference", tokens(), **OPTIONS, overrides=overrides)
    assert {r.method for r in mixed.report.quantized} == {"gptq", "obq"}
    data = tokens()
    plain = quantize(build(), "reference", data, **OPTIONS)
    first = "model.layers.0.self_attn.o_proj"
    assert not np.array_equal(mixed.matrices[first].codes, plain.matrices[first].codes)


def test_obq_that_would_take_hours_is_refused(monkeypatch):
    monkeypatch.setattr("ptqkit.nn.matrix_solver.OBQ_HOURS", 1e-9)
    with pytest.raises(PreflightError, match="method 'obq' would take about .*'gptq', for single"):
        quantize(build(), "obq", tokens(), progress=False)
    quantize(build(), "reference", tokens(), **OPTIONS)


def test_obq_needs_data():
    with pytest.raises(PreflightError, match="method 'obq' needs calibration data"):
        quantize(build(), "obq", progress=False)
