"""Progress: events, the stages that count them, bars."""

from __future__ import annotations

import math
import sys
import time

import pytest

from ptqkit.hf.progress import (
    ProgressEvent,
    ProgressStage,
    close_progress,
    make_progress,
)


def test_events_read_as_a_line():
    event = ProgressEvent("down", 3, 14, 0.125, 2.0, 7.4)
    assert str(event) == "[3/14] down  loss 0.125  7 s left"
    assert str(ProgressEvent("q", 1, 2, stage="measuring")) == "measuring [1/2] q  0 s left"


def test_a_stage_counts_steps_by_their_cost():
    events = []
    stage = ProgressStage(events.append, "quantizing", 3, cost=10.0, start=time.perf_counter() - 6)
    stage.step("a", 1.5, cost=4.0)
    stage.skip(cost=2.0)
    stage.step("c", cost=4.0)
    assert [(e.name, e.index, e.total, e.stage) for e in events] == [
        ("a", 1, 3, "quantizing"),
        ("c", 3, 3, "quantizing"),
    ]
    assert events[0].loss == 1.5 and math.isnan(events[1].loss)
    # Four tenths took what the clock says, so six tenths take 1.5 times as long.
    assert events[0].elapsed >= 6
    assert events[0].seconds_left == pytest.approx(1.5 * events[0].elapsed)
    assert events[1].seconds_left == 0


def test_a_stage_without_a_listener_is_silent(capsys):
    ProgressStage(None, "measuring", 1).step("a")
    assert capsys.readouterr() == ("", "")


def test_without_rich_lines_are_printed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    progress = make_progress(True)
    progress(ProgressEvent("a", 1, 2, stage="measuring"))
    close_progress(progress)
    assert capsys.readouterr().err == "measuring [1/2] a  0 s left\n"


def test_closing_restores_a_bar_and_leaves_a_callable_alone():
    closed = []

    class Bar:
        def __call__(self, event):
            pass

        def close(self):
            closed.append(True)

    for progress in (Bar(), print, None):
        close_progress(progress)
    assert closed == [True]
