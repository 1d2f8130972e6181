"""Groups that are solved at once while a device goes on: the order of things, and equal codes."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from helpers.driver_models import build, tokens
from helpers.expert_models import batches
from helpers.expert_models import build as build_experts

from ptqkit.hf import quantize
from ptqkit.hf.quantization import plan, replay
from ptqkit.hf.quantization.overlap import each_group, helpers
from ptqkit.hf.quantization.work import Step

WAIT = 20


class FakeDevice:
    """A schedule whose moments come from a device; notes what happens, in order.

    With ``meet`` the moments of the second group are there only once the first one is being solved,
    and the first one is solved only once the moments of the second one are asked for.
    """

    def __init__(self, independent, meet=False):
        self.independent, self.meet, self.events = independent, meet, []
        self.solving, self.asked = threading.Event(), threading.Event()

    def steps(self):
        for number, independent in enumerate(self.independent):
            if self.meet and number == 1:
                self.asked.set()
                assert self.solving.wait(WAIT), "the first group is not solved meanwhile"
            self.events.append(f"moments {number}")
            yield Step([], number, independent)
        return "the rest"

    def solve(self, number):
        if self.meet and number == 0:
            self.solving.set()
            assert self.asked.wait(WAIT), "the device waits for the first group"
        return number

    def run(self, at_once, ahead=None):
        with helpers(at_once) as begin:
            reason = each_group(
                self.steps(),
                lambda step: begin(lambda: self.solve(step.moments)),
                lambda wait: self.events.append(f"write {wait()}"),
                at_once if ahead is None else ahead,
            )
        assert reason == "the rest"
        return self.events


def test_a_group_is_solved_while_the_device_goes_on():
    events = FakeDevice([True, False], meet=True).run(1)
    assert events == ["moments 0", "moments 1", "write 0", "write 1"]


@pytest.mark.parametrize("at_once", [0, 1, 3])
def test_what_depends_on_a_group_waits_until_it_is_written(at_once):
    events = FakeDevice([False, True, True, False, True]).run(at_once)
    assert [e for e in events if e.startswith("write")] == [f"write {i}" for i in range(5)]
    for before, after in (("write 0", "moments 1"), ("write 3", "moments 4")):
        assert events.index(before) < events.index(after)
    ahead = events.index("moments 2") < events.index("write 1")
    assert ahead == (at_once > 0)


def test_as_many_groups_wait_as_there_is_room_for():
    waiting = most = 0
    for event in FakeDevice([True] * 9).run(2):
        waiting += 1 if event.startswith("moments") else -1
        most = max(most, waiting)
    assert most == 3  # two that wait, and the one that comes


def test_an_error_is_raised_in_the_turn_of_its_group():
    device = FakeDevice([True, True, True])

    def solve(number):
        if number == 1:
            raise ValueError("not this one")
        return number

    device.solve = solve
    with pytest.raises(ValueError, match="not this one"):
        device.run(2)
    assert [e for e in device.events if e.startswith("write")] == ["write 0"]


def test_the_schedule_is_closed_and_calls_that_wait_are_dropped():
    closed, calls = [], []

    def steps():
        try:
            while True:
                yield Step([], 0, True)
        finally:
            closed.append(True)

    def fail():
        calls.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), helpers(1) as begin:
        each_group(steps(), lambda step: begin(fail), lambda wait: wait(), 2)
    assert closed and len(calls) <= 3


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("options", [{}, {"on_error": "leave_float", "calibrate_on": "float"}])
def test_codes_and_report_are_those_of_one_after_the_other(ahead, options, monkeypatch):
    options = {"bits": 3, "group_size": 8, "schedule": "replay", "progress": False, **options}
    found, sizes, threads = [], [], set()
    waves = replay._waves

    def noted(work, groups):
        for wave, more in waves(work, groups):
            sizes.append(len(wave))
            yield wave, more

    monkeypatch.setattr(replay, "_waves", noted)
    for overlap in ((0, False), (3, ahead)):
        monkeypatch.setattr(plan, "plan_overlap", lambda *_, o=overlap: o)
        found.append(quantize(build_experts("mixtral"), "quality", batches(2, 1, 24), **options))
        threads |= {t.name for t in threading.enumerate() if t.name.startswith("ptqkit-solver")}
    first, second = found
    assert not threads and max(sizes) == 4 and ((2 in sizes) == ahead)
    assert list(first.matrices) == list(second.matrices)
    for name, matrix in first.matrices.items():
        np.testing.assert_array_equal(matrix.codes, second.matrices[name].codes, err_msg=name)
        np.testing.assert_array_equal(matrix.scales, second.matrices[name].scales)
    assert [r.name for r in first.report.layers] == [r.name for r in second.report.layers]
    for one, two in zip(first.report.quantized, second.report.quantized, strict=True):
        assert (one.objective, one.objective_rtn) == (two.objective, two.objective_rtn)
    assert first.report.warnings == second.report.warnings
    assert all(value >= 0 for value in second.report.seconds.values())


def test_a_float_model_calibrates_while_layers_are_solved(monkeypatch):
    options = {"bits": 3, "group_size": 16, "calibrate_on": "float", "progress": False}
    found = []
    for overlap in ((0, False), (1, False)):
        monkeypatch.setattr(plan, "plan_overlap", lambda *_, o=overlap: o)
        found.append(quantize(build(), "quality", tokens(), **options))
    for name, matrix in found[0].matrices.items():
        np.testing.assert_array_equal(matrix.codes, found[1].matrices[name].codes, err_msg=name)
