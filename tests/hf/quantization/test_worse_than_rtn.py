"""Layers that GPTQ makes worse than rounding to nearest are marked."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.driver_models import build, tokens

from ptqkit.hf import quantize

OPTIONS = {"bits": 8, "group_size": 8, "symmetric": True, "progress": False}


def unlike():
    """A model whose first inputs are of very unlike scale, with weights of which one is large."""
    model, generator = build(), torch.Generator().manual_seed(0)
    scale = 10.0 ** (12 * torch.rand(32, generator=generator) - 6)
    block = model.model.layers[0]
    with torch.no_grad():
        block.input_layernorm.weight.mul_(scale)
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(block.self_attn, name).weight[:, 7] *= 100
    return model


def test_they_are_marked():
    report = quantize(unlike(), "reference", tokens(), order="act", **OPTIONS).report
    row = report["model.layers.0.self_attn.q_proj"]
    assert row in report.worse_than_rtn and row.improvement < -0.5
    for other in report.quantized:
        worse = other in report.worse_than_rtn
        assert worse == (other.objective > 1.0001 * other.objective_rtn)
        assert worse == ("worse than rounding to nearest" in other.notes)
    assert "layers are worse than round-to-nearest; try order group-act" in str(report)
    # RTN on its own grids is what the method rtn gives
    rtn = quantize(unlike(), "reference", tokens(), method="rtn", **OPTIONS).report
    assert row.objective_rtn == pytest.approx(rtn[row.name].objective, rel=1e-3)
    grouped = quantize(unlike(), "reference", tokens(), order="group-act", **OPTIONS).report
    assert grouped[row.name].objective < 1.01 * row.objective_rtn


@pytest.mark.parametrize("options", [{"diagnostics": False, "order": "act"}, {"method": "rtn"}, {}])
def test_nothing_is_said_where_nothing_is_known_or_wrong(options):
    report = quantize(build(), "reference", tokens(), **OPTIONS, **options).report
    assert "worse than" not in str(report) and not report.worse_than_rtn
    assert math.isnan(report.quantized[0].objective_rtn) == ("diagnostics" in options)
