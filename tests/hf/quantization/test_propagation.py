"""Error propagation in the driver: two whole models by hand, the float path, refusals, clean-up."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch
from helpers.driver_models import build, padded_batches, tokens
from helpers.failures import broken_activation, fail_target
from helpers.schedule_models import count_hooks, plain

import ptqkit
import ptqkit.reference as reference
from ptqkit.cli.quantize import _recipe, add_parser
from ptqkit.errors import PreflightError, UnsupportedModuleError, UsageError
from ptqkit.hf import quantize
from ptqkit.hf.quantization import moments
from ptqkit.hf.quantization.moments import check_same_tokens
from ptqkit.nn import statistics
from ptqkit.nn.statistics import TorchDrift
from ptqkit.recipe.recipe import Recipe

ALPHA = 0.5
OPTIONS = {"bits": 3, "group_size": 16, "progress": False, "error_propagation": ALPHA}
PLAIN = {**OPTIONS, "error_propagation": 0.0}


def weight_of(module):
    weight = module.weight.detach().float()
    return (weight.T if type(module).__name__ == "Conv1D" else weight).contiguous().numpy()


def inputs(model, name, batches):
    """A layer's input in a plain forward of each batch; None if that does not reach it."""
    result, seen = [], []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
            result.append(seen.pop() if seen else None)
    handle.remove()
    return result


def two_models(floats, model, groups, batches, options, alpha):
    """The plainest form: a float and a quantized model, a whole forward of each per group."""
    result = {}
    for group in groups:
        width = weight_of(model.get_submodule(group[0])).shape[1]
        hessian, drift, count = ptqkit.Hessian(width), ptqkit.Drift(width, width), 0
        every = []
        pairs = zip(*(inputs(m, group[0], batches) for m in (floats, model)), strict=True)
        for batch, (x, x_q) in zip(batches, pairs, strict=True):
            if x is None:
                continue
            mask = batch.get("attention_mask", torch.ones(x.shape[:2])).bool().reshape(-1)
            x, x_q = (v.reshape(-1, width)[mask] for v in (x, x_q))
            hessian.update(x_q)
            drift.update(x, x_q)
            count += len(x)
            every.append((x.double().numpy(), x_q.double().numpy()))
        G = hessian.matrix + drift.matrix
        x, x_q = (np.concatenate(v) for v in zip(*every, strict=True))
        np.testing.assert_allclose(G, 2 / count * x.T @ x_q, atol=1e-5 * np.abs(G).max())
        for name in group:
            weight = weight_of(floats.get_submodule(name))
            corrected = ptqkit.propagate_error(weight, hessian, drift, alpha, options["damping"])
            expected = reference.propagate_error(
                weight, hessian.matrix, 2 / count * x.T @ x_q, alpha, options["damping"]
            )
            np.testing.assert_allclose(corrected, expected, atol=1e-4 * np.abs(expected).max())
            result[name] = matrix = ptqkit.gptq(corrected, hessian, **options)
            module, values = model.get_submodule(name), torch.from_numpy(matrix.dequantize())
            with torch.no_grad():
                module.weight.copy_(values.T if type(module).__name__ == "Conv1D" else values)
    return result


def groups_of(result):
    groups = []
    for row in result.report.quantized:
        if not any(row.name in g for g in groups):
            groups.append([row.name, *row.shares_input_with])
    return groups


@pytest.mark.parametrize("name", ["llama", "falcon", "gpt2", "opt", "bert"])
@pytest.mark.parametrize("recipe", ["quality", "reference"])
def test_equals_two_whole_models_by_hand(name, recipe):
    batches = padded_batches(name)
    result = quantize(build(name), recipe, batches, **OPTIONS)
    _compare(result, build(name), build(name), batches)
    with torch.no_grad():
        assert all(torch.isfinite(result.model(**b)[0]).all() for b in batches)


def test_equals_two_whole_models_in_half_precision():
    batches, (one, two, three) = padded_batches(), (build().bfloat16() for _ in range(3))
    _compare(quantize(one, "quality", batches, **OPTIONS), two, three, batches)


