"""What interrupts a run, such as a signal handler's time-out, is no failure of a layer."""

from __future__ import annotations

import signal

import pytest
import torch
from helpers.driver_models import build, tokens

from ptqkit.arrays.hessian import Hessian
from ptqkit.errors import CalibrationError
from ptqkit.hf.equalization import run as equalization
from ptqkit.hf.equalization.driver import equalize
from ptqkit.hf.quantization import run as quantization
from ptqkit.hf.quantization.driver import quantize
from ptqkit.hf.quantization.moments import MomentAccumulator

OPTIONS = {"bits": 3, "group_size": 16, "progress": False}


class TimeIsUp(Exception):
    """What a caller's signal handler raises."""


@pytest.fixture
def alarm():
    """Raise TimeIsUp, as a signal handler does, when the returned function is called."""

    def handler(number, frame):
        raise TimeIsUp

    before = signal.signal(signal.SIGTERM, handler)
    yield lambda: signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)


def interrupted(monkeypatch, owner, name, alarm, at=2):
    """Interrupt the call number ``at`` of a function, after its work."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(None)
        if len(calls) == at:
            alarm()
        return result

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize("on_error", ["raise", "leave_float"])
@pytest.mark.parametrize("schedule", ["one-pass", "replay"])
@pytest.mark.parametrize("recipe", ["quality", "best"])
@pytest.mark.parametrize("place", [(Hessian, "update"), (quantization, "solve_group")])
def test_a_time_out_ends_the_run_as_it_is(monkeypatch, alarm, place, recipe, schedule, on_error):
    interrupted(monkeypatch, *place, alarm)
    with pytest.raises(TimeIsUp):
        quantize(build(), recipe, tokens(), **OPTIONS, schedule=schedule, on_error=on_error)


def test_a_failure_of_a_layer_is_still_one(monkeypatch):
    def update(self, *args):
        raise ValueError("out of range")

    monkeypatch.setattr(Hessian, "update", update)
    result = quantize(build(), "quality", tokens(), **OPTIONS, on_error="leave_float")
    assert not result.matrices and len(result.report.failed) == 14
    assert all("out of range" in row.status for row in result.report.failed)


def test_an_interrupted_accumulator_gives_no_moments(monkeypatch, alarm):
    found = MomentAccumulator("layer", needs_ranges=True)
    batch = {"input_ids": torch.zeros((2, 4), dtype=torch.long)}
    value = torch.randn(2, 4, 8)
    found.add(value, batch, None)
    interrupted(monkeypatch, Hessian, "update", alarm, at=1)
    with pytest.raises(TimeIsUp):
        found.add(value, batch, None)  # H has the batch, the ranges do not
    found.add(value, batch, None)
    error = found.finish()
    assert isinstance(error, CalibrationError) and "interrupted" in str(error)


def test_a_time_out_in_the_choice_of_scales_goes_through(monkeypatch, alarm):
    interrupted(monkeypatch, equalization.EqualizationRun, "_weight", alarm, at=1)
    with pytest.raises(TimeIsUp):
        equalize(build(), tokens())
