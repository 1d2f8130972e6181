"""The two schedules as generators: groups with their moments, and a model left as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.driver_models import build, padded_batches
from helpers.schedule_models import plain

from ptqkit.errors import CalibrationError
from ptqkit.hf.data.calibration import prepare_calibration
from ptqkit.hf.models.probe import probe_model
from ptqkit.hf.models.structure import find_structure
from ptqkit.hf.quantization.moments import MomentAccumulator, Moments
from ptqkit.hf.quantization.one_pass import one_pass_groups
from ptqkit.hf.quantization.replay import replay_groups
from ptqkit.hf.quantization.work import Work
from ptqkit.nn.forward import calibration_mode
from ptqkit.recipe import as_recipe

SCHEDULES = {"one pass": one_pass_groups, "replay": replay_groups}


def work_on(model, recipe="quality", batches=None):
    structure = find_structure(model, as_recipe(recipe))
    data = prepare_calibration(padded_batches() if batches is None else batches, None)
    modules = {name: target.module for name, target in structure.targets.items()}
    blocks = {name: model.get_submodule(name) for name in structure.blocks}
    shown = probe_model(model, modules, data.batches[0], blocks)
    return Work(model, structure.targets, shown.groups, shown.blocks, data)


def untouched(model):
    for module in model.modules():
        assert not module._forward_pre_hooks and "forward" not in module.__dict__
    expected = build().state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


def all_groups(schedule, recipe):
    model = build()
    with calibration_mode(model):
        found = list(SCHEDULES[schedule](work_on(model, recipe)))
    untouched(model)
    return found


@pytest.mark.parametrize("recipe", ["quality", "aweq"])
def test_both_yield_the_same_groups_and_moments(recipe):
    one, two = (all_groups(schedule, recipe) for schedule in SCHEDULES)
    assert len(one) == len(two) == 8
    for (first, a, _), (second, b, _) in zip(one, two, strict=True):
        assert [t.name for t in first] == [t.name for t in second]
        assert isinstance(a, Moments) and a.tokens == b.tokens > 0 and a.drift is None
        np.testing.assert_array_equal(a.hessian.matrix, b.hessian.matrix)
        assert (a.ranges is not None) == (recipe == "aweq")
        if a.ranges is not None:
            np.testing.assert_array_equal(a.ranges.mean, b.ranges.mean)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_later_groups_see_what_was_written_before(schedule):
    model = build()
    last = []
    with calibration_mode(model):
        for members, moments, _ in SCHEDULES[schedule](work_on(model)):
            last = moments.hessian.matrix
            for target in members:
                target.view.write(np.round(target.view.read(), 1))
    assert not np.array_equal(last, all_groups(schedule, "quality")[-1].moments.hessian.matrix)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stopping_in_the_middle_leaves_the_model_as_it_was(schedule):
    model = build()
    work = work_on(model)
    with calibration_mode(model):
        steps = SCHEDULES[schedule](work)
        next(steps)
        members = next(steps).members
        steps.close()
    assert work.done == set(work.groups[0]) and members[0].name not in work.done
    untouched(model)


def test_one_pass_returns_why_the_rest_is_left():
    model = plain(autocast=True)
    ids = [{"input_ids": torch.arange(40).reshape(2, 20)}]
    with calibration_mode(model):
        steps = one_pass_groups(work_on(model, "reference", ids))
        with pytest.raises(StopIteration) as end:
            while True:
                next(steps)
    assert "runs inside a thread-local mode" in end.value.value


def test_an_error_is_a_value_until_all_batches_are_through():
    found = MomentAccumulator("layer", needs_ranges=False)
    assert found.empty
    batch = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}
    found.add(torch.full((1, 2, 4), torch.nan), batch, None)
    assert not found.empty
    found.add(torch.ones(1, 2, 4), batch, None)
    error = found.finish()
    assert isinstance(error, ValueError) and "layer" in str(error)
    masked = {**batch, "attention_mask": torch.tensor([[1, 0]])}
    found = MomentAccumulator("layer", needs_ranges=True)
    found.add(torch.ones(3, 4), masked, torch.tensor([[True, False]]))
    assert isinstance(found.finish(), CalibrationError)