def solver(result):
    names = ("bits", "group_size", "order", "static_groups", "grid", "refine_passes", "damping")
    return {name: getattr(result.recipe, name) for name in names}


def _compare(result, floats, model, batches):
    assert result.report.schedule == "one-pass"
    options = solver(result)
    options["scale_dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    expected = two_models(floats, model, groups_of(result), batches, options, ALPHA)
    assert expected.keys() == result.matrices.keys()
    for key, matrix in expected.items():
        found = result.matrices[key]
        np.testing.assert_array_equal(found.codes, matrix.codes, err_msg=key)
        np.testing.assert_array_equal(found.scales, matrix.scales, err_msg=key)
        assert result.report[key].objective == pytest.approx(matrix.objective, rel=1e-6)
    for (name, a), b in zip(
        model.state_dict().items(), result.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", ["llama", "falcon", "gpt2", "opt", "bert", "t5"])
def test_the_float_path_is_the_float_model(name):
    """Every layer runs once per batch and model; the float runs give the float model's outputs.

    Falcon's first MLP layer shares its input with the attention, but runs a pause later.
    """
    batches, model, floats = padded_batches(name), build(name), build(name)
    layers = [r.name for r in quantize(build(name), "reference", batches, **PLAIN).report.quantized]
    outputs, expected = ({layer: [] for layer in layers} for _ in range(2))
    for found, into in ((model, outputs), (floats, expected)):
        for layer in layers:
            found.get_submodule(layer).register_forward_hook(
                lambda m, a, o, rows=into[layer]: rows.append(o.clone())
            )
    quantize(model, "reference", batches, **OPTIONS)
    with torch.no_grad():
        for batch in batches:
            floats(**batch)
    count, different = len(batches), 0
    for layer, rows in outputs.items():
        rows = rows[1:]  # the first is of the probe
        if not rows:
            assert layer == layers[-1] or layer in layers[-3:], layer  # calibration stops there
            continue
        assert len(rows) == 2 * count, layer
        for a, b in zip(rows[:count], expected[layer], strict=True):
            assert torch.equal(a, b), layer
        different += not torch.equal(rows[count], rows[0])
    assert different == sum(len(rows) > 1 for rows in outputs.values())


def test_it_helps_and_leaves_the_first_layers_alone():
    batches, floats = padded_batches(), build()
    without, half, whole = (
        quantize(build(), "quality", batches, **{**OPTIONS, "error_propagation": a})
        for a in (0.0, ALPHA, 1)
    )
    with torch.no_grad():
        errors = [
            sum(float(((r.model(**b)[0] - floats(**b)[0]) ** 2).sum()) for b in batches)
            for r in (without, half, whole)
        ]
    assert errors[2] < errors[1] < 0.7 * errors[0]
    for end in "qkv":  # no layer before these: no error to correct
        key = f"model.layers.0.self_attn.{end}_proj"
        np.testing.assert_array_equal(half.matrices[key].codes, without.matrices[key].codes)
    key = "model.layers.0.self_attn.o_proj"
    assert not np.array_equal(half.matrices[key].codes, without.matrices[key].codes)


def test_off_by_default():
    assert Recipe().error_propagation == 0 and Recipe.preset("reference").error_propagation == 0
    options = {k: v for k, v in OPTIONS.items() if k != "error_propagation"}
    one = quantize(build(), "quality", padded_batches(), **options)
    two = quantize(build(), "quality", padded_batches(), **PLAIN)
    for key, matrix in one.matrices.items():
        np.testing.assert_array_equal(matrix.codes, two.matrices[key].codes)
    assert "propagation" not in one.report.seconds


def test_different_options_in_one_group():
    """Stacks of a group are corrected one by one, with the same result as alone."""
    batches = padded_batches()
    overrides = {"*.k_proj": {"bits": 4}, "*.v_proj": {"damping": 0.1}, "*.up_proj": "skip"}
    mixed = quantize(build(), "quality", batches, **OPTIONS, overrides=overrides)
    alone = quantize(
        build(), "quality", batches, **OPTIONS, overrides=overrides, share_inputs=False
    )
    assert mixed.matrices["model.layers.1.self_attn.k_proj"].bits == 4
    for key, matrix in mixed.matrices.items():
        np.testing.assert_array_equal(matrix.codes, alone.matrices[key].codes, err_msg=key)


def test_padding_does_not_count():
    batches = padded_batches("gpt2")
    other = [dict(b) for b in batches]
    for batch in other:
        batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 5)
    first = quantize(build("gpt2"), "reference", batches, **OPTIONS)
    second = quantize(build("gpt2"), "reference", other, **OPTIONS)
    for name, matrix in first.matrices.items():
        np.testing.assert_array_equal(matrix.codes, second.matrices[name].codes, err_msg=name)


@pytest.mark.parametrize("make", [lambda: ptqkit.Drift(8, 8), lambda: TorchDrift(8, 8, "cpu")])
def test_drift_is_exact_where_it_matters(make):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 50, 8, generator=rng)
    drift = make()
    drift.update(x, x)
    np.testing.assert_array_equal(drift.finish().matrix, 0)
    mask = torch.arange(50) % 3 > 0
    masked, one = make(), make()
    y = x + 1e-4 * torch.randn(x.shape, generator=rng)
    masked.update(y, x, mask=mask.expand(2, 50))
    one.update(y[:, mask], x[:, mask])
    np.testing.assert_array_equal(masked.finish().matrix, one.finish().matrix)
    a, b = (v[:, mask].reshape(-1, 8).double() for v in (y, x))
    expected = (2 / len(a) * (a - b).T @ b).numpy()
    np.testing.assert_allclose(one.finish().matrix, expected, atol=2e-6 * np.abs(expected).max())
    with pytest.raises((ptqkit.CalibrationError, ValueError), match="not finite|NaN or Inf"):
        one.update(y * torch.inf, x)
        one.finish()


