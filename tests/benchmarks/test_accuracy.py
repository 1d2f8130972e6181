"""The comparison of recipes: its grids, the order of its cells, its statistics."""

from __future__ import annotations

import argparse
import csv
import math
import statistics

import pytest
import torch
from torch import nn

from benchmarks.accuracy import run, tables, times
from benchmarks.accuracy.peers import common


def test_a_group_that_does_not_divide_is_the_nearest_divisor():
    model = nn.ModuleDict({"up": nn.Linear(64, 172), "down": nn.Linear(172, 64)})
    for size, up, down in ((64, None, 43), (32, None, 43), (128, 64, 86), (8, None, 4)):
        found = run.grid_options(model, {"bits": 3, "group_size": size})
        given = {name: change["group_size"] for name, change in found["overrides"].items()}
        assert given == {n: s for n, s in (("up", up), ("down", down)) if s}
        assert all(
            common.divisor(getattr(model, n).in_features, size) == s for n, s in given.items()
        )
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


def test_jackknife_of_a_mean_is_its_standard_error():
    values = [1.0, 2.0, 4.0, 9.0]

    def mean(left_out):
        return statistics.fmean(v for i, v in enumerate(values) if i != left_out)

    error = statistics.stdev(values) / 2
    assert tables.jackknife(mean, range(4)) == (4.0, pytest.approx(error))


def test_above_is_of_the_draws_that_both_have():
    first = {0: {0: math.log(6.0), 1: math.log(6.0)}, 1: {0: math.log(9.0), 1: math.log(9.0)}}
    other = {1: {0: math.log(5.0), 1: math.log(5.0)}, 2: {0: 0.0, 1: 0.0}}
    assert tables.above(first, other) == (pytest.approx(4.0), pytest.approx(0, abs=1e-12))
    assert tables.above({0: first[0]}, other) is None
    uneven = {1: {0: math.log(5.0), 1: math.log(20.0)}}  # 10 - 5; 20 - 5 and 5 - 5
    assert tables.above(uneven, other) == (pytest.approx(5.0), pytest.approx(7.5))


def test_other_libraries_stand_beside_ours_on_the_same_text_only():
    def cell(*values):
        return {d: {0: math.log(v), 1: math.log(v)} for d, v in enumerate(values)}

    base = {"float": {-1: cell(4.0)[0]}}
    found = {("m", ""): base, ("m", "3 g64"): {"best": cell(4.5, 4.5), "rtn": cell(7.0)}}
    theirs = {"P, GPTQ": cell(5.0, 5.5)}
    peers = {("m", ""): base, ("m", "3 g64"): theirs}
    assert tables.beside(found, peers) == [
        "| m | 3 g64 | best | 2 | 0.5 ± 0 |  |  |  |",
        "| m | 3 g64 | P, GPTQ | 2 | 1.25 ± 0.35 |  | +0.75 ± 0 |  |",
    ]
    elsewhere = {"float": {-1: {0: math.log(4.0), 1: math.log(4.1)}}}
    own = {("m", ""): elsewhere, ("m", "3 g64"): {"quality": cell(4.5), **theirs}}
    mean = math.sqrt(4.0 * 4.1)
    assert tables.beside(found, own) == [
        f"| m | 3 g64 | quality | 1 | {4.5 - mean:.4g} |  |  |  |",
        f"| m | 3 g64 | P, GPTQ | 2 | {5.25 - mean:.4g} ± 0.35 | +0.5 ± 0 |  |  |",
    ]


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
