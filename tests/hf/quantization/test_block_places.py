"""Blocks that wait on the host: what changes places when, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.driver_models import build, tokens
from torch import nn

from ptqkit import quantize
from ptqkit.hf.quantization import block_places, run
from ptqkit.hf.quantization.block_places import BlockPlaces, movable_bytes

NAMES = ["0", "1", "2", "3", "4"]


def stack():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)) for _ in NAMES))


def places_of(model):
    return {p.data_ptr(): name for name, p in model.named_parameters()}


def test_blocks_change_places_and_come_back(monkeypatch):
    monkeypatch.setattr(block_places, "_STAGE", 20)  # several parts of each parameter
    model = stack()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, x = places_of(model), torch.randn(3, 6)
    expected = model(x)
    places = BlockPlaces(model, NAMES, 2)
    moved = []
    with places.moving(), places.entering():
        places.settle()
        away = {n for n, p in model.named_parameters() if p.data_ptr() not in first}
        assert {name[0] for name in away} == {"3", "4"}
        out = x
        for position in range(len(NAMES)):
            out = model[position](out)
            own = model[position][0].weight.data_ptr()
            moved.append(first.get(own, "")[:1])
            places.leave(position + 1)
        assert torch.equal(out, expected)
    # The place of a block that is finished is that of the next one that waits.
    assert moved == ["0", "1", "2", "0", "1"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_block_that_is_called_early_comes_at_once():
    model = stack()
    places, expected = BlockPlaces(model, NAMES, 3), model(torch.ones(1, 6))
    with places.moving(), places.entering():
        assert torch.equal(model(torch.ones(1, 6)), expected)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_only_blocks_that_are_alike_may_move():
    model = stack()
    assert movable_bytes(model, NAMES) == 4 * (36 + 3 * 6)
    assert movable_bytes(model, []) == 0
    shared = stack()
    shared[1][0].weight = shared[0][0].weight
    outside = nn.Sequential(stack(), nn.Linear(6, 6))
    outside[1].weight = outside[0][2][0].weight
    other = stack()
    other[2] = nn.Sequential(nn.Linear(6, 6, bias=False), nn.LayerNorm(6))
    turned = stack()
    turned[0][0].weight = nn.Parameter(torch.randn(6, 6).T)
    for model in (shared, other, turned):
        assert movable_bytes(model, NAMES) == 0
    assert movable_bytes(outside, [f"0.{name}" for name in NAMES]) == 0


@pytest.mark.parametrize(
    ("recipe", "schedule"), [("quality", "replay"), ("best", "one-pass"), ("best", "replay")]
)
def test_codes_do_not_depend_on_where_blocks_wait(recipe, schedule, monkeypatch):
    own, found = run.QuantizationRun.__init__, []
    for count in (0, 1):

        def begin(self, model, recipe, inspection, plan, *rest, count=count, **more):
            own(self, model, recipe, inspection, replace(plan, on_host=count), *rest, **more)

        monkeypatch.setattr(run.QuantizationRun, "__init__", begin)
        model = build()
        found.append(
            quantize(model, recipe, tokens(), group_size=16, schedule=schedule, progress=False)
        )
    for key, matrix in found[0].matrices.items():
        assert np.array_equal(matrix.codes, found[1].matrices[key].codes), key
    for one, two in zip(*(r.model.parameters() for r in found), strict=True):
        assert torch.equal(one, two)