@pytest.mark.parametrize("rows", [5, 30])
def test_drift_of_another_width_by_torch_too(rows):
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 50, rows, generator=rng) for _ in range(2))
    x = torch.randn(2, 50, 8, generator=rng)
    mask = torch.arange(100).reshape(2, 50) % 3 > 0
    host, other = ptqkit.Drift(rows, 8), TorchDrift(rows, 8, "cpu")
    for drift in (host, other):
        drift.update(a, b, x, mask)
        drift.update(a[:1], b[:1], x[:1])
    assert other.finish().tokens == host.tokens
    np.testing.assert_allclose(other.finish().matrix, host.matrix, atol=1e-6)
    a[1, 3, rows - 1] = torch.inf
    other.update(a, b, x)
    with pytest.raises(ptqkit.CalibrationError, match="first in batch 3 of 3"):
        other.finish()


def test_accumulated_by_torch_as_on_a_gpu(monkeypatch):
    host = quantize(build(), "quality", padded_batches(), **OPTIONS)
    monkeypatch.setattr(moments, "accumulator", statistics.TorchHessian)
    monkeypatch.setattr(moments, "drift_accumulator", statistics.TorchDrift)
    found = quantize(build(), "quality", padded_batches(), **OPTIONS)
    for key, matrix in host.matrices.items():
        assert float(np.mean(found.matrices[key].codes != matrix.codes)) < 0.1, key


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "falcon", "gpt2"])
def test_gpu_equals_host(name):
    host = quantize(build(name), "quality", padded_batches(name), **OPTIONS)
    found = quantize(build(name).cuda(), "quality", padded_batches(name), **OPTIONS)
    assert found.report.schedule == "one-pass"
    first = host.report.quantized[0].name
    for key, matrix in host.matrices.items():
        different = float(np.mean(found.matrices[key].codes != matrix.codes))
        assert different < (0.01 if key == first else 0.1), key


