"""Tuning: what changes and what does not, which step is kept, and that files hold the result."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers import expert_models
from helpers.driver_models import build, padded_batches, tokens

import ptqkit
from ptqkit.errors import CalibrationError, PreflightError, UnsupportedModuleError, UsageError
from ptqkit.hf import (
    FloatWeights,
    TuningInterrupted,
    own_text,
    prepare_calibration,
    quantize,
    read_matrices,
    tune,
)
from ptqkit.hf.quantization import tuning, tuning_step
from ptqkit.hf.quantization.float_logits import (
    counted_logits,
    joined_windows,
    model_call,
    record_logits,
    split_windows,
)
from ptqkit.hf.quantization.tuning import TuningOptions, split_held_out
from ptqkit.hf.quantization.tuning_memory import measure_memory
from ptqkit.recipe.recipe import Recipe
from ptqkit.reference.tuning import divergence as divergence_twin

OPTIONS = {"bits": 2, "group_size": 16, "progress": False}
QUICK = {"progress": False, "samples": 16, "rate": 1e-3, "patience": 99}


def bits(model):
    return {n: p.detach().clone() for n, p in model.state_dict().items()}


def differing(state, other):
    return [n for n, p in state.items() if not torch.equal(p, other[n])]


def quantized(name="llama", data=None, **changes):
    """A quantized model, the float one, and the data."""
    model = build(name)
    data = tokens(16) if data is None else data
    result = quantize(model, "rtn", data, **{**OPTIONS, **changes})
    return result, build(name), data


def mean_divergence(model, floats, windows):
    """By the twin, in float64, over all windows."""
    total = count = 0
    with torch.no_grad():
        for window in windows:
            rows = [
                counted_logits(m(**window).logits, window).double().numpy() for m in (floats, model)
            ]
            total += divergence_twin(*rows)[0]
            count += len(rows[0])
    return total / count


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_learns_on_every_shape_of_model_and_changes_scales_and_vectors_alone(name):
    data = padded_batches(name, 16)
    result, floats, _ = quantized(name, data)
    before, matrices = bits(result.model), dict(result.matrices)
    assert tune(result, data, steps=5, float_model=floats, **QUICK) is result
    told, windows = result.tuning, split_windows(data)
    assert told.kept > 0 and told.loss_after < told.loss_before
    assert told.steps == 5 and (told.windows, told.held_out) == (14, 2)
    for key, matrix in result.matrices.items():
        assert matrix.codes is matrices[key].codes
        assert matrix.zero_points is matrices[key].zero_points
        assert (matrix.scales > 0).all() and matrix.row_objectives is None
        weight = result.model.get_submodule(key).weight.detach().numpy()
        expected = matrix.dequantize()
        np.testing.assert_array_equal(weight, expected.T if name == "gpt2" else expected)
    assert any(
        m.scales.tobytes() != matrices[k].scales.tobytes() for k, m in result.matrices.items()
    )
    weights = {f"{key}.weight" for key in result.matrices}
    changed = set(differing(bits(result.model), before))
    vectors = {n for n, p in result.model.state_dict().items() if p.dim() == 1}
    assert changed & weights and changed & vectors and changed <= weights | vectors
    with pytest.raises(PreflightError, match="quantized already"):
        quantize(result.model, "rtn", data, **OPTIONS)
    _, held = split_held_out(16, 8)
    chosen = [windows[i] for i in held]
    found = mean_divergence(result.model, floats, chosen)
    assert found == pytest.approx(told.loss_after, rel=1e-4)


def spoil(result):
    """Change codes as no solver would, which is easy to do better than."""
    rng = np.random.default_rng(0)
    spoiled = {
        key: dataclasses.replace(
            matrix, codes=(matrix.codes ^ (rng.random(matrix.shape) < 0.3)).astype(np.uint8)
        )
        for key, matrix in result.matrices.items()
    }
    for key, matrix in spoiled.items():
        result.model.get_submodule(key).weight.data = torch.from_numpy(matrix.dequantize())
    result.matrices.update(spoiled)
    return spoiled


def test_codes_learn_if_they_are_told_to_and_zero_points_do_not(tmp_path):
    result, floats, data = quantized()
    spoiled = spoil(result)
    options = {**QUICK, "code_rate": 0.1, "own_text": 24}
    tune(result, data, steps=20, float_model=floats, **options)
    told = result.tuning
    assert told.kept > 0 and told.loss_after < 0.8 * told.loss_before
    assert (told.windows, told.held_out) == (14 + 24, 2)  # none of its own text is held out
    changed = {k: int((m.codes != spoiled[k].codes).sum()) for k, m in result.matrices.items()}
    assert told.codes_changed == sum(changed.values()) > 0
    for key, matrix in result.matrices.items():
        assert matrix.codes.dtype == np.uint8 and matrix.codes.max() <= matrix.max_code
        assert matrix.zero_points is spoiled[key].zero_points
        weight = result.model.get_submodule(key).weight.detach().numpy()
        np.testing.assert_array_equal(weight, matrix.dequantize())
    windows = split_windows(prepare_calibration(data, samples=16).batches)
    held = [windows[i] for i in split_held_out(16, 8)[1]]
    found = mean_divergence(result.model, floats, held)
    assert found == pytest.approx(told.loss_after, rel=1e-4)
    result.save(tmp_path)
    for key, matrix in read_matrices(tmp_path).items():
        np.testing.assert_array_equal(matrix.codes, result.matrices[key].codes)


def test_codes_hold_on_to_what_they_are():
    """By a share of the distance in a step; by all of it none ever gets halfway to another."""
    changed, options = [], {**QUICK, "code_rate": 0.2, "checks": 4}
    for hold in (0.0, 5.0):
        result, floats, data = quantized()
        spoil(result)
        tune(result, data, steps=16, float_model=floats, code_hold=hold, **options)
        changed.append(result.tuning.codes_changed)
    assert changed[0] > changed[1] == 0
    result, _, _ = quantized()
    leaves = tuning._Leaves(result.model, result.matrices, torch.float32, True)
    latents = next(iter(leaves.latents.values()))
    with torch.no_grad():
        latents[0, :3] = torch.tensor([1.4, 1.6, -0.2])
    leaves.hold(torch.tensor(0.25))
    torch.testing.assert_close(latents[0, :3].detach(), torch.tensor([1.3, 1.7, -0.15]))
    with pytest.raises(ValueError, match="code_hold must be a number of at least 0, not -1"):
        TuningOptions(code_hold=-1)


def test_text_that_was_written_before_is_learned_from():
    data, options = tokens(16), {**QUICK, "code_rate": 0.1, "batch_size": 4}
    text = own_text(build(), split_windows(prepare_calibration(data, samples=16).batches), 12)
    results = []
    for given in (12, text, text[:6] + text[:6]):
        result, floats, _ = quantized()
        tune(result, data, steps=2, float_model=floats, own_text=given, **options)
        results.append(result.tuning)
    assert results[0].windows == results[2].windows == 14 + 12
    assert results[0].checks == results[1].checks != results[2].checks
    assert results[0].memory["text"] > 0 == results[1].memory["text"]


def replayed(run, put_back, device):
    """Record as a GPU does, without one: what runs again, and where its result lies."""
    run()
    put_back()
    told = torch.zeros(2, dtype=torch.float64)
    return lambda: told.copy_(run()), told


def refused(run, put_back, device):
    run()
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_recorded_step_is_the_step(monkeypatch):
    """Two batches of four windows; where recording fails, steps are run on their own."""
    options = {**QUICK, "code_rate": 0.2, "windows": 8, "checks": 3, "batch_size": 4}
    found = []
    for record in (None, replayed, refused):
        monkeypatch.setattr(tuning_step, "can_record", lambda device: record is not None)  # noqa: B023
        monkeypatch.setattr(tuning_step, "record_graph", record)
        result, floats, data = quantized()
        tune(result, data, steps=6, float_model=floats, **options)
        assert result.tuning.recorded == (record is replayed)
        assert result.tuning.kept
        found.append((result.tuning.checks, bits(result.model)))
    for checks, state in found[1:]:
        assert checks == found[0][0] and not differing(state, found[0][1])


def test_windows_that_differ_are_not_recorded(monkeypatch):
    monkeypatch.setattr(tuning_step, "can_record", lambda device: True)
    data = padded_batches(rows=16)
    result, floats, _ = quantized(data=data)
    tune(result, data, steps=1, float_model=floats, **QUICK)
    assert not result.tuning.recorded


def test_a_recipe_tunes_codes_as_the_function_does():
    model, data = build("llama"), tokens(16)
    changes = {"tune": 8, "tune_codes": 0.2, "tune_own_text": 8}
    result = quantize(model, "rtn", data, **{**OPTIONS, **changes})
    other, floats, _ = quantized()
    tune(other, data, 8, float_model=floats, code_rate=0.2, own_text=8, progress=False)
    assert result.tuning.checks == other.tuning.checks
    assert result.tuning.codes_changed == other.tuning.codes_changed
    for name, value in (("tune_codes", 0.1), ("tune_own_text", 4)):
        with pytest.raises(ValueError, match=f"{name}=.* needs steps of tuning; give tune"):
            Recipe(**{name: value})
        with pytest.raises(ValueError, match="holds for the whole run"):
            Recipe(tune=5, overrides={"*": {name: value}})
    with pytest.raises(ValueError, match="tune_codes must be a number from 0 to 1"):
        Recipe(tune=5, tune_codes=2)


def test_held_out_loss_before_is_that_of_the_model_given():
    result, floats, data = quantized()
    _, held = split_held_out(16, 8)
    windows = split_windows(prepare_calibration(data, samples=16).batches)
    expected = mean_divergence(result.model, floats, [windows[i] for i in held])
    tune(result, data, steps=1, float_model=floats, **QUICK)
    assert result.tuning.loss_before == pytest.approx(expected, rel=1e-4)


def test_no_step_and_no_better_step_change_nothing():
    result, floats, data = quantized()
    before, matrices, report = bits(result.model), dict(result.matrices), result.report.to_json()
    assert tune(result, data, steps=0) is result
    assert result.tuning is None and result.report.to_json() == report
    # Rates so high that every step is worse than none.
    tune(result, data, steps=6, float_model=floats, **{**QUICK, "rate": 30.0, "scale_rate": 30.0})
    assert result.tuning.kept == 0 and result.tuning.loss_after == result.tuning.loss_before
    assert not differing(bits(result.model), before)
    assert all(result.matrices[k] is m for k, m in matrices.items())


def test_stops_when_the_held_out_loss_rises():
    result, floats, data = quantized()
    tune(
        result, data, steps=60, float_model=floats, progress=False, rate=1.0, patience=2, checks=60
    )
    told = result.tuning
    assert told.steps < 60 and told.checks[-1][0] == told.steps
    after = [loss for step, loss in told.checks if step > told.kept]
    assert len(after) == 2 and min(after) >= told.loss_after


def test_a_recipe_tunes_as_the_function_does():
    data = padded_batches(rows=16)
    result = quantize(build(), "rtn", data, **OPTIONS, tune=8)
    other = quantize(build(), "rtn", data, **OPTIONS)
    assert differing(bits(result.model), bits(other.model))
    tune(other, data, steps=8, float_model=build(), progress=False)
    assert not differing(bits(result.model), bits(other.model))
    assert result.report.tuning["steps"] == 8 and "held-out windows" in result.report.table()
    assert result.report.seconds["total"] >= result.report.seconds["tuning"] > 0
    assert json.loads(result.report.to_json())["tuning"]["kept"] == result.tuning.kept
    assert Recipe.from_dict(result.recipe.to_dict()).tune == 8


def test_experts_learn_too():
    data = expert_models.batches()
    options = {**OPTIONS, "group_size": 8}
    result = quantize(expert_models.build("mixtral"), "rtn", data, **options, tune=4)
    model = expert_models.build("mixtral")
    floats = FloatWeights(model)
    other = quantize(model, "rtn", data, **options)
    before = {k: m.scales.tobytes() for k, m in other.matrices.items()}
    tune(other, data, steps=4, float_model=floats, progress=False)
    assert result.tuning.kept and not differing(bits(result.model), bits(other.model))
    changed = [k for k, m in other.matrices.items() if m.scales.tobytes() != before[k]]
    assert any(".experts." in k for k in changed)


def test_the_float_model_may_be_anywhere(tmp_path):
    expected, floats, data = quantized()
    tune(expected, data, steps=2, float_model=floats, **QUICK)
    build().save_pretrained(tmp_path)
    for source in ("weights", "folder", "own folder"):
        model = type(build()).from_pretrained(tmp_path)
        given = {"weights": FloatWeights(model), "folder": tmp_path, "own folder": None}[source]
        result = quantize(model, "rtn", data, **OPTIONS)
        tune(result, data, steps=2, float_model=given, **QUICK)
        assert result.tuning.kept and not differing(bits(result.model), bits(expected.model))


def test_float_models_that_are_none():
    result, _, data = quantized()
    with pytest.raises(UsageError, match="FloatWeights"):
        tune(result, data, steps=1)
    with pytest.raises(UsageError, match="the quantized model itself"):
        tune(result, data, steps=1, float_model=result.model)
    with pytest.raises(UsageError, match="another model object"):
        tune(result, data, steps=1, float_model=FloatWeights(build()))


@pytest.fixture(scope="module")
def stored():
    """A tuned model in float32 that is going to be stored in float16."""
    model, data = build(), tokens(16)
    result = quantize(
        model, "rtn", data, bits=4, group_size=16, symmetric=True, stored_dtype="float16", tune=6,
        progress=False,
    )  # fmt: skip
    assert result.tuning.kept
    assert all(m.scale_dtype == "float16" for m in result.matrices.values())
    assert all(torch.equal(p, p.half().float()) for p in model.parameters() if p.dim() == 1)
    return result, bits(model)


@pytest.mark.parametrize("name", ["ptqkit", "ptqkit_v3", "gptq", "gptq_v2", "compressed-tensors"])
def test_every_format_holds_the_result(tmp_path, stored, name):
    result, tuned = stored
    result.save(tmp_path / "q", name)
    found = read_matrices(tmp_path / "q")
    assert found.keys() == result.matrices.keys()
    for key, matrix in found.items():
        assert torch.equal(torch.from_numpy(matrix.dequantize()), tuned[f"{key}.weight"]), key
    loaded = ptqkit.load(tmp_path / "q", dtype="float32").state_dict()
    vectors = [k for k, v in tuned.items() if v.dim() == 1]
    assert len(vectors) == 5 and all(torch.equal(loaded[k], tuned[k]) for k in vectors)


class _Stop(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, _Stop])
def test_an_end_in_the_middle_leaves_no_trace(monkeypatch, error):
    result, floats, data = quantized()
    model = result.model.train()
    frozen = next(model.parameters()).requires_grad_(False)
    before, matrices = bits(model), dict(result.matrices)
    state = torch.get_rng_state()
    steps = []

    def progress(event):
        steps.append(str(event))
        if len(steps) == 3:
            raise error

    with pytest.raises(TuningInterrupted if error is KeyboardInterrupt else _Stop):
        tune(result, data, float_model=floats, **{**QUICK, "progress": progress})
    assert "tuning [1/150] step 1" in steps[0] and "s left" in steps[0]
    assert not differing(bits(model), before) and result.tuning is None
    assert all(result.matrices[k] is m for k, m in matrices.items())
    assert all(module.training for module in model.modules()) and model.config.use_cache
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not frozen.requires_grad
    assert all(p.requires_grad and p.grad is None for p in model.parameters() if p is not frozen)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()


def test_an_error_while_writing_puts_everything_back(monkeypatch):
    result, floats, data = quantized()
    before, matrices, calls = bits(result.model), dict(result.matrices), []
    original = tuning.dequantize

    def dequantize(matrix):
        calls.append(None)
        if len(calls) == 3:
            raise _Stop
        return original(matrix)

    monkeypatch.setattr(tuning, "dequantize", dequantize)
    with pytest.raises(_Stop):
        tune(result, data, steps=3, float_model=floats, **QUICK)
    assert not differing(bits(result.model), before)
    assert all(result.matrices[k] is m for k, m in matrices.items())


def test_an_interrupted_recipe_carries_the_quantized_model():
    def progress(event):
        if event.stage == "tuning":
            raise KeyboardInterrupt

    with pytest.raises(TuningInterrupted) as caught:
        quantize(build(), "rtn", tokens(16), **{**OPTIONS, "progress": progress}, tune=5)
    assert len(caught.value.result.matrices) == 14


def test_gradients_under_no_grad_and_inference_mode():
    expected, floats, data = quantized()
    tune(expected, data, steps=2, float_model=floats, **QUICK)
    for mode in (torch.no_grad, torch.inference_mode):
        result, floats, data = quantized()
        with mode():
            tune(result, data, steps=2, float_model=floats, **QUICK)
        assert not differing(bits(result.model), bits(expected.model))


def test_half_precision_and_default_dtype():
    for dtype in (torch.bfloat16, torch.float16):
        model, floats, data = build().to(dtype), build().to(dtype), tokens(16)
        with pytest.warns(UserWarning, match="float16") if dtype == torch.float16 else _nothing():
            result = quantize(model, "rtn", data, **OPTIONS)
        tune(result, data, steps=3, float_model=floats, **QUICK)
        assert result.tuning.kept and {p.dtype for p in model.parameters()} == {dtype}
        for matrix in result.matrices.values():
            scales = torch.from_numpy(matrix.scales)
            assert torch.equal(scales, scales.to(dtype).float())


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None


def test_the_head_s_inputs_are_held_where_they_are_enough():
    windows = split_windows(padded_batches(rows=4))
    model = build()
    held = record_logits(model, windows)
    assert held.head is not None and held.held[0].shape == (32, 32)
    assert held.held[1].shape == (20, 32)  # without padding
    with torch.no_grad():
        for index, window in enumerate(windows):
            expected = counted_logits(model(**window).logits, window)
            found = held.rows(index, slice(0, 5))
            torch.testing.assert_close(found, expected[:5], rtol=1e-5, atol=1e-5)
    # Gemma 2 bounds its logits after the head.
    assert record_logits(build("gemma2"), windows).head is None
    before = held.rows(0, slice(0, 5))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(held.rows(0, slice(0, 5)), before)


def test_windows_are_those_of_the_batches():
    batches = padded_batches(rows=6)
    windows = split_windows(batches)
    assert len(windows) == 6 and windows[3]["attention_mask"][0, :7].sum() == 0
    whole = {"input_ids": torch.ones((4, 8), dtype=torch.long), "pixel_values": torch.ones(1, 3)}
    assert split_windows([whole])[0].keys() == whole.keys()
    assert len(split_windows([whole])) == 1
    joined = list(joined_windows([*windows, whole, whole], range(8), 4))
    assert [indices for _, indices in joined] == [[0, 1, 2, 3], [6], [7], [4, 5]]
    assert torch.equal(joined[0][0]["input_ids"], tokens(6)[:4])
    for count, share in ((2, 8), (7, 8), (64, 8), (128, 8), (3, 2)):
        train, held = split_held_out(count, share)
        assert sorted(train + held) == list(range(count)) and held and train
    with pytest.raises(CalibrationError, match="at least 2"):
        split_held_out(1, 8)


def test_memory_is_measured_and_checked_before_anything_runs():
    result, floats, data = quantized()
    with pytest.raises(PreflightError, match=r"tuning needs about .* per window .* memory budget"):
        tune(result, data, float_model=floats, memory_budget="1MB", **QUICK)
    with pytest.raises(PreflightError, match="one window alone"):
        tune(result, data, float_model=floats, memory_budget=1000, **QUICK)
    model = build()
    before = bits(model)
    with pytest.raises(PreflightError, match="batch_size"):
        quantize(model, "rtn", data, **OPTIONS, tune=5, memory_budget="900kB")
    assert not differing(bits(model), before)
    modules = {n: model.get_submodule(n) for n in result.matrices}
    windows = split_windows([{"input_ids": data}])
    one, two = (measure_memory(model, modules, windows, n, 100, 1 << 40) for n in (4, 8))
    assert two.window == one.window and two.fixed == one.fixed
    assert two.step - one.step == pytest.approx(4 * 1.3 * one.window, abs=4)
    # The float model's logits: 16 windows of 32 tokens, 32 values of the head's input each.
    assert one.fixed == 16 * 32 * 32 * 4 + 100 * 40


def test_memory_of_own_text_is_what_the_model_keeps_of_it():
    model, data = build(), tokens(16)
    windows = split_windows([{"input_ids": data}])
    none, some, few, there = (
        measure_memory(model, {}, windows, 4, 100, limit, count, written)
        for limit, count, written in (
            (1 << 40, 0, False), (1 << 40, 100, False), (1 << 20, 100, False), (1 << 40, 100, True)
        )
    )  # fmt: skip
    assert none.text == there.text == 0
    assert there.fixed == some.fixed == none.fixed + 100 * 32 * 32 * 4
    config = model.config
    heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    kept = 2 * config.num_hidden_layers * heads * data.shape[1] * 4
    assert some.texts == 64 and some.text == 64 * (2 * kept + 32 * config.vocab_size)
    assert some.total == max(some.step, some.text) + some.fixed
    assert 1 <= few.texts < 64 and few.text + few.fixed <= 1 << 20


def test_memory_of_a_window_is_what_autograd_keeps():
    model, data = build(), tokens(16)
    layers = [n for n, m in model.named_modules() if "layers" in n and n.endswith("proj")]
    modules = {n: model.get_submodule(n) for n in layers}
    found = measure_memory(model, modules, split_windows([{"input_ids": data}]), 4, 1, 1 << 40)
    # At least the input of every layer (q, k, v share one, as gate and up do), in float32, and no
    # weight: those of one block alone are more than all activations.
    inputs = 2 * 32 * 4 * (32 + 32 + 32 + 64)
    assert inputs < found.window < 40 * inputs


def test_what_cannot_be_tuned():
    with pytest.raises(ValueError, match="activations"):
        Recipe.preset("vector-wise", tune=10)
    with pytest.raises(ValueError, match="holds for the whole run"):
        Recipe(overrides={"*": {"tune": 5}})
    with pytest.raises(ValueError, match="tune"):
        Recipe(tune=-1)
    assert Recipe.preset("rtn", tune=5).needs_calibration() == "tune=5"
    result = quantize(build(), "vector-wise", tokens(4), group_size=None, progress=False)
    with pytest.raises(UnsupportedModuleError, match="no gradient"):
        tune(result, tokens(4), steps=1, float_model=build(), progress=False)
    with pytest.raises(TypeError, match="unknown"):
        tune(result, tokens(4), steps=1, unknown=3)


def test_a_model_without_logits():
    class Bare(torch.nn.Module):
        def forward(self, input_ids):
            return input_ids

    with pytest.raises(UnsupportedModuleError, match="no logits"):
        _call_bare(Bare())


def _call_bare(bare):
    bare.weight = torch.nn.Parameter(torch.zeros(1))
    return model_call(bare, {"input_ids": torch.zeros(1, 2, dtype=torch.long)}, {})


def test_patience_holds_for_codes_too():
    result, floats, data = quantized()
    options = {**QUICK, "patience": 1, "code_rate": 1.0, "rate": 30.0, "scale_rate": 30.0}
    tune(result, data, steps=6, float_model=floats, checks=6, **options)
    assert result.tuning.steps < 6
    other, floats, data = quantized()
    del options["patience"]
    tune(other, data, steps=6, float_model=floats, checks=6, **options)
    assert other.tuning.steps == 6


def test_options_are_named():
    assert TuningOptions().steps == 150 and TuningOptions().code_rate == 0


@pytest.mark.parametrize(
    "name, value",
    [("windows", 0), ("patience", 0), ("own_text", -1), ("held_out", 1), ("checks", 0)],
)
def test_options_without_windows_or_checks_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least"):
        TuningOptions(**{name: value})
