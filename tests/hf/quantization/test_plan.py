"""Schedules are chosen from values: what a probe showed, memory, what was asked for."""

from __future__ import annotations

import pytest
import torch
from helpers.driver_models import build, tokens

from ptqkit.errors import PreflightError, UnsupportedModuleError
from ptqkit.hf.data.calibration import prepare_calibration
from ptqkit.hf.models.probe import Probe
from ptqkit.hf.models.structure import find_structure
from ptqkit.hf.quantization import memory as memory_module
from ptqkit.hf.quantization import plan as plan_module
from ptqkit.hf.quantization.float_twin import twin_bytes
from ptqkit.hf.quantization.inspection import Inspection, inspect_model
from ptqkit.hf.quantization.memory import MemoryLimit, spare_memory
from ptqkit.hf.quantization.plan import (
    Plan,
    estimate_memory,
    plan_schedule,
)
from ptqkit.recipe.recipe import Recipe


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def seen(model):
    recipe = Recipe(group_size=16)
    return inspect_model(
        model,
        recipe,
        tokens(60),
        None,
        blocks=None,
        share_inputs=True,
        checkpoint_format="auto",
        out_dir=None,
        overwrite=False,
        batch_size=1,
    )


def test_an_inspection_changes_nothing(model, seen):
    assert len(seen.structure.targets) == 14 and len(seen.probe.groups) == 8
    assert seen.calibration.tokens > 0 and seen.unprobed == set()
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_without_data_there_is_nothing_to_choose(model, seen):
    assert plan_schedule(model, Inspection(seen.structure), "auto", None) == Plan()


def test_one_pass_unless_something_is_in_the_way(model, seen):
    found = plan_schedule(model, seen, "auto", None)
    assert (found.schedule, found.reason, found.strict) == ("one-pass", "", False)
    assert found.estimate["budget"] is None and found.estimate["available"] > 0
    assert plan_schedule(model, seen, "one-pass", None).strict
    found = plan_schedule(model, seen, "replay", None)
    assert (found.schedule, found.reason) == ("replay", "asked for")


def altered(seen, inside_mode=None, unprobed=()):
    shown = Probe(seen.probe.groups, {}, [], inside_mode, seen.probe.blocks)
    return Inspection(seen.structure, seen.calibration, shown, set(unprobed))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"inside_mode": "x.y"}, r"x\.y runs inside a thread-local mode"),
        ({"unprobed": ["b", "a"]}, r"did not reach 2 layers \(a, \.\.\.\)"),
    ],
)
def test_what_the_probe_showed_decides(model, seen, changes, reason):
    inspection = altered(seen, **changes)
    found = plan_schedule(model, inspection, "auto", None)
    assert found.schedule == "replay"
    with pytest.raises(UnsupportedModuleError, match=f"is not possible: .*{reason}"):
        plan_schedule(model, inspection, "one-pass", None)


def test_memory_decides(model, seen, monkeypatch):
    targets, groups, data = seen.structure.targets, seen.probe.groups, seen.calibration
    needed = estimate_memory(model, targets, groups, data)
    assert 0 < needed.replay < needed.one_pass
    between = (needed.replay + needed.one_pass) // 2
    found = plan_schedule(model, seen, "auto", between)
    assert found.schedule == "replay" and "the memory budget is" in found.reason
    with pytest.raises(PreflightError, match="memory_budget: replay needs about"):
        plan_schedule(model, seen, "auto", 1000)
    # What is free is no promise: too little of it is a warning.
    monkeypatch.setattr(memory_module, "available_memory", lambda device: 1000)
    found = plan_schedule(model, seen, "auto", None)
    assert found.schedule == "replay" and "the free memory is" in found.reason
    assert len(found.warnings) == 1 and "replay needs about" in found.warnings[0]


def test_a_float_model_that_runs_along_is_counted(model, seen):
    targets, groups, data = seen.structure.targets, seen.probe.groups, seen.calibration
    needed = estimate_memory(model, targets, groups, data, propagate=True)
    found = plan_schedule(model, seen, "auto", 2**40, True)
    assert (found.schedule, found.strict) == ("one-pass", False)
    replay = found.estimate["estimate_replay"]
    whole = needed.replay + twin_bytes(targets, groups)
    assert replay == whole + spare_memory(torch.device("cpu"), whole)
    one = found.estimate["estimate_one_pass"]
    assert replay < one - 1
    for budget, schedule in ((one, "one-pass"), (one - 1, "replay"), (replay, "replay")):
        assert plan_schedule(model, seen, "auto", budget, True).schedule == schedule
    with pytest.raises(PreflightError, match="memory_budget: replay needs about"):
        plan_schedule(model, seen, "auto", replay - 1, True)


