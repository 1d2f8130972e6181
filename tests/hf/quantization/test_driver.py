"""The driver: pre-flight, report, errors, overrides, interruption, progress, checkpoints."""

from __future__ import annotations

import json
import math
import pickle
import shutil

import numpy as np
import pytest
import torch
import transformers
from helpers.data import SHARED
from helpers.driver_models import WordTokenizer, build, numbers, padded_batches, tokens

import ptqkit
from ptqkit import Recipe
from ptqkit._units import parse_bytes
from ptqkit.errors import (
    CalibrationError,
    NotPositiveDefiniteError,
    PreflightError,
    Problem,
    UnsupportedModuleError,
)
from ptqkit.hf import prepare_calibration, quantize
from ptqkit.hf.models.inputs import match_mask
from ptqkit.hf.models.structure import find_blocks
from ptqkit.hf.progress import ProgressEvent, _RichBar, make_progress
from ptqkit.hf.quantization.driver import QuantizationInterrupted
from ptqkit.nn import matrix_solver, on_grid, statistics
from ptqkit.nn.on_grid import rtn_on_grid
from ptqkit.nn.statistics import TorchHessian

OPTIONS = {"bits": 3, "group_size": 16, "progress": False}


def run(model=None, recipe="reference", data=None, **kwargs):
    model = build() if model is None else model
    return quantize(model, recipe, tokens() if data is None else data, **{**OPTIONS, **kwargs})


def problems(*args, **kwargs):
    """Problems of a run that must stop before any forward pass with the calibration data."""
    model = kwargs.get("model") or (args[0] if args else None)
    with pytest.raises(PreflightError) as error:
        run(*args, **kwargs)
    assert model is None or not any(m._forward_pre_hooks for m in model.modules())
    return error.value.problems


def test_weights_are_the_dequantized_codes():
    for name in ("llama", "gpt2"):
        result = run(build(name), "quality")
        for key, matrix in result.matrices.items():
            module = result.model.get_submodule(key)
            weight = module.weight.detach().numpy()
            if name == "gpt2":
                weight = weight.T
            np.testing.assert_array_equal(weight, matrix.dequantize())
            assert matrix.bits == 3 and matrix.group_size == 16


@pytest.mark.filterwarnings("ignore:the model computes in float16 on a CPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_exact(dtype):
    result = run(build().to(dtype), "quality")
    assert result.report.schedule == "one-pass"
    for key, matrix in result.matrices.items():
        assert matrix.scale_dtype == str(dtype).removeprefix("torch.")
        expected = torch.from_numpy(matrix.dequantize()).to(dtype)
        assert torch.equal(result.model.get_submodule(key).weight, expected)
        step = torch.from_numpy(matrix.scales)
        assert torch.equal(step, step.to(dtype).float())


def test_report_numbers_are_the_definitions():
    model, data = build(), tokens()
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().double().numpy().copy()
    seen = []
    hook = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda m, a: seen.append(a[0].detach())
    )
    with torch.no_grad():
        model(data)
    hook.remove()
    result = run(model, "quality", data)
    row = result.report["model.layers.0.self_attn.q_proj"]
    x = seen[0].double().reshape(-1, 32).numpy()
    h = 2 * x.T @ x / len(x)
    matrix = result.matrices[row.name]
    error = weight - matrix.dequantize()
    rounded = weight - rtn_on_grid(weight.astype(np.float32), matrix)
    y, dy = x @ weight.T, x @ error.T
    assert row.objective == pytest.approx(np.trace(error @ h @ error.T), rel=1e-4)
    assert row.objective_rtn == pytest.approx(np.trace(rounded @ h @ rounded.T), rel=1e-4)
    assert row.improvement == pytest.approx(1 - row.objective / row.objective_rtn)
    assert row.output_sqnr_db == pytest.approx(10 * math.log10((y**2).sum() / (dy**2).sum()), 1e-4)
    weight_sqnr = 10 * math.log10((weight**2).sum() / (error**2).sum())
    assert row.weight_sqnr_db == pytest.approx(weight_sqnr, 1e-4)
    assert row.bits_per_weight == matrix.bits_per_weight
    assert (row.tokens, row.damping, row.shape) == (192, 0.01, (32, 32))


