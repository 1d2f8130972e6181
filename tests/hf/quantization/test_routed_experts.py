"""Experts of mixtures: each quantized on its own tokens, and what is done if they are too few."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.expert_models import (
    MODELS,
    TOKENS,
    batches,
    build,
    inner,
    mixtures,
    projection,
    seen_by,
    starve,
)

import ptqkit
from ptqkit.errors import CalibrationError, PreflightError, UnsupportedModuleError
from ptqkit.hf.models.experts import ExpertSwap
from ptqkit.hf.models.structure import Structure
from ptqkit.hf.quantization.inspection import Inspection
from ptqkit.hf.quantization.plan import experts_at_once

OPTIONS = {"bits": 3, "group_size": 8, "symmetric": True}
SOLVER = {"order": "group-act", "grid": "hessian", "refine_passes": 1}


def run(model, data=None, **options):
    return ptqkit.quantize(model, "quality", data or batches(), **{**OPTIONS, **options})


def refused(text, *args, **options):
    with pytest.raises(PreflightError, match=text):
        run(*args, **options)


def hessian_of(inputs):
    found = ptqkit.Hessian(inputs[0].shape[-1])
    for x in inputs:
        if len(x):
            found.update(x)
    return found


def moments(inputs, pools):
    """The rule by hand: own tokens, filled up to the number of inputs with those of the pool."""
    own, size = hessian_of(inputs), inputs[0].shape[-1]
    if own.tokens >= size:
        return own
    share = np.float32((size - own.tokens) / size)
    mixed = hessian_of(pools).matrix * share
    if own.tokens:
        mixed = mixed + own.matrix * np.float32(own.tokens / size)
    return ptqkit.Hessian.from_matrix(mixed, size)


def by_hand(model, name, floats, data, everything=False):
    """Codes of a mixture: weights of ``floats``, inputs of ``model``, which is quantized."""
    module, result = model.get_submodule(name), {}
    seen = [seen_by(model, name, batch) for batch in data]
    pools = [pool for _, _, pool in seen]
    for expert in range(4):
        inputs = pools if everything else [routed[expert] for _, routed, _ in seen]
        lasts = [inner(module, expert, x) for x in inputs]
        far = [inner(module, expert, x) for x in pools]
        for which in ("gate_proj", "up_proj", "down_proj"):
            H = moments(lasts, far) if which == "down_proj" else moments(inputs, pools)
            weight = projection(floats, expert, which)
            result[f"{name}.{expert}.{which}"] = ptqkit.gptq(weight, H, **OPTIONS, **SOLVER)
    return result


@pytest.mark.parametrize("kind", MODELS)
def test_codes_are_those_of_the_function_on_the_routed_tokens(kind):
    floats, model, data = build(kind), build(kind), batches()
    result = run(model, data)
    # The first mixture: what comes to it does not depend on how another one is computed.
    name, module = next(iter(mixtures(model).items()))
    wanted = by_hand(model, name, floats.get_submodule(name), data)
    assert len(wanted) == 12
    for layer, matrix in wanted.items():
        assert (result.matrices[layer].codes == matrix.codes).all(), layer
        assert (result.matrices[layer].scales == matrix.scales).all(), layer
        expert, which = layer.split(".")[-2:]
        held = projection(module, int(expert), which)
        assert (held == result.matrices[layer].dequantize()).all()
    rows = [r for r in result.report.layers if r.name.startswith(f"{name}.")]
    assert sum(r.tokens for r in rows) == 3 * 192 * (1 if kind == "llama4" else 2)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4"])
def test_too_few_tokens_are_filled_up_by_the_stated_rule(kind):
    floats, model, data = build(kind), build(kind), batches(2, 1, 24)
    result = run(model, data)
    name = next(iter(mixtures(model)))
    short = {r.name: r for r in result.report.layers if r.rule}
    assert any(n.startswith(f"{name}.") for n in short)
    for layer, matrix in by_hand(model, name, floats.get_submodule(name), data).items():
        assert (result.matrices[layer].codes == matrix.codes).all(), layer
        row = result.report[layer]
        assert (row.tokens < row.shape[1]) == (layer in short)
        if layer in short:
            missing = row.shape[1] - row.tokens
            assert row.rule in row.notes and f"fill up {missing} of {row.shape[1]}" in row.rule
    (told,) = [w for w in result.report.warnings if "routed fewer tokens" in w]
    assert told.startswith(f"{len(short)} layers of experts")


def test_an_expert_without_a_token_is_quantized_on_those_of_the_others():
    floats, model, data = build("mixtral"), build("mixtral"), batches()
    name = next(iter(mixtures(model)))
    starve(model, name, 2)
    result = run(model, data)
    wanted = by_hand(model, name, floats.get_submodule(name), data)
    for which in ("gate_proj", "up_proj", "down_proj"):
        row = result.report[f"{name}.2.{which}"]
        assert row.tokens == 0 and row.rule.startswith("no token routed to it")
        assert (result.matrices[row.name].codes == wanted[row.name].codes).all()
    told = [w for w in result.report.warnings if "3 of them none" in w]
    assert len(told) == 1


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama4"])
def test_all_tokens_calibrate_every_expert_if_asked_for(kind):
    floats, model, data = build(kind), build(kind), batches()
    result = run(model, data, calibrate_all_experts=True)
    name = next(iter(mixtures(model)))
    for layer, matrix in by_hand(model, name, floats.get_submodule(name), data, True).items():
        assert (result.matrices[layer].codes == matrix.codes).all(), layer
        assert result.report[layer].tokens == 192
    assert not any(r.rule for r in result.report.layers)


def test_experts_that_see_all_tokens_are_solved_in_parts(monkeypatch):
    whole = run(build("qwen3_moe"), calibrate_all_experts=True)
    for most, shared in ((1, 0), (3 * 24 * 32, 2)):
        monkeypatch.setattr("ptqkit.hf.quantization.expert_moments.MOST_WEIGHTS", most)
        parts = run(build("qwen3_moe"), calibrate_all_experts=True)
        for name, matrix in whole.matrices.items():
            assert (matrix.codes == parts.matrices[name].codes).all()
        assert parts.report.memory["estimate_one_pass"] < whole.report.memory["estimate_one_pass"]
        row = parts.report["model.layers.0.mlp.experts.0.gate_proj"]
        assert len(row.shares_input_with) == shared


@pytest.mark.parametrize(
    "options, counts",
    [
        ({}, (1, 3)),
        ({"calibrate_all_experts": True}, (4,)),
        ({"share_inputs": False}, (2,)),
        ({"calibrate_on": "float"}, (3,)),
    ],
)
def test_schedules_agree(options, counts, monkeypatch):
    data = batches(2, 1, 24)
    one = run(build("mixtral"), data, schedule="one-pass", **options)
    for at_once in counts:
        monkeypatch.setattr("ptqkit.hf.quantization.plan.experts_at_once", lambda *_, n=at_once: n)
        other = run(build("mixtral"), data, schedule="replay", **options)
        assert other.report.memory["experts_at_once"] == at_once
        assert one.matrices.keys() == other.matrices.keys()
        for name, matrix in one.matrices.items():
            assert (matrix.codes == other.matrices[name].codes).all(), name
            assert one.report[name].rule == other.report[name].rule


def test_replay_takes_as_many_experts_at_once_as_there_is_room_for():
    assert experts_at_once(Inspection(Structure({})), 10**9) == 1
    with ExpertSwap(build("mixtral"), lambda name: True) as swap:
        found = Inspection(Structure({}), experts=swap.modules)
        each = 2 * 4 * 48**2
        assert [experts_at_once(found, n * each) for n in (-1, 0, 2, 9)] == [1, 1, 3, 4]


def test_padding_does_not_count():
    data = batches(2)
    padded = []
    for batch in data:
        mask = torch.ones_like(batch["input_ids"])
        mask[1, 20:] = 0
        padded.append({**batch, "attention_mask": mask})
    result = run(build("qwen3_moe"), padded)
    rows = [r for r in result.report.layers if r.name.endswith("gate_proj")]
    assert sum(r.tokens for r in rows) == 2 * 2 * 2 * (32 + 20)


def test_router_is_float_and_the_module_as_before():
    model, before = build("mixtral"), build("mixtral")
    kinds = {n: type(m) for n, m in model.named_modules()}
    names = list(model.state_dict())
    result = run(model)
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert list(model.state_dict()) == names
    router = "model.layers.0.mlp.gate"
    assert "not a linear layer" in result.report[router].status
    assert torch.equal(model.get_submodule(router).weight, before.get_submodule(router).weight)
    refused("quantized already", model)
    # An error in the middle leaves the module in place too.
    other = build("mixtral")
    refused("group_size 7", other, group_size=7)
    assert {n: type(m) for n, m in other.named_modules()} == kinds


def test_single_experts_and_layers_can_be_skipped_or_have_other_options():
    overrides = {"*.experts.1.*": "skip", "*.gate_proj": "skip", "*.experts.3.*": {"bits": 8}}
    floats, model = build("qwen2_moe"), build("qwen2_moe")
    result = run(model, overrides=overrides)
    name = next(iter(mixtures(model)))
    assert f"{name}.0.gate_proj" not in result.matrices
    assert not any(n.startswith(f"{name}.1.") for n in result.matrices)
    assert result.matrices[f"{name}.3.down_proj"].bits == 8
    held = projection(model.get_submodule(name), 1, "down_proj")
    assert (held == projection(floats.get_submodule(name), 1, "down_proj")).all()
    assert result.report[f"{name}.1.up_proj"].status == "skipped: override 'skip'"


def test_rounding_needs_no_tokens():
    result = ptqkit.quantize(build("gpt_oss"), "rtn", **OPTIONS)
    assert len(result.matrices) == 32


def test_error_propagation_leaves_experts_out_and_says_so():
    result = run(build("mixtral"), error_propagation=0.5)
    assert result.report["model.layers.1.self_attn.q_proj"].target == "least-squares 0.5"
    assert result.report["model.layers.1.mlp.experts.0.up_proj"].target == ""
    assert any("not corrected for the errors before them" in w for w in result.report.warnings)
    # If every expert sees all tokens, they are the same ones in both models.
    result = run(build("mixtral"), error_propagation=0.5, calibrate_all_experts=True)
    assert result.report["model.layers.1.mlp.experts.0.up_proj"].target == "least-squares 0.5"
    assert not any("not corrected" in w for w in result.report.warnings)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"activations": {"bits": 8}}, r"'\*.experts.\*': {'activations': None}"),
        ({"bias_correction": True}, r"'\*.experts.\*': {'bias_correction': False}"),
    ],
)
def test_what_experts_cannot_have_is_refused(options, text):
    refused(text, build("mixtral"), **options)
    (change,) = options
    without = {"*.experts.*": {change: None if change == "activations" else False}}
    assert len(run(build("mixtral"), **options, overrides=without).matrices) == 32


def test_biases_that_experts_have_are_corrected():
    floats, model = build("gpt_oss"), build("gpt_oss")
    run(model, bias_correction=True)
    name = "model.layers.0.mlp.experts.gate_up_proj_bias"
    assert not torch.equal(model.get_parameter(name), floats.get_parameter(name))


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "llama4"])
def test_a_router_that_is_not_finite_is_named(kind):
    model = build(kind)
    name = list(mixtures(model))[-1]
    router = name.removesuffix("experts") + ("router" if kind == "llama4" else "gate")
    with torch.no_grad():
        model.get_submodule(router).weight[1] = torch.nan
    what = "inputs" if kind == "llama4" else "routing weights"
    with pytest.raises(CalibrationError, match=f"{name}: the {what} hold values that are not"):
        run(model)
    assert mixtures(model)[name].gate_up_proj.dim() == 3


def test_more_experts_per_token_than_there_are_is_refused():
    model = build("qwen3_moe")
    model.config.num_experts_per_tok = 5
    refused("sends a token to 5 experts, but there are 4", model)


def test_equalization_works_around_experts():
    model = build("qwen3_moe")
    with torch.no_grad():
        result = ptqkit.quantize(
            model, [ptqkit.recipe.parts.AWE(), ptqkit.recipe.parts.GPTQ(**OPTIONS)], batches()
        )
        assert result.equalization is not None and len(result.matrices) == 32
        assert torch.isfinite(model(TOKENS).logits).all()


def test_quantized_experts_are_known_for_what_they_are():
    model = build("mixtral")
    only = {"*.self_attn.*": "skip"}
    run(model, overrides=only)
    with pytest.raises(UnsupportedModuleError, match="quantized already"):
        ptqkit.equalize(model, batches())
    refused("quantized already", model, overrides=only)
    run(model, overrides=only, requantize=True)
    # Not any longer once other weights are loaded.
    model.load_state_dict(build("mixtral").state_dict())
    run(model, overrides=only)


def test_float_weights_of_experts_come_back():
    model = build("mixtral")
    floats = ptqkit.hf.FloatWeights(model)
    first = run(model)
    with pytest.raises(UnsupportedModuleError, match="quantized already"):
        ptqkit.hf.FloatWeights(model)
    floats.restore()
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(model.get_parameter(name), build("mixtral").get_parameter(name))
    second = run(model)
    for name, matrix in first.matrices.items():
        assert (matrix.codes == second.matrices[name].codes).all()


def test_last_layers_alone_know_of_other_tokens_too():
    overrides = {"*.experts.*.gate_proj": "skip", "*.experts.*.up_proj": "skip"}
    model, data = build("mixtral"), batches(2, 1, 24)
    floats = build("mixtral")
    result = run(model, data, overrides=overrides)
    name = next(iter(mixtures(model)))
    wanted = by_hand(model, name, floats.get_submodule(name), data)
    for expert in range(4):
        layer = f"{name}.{expert}.down_proj"
        assert result.report[layer].rule
        assert (result.matrices[layer].codes == wanted[layer].codes).all()


def test_diagnoses_say_that_experts_are_not_in_them():
    report = ptqkit.hf.diagnose(build("mixtral"), batches(), sensitivity=False)
    assert any("experts of 2 mixtures" in note for note in report.notes)
    assert all(".experts." not in row.name for row in report.weights)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_scales_of_experts_learn_from_logits(kind):
    data, options = batches(8), {**OPTIONS, "bits": 2}
    result = ptqkit.quantize(build(kind), "rtn", data, **options, tune=4)
    assert 0 < result.tuning.loss_after < result.tuning.loss_before
    name, module = list(mixtures(result.model).items())[-1]
    for which in ("up_proj", "down_proj"):
        held = result.matrices[f"{name}.2.{which}"].dequantize()
        assert (projection(module, 2, which) == held).all()
    later = ptqkit.quantize(build(kind), "rtn", data, **options)
    ptqkit.hf.tune(later, data, 4, float_model=build(kind))
    assert later.tuning.kept == result.tuning.kept
    for name, matrix in result.matrices.items():
        assert np.allclose(matrix.scales, later.matrices[name].scales, rtol=1e-3), name


def test_a_budget_of_bits_is_spent_on_experts_too():
    result = run(build("qwen3_moe"), bits=3.5)
    bits = {str(m.bits) for n, m in result.matrices.items() if ".experts." in n}
    assert len(bits) > 1
