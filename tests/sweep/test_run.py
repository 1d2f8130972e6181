"""The loop of a sweep: what runs, what is reused, what failures leave behind."""

from __future__ import annotations

import csv
import json
import math

import pytest
from helpers.sweep_cases import HEAD, RTN, ZERO_SHOT, FakeBench, folder, write

from ptqkit.errors import PreflightError
from ptqkit.study.cells import FAILED, MISSING, OK
from ptqkit.sweep import CellsFailed, read_plan, run_sweep
from ptqkit.sweep.grid import SweepInterrupted, plan_cells
from ptqkit.sweep.results import COLUMNS, degradation, means, rows, table, write_results

pytest.importorskip("torch")
pytest.importorskip("transformers")

RTN3 = RTN.replace('"RTN"', '"RTN3"').replace("bits = 4", "bits = 3")
SECOND = '\n[[tasks]]\nname = "wiki2"\nkind = "perplexity"\ntext = "test.txt"\n'


@pytest.fixture
def bench(monkeypatch):
    """Stand-in for models; gives the log of what was asked of it."""
    FakeBench.install(monkeypatch)
    monkeypatch.setattr("ptqkit.sweep.run.has_lm_eval", lambda: True)
    monkeypatch.setattr(FakeBench, "log", [])
    monkeypatch.setattr(FakeBench, "fail", {})
    return FakeBench


def sweep(path, *parts, **options):
    return run_sweep(read_plan(write(path, *parts)), path / "out", **options)


def test_every_cell_runs_once_and_each_recipe_is_quantized_once(tmp_path, bench):
    result = sweep(folder(tmp_path), HEAD, ZERO_SHOT, RTN, RTN3)
    assert [c.label for c in result.cells] == [
        "small/float/wiki",
        "small/float/choice",
        "small/RTN/wiki",
        "small/RTN/choice",
        "small/RTN3/wiki",
        "small/RTN3/choice",
    ]
    assert result.count(OK) == 6
    assert bench.log == [
        "load small",
        "measure small/wiki 10",
        "measure small/choice 10",
        "quantize small/RTN",
        "measure small/wiki 12",
        "measure small/choice 12",
        "quantize small/RTN3",
        "measure small/wiki 12.6667",
        "measure small/choice 12.6667",
    ]
    cell = result.cells[2]
    assert (cell.value, cell.bits_per_weight, cell.seconds_quantize) == (12, 4, 0.5)
    assert cell.seconds_eval >= 0 and not cell.reused


def test_a_second_run_measures_nothing(tmp_path, bench):
    first = sweep(folder(tmp_path), HEAD, ZERO_SHOT, RTN)
    bench.log.clear()
    again = sweep(tmp_path, HEAD, ZERO_SHOT, RTN)
    assert bench.log == [] and all(c.reused for c in again.cells)
    assert [c.value for c in again.cells] == [c.value for c in first.cells]
    assert rows(again) == rows(first)


def test_a_changed_recipe_runs_its_own_cells_alone(tmp_path, bench):
    sweep(folder(tmp_path), HEAD, ZERO_SHOT, RTN, RTN3)
    bench.log.clear()
    sweep(tmp_path, HEAD, ZERO_SHOT, RTN, RTN3.replace("bits = 3", "bits = 2"))
    assert bench.log == [
        "load small",
        "quantize small/RTN3",
        "measure small/wiki 14",
        "measure small/choice 14",
    ]


def test_a_new_task_runs_alone_and_names_do_not_count(tmp_path, bench):
    sweep(folder(tmp_path), HEAD, RTN)
    bench.log.clear()
    result = sweep(tmp_path, HEAD.replace('"small"', '"tiny"'), SECOND, RTN.replace("RTN", "R"))
    assert [line for line in bench.log if "measure" in line] == [
        "measure tiny/wiki2 10",
        "measure tiny/wiki2 12",
    ]
    assert [c.reused for c in result.cells] == [True, False, True, False]
    assert result.cells[2].label == "tiny/R/wiki"