def test_a_container_bounds_the_budget(model, seen, monkeypatch):
    targets, groups, data = seen.structure.targets, seen.probe.groups, seen.calibration
    needed = estimate_memory(model, targets, groups, data)
    between = (needed.replay + needed.one_pass) // 2
    monkeypatch.setattr(memory_module, "container_memory", lambda: between)
    found = plan_schedule(model, seen, "auto", 2**40)
    assert found.schedule == "replay" and "the container's limit leaves" in found.reason
    # A budget is a promise, what a container has left is not.
    monkeypatch.setattr(memory_module, "container_memory", lambda: 1000)
    assert "replay needs about" in plan_schedule(model, seen, "auto", 2**40).warnings[0]


def test_the_codes_are_counted(model, seen):
    targets, groups, data = seen.structure.targets, seen.probe.groups, seen.calibration
    last = {name: targets[name] for name in groups[-1]}
    others = {name: target for name, target in targets.items() if name not in last}
    weights = sum(t.view.weight.numel() for t in last.values())
    full, less = (estimate_memory(model, t, groups[:-1], data) for t in (targets, others))
    assert full.replay - less.replay == full.one_pass - less.one_pass == weights


@pytest.mark.parametrize(("name", "stacks"), [("llama", 1), ("t5", 2)])
def test_outputs_on_a_device_have_one_place_per_stack(name, stacks, monkeypatch):
    model = build(name)
    targets, data = find_structure(model, Recipe()).targets, prepare_calibration(tokens(8), None)
    groups = [[key] for key in targets]
    for propagate, models in ((False, 1), (True, 2)):
        host = estimate_memory(model, targets, groups, data, propagate).outputs
        with monkeypatch.context() as patch:
            patch.setattr(plan_module, "device_of", lambda model: torch.device("cuda"))
            found = estimate_memory(model, targets, groups, data, propagate).outputs
        one = data.tokens * 4 * 32 * models  # float32, 32 wide
        assert found == pytest.approx(1.3 * stacks * one, abs=1)
        assert host == pytest.approx(1.3 * 2 * one, abs=1)


def test_blocks_wait_on_the_host_where_a_gpu_is_short_of_memory(model, seen, monkeypatch):
    shown = Probe(seen.probe.groups, {}, [], None, [f"block {i}" for i in range(10)])
    inspection = Inspection(seen.structure, seen.calibration, shown)
    limits = [2**40]
    for name, what in (
        ("device_of", lambda model: torch.device("cuda")),
        ("waiting_bytes", lambda *rest: {}),
        ("movable_bytes", lambda model, blocks: 1000),
        ("memory_limit", lambda device, budget: MemoryLimit(limits[-1], "memory budget", 7)),
    ):
        monkeypatch.setattr(plan_module, name, what)

    def planned(limit, schedule="auto", propagate=False):
        limits.append(limit)
        return plan_schedule(model, inspection, schedule, limit, propagate)

    found = planned(2**40)
    assert found.on_host == 0 and "blocks_on_host" not in found.estimate
    one, replay = found.estimate["estimate_one_pass"], found.estimate["estimate_replay"]
    assert one > replay + 8000
    for schedule, needed in (("one-pass", one), ("replay", replay)):
        for missing, count in ((1, 1), (1000, 1), (1001, 2), (7000, 7)):  # three stay
            found = planned(needed - missing, schedule)
            assert (found.schedule, found.on_host) == (schedule, count)
            assert found.estimate["blocks_on_host"] == count
    found = planned(one - 7001)
    assert found.schedule == "replay" and "one pass needs about" in found.reason
    with pytest.raises(PreflightError, match="replay needs about"):
        planned(replay - 7001)
    # Also where the float model runs along, with its copies.
    twice = planned(2**40, propagate=True).estimate
    assert twice["estimate_one_pass"] > one and twice["estimate_replay"] > replay
    found = planned(twice["estimate_replay"] - 1001, propagate=True)
    assert (found.schedule, found.on_host) == ("replay", 2)
    monkeypatch.setattr(plan_module, "movable_bytes", lambda model, blocks: 0)
    assert planned(one - 1).schedule == "replay"