@pytest.mark.parametrize("bits", [2, 3, 8, "ternary"])
@pytest.mark.parametrize("group_size", [8, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rtn_on_grid_is_rtn(bits, group_size, symmetric):
    weight = np.random.default_rng(0).normal(size=(300, 32)).astype(np.float32)
    matrix = ptqkit.rtn(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    np.testing.assert_array_equal(rtn_on_grid(weight, matrix), matrix.dequantize())
    np.testing.assert_array_equal(on_grid.dequantize(matrix), matrix.dequantize())


def test_dequantize_with_permuted_groups():
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(130, 32)).astype(np.float32)
    inputs = generator.normal(size=(99, 32)).astype(np.float32) * np.linspace(
        0.1, 3, 32, dtype="f4"
    )
    hessian = ptqkit.Hessian(32)
    hessian.update(inputs)
    matrix = ptqkit.gptq(weight, hessian, bits=3, group_size=8, order="act")
    assert matrix.permuted_groups
    np.testing.assert_array_equal(on_grid.dequantize(matrix), matrix.dequantize())
    codes = np.rint(weight / matrix.scales[:, matrix.g_idx])
    zeros = matrix.zero_points.astype(np.float32)[:, matrix.g_idx]
    expected = np.clip(codes + zeros, 0, 7) - zeros
    np.testing.assert_array_equal(
        rtn_on_grid(weight, matrix), expected * matrix.scales[:, matrix.g_idx]
    )


def test_gptq_beats_rtn_in_sum_and_feedback_off_equals_it():
    report = run(recipe="quality").report
    totals = report.totals()
    assert totals["objective"] < totals["objective_rtn"] and totals["layers"] == 14
    off = run(recipe="reference", feedback=False)
    for row in off.report.quantized:
        assert row.objective == pytest.approx(row.objective_rtn, rel=1e-6)


def test_report_forms(tmp_path):
    result = run(recipe="quality")
    report = result.report
    dicts = report.to_dicts()
    assert [d["name"] for d in dicts][-1] == "lm_head" and dicts[-1]["status"].startswith("skipped")
    value = json.loads(report.to_json(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text()) == value
    assert value["totals"]["layers"] == 14 and value["layers"][-1]["objective"] is None
    assert value["recipe"] == result.recipe.to_dict()
    table = report.table().splitlines()
    assert len(table) == 14 + 2 + 7 and "lm_head" not in report.table()
    assert "lm_head" in report.table(skipped=True) and str(report) == report.table()
    assert "schedule one-pass" in report.table()
    assert set(report.seconds) == {
        "total",
        "setup",
        "forward",
        "hessian",
        "solve",
        "diagnostics",
    }
    assert sum(v for k, v in report.seconds.items() if k != "total") == pytest.approx(
        report.seconds["total"]
    )
    with pytest.raises(KeyError):
        report["nothing"]


def test_diagnostics_can_be_left_out():
    plain, full = run(diagnostics=False), run()
    row = plain.report.quantized[0]
    assert math.isnan(row.objective_rtn) and math.isnan(row.output_sqnr_db)
    assert row.objective == full.report.quantized[0].objective
    assert plain.report.seconds["diagnostics"] == 0


def test_rtn_without_calibration():
    model = build()
    weight = model.model.layers[1].mlp.up_proj.weight.detach().numpy().copy()
    result = quantize(model, "rtn", **OPTIONS)
    assert result.report.schedule == "no calibration" and len(result.matrices) == 14
    expected = ptqkit.rtn(weight, bits=3, group_size=16)
    got = result.matrices["model.layers.1.mlp.up_proj"]
    np.testing.assert_array_equal(got.codes, expected.codes)
    row = result.report.quantized[0]
    assert math.isnan(row.objective) and row.weight_sqnr_db > 5
    measured = run(recipe="rtn")
    np.testing.assert_array_equal(measured.matrices["model.layers.1.mlp.up_proj"].codes, got.codes)
    assert measured.report.quantized[0].objective > 0


def test_overrides_and_mixed_options_in_a_group():
    overrides = {
        "*.k_proj": {"bits": 4},
        "*.v_proj": {"bits": 2, "group_size": 8, "order": "natural"},
        "re:.*layers\\.1\\..*down_proj": {"method": "rtn", "grid": "minmax"},
        "*.0.mlp.gate_proj": "skip",
    }
    one = run(recipe="quality", overrides=overrides)
    layers = one.matrices
    assert layers["model.layers.0.self_attn.q_proj"].bits == 3
    assert layers["model.layers.0.self_attn.k_proj"].bits == 4
    assert layers["model.layers.0.self_attn.v_proj"].group_size == 8
    assert "model.layers.0.mlp.gate_proj" not in layers
    skipped = one.report["model.layers.0.mlp.gate_proj"]
    assert skipped.status == "skipped: override 'skip'" and skipped.shape == (64, 32)
    assert one.report["model.layers.1.mlp.down_proj"].method == "rtn"
    alone = run(recipe="quality", overrides=overrides, share_inputs=False)
    for name, matrix in layers.items():
        np.testing.assert_array_equal(matrix.codes, alone.matrices[name].codes, err_msg=name)


def test_include_takes_an_untied_head():
    result = run(include=("lm_head",))
    assert "lm_head" in result.matrices and len(result.matrices) == 15
    again = run(include=("lm_head",), schedule="replay")
    np.testing.assert_array_equal(result.matrices["lm_head"].codes, again.matrices["lm_head"].codes)
    found = problems(build("qwen2"), include=("lm_head",))
    assert len(found) == 1 and "lm_head shares its weight with model.embed_tokens" in found[0]


def test_layers_outside_the_blocks_that_run_first():
    names = ("model.decoder.project_in", "model.decoder.project_out")
    one = run(build("opt"), include=names)
    two = run(build("opt"), include=names, schedule="replay")
    assert one.report.quantized[0].name == names[0]
    assert one.report.quantized[-1].name == names[1]
    for name, matrix in one.matrices.items():
        np.testing.assert_array_equal(matrix.codes, two.matrices[name].codes, err_msg=name)


def test_every_problem_at_once(tmp_path):
    model = build()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = float("nan")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    found = problems(
        model,
        data=tokens() + 40,
        group_size=24,
        overrides={"*.w1": "skip"},
        out_dir=tmp_path / "out",
        checkpoint_format="compressed-tensors",
    )
    text = "\n".join(found)
    assert "token ids from 43 to 103, but the model's vocabulary has 64" in text
    assert "pattern '*.w1' of the recipe matches no module" in text
    assert text.count("group_size 24 does not divide its 32 inputs") == 1
    assert "by an override (and 11 more layers)" in text
    assert "model.layers.0.mlp.up_proj: 1 of its 64x32 weights are not finite" in text
    assert "out_dir 'out' exists already" in text
    assert text.count("compressed-tensors loads asymmetric grids only") == 1
    assert len(found) == 7  # one line for each cause, not for each layer


def refused(kind, message, *args, **kwargs):
    """The error of a run that stops with exactly this kind of problem."""
    with pytest.raises(PreflightError, match=message) as error:
        run(*args, **kwargs)
    assert error.value.has(kind) and {type(p) for p in error.value.problems} == {Problem}
    assert all(issubclass(p.kind, kind) for p in error.value.problems)
    return error


def test_preflight_problems_have_kinds():
    with pytest.raises(PreflightError, match="needs calibration data") as error:
        quantize(build(), "quality", **OPTIONS)
    assert {p.kind for p in error.value.problems} == {CalibrationError}
    error = refused(
        FileNotFoundError, "neither a file nor", data="none.txt", tokenizer=WordTokenizer()
    )
    assert error.value.has(CalibrationError) and len(error.value.problems) == 1
    with pytest.raises(PreflightError, match="grid 'hessian' needs calibration data") as error:
        quantize(build(), "rtn", grid="hessian", **OPTIONS)
    assert error.value.has(CalibrationError)
    refused(CalibrationError, "holds 100 tokens", data=[numbers(100)], tokenizer=WordTokenizer())
    refused(
        CalibrationError, "sequences of 40 tokens, but the model takes at most", data=tokens(2, 40)
    )
    error = refused(ValueError, "does not divide its 32 inputs", group_size=24)
    assert not error.value.has(CalibrationError)


def test_preflight_errors_can_be_pickled():
    error = PreflightError([Problem("no data", CalibrationError), "too wide"])
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is PreflightError and str(again) == str(error)
    assert again.problems == ["no data", "too wide"]
    assert [p.kind for p in again.problems] == [CalibrationError, ValueError]


def test_disk_space_is_checked(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage._replace(free=1000))
    found = problems(out_dir=tmp_path / "new" / "deep")
    assert len(found) == 1 and "the disk has 0 MiB free" in found[0]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("out_format", "options", "message"),
    [
        ("gptq", {"bits": 5}, "no 5-bit layout"),
        ("gptq_v2", {"bits": "ternary"}, "has no ternary type"),
        (
            "compressed-tensors",
            {"symmetric": True, "order": "act", "static_groups": False},
            "cannot carry g_idx",
        ),
    ],
)
def test_format_conflicts(out_format, options, message):
    found = problems(checkpoint_format=out_format, **options)
    assert len(found) == 1 and "(and 13 more layers)" in found[0] and message in found[0]


def test_format_cannot_hold_conv1d():
    found = problems(build("gpt2"), checkpoint_format="gptq")
    assert len(found) == 1 and "take nn.Linear only, not Conv1D" in found[0]
    assert "transformer.h.0.attn.c_attn: " in found[0] and "(and 7 more layers)" in found[0]


def test_gptq_format_gets_scales_and_zero_points_it_can_hold():
    result = run(checkpoint_format="gptq", bits=2)
    assert result.recipe.scale_dtype == "float16" and result.recipe.min_zero_point == 1
    assert all(m.zero_points.min() >= 1 for m in result.matrices.values())
    assert all(m.scale_dtype == "float16" for m in result.matrices.values())


def mixtral():
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=64,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        return transformers.MixtralForCausalLM(config).eval()


def test_fused_experts_of_unknown_form_are_named_and_any_can_be_left_float(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("ptqkit.hf.models.experts.expert_shape", lambda module: None)
        e = refused(UnsupportedModuleError, "fuses several linear layers into 3-D", mixtral())
    assert "model.layers.0.mlp.experts (MixtralExperts)" in str(e.value)
    assert "overrides={'model.layers.*.mlp.experts': 'skip'}" in str(e.value)
    result = run(mixtral(), overrides={"model.layers.*.mlp.experts": "skip"})
    assert len(result.matrices) == 8
    assert result.report["model.layers.1.mlp.experts"].status == "skipped: override 'skip'"
    assert "is not a linear layer" in result.report["model.layers.0.mlp.gate"].status


def test_reused_layers_are_named():
    config = transformers.AlbertConfig(
        vocab_size=64,
        embedding_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        model = transformers.AlbertForMaskedLM(config).eval()
    refused(UnsupportedModuleError, r"attention\.query runs 2 times", model)


def test_uncalled_and_shared_layers_are_named():
    model = build()
    layers = model.model.layers
    layers[0].mlp.spare = torch.nn.Linear(32, 32)
    layers[1].mlp.up_proj = layers[0].mlp.up_proj
    found = problems(model)
    assert found == [
        "model.layers.1.mlp.up_proj is the same module as model.layers.0.mlp.up_proj: a shared "
        "linear layer cannot be quantized; add an override 'skip' for both names"
    ]
    found = problems(model, overrides={"*.up_proj": "skip"})
    assert len(found) == 1 and "model.layers.0.mlp.spare is never called" in found[0]
    assert len(run(model, overrides={"*.up_proj": "skip", "*.spare": "skip"}).matrices) == 12


def test_models_without_blocks_and_named_blocks():
    kind = UnsupportedModuleError
    refused(kind, "has no nn.ModuleList of equal blocks", torch.nn.Linear(4, 4))
    refused(kind, "has no module 'model.blocks'", blocks=("model.blocks",))
    refused(kind, "'model.norm' is not a non-empty list", blocks=("model.norm",))
    assert len(run(blocks=("model.layers",)).matrices) == 14
    assert list(find_blocks(build("t5"))) == ["encoder.block", "decoder.block"]
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        quantize("gpt2", "rtn")


def test_meta_parameters_are_refused():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(build().config)
    with pytest.raises(PreflightError, match="parameters are on the meta device"):
        quantize(model, "rtn", **OPTIONS)


def fail_at(monkeypatch, name, error):
    """Make the solver fail for the stack that holds a layer."""
    original = ptqkit.gptq

    def gptq(weight, hessian, **kwargs):
        if name in kwargs["name"]:
            raise error
        return original(weight, hessian, **kwargs)

    monkeypatch.setattr(matrix_solver, "gptq", gptq)


def test_a_prepared_calibration_set_is_taken():
    data = prepare_calibration(tokens(), batch_size=4)
    result, same = run(data=data), run()
    for name, matrix in result.matrices.items():
        np.testing.assert_array_equal(matrix.codes, same.matrices[name].codes)
    assert len(result.matrices) == 14
    assert result.report.calibration == same.report.calibration


@pytest.mark.parametrize("schedule", ["one-pass", "replay"])
def test_a_layer_that_fails(monkeypatch, schedule):
    name = "model.layers.1.mlp.gate_proj"
    fail_at(monkeypatch, name, NotPositiveDefiniteError("no luck", 3, 1.0))
    model = build()
    with pytest.raises(NotPositiveDefiniteError, match=r"gate_proj.*no luck") as error:
        run(model, schedule=schedule)
    assert (error.value.index, error.value.damping) == (3, 1.0)
    if hasattr(error.value, "__notes__"):
        assert "11 of 14 layers are already quantized" in error.value.__notes__[0]
    result = run(build(), schedule=schedule, on_error="leave_float")
    assert [r.name for r in result.report.failed] == [name, "model.layers.1.mlp.up_proj"]
    assert "no luck" in result.report[name].status and "left float" in result.report.warnings[0]
    kept = build().get_submodule(name).weight
    assert torch.equal(result.model.get_submodule(name).weight, kept)
    assert len(result.matrices) == 12 and name not in result.matrices
    assert result.report.totals()["failed"] == 2


def test_activations_that_are_not_finite_name_the_layer():
    model = build()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[5] = float("inf")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj"):
        run(model)


@pytest.mark.parametrize("schedule", ["one-pass", "replay"])
def test_interruption_says_what_is_done(monkeypatch, schedule):
    fail_at(monkeypatch, "model.layers.0.mlp.down_proj", KeyboardInterrupt())
    model = build()
    with pytest.raises(QuantizationInterrupted, match="6 of 14 layers are already") as error:
        run(model, schedule=schedule)
    assert isinstance(error.value, KeyboardInterrupt)
    assert error.value.quantized[-1] == "model.layers.0.mlp.up_proj"
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not any("forward" in m.__dict__ for m in model.modules())
    original = build().state_dict()
    for name, value in model.state_dict().items():
        changed = name.removesuffix(".weight") in error.value.quantized
        assert torch.equal(value, original[name]) != changed, name
    fail_at(monkeypatch, "model.layers.0.self_attn.q_proj", KeyboardInterrupt())
    with pytest.raises(QuantizationInterrupted, match="the model is unchanged"):
        run(build(), schedule=schedule)


def test_progress_events():
    events: list[ProgressEvent] = []
    result = run(progress=events.append)
    assert [e.index for e in events] == list(range(1, 15)) and {e.total for e in events} == {14}
    assert [e.name for e in events] == [r.name for r in result.report.quantized]
    assert [e.loss for e in events] == [r.objective for r in result.report.quantized]
    assert all(e.seconds_left >= 0 for e in events)
    assert events[-1].seconds_left == pytest.approx(0, abs=1e-6)


def test_an_error_of_the_callback_is_the_callers():
    def stop(event):
        raise StopIteration("enough")

    with pytest.raises(StopIteration, match="enough"):
        run(progress=stop, on_error="leave_float")


def test_progress_bars(capsys):
    assert make_progress(False) is None and make_progress(print) is print
    with pytest.raises(TypeError, match="progress must be"):
        make_progress("yes")
    bar = make_progress(True)
    assert isinstance(bar, _RichBar)
    run(progress=bar)
    assert "14/14" in capsys.readouterr().err
    run(recipe=["AWE", "RTN"], progress=bar, group_size=16)
    shown = capsys.readouterr().err
    assert "equalizing" in shown and "8/8" in shown
    assert "quantizing" in shown and "14/14" in shown


def test_silent_by_default_without_a_terminal(capsys):
    run(progress=None)
    out = capsys.readouterr()
    assert out.out == "" and out.err == ""


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("schedule", "fast"),
        ("on_error", "ignore"),
        ("checkpoint_format", "gguf"),
        ("memory_budget", "lots"),
    ],
)
def test_bad_arguments(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be"):
        run(**{argument: value})
    with pytest.raises(ValueError, match="recipe has no option 'bit'"):
        run(bit=3)


def test_parse_bytes():
    assert parse_bytes("8GiB") == 8 * 2**30 and parse_bytes("500MB") == 500 * 10**6
    assert parse_bytes(" 1.5 k ") == 1500 and parse_bytes(7) == 7 and parse_bytes(None) is None
    for bad in (0, -1, True, "GiB", 1.5):
        with pytest.raises(ValueError, match="memory_budget must be"):
            parse_bytes(bad)


def test_notes_for_few_tokens():
    result = run(data=tokens(1, 20))
    assert result.report.quantized[0].notes == "only 20 tokens for 32 inputs"
    assert len(result.report.warnings) == 14


def test_torch_accumulator_equals_the_core():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 7, 24, generator=generator)
    mask = torch.rand(3, 7, generator=generator) > 0.3
    ours, theirs = TorchHessian(24, "cpu"), ptqkit.Hessian(24)
    for part, keep in zip(values, mask, strict=True):
        ours.update(part, keep)
        theirs.update(part, keep)
    host = ours.finish()
    assert host.tokens == theirs.tokens == int(mask.sum())
    np.testing.assert_allclose(host.matrix, theirs.matrix, rtol=1e-5, atol=1e-6)
    half = TorchHessian(24, "cpu")
    half.update(values.to(torch.bfloat16))
    exact = values.to(torch.bfloat16).double().reshape(-1, 24)
    np.testing.assert_allclose(half.finish().matrix, 2 * exact.T @ exact / 21, rtol=1e-5, atol=1e-5)
    broken = TorchHessian(24, "cpu")
    broken.update(torch.full((2, 24), float("nan")))
    with pytest.raises(CalibrationError, match="not finite"):
        broken.finish()


def test_tf32_is_off_inside_and_as_before_outside():
    settings = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(settings, "fp32_precision") else "allow_tf32"
    before = getattr(settings, name)
    changed = "tf32" if name == "fp32_precision" else True
    try:
        setattr(settings, name, changed)
        with pytest.raises(KeyError), statistics.full_float32(torch.device("cuda")):
            assert getattr(settings, name) in ("ieee", False)
            raise KeyError
        assert getattr(settings, name) == changed
        with statistics.full_float32(torch.device("cpu")):
            assert getattr(settings, name) == changed
    finally:
        setattr(settings, name, before)


def test_a_model_elsewhere_uses_the_torch_accumulator(monkeypatch):
    """The same path as on a GPU, with the host playing the device."""
    from ptqkit.hf.quantization import moments

    expected = run(data=padded_batches())
    monkeypatch.setattr(moments, "accumulator", TorchHessian)
    got = run(data=padded_batches())
    for name, matrix in expected.matrices.items():
        different = np.mean(got.matrices[name].codes != matrix.codes)
        assert different < 0.02, name  # H differs in its last bits, so ties may fall otherwise


def test_masks_follow_the_shape_of_the_input():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    batch = {"input_ids": torch.zeros(2, 3), "attention_mask": mask}
    assert torch.equal(match_mask(torch.zeros(2, 3, 8), batch, mask), mask)
    assert torch.equal(match_mask(torch.zeros(6, 8), batch, mask), mask.reshape(6))
    assert match_mask(torch.zeros(2, 8), batch, None) is None
    with pytest.raises(CalibrationError, match=r"shape \(2, 8\) fits 0 attention masks"):
        match_mask(torch.zeros(2, 8), batch, mask)
    both = {**batch, "decoder_input_ids": torch.zeros(2, 3)}
    with pytest.raises(CalibrationError, match="fits 2 attention masks"):
        match_mask(torch.zeros(2, 3, 8), both, mask)
    longer = {**batch, "decoder_input_ids": torch.zeros(2, 5)}
    assert match_mask(torch.zeros(2, 5, 8), longer, mask) is None


def test_a_quantized_model_is_refused(tmp_path):
    run(recipe="quality", symmetric=True, out_dir=tmp_path / "w3")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "w3")
    with pytest.raises(PreflightError, match="quantized already") as error:
        run(model)
    assert error.value.has(UnsupportedModuleError)


def test_save_and_load(tmp_path):
    result = run(recipe="quality", symmetric=True, out_dir=tmp_path / "w3")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "w3")
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, result.model(tokens()).logits)
    report = json.loads((tmp_path / "w3" / "ptqkit_report.json").read_text())
    assert report["totals"]["layers"] == 14
    assert Recipe.from_dict(json.loads((tmp_path / "w3" / "ptqkit_recipe.json").read_text()))
    with pytest.raises(PreflightError, match="exists already"):
        run(recipe="quality", symmetric=True, out_dir=tmp_path / "w3")