def test_report():
    report = quantize(build(), "quality", padded_batches(), **OPTIONS).report
    assert report.recipe["error_propagation"] == ALPHA
    rows = report.quantized
    assert report.seconds["propagation"] > 0 and all(r.seconds_propagation > 0 for r in rows)
    assert sum(r.seconds_propagation for r in rows) == pytest.approx(report.seconds["propagation"])
    parts = sum(v for k, v in report.seconds.items() if k != "total")
    assert parts == pytest.approx(report.seconds["total"])
    assert "error propagation 0.5: figures are of the corrected weights" in report.table()
    assert json.loads(report.to_json())["layers"][0]["seconds_propagation"] > 0
    assert (
        "error propagation"
        not in quantize(build(), "quality", padded_batches(), **PLAIN).report.table()
    )


def test_memory_is_that_of_two_models():
    ids = tokens(60)
    one = quantize(build(), "reference", ids, **PLAIN).report.memory["estimate_one_pass"]
    two = quantize(build(), "reference", ids, **OPTIONS).report.memory["estimate_one_pass"]
    assert 1.8 * one < two < 2.3 * one
    found = quantize(build(), "reference", ids, **OPTIONS, memory_budget=(one + two) // 2)
    assert found.report.schedule == "replay"
    assert "two models' activations" in found.report.schedule_reason
    model, replay = build(), found.report.memory["estimate_replay"]
    with pytest.raises(PreflightError, match="memory_budget: replay needs about"):
        quantize(model, "reference", ids, **OPTIONS, memory_budget=replay - 1)
    assert count_hooks(model) == 0
    for a, b in zip(model.state_dict().values(), build().state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "asked for"),
        ({"autocast": True}, "thread-local mode"),
        ({"experts": True}, "a short probe did not reach 2 layers"),
    ],
)
def test_replay_where_one_pass_is_not_possible(options, reason):
    """Also layers that only some batches reach, and a block that sets a mode."""
    rows = [tokens()[0], tokens()[1, :31], tokens()[2]]
    schedule = "auto" if options else "replay"
    result = quantize(plain(**options), "reference", rows, **OPTIONS, schedule=schedule)
    assert result.report.schedule == "replay" and reason in result.report.schedule_reason
    by_length = [torch.stack(rows[::2]), rows[1][None]]
    floats, model = plain(**options), plain(**options)
    names = ("up", "experts.0", *(["experts.1"] if options.get("experts") else []), "down")
    groups = [[f"layers.{i}.{name}"] for i in range(2) for name in names]
    expected = two_models(
        floats, model, groups, [{"input_ids": ids} for ids in by_length], solver(result), ALPHA
    )
    assert expected.keys() == result.matrices.keys()
    for key, matrix in expected.items():
        np.testing.assert_array_equal(result.matrices[key].codes, matrix.codes, err_msg=key)


def test_replay_without_greenlet(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "greenlet", None)
    result = quantize(build(), "reference", tokens(), **OPTIONS)
    assert result.report.schedule == "replay" and "greenlet" in result.report.schedule_reason


@pytest.mark.parametrize("call", [2, 4, 5])
@pytest.mark.parametrize("kind", [FloatingPointError, KeyboardInterrupt])
def test_quantized_weights_are_back_after_an_error(call, kind):
    """Calls 2 to 4 are of the float path (the first is the probe's), 5 to 7 of the quantized."""
    finished = quantize(build(), "quality", padded_batches(), **OPTIONS).model
    model = build()
    model.train()
    seed = torch.random.get_rng_state()
    with broken_activation(model.model.layers[1].mlp, call, kind) as calls, pytest.raises(kind):
        quantize(model, "quality", padded_batches(), **OPTIONS)
    assert calls[0] == call and count_hooks(model) == 0
    assert model.training and torch.is_grad_enabled() and model.config.use_cache is True
    assert torch.equal(torch.random.get_rng_state(), seed)
    floats = build().state_dict()
    for key, value in model.state_dict().items():
        left = key == "model.layers.1.mlp.down_proj.weight"
        assert torch.equal(value, floats[key] if left else finished.state_dict()[key]), key


