"""Layers that answer for the errors of their residual stream, and the recipe `best`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.driver_models import build, padded_batches, tokens
from helpers.schedule_models import count_hooks

import ptqkit
from ptqkit.arrays.drift import moved_outputs
from ptqkit.hf import quantize
from ptqkit.hf.models.stream import find_writers
from ptqkit.hf.models.structure import find_blocks
from ptqkit.nn.linear import LinearView
from ptqkit.recipe.recipe import Recipe

# Rows for themselves: what couples them has tests of its own.
OPTIONS = {"bits": 3, "group_size": 16, "row_coupling": 0, "progress": False}
ALPHAS = {"error_propagation": 0.5, "residual_propagation": 0.75}


def _plus(stream, output):
    return stream + output.reshape(stream.shape)


def passing(model, layer, block, before, batches):
    """Inputs of a layer in plain forwards, and the stream that it is about to add to: the block's
    input plus the outputs of the writers before it.
    """
    inputs, streams, handles = [], [], []
    first = model.get_submodule(block).register_forward_pre_hook(
        lambda m, a, k: streams.append((a[0] if a else k["hidden_states"]).clone()),
        with_kwargs=True,
    )
    handles.append(first)
    for name in before:
        handles.append(
            model.get_submodule(name).register_forward_hook(
                lambda m, a, o: streams.append(_plus(streams.pop(), o))
            )
        )
    handles.append(
        model.get_submodule(layer).register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return inputs, streams


def by_hand(floats, model, result, writers, batches):
    """The plainest form: whole forwards of a float and a quantized model for every layer."""
    blocks = {name: block for block, names in writers.items() for name in names}
    alphas = result.recipe
    for row in result.report.quantized:
        name = row.name
        view, goal = (LinearView(m.get_submodule(name)) for m in (model, floats))
        outputs, width = goal.shape
        block = blocks.get(name, next(b for b in writers if name.startswith(b)))
        before = writers[block][: writers[block].index(name)] if name in blocks else ()
        H, drift = ptqkit.Hessian(width), ptqkit.Drift(width, width)
        residual = ptqkit.Drift(outputs, width)
        narrow = name in blocks and outputs < width  # D is of the streams behind it
        found = zip(
            batches, *(zip(*passing(m, name, block, before, batches), strict=True)
                       for m in (floats, model)), strict=True,
        )  # fmt: skip
        for batch, (x, r), (x_q, r_q) in found:
            mask = batch.get("attention_mask")
            keep = slice(None) if mask is None else mask.bool().reshape(-1)
            x, x_q = (v.reshape(-1, width)[keep] for v in (x, x_q))
            H.update(x_q)
            drift.update(x, x_q)
            if name in blocks:
                r, r_q = (v.reshape(-1, outputs)[keep] for v in (r, r_q))
                if narrow:
                    r = moved_outputs(r, goal.read(), x, x_q)
                residual.update(r, r_q, x_q)
        options = {k: getattr(alphas, k) for k in ("bits", "group_size", "order", "grid")}
        options |= {k: getattr(alphas, k) for k in ("refine_passes", "refit_rounds", "damping")}
        D, alpha = None, alphas.error_propagation
        if name in blocks:
            D, alpha = residual, alphas.residual_propagation
        G = None if narrow else drift
        target = ptqkit.target_weights(goal.read(), H, G, D, alpha=alpha)
        matrix = ptqkit.gptq(target, H, **options)
        yield name, matrix
        view.write(matrix.dequantize())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom"])
def test_equals_two_whole_models_by_hand(name):
    batches = padded_batches(name)
    result = quantize(build(name), "best", batches, share_inputs=False, **OPTIONS, **ALPHAS)
    floats, model = build(name), build(name)
    paths = [name for names in find_blocks(model).values() for name in names]
    blocks = {path: model.get_submodule(path) for path in paths}
    writers = find_writers(model, blocks, batches[0]).writers
    assert all(len(names) == 2 for names in writers.values())
    for key, matrix in by_hand(floats, model, result, writers, batches):
        found = result.matrices[key]
        np.testing.assert_array_equal(found.codes, matrix.codes, err_msg=key)
        np.testing.assert_array_equal(found.scales, matrix.scales, err_msg=key)
    for (key, a), b in zip(
        model.state_dict().items(), result.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), key


def test_d_behind_a_writer_is_d_and_g_before_it():
    rng = np.random.default_rng(0)
    x, x_q = (rng.normal(size=(200, 16)).astype(np.float32) for _ in range(2))
    r, r_q = (rng.normal(size=(200, 8)).astype(np.float32) for _ in range(2))
    W = rng.normal(size=(8, 16)).astype(np.float32)
    H, G = ptqkit.Hessian(16), ptqkit.Drift(16, 16)
    before, behind = ptqkit.Drift(8, 16), ptqkit.Drift(8, 16)
    H.update(x_q)
    G.update(x, x_q)
    before.update(r, r_q, x_q)
    behind.update(r + (x - x_q) @ W.T, r_q, x_q)
    both = (
        ptqkit.target_weights(W, H, *parts, alpha=0.75) for parts in ((G, before), (None, behind))
    )
    np.testing.assert_allclose(*both, rtol=0, atol=1e-5)
    assert abs(ptqkit.target_weights(W, H, None, before, alpha=0.75) - W).max() > 0.1


def test_without_targets_and_refits_best_is_quality():
    off = {"error_propagation": 0, "residual_propagation": 0, "refit_rounds": 0}
    best, quality = (
        quantize(build(), name, padded_batches(), **OPTIONS, **extra)
        for name, extra in (("best", off), ("quality", {}))
    )
    assert best.recipe == quality.recipe
    for key, matrix in quality.matrices.items():
        assert matrix.codes.tobytes() == best.matrices[key].codes.tobytes()
        assert matrix.scales.tobytes() == best.matrices[key].scales.tobytes()


def test_layers_whose_paths_agree_are_quantized_as_they_are():
    found = quantize(build(), "best", padded_batches(), **OPTIONS)
    plain = quantize(build(), "quality", padded_batches(), refit_rounds=2, **OPTIONS)
    for end in "qkv":
        key = f"model.layers.0.self_attn.{end}_proj"
        np.testing.assert_array_equal(found.matrices[key].codes, plain.matrices[key].codes)
        np.testing.assert_array_equal(found.matrices[key].scales, plain.matrices[key].scales)


def test_the_stream_is_nearer_to_the_float_models():
    batches, floats = padded_batches(), build()

    def error(alphas):
        model = quantize(build(), "quality", batches, **OPTIONS, **alphas).model
        with torch.no_grad():
            pairs = ((model.model(**b)[0], floats.model(**b)[0]) for b in batches)
            return sum(float(((a - b) ** 2).sum()) for a, b in pairs)

    qep = error({"error_propagation": 1.0})
    both = error({"error_propagation": 1.0, "residual_propagation": 1.0})
    alone = error({"residual_propagation": 1.0})
    assert both < qep < error({}) and alone < error({})


def test_report_says_what_was_quantized():
    report = quantize(build(), "best", padded_batches(), **OPTIONS, **ALPHAS).report
    kinds = {row.name.rsplit(".", 1)[1]: row.target for row in report.quantized}
    assert kinds["o_proj"] == kinds["down_proj"] == "residual 0.75"
    assert kinds["q_proj"] == kinds["up_proj"] == "least-squares 0.5"
    assert "error propagation 0.5, residual propagation 0.75: figures are" in report.table()
    assert json.loads(report.to_json())["layers"][0]["target"] == "least-squares 0.5"
    assert not report.warnings
    plain = quantize(build(), "quality", padded_batches(), **OPTIONS).report
    assert {row.target for row in plain.quantized} == {""}


@pytest.mark.parametrize("name", ["falcon", "bert", "gemma2"])
def test_where_the_stream_cannot_be_told_it_is_error_propagation(name):
    batches = padded_batches(name)
    found = quantize(build(name), "best", batches, **OPTIONS, **ALPHAS)
    assert {row.target for row in found.report.quantized} == {"least-squares 0.5"}
    [text] = found.report.warnings
    assert text.startswith("residual_propagation=0.75 does not reach 2 of 2 blocks (")
    assert "in turn); their layers have error_propagation=0.5" in text
    only = quantize(
        build(name), "quality", batches, refit_rounds=2, error_propagation=0.5, **OPTIONS
    )
    for key, matrix in only.matrices.items():
        np.testing.assert_array_equal(matrix.codes, found.matrices[key].codes)
    alone = quantize(build(name), "quality", batches, residual_propagation=0.5, **OPTIONS)
    plain = quantize(build(name), "quality", batches, **OPTIONS)
    for key, matrix in plain.matrices.items():
        np.testing.assert_array_equal(matrix.codes, alone.matrices[key].codes)


def test_a_writer_that_stays_float_still_writes():
    """The stream of the layers after it holds its output."""
    batches, skip = padded_batches("gpt2"), {"*.attn.c_proj": "skip"}
    result = quantize(build("gpt2"), "best", batches, overrides=skip, **OPTIONS)
    model = build("gpt2")
    blocks = {f"transformer.h.{i}": model.transformer.h[i] for i in range(2)}
    writers = find_writers(model, blocks, batches[0]).writers
    for key, matrix in by_hand(build("gpt2"), model, result, writers, batches):
        np.testing.assert_array_equal(result.matrices[key].codes, matrix.codes, err_msg=key)


@pytest.mark.parametrize("kind", [FloatingPointError, KeyboardInterrupt])
def test_hooks_go_after_an_error(kind):
    model, calls = build(), [0]

    class Broken(torch.nn.Module):
        def forward(self, x):
            calls[0] += 1
            if calls[0] == 5:
                raise kind("in the model")
            return torch.nn.functional.silu(x)

    model.model.layers[1].mlp.act_fn = Broken()
    with pytest.raises(kind):
        quantize(model, "best", padded_batches(), **OPTIONS)
    assert calls[0] == 5 and count_hooks(model) == 0


def test_the_streams_are_counted():
    ids = tokens(60)
    qep, both = (
        quantize(build(), "quality", ids, **OPTIONS, **alphas).report.memory["estimate_one_pass"]
        for alphas in ({"error_propagation": 0.5}, ALPHAS)
    )
    assert 1.02 * qep < both < 1.3 * qep


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual_propagation": 1.5}, "residual_propagation must be a number from 0 to 1"),
        ({"residual_propagation": True}, "residual_propagation must be a number"),
        ({"residual_propagation": 0.5, "method": "rtn"}, "residual_propagation=0.5 needs method"),
        (
            {"residual_propagation": 0.5, "bias_correction": True},
            "cannot be combined with bias_correction.*use residual_propagation=0",
        ),
        ({"residual_propagation": 0.5, "target": "qronos"}, "needs target 'least-squares'"),
        ({"target": "qep"}, "target must be"),
        ({"target_damping": -0.1}, "target_damping must be a number of at least 0"),
        ({"refit_rounds": -1}, "refit_rounds must be"),
        (
            {"overrides": {"a*": {"residual_propagation": 0.5}}},
            "cannot hold residual_propagation: it holds for the whole run",
        ),
    ],
)
def test_recipe_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_recipe_round_trip_and_settings():
    recipe = Recipe.preset("best", target_damping=0.1)
    assert recipe.refit_rounds == 2 and recipe.residual_propagation > 0
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.propagation == f"error_propagation={recipe.error_propagation:g}"
    assert Recipe(residual_propagation=1).propagation == "residual_propagation=1"
    assert Recipe().propagation == ""


@pytest.mark.parametrize("target", ["qronos", "gptaq"])
def test_other_targets_and_their_damping(target):
    batches = padded_batches()
    options = {**OPTIONS, "error_propagation": 1.0}
    found = quantize(build(), "reference", batches, target=target, **options)
    assert {row.target for row in found.report.quantized} == {f"{target} 1"}
    same, other = (
        quantize(build(), "reference", batches, target=target, target_damping=d, **options)
        for d in (0.01, 0.5)
    )
    key = "model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(found.matrices[key].codes, same.matrices[key].codes)
    assert not np.array_equal(found.matrices[key].codes, other.matrices[key].codes)
