"""Average bits, shared out among layers by what rounding them costs the model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers import expert_models
from helpers.driver_models import build, tokens

import ptqkit
from ptqkit.errors import PreflightError
from ptqkit.hf.quantization.mixed_bits import choose_bits
from ptqkit.recipe.recipe import Recipe

OPTIONS = {"group_size": 16, "progress": False, "diagnostics": False}


def run(bits=3.4, model=None, data=None, **changes):
    data = tokens() if data is None else data
    return ptqkit.quantize(
        model or build(), "quality", data, **{**OPTIONS, "bits": bits, **changes}
    )


def average(result, names=None):
    found = [m for n, m in result.matrices.items() if names is None or n in names]
    return sum(m.bits * m.codes.size for m in found) / sum(m.codes.size for m in found)


def test_the_average_is_kept_and_layers_differ():
    result = run()
    assert 3.3 < average(result) <= 3.4
    assert len({m.bits for m in result.matrices.values()}) > 1
    losses = result.report.rounding_losses
    assert losses.keys() == result.matrices.keys()
    assert all(curve[2] > curve[3] > curve[4] > 0 for curve in losses.values())
    seconds = result.report.seconds
    assert seconds["rounding_losses"] > 0
    assert sum(v for k, v in seconds.items() if k != "total") == pytest.approx(seconds["total"])
    assert all(v >= 0 for v in seconds.values())


def test_layers_that_cost_more_have_more_bits():
    losses, matrices = run().report.rounding_losses, run().matrices
    per_weight = {n: losses[n][3] / m.codes.size for n, m in matrices.items()}
    ranked = sorted(per_weight, key=per_weight.__getitem__)
    few, many = ranked[: len(ranked) // 3], ranked[-len(ranked) // 3 :]
    assert max(matrices[n].bits for n in few) <= min(matrices[n].bits for n in many)


def test_the_result_names_every_layer_and_gives_the_same_codes_again():
    first = run()
    again = ptqkit.quantize(
        build(), Recipe.from_dict(json.loads(json.dumps(first.recipe.to_dict()))), tokens(),
        progress=False, diagnostics=False,
    )  # fmt: skip
    assert first.recipe.bits == 3.4 and not again.report.rounding_losses
    for name, matrix in first.matrices.items():
        assert np.array_equal(matrix.codes, again.matrices[name].codes)
        assert again.matrices[name].bits == matrix.bits


def test_layers_with_bits_of_their_own_do_not_count():
    result = run(2.5, overrides={"*.down_proj": {"bits": 8}, "*.0.*.q_proj": "skip"})
    own = {n for n in result.matrices if n.endswith("down_proj")}
    assert all(result.matrices[n].bits == 8 for n in own)
    rest = result.matrices.keys() - own
    assert result.report.rounding_losses.keys() == rest
    assert 2.3 < average(result, rest) <= 2.5


def test_the_model_is_float_while_layers_are_compared(monkeypatch):
    model = build()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def chosen(model, recipe, found, threads):
        choose_bits(model, recipe, found, threads)
        for n, p in model.named_parameters():
            assert torch.equal(p, before[n]) and p.requires_grad and p.grad is None
        raise InterruptedError

    monkeypatch.setattr("ptqkit.hf.quantization.driver.choose_bits", chosen)
    with pytest.raises(InterruptedError):
        run(model=model)


def test_formats_that_hold_mixed_bits(tmp_path):
    with pytest.raises(PreflightError, match="one bits and group_size for all layers"):
        run(checkpoint_format="gptq_v2", out_dir=tmp_path / "gptq")
    result = run(symmetric=True, out_dir=tmp_path / "ct", checkpoint_format="compressed-tensors")
    stored = ptqkit.hf.read_matrices(tmp_path / "ct")
    assert {n: m.bits for n, m in stored.items()} == {n: m.bits for n, m in result.matrices.items()}
    run(out_dir=tmp_path / "own")
    assert ptqkit.load(tmp_path / "own") is not None


def test_calibration_is_needed_even_to_round_to_nearest():
    with pytest.raises(PreflightError, match=r"bits 3\.4 needs calibration data"):
        ptqkit.quantize(build(), "rtn", bits=3.4, group_size=16, progress=False)
    result = ptqkit.quantize(build(), "rtn", tokens(), bits=3.4, group_size=16, progress=False)
    assert 3.3 < average(result) <= 3.4


@pytest.mark.parametrize("kind", ["mixtral"])
def test_experts_are_layers_like_others(kind):
    model = expert_models.build(kind)
    result = run(model=model, data=expert_models.batches())
    assert average(result) <= 3.4 and len({m.bits for m in result.matrices.values()}) > 1
    assert any("experts" in n for n in result.report.rounding_losses)


def test_a_model_without_logits():
    model = build().model
    assert 3.3 < average(run(model=model)) <= 3.4


def test_equalized_models_are_compared_as_they_are_then(monkeypatch):
    plain = run().report.rounding_losses
    equalized = run(equalization={"method": "awe", "alpha": 0.5}).report.rounding_losses
    assert plain.keys() == equalized.keys() and plain != equalized