def test_a_layer_that_fails_is_named_or_kept(monkeypatch):
    fail_target(monkeypatch, "layers.0.mlp.down_proj")
    name = "model.layers.0.mlp.down_proj"
    with pytest.raises(ValueError, match=f"{name}: on purpose"):
        quantize(build(), "reference", tokens(), **OPTIONS)
    result = quantize(build(), "reference", tokens(), **OPTIONS, on_error="leave_float")
    assert [r.name for r in result.report.failed] == [name] and len(result.matrices) == 13
    weight = build().get_submodule(name).weight
    assert torch.equal(result.model.get_submodule(name).weight, weight)


def test_inputs_that_do_not_correspond():
    batch = {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    for shape in ((2, 5, 8), (10, 8), (2, 8), (2, 3, 5, 8)):
        check_same_tokens("x", torch.zeros(shape), torch.zeros(shape), batch)
    both = {**batch, "decoder_input_ids": torch.zeros(2, 3, dtype=torch.long)}
    check_same_tokens("x", torch.zeros(6, 8), torch.zeros(6, 8), both)
    for first, second in (((7, 8), (6, 8)), ((7, 8), (7, 8)), ((2, 5, 8), (2, 4, 8))):
        with pytest.raises(UnsupportedModuleError, match="fc: error_propagation needs every tok"):
            check_same_tokens("fc", torch.zeros(first), torch.zeros(second), batch)


def test_layers_that_choose_tokens_are_refused():
    """Each path chooses for itself: the inputs' rows are not of the same tokens."""

    class Choosy(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            out = torch.zeros(*x.shape[:-1], self.inner.out_features)
            chosen = x.mean(-1) > x.mean()
            out[chosen] = self.inner(x[chosen])
            return out

    def choosy():
        model = plain()
        model.layers[1].down = Choosy(model.layers[1].down)
        return model

    quantize(choosy(), "reference", tokens(), **PLAIN)
    with pytest.raises(
        UnsupportedModuleError, match=r"layers\.1\.down\.inner: error_propagation ne"
    ):
        quantize(choosy(), "reference", tokens(), **OPTIONS)
    result = quantize(
        choosy(), "reference", tokens(), **OPTIONS, overrides={"*.down.inner": "skip"}
    )
    assert len(result.matrices) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"error_propagation": 1.5}, "error_propagation must be a number from 0 to 1, not 1.5"),
        ({"error_propagation": -0.1}, "error_propagation must be"),
        ({"error_propagation": True}, "error_propagation must be"),
        ({"error_propagation": "1"}, "error_propagation must be"),
        ({"error_propagation": float("nan")}, "error_propagation must be"),
        ({"error_propagation": 0.5, "method": "rtn"}, "needs method 'gptq', not 'rtn'"),
        (
            {"error_propagation": 0.5, "overrides": {"a*": {"method": "rtn"}}},
            r"overrides\['a\*'\]: error_propagation=0.5 needs method 'gptq'",
        ),
        (
            {"overrides": {"a*": {"error_propagation": 0.5}}},
            r"overrides\['a\*'\] cannot hold error_propagation: it holds for the whole run",
        ),
    ],
)
def test_recipe_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_recipe_round_trip():
    recipe = Recipe(error_propagation=0.75)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.for_layer("x").error_propagation == 0.75
    assert Recipe.preset("rtn", error_propagation=0).error_propagation == 0


def test_command_line_option():
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    given = ["quantize", "model", "--out", "x", "--error-propagation", "0.5"]
    assert _recipe(parser.parse_args(given)).error_propagation == 0.5
    assert _recipe(parser.parse_args(given[:4])).error_propagation == 0
    with pytest.raises(UsageError, match="--error-propagation has no meaning with --method rtn"):
        _recipe(parser.parse_args([*given, "--method", "rtn"]))
