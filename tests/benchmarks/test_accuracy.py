"""The comparison of recipes: its grids, the order of its cells, its statistics."""

from __future__ import annotations

import argparse
import csv
import math

import pytest
import torch
from torch import nn

from benchmarks.accuracy import run, tables, times


def test_a_group_that_does_not_divide_is_the_nearest_divisor():
    model = nn.ModuleDict({"up": nn.Linear(64, 172), "down": nn.Linear(172, 64)})
    for size, up, down in ((64, None, 43), (32, None, 43), (128, 64, 86), (8, None, 4)):
        found = run.grid_options(model, {"bits": 3, "group_size": size})
        given = {name: change["group_size"] for name, change in found["overrides"].items()}
        assert given == {n: s for n, s in (("up", up), ("down", down)) if s}
    assert run.grid_options(model, run.GRIDS["4 channel"]) == {"bits": 4, "group_size": None}


def test_cells_come_draw_by_draw_and_what_is_there_is_left_alone(tmp_path):
    windows = run.Table(tmp_path / "windows.csv", run.WINDOWS)
    runs = run.Table(tmp_path / "runs.csv", run.RUNS)
    for table in (windows, runs):
        table.seen |= {("stories260k", "3 g64", "best", "0"), ("embedded", "", "float", "-1")}
    args = argparse.Namespace(
        data=tmp_path, samples=4, windows=4, device="cpu", models=None, draws=2, processes=1,
        tune_device=None, own=None,
        model=["embedded", "stories260k"], grid=["3 g64", "2 g64"],
        recipe=["rtn", "best", "best, tuned"],
    )  # fmt: skip
    found = [(c.model, c.grid, c.draw, c.recipes) for c in run.missing(args, windows, runs)]
    assert found[:5] == [
        ("stories260k", "", -1, ()),
        ("embedded", "3 g64", 0, ("rtn", "best")),
        ("stories260k", "3 g64", 0, ("rtn",)),
        ("embedded", "2 g64", 0, ("rtn", "best")),
        ("stories260k", "2 g64", 0, ("rtn", "best")),
    ]
    assert found[9:] == [
        (model, grid, draw, ("best, tuned",))
        for draw in range(2)
        for grid in args.grid
        for model in args.model
    ]


def test_points_of_the_picture(tmp_path):
    rows = [("m", "", "float", -1, 0, 10 * math.log(4), 10)]
    rows += [("m", "3 g64", "best", d, 0, 10 * math.log(v), 10) for d, v in ((0, 4.5), (1, 4.5))]
    for name, columns, lines in (
        ("windows", run.WINDOWS, rows),
        ("runs", run.RUNS, [("m", "3 g64", "best", d, 1, 1, 1, 3.25) for d in range(2)]),
    ):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([columns, *lines])
    (bits, excess), = tables.points(tmp_path)["m"]["best"]  # fmt: skip
    assert (bits, excess) == (3.25, pytest.approx(0.5))
    tables.draw(tables.points(tmp_path), tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_means_over_models():
    def cell(*values):
        return {d: {0: math.log(v), 1: math.log(v)} for d, v in enumerate(values)}

    found = {}
    for model, best in (("a", (4.5,)), ("b", (3.9, 3.9))):
        found[model, ""] = {"float": {-1: cell(4.0)[0]}}
        found[model, "3 g64"] = {"reference": cell(5.0), "best": cell(*best)}
    assert tables.means(found) == ["| 3 g64 | best | -75 % | a -50 (1), b -100 (2) |"]


def test_times_are_compared_within_a_round(tmp_path):
    rows = [
        ("m", "3 g64", recipe, turn, 128, 4, seconds, 1)
        for turn, pair in enumerate([(1, 2), (10, 40), (2, 3)])
        for recipe, seconds in zip(("quality", "best"), pair, strict=True)
    ]
    path = tmp_path / "times.csv"
    run.Table(path, times.COLUMNS).add(rows)
    assert times.summary(path)[2:] == [
        "| m | 3 g64 | 128 | 4 | quality | 3 | 2.00 | 1.00 |",
        "| m | 3 g64 | 128 | 4 | best | 3 | 3.00 | 2.00 |",
    ]


def test_own_text_is_written_once(tmp_path, monkeypatch):
    text = [{"input_ids": torch.tensor([[1, 2, 3]])}]
    calls = []
    monkeypatch.setattr(run, "own_text", lambda *args, **options: calls.append(options) or text)
    case = argparse.Namespace(model=argparse.Namespace(device=torch.device("cpu")))
    for _ in range(2):
        (found,) = run.written(case, [], 1, 5, tmp_path / "own" / "m.pt")
        assert found["input_ids"].tolist() == [[1, 2, 3]] and found["attention_mask"].sum() == 3
    assert calls == [{"batch_size": 64, "seed": 5}]


def test_average_bits_are_those_of_the_grid():
    model = nn.ModuleDict({"up": nn.Linear(64, 172)})
    grid = run.GRIDS["3 g64"]
    assert run.recipe_options(model, "best", grid)["bits"] == 3
    found = run.recipe_options(model, "best, average bits", grid)
    assert isinstance(found["bits"], float) and found["bits"] == 3.0
    assert all(name in run.RECIPES for name in run.AVERAGE)