@pytest.mark.parametrize(
    ("change", "labels"),
    [
        ("train.txt", {"small/RTN/wiki", "small/RTN/choice"}),
        ("test.txt", {"small/float/wiki", "small/RTN/wiki"}),
        ("choice.jsonl", {"small/float/choice", "small/RTN/choice"}),
        ("model/config.json", None),
        ("samples = 3", {"small/RTN/wiki", "small/RTN/choice"}),
        ("window = 16", {"small/float/wiki", "small/RTN/wiki"}),
        ('dtype = "float32"', None),
        ("outliers = {}", None),
    ],
)
def test_what_decides_a_cell(tmp_path, bench, change, labels):
    text = HEAD + ZERO_SHOT + RTN
    before = {c.label: c.key for c in plan_cells(read_plan(write(folder(tmp_path), text)))[0]}
    if "=" not in change:
        file = tmp_path / change
        old = file.read_text(encoding="utf-8")
        new = old.replace('"gold": 0', '"gold": 1', 1) if change.endswith("l") else old + " "
        file.write_text(new, encoding="utf-8")
    elif change.startswith(("dtype", "outliers")):
        text = text.replace('path = "model"', f'path = "model"\n{change}')
    else:
        name = change.split(" ")[0]
        text = "\n".join(change if x.startswith(f"{name} =") else x for x in text.splitlines())
    after = {c.label: c.key for c in plan_cells(read_plan(write(tmp_path, text)))[0]}
    changed = {label for label in before if before[label] != after[label]}
    assert changed == (set(before) if labels is None else labels)


def test_the_version_and_the_device_decide_too(tmp_path, bench, monkeypatch):
    plan = read_plan(write(folder(tmp_path), HEAD, RTN))
    before = [c.key for c in plan_cells(plan)[0]]
    assert not {*before} & {c.key for c in plan_cells(plan, "cuda")[0]}
    monkeypatch.setattr("ptqkit.sweep.digest.__version__", "99.0")
    assert not {*before} & {c.key for c in plan_cells(plan)[0]}


def test_a_recipe_under_two_names_is_quantized_once(tmp_path, bench):
    result = sweep(folder(tmp_path), HEAD, RTN, RTN.replace('"RTN"', '"same"'))
    assert sum("quantize" in line for line in bench.log) == 1
    assert [c.value for c in result.cells] == [10, 12, 12]
    assert result.cells[2].label == "small/same/wiki"


def test_failures_are_recorded_and_tried_again(tmp_path, bench):
    bench.fail = {
        "quantize small/RTN": PreflightError(["down_proj: too wide", "up_proj: too wide"]),
        "measure small/choice 12.6667": ArithmeticError("log-likelihoods are not finite"),
        "measure small/wiki 12.6667": RuntimeError("out of memory"),
    }
    lines = []
    result = sweep(folder(tmp_path), HEAD, ZERO_SHOT, RTN, RTN3, log=lines.append)
    assert [c.status for c in result.cells] == [OK, OK, FAILED, FAILED, FAILED, FAILED]
    assert [c.message for c in result.cells[2:]] == [
        "down_proj: too wide (and 1 more)",
        "down_proj: too wide (and 1 more)",
        "RuntimeError: out of memory",
        "log-likelihoods are not finite",
    ]
    assert sum("FAILED" in line for line in lines) == 4
    found = rows(result)
    assert found[2]["status"] == FAILED and math.isnan(found[2]["value"])
    assert "small/RTN (wiki, choice): down_proj: too wide" in table(result)
    bench.fail = {}
    bench.log.clear()
    assert sweep(tmp_path, HEAD, ZERO_SHOT, RTN, RTN3).count(OK) == 6
    assert sum("quantize" in line for line in bench.log) == 2


def test_a_model_that_does_not_load_fails_its_cells(tmp_path, bench):
    other = '\n[[models]]\nname = "broken"\npath = "model"\ndtype = "float32"\n'
    bench.fail = {"load broken": OSError("no weights")}
    result = sweep(folder(tmp_path), HEAD, other, RTN)
    assert [c.status for c in result.cells] == [OK, OK, FAILED, FAILED]
    assert result.cells[3].message == "OSError: no weights"