def widened():
    """A model whose values are float16, in float32."""
    model = build()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    return model


def test_a_widened_model_is_saved_in_the_type_of_its_files(tmp_path):
    result = run(widened(), "quality", symmetric=True, stored_dtype="float16")
    assert result.stored_dtype == "float16" and result.recipe.scale_dtype == "float16"
    assert next(result.model.parameters()).dtype == torch.float32
    with torch.no_grad():
        expected = result.model(tokens()).logits
        info = result.save(tmp_path / "w3")
        assert torch.equal(result.model(tokens()).logits, expected)
    assert result.checkpoint is info
    config = json.loads((tmp_path / "w3" / "config.json").read_text())
    assert config["dtype"] == "float16"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "w3", dtype="float32")
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, expected)
    wide = result.save(tmp_path / "wide", dtype="float32")
    assert wide.bytes > info.bytes
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    "parts", [["AWE", "RTN"], ["RTN", "BiasCorrection"], ["RTN", "ActivationQuantization"]]
)
def test_values_that_the_files_type_cannot_hold_keep_the_models(parts):
    result = run(widened(), parts, group_size=16, stored_dtype="float16")
    assert result.stored_dtype == "float32" and result.recipe.scale_dtype is None


def test_the_type_of_the_files_is_that_of_the_model_by_default():
    assert run(widened()).stored_dtype == "float32"
    assert run(build().bfloat16(), stored_dtype="float32").stored_dtype == "bfloat16"
    with pytest.raises(ValueError, match="dtype must be a floating-point type"):
        run(stored_dtype="int8")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data lies beside the repository only")
def test_a_trained_model():
    path = SHARED / "stories260k"
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    result = quantize(
        model,
        "quality",
        SHARED / "tinystories" / "train_800.jsonl.gz",
        tokenizer=tokenizer,
        samples=8,
        sequence_length=128,
        group_size=None,
        bits=4,
        progress=False,
    )
    totals = result.report.totals()
    assert totals["layers"] == 35 and totals["objective"] < 0.8 * totals["objective_rtn"]
    assert result.report.calibration["start_token"] == "<s>"
    assert min(r.output_sqnr_db for r in result.report.quantized) > 15