def test_fail_fast(tmp_path, bench):
    bench.fail = {"quantize small/RTN": ValueError("no")}
    with pytest.raises(CellsFailed, match="small/RTN/wiki failed: no"):
        sweep(folder(tmp_path), HEAD, RTN, RTN3, fail_fast=True)
    assert "quantize small/RTN3" not in bench.log
    bench.fail = {}
    assert [c.reused for c in sweep(tmp_path, HEAD, RTN, RTN3).cells] == [True, False, False]


def test_an_interrupt_keeps_what_was_finished(tmp_path, bench):
    bench.fail = {"measure small/choice 12": KeyboardInterrupt()}
    with pytest.raises(SweepInterrupted, match="3 finished cells are kept") as caught:
        sweep(folder(tmp_path), HEAD, ZERO_SHOT, RTN)
    states = [c.status for c in caught.value.result.cells]
    assert states == [OK, OK, OK, MISSING]
    bench.fail = {}
    bench.log.clear()
    sweep(tmp_path, HEAD, ZERO_SHOT, RTN)
    assert bench.log == ["load small", "quantize small/RTN", "measure small/choice 12"]


def test_only_a_pattern_and_the_float_cells_it_needs(tmp_path, bench):
    result = sweep(folder(tmp_path), HEAD, ZERO_SHOT, RTN, RTN3, only="*/RTN3/wiki")
    assert [c.status for c in result.cells] == [OK, MISSING, MISSING, MISSING, OK, MISSING]
    assert "choice" not in table(result) and "wiki" in table(result)
    with pytest.raises(PreflightError, match="fits no cell; cells are named like 'small/RTN3/ch"):
        sweep(tmp_path, HEAD, ZERO_SHOT, RTN, RTN3, only="RTN3")


def test_rerun(tmp_path, bench):
    sweep(folder(tmp_path), HEAD, RTN)
    bench.log.clear()
    result = sweep(tmp_path, HEAD, RTN, rerun=True, only="*/RTN/*")
    assert bench.log == ["load small", "quantize small/RTN", "measure small/wiki 12"]
    assert [c.reused for c in result.cells] == [True, False]
    bench.fail = {"measure small/wiki 12": ValueError("now it fails")}
    result = sweep(tmp_path, HEAD, RTN, rerun=True)
    assert result.cells[1].status == FAILED and math.isnan(result.cells[1].value)


def test_dry_writes_nothing(tmp_path, bench):
    result = sweep(folder(tmp_path), HEAD, RTN, dry=True)
    assert len(result.todo) == 2 and bench.log == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": "x"}', None])
def test_a_damaged_cell_is_measured_again(tmp_path, bench, damage):
    first = sweep(folder(tmp_path), HEAD, RTN)
    file = tmp_path / "out" / "cells" / f"{first.cells[1].key}.json"
    if damage is None:
        damage = json.dumps({**json.loads(file.read_text()), "status": "failed"})
    file.write_text(damage, encoding="utf-8")
    again = sweep(tmp_path, HEAD, RTN)
    assert [c.reused for c in again.cells] == [True, False]
    assert again.cells[1].value == 12


def test_cells_are_whole_files_without_leftovers(tmp_path, bench):
    result = sweep(folder(tmp_path), HEAD, RTN)
    files = sorted(p.name for p in (tmp_path / "out" / "cells").iterdir())
    assert files == sorted(f"{c.key}.json" for c in result.cells)
    values = json.loads((tmp_path / "out" / "cells" / files[0]).read_text())
    assert values["inputs"]["version"] and values["environment"]["torch"]
    assert str(tmp_path) not in json.dumps(values["inputs"])


def test_lm_eval_is_asked_for_before_anything_runs(tmp_path, bench, monkeypatch):
    monkeypatch.setattr("ptqkit.sweep.run.has_lm_eval", lambda: False)
    with pytest.raises(PreflightError, match=r"pip install 'ptqkit\[eval\]'"):
        sweep(folder(tmp_path), HEAD, ZERO_SHOT, RTN)
    assert bench.log == []
    assert sweep(tmp_path, HEAD, RTN).count(OK) == 2


def test_skipped_models_and_an_empty_sweep(tmp_path, bench):
    gone = HEAD.replace('path = "model"', 'path = "gone"\noptional = true')
    with pytest.raises(PreflightError, match="nothing can be measured"):
        sweep(folder(tmp_path), gone, RTN)
    here = '\n[[models]]\nname = "here"\npath = "model"\n'
    lines = []
    result = sweep(tmp_path, gone, here, RTN, log=lines.append)
    assert {c.model for c in result.cells} == {"here"}
    assert "skipped: model small" in lines[0] and "model small" in result.skipped[0]


def test_degradation_and_means(tmp_path, bench):
    assert degradation(12.0, 10.0) == pytest.approx(20)
    assert degradation(0.4, 0.5) == pytest.approx(-20)
    assert math.isnan(degradation(0.1, 0.0))
    result = sweep(folder(tmp_path), HEAD, SECOND, ZERO_SHOT, RTN)
    by_task = {r["task"]: r for r in rows(result) if r["recipe"] == "RTN"}
    assert by_task["wiki"]["degradation_percent"] == pytest.approx(20)
    assert by_task["wiki"]["excess"] == pytest.approx(2)
    assert by_task["choice"]["degradation_percent"] == pytest.approx(100 * (10 / 12 - 1))
    found = {m["kind"]: m for m in means(result)}
    assert found["perplexity"]["tasks"] == 2 and found["zero-shot"]["tasks"] == 1
    assert found["perplexity"]["degradation_percent"] == pytest.approx(20)
    result.cells[3].status = FAILED
    assert {m["kind"] for m in means(result)} == {"zero-shot"}, "a mean of what is left misleads"


def test_files_and_published_figures_apart(tmp_path, bench):
    published = "".join(
        f'\n[[published]]\nmodel = "{m}"\nrecipe = "RTN"\ntask = "wiki"\nvalue = {v}\nsource = "P"'
        for m, v in (("LLaMA", 6.09), ("small", 7.5))
    )
    result = sweep(folder(tmp_path), HEAD, RTN, published)
    written = write_results(result)
    assert [p.rsplit("/", 1)[1] for p in written] == [
        "results.csv",
        "published.csv",
        "results.json",
    ]
    text = (tmp_path / "out" / "results.csv").read_text()
    assert "6.09" not in text and "7.5" not in text and "LLaMA" not in text
    lines = list(csv.DictReader(text.splitlines()))
    assert tuple(lines[0]) == COLUMNS and len(lines) == 2
    assert float(lines[1]["value"]) == 12 and float(lines[1]["degradation_percent"]) == 20
    assert lines[1]["higher_is_better"] == "false" and lines[1]["chance"] == ""
    theirs = list(csv.DictReader((tmp_path / "out" / "published.csv").read_text().splitlines()))
    assert [line["ours"] for line in theirs] == ["", "12.0"]
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["schema"] == 2 and len(saved["rows"]) == 2 and len(saved["published"]) == 2
    assert saved["environment"]["python"]
    shown = table(result)
    ours, theirs = shown.split("published by others")
    assert "LLaMA" not in ours and "LLaMA" in theirs


def test_picture(tmp_path, bench):
    pytest.importorskip("matplotlib")
    from ptqkit.sweep.picture import _panels, draw

    many = "".join(
        RTN.replace('"RTN"', f'"recipe {b}"').replace("bits = 4", f"bits = {b}")
        for b in range(2, 9)
    )
    bench.fail = {"quantize small/recipe 3": ValueError("no")}
    result = sweep(folder(tmp_path), HEAD, ZERO_SHOT, many)
    result.cells[-2].value = 1e6  # an explosion: a logarithmic axis
    assert [*_panels(result)] == ["wiki: small", "choice"]
    path = draw(result)
    with open(path, "rb") as file:
        assert file.read(4) == b"\x89PNG"
