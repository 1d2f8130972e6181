"""``ptqkit sweep`` from end to end, and the sweep files that come with the package."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.data import ROOT
from helpers.sweep_cases import HEAD, RTN, ZERO_SHOT, folder, tiny_model, write

from ptqkit.cli import main

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GPTQ = '\n[[recipes]]\nname = "GPTQ"\npreset = "reference"\nbits = 3\ngroup_size = 16\n'
WRONG = '\n[[recipes]]\nname = "wrong"\npreset = "rtn"\nbits = 3\ngroup_size = 7\n'
FILES = sorted(ROOT.glob("benchmarks/sweeps/*.toml"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The files of a sweep with a tiny model."""
    path = folder(tmp_path_factory.mktemp("cli-sweep"))
    (path / "model" / "config.json").unlink()
    tiny_model(path / "model")
    return path


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A current folder of its own, beside the files."""
    monkeypatch.chdir(tmp_path)
    return made


def lines(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_end_to_end(place, capsys):
    import ptqkit
    from ptqkit.hf import perplexity, prepare_calibration

    pytest.importorskip("lm_eval")
    file = str(write(place, HEAD, ZERO_SHOT, RTN, GPTQ))
    assert main(["sweep", file]) == 0
    shown = capsys.readouterr()
    assert "6 of 6 cells measured, 0 of them before" in shown.out
    assert "6 cells: 0 there from before, 6 to measure" in shown.err
    found = {(r["recipe"], r["task"]): r for r in lines("study/results.csv")}
    assert {p.name for p in Path("study").iterdir()} == {
        "cells",
        "results.csv",
        "results.json",
        "results.png",
    }

    # The same by hand: a model of its own, quantized and measured with the library.
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    text = (place / "test.txt").read_text(encoding="utf-8")
    options = {"window": 32, "max_tokens": 60, "batch_size": 4}
    base = perplexity(model.eval(), tokenizer, text, **options)
    assert float(found["float", "wiki"]["value"]) == base.perplexity
    batches = prepare_calibration(
        str(place / "train.txt"),
        tokenizer,
        samples=2,
        sequence_length=16,
        batch_size=4,
        max_length=64,
    ).batches
    recipe = {"preset": "reference", "bits": 3, "group_size": 16, "scale_dtype": "float16"}
    result = ptqkit.quantize(model, recipe, batches, diagnostics=False, progress=False)
    row = found["GPTQ", "wiki"]
    assert float(row["value"]) == perplexity(model, tokenizer, text, **options).perplexity
    assert float(row["value"]) != base.perplexity
    assert float(row["bits_per_weight"]) == result.report.totals()["bits_per_weight"]
    assert float(row["float_value"]) == base.perplexity
    assert found["float", "choice"]["chance"] and found["GPTQ", "choice"]["metric"] == "acc"

    capsys.readouterr()
    assert main(["sweep", file, "--json", "again.json"]) == 0
    again = capsys.readouterr()
    assert "6 of 6 cells measured, 6 of them before" in again.out
    assert len(again.err.splitlines()) == 1
    assert len(json.loads(Path("again.json").read_text())["rows"]) == 6


def test_list_only_quiet_and_out(place, capsys):
    file = str(write(place, HEAD, RTN, GPTQ))
    assert main(["sweep", file, "--list"]) == 0
    assert "3 cells, 3 to measure" in capsys.readouterr().out
    assert not Path("study").exists()
    assert main(["sweep", file, "--only", "*/RTN/*", "--out", "here", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "here\n" and not shown.err
    assert [r["status"] for r in lines("here/results.csv")] == ["ok", "ok", "missing"]
    assert main(["sweep", file, "--out", "here", "--list", "--json", "-"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["command"] == "sweep" and len(values["to_measure"]) == 1


def test_failed_cells(place, capsys):
    file = str(write(place, HEAD, WRONG, RTN))
    assert main(["sweep", file]) == 4
    shown = capsys.readouterr()
    assert "1 of 3 cells failed" in shown.err and "group_size 7 does not divide" in shown.out
    assert [r["status"] for r in lines("study/results.csv")] == ["ok", "failed", "ok"]
    assert main(["sweep", file, "--fail-fast"]) == 4
    assert "small/wrong/wiki failed: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["nothing.toml"], 2, "FILE nothing.toml: there is no such file"),
        (["FILE", "--only", "x"], 3, "fits no cell"),
        (["FILE", "--threads", "-1"], 2, "--threads must be at least 0"),
        (["FILE", "--device", "nowhere"], 2, "--device nowhere cannot be used here"),
        (["FILE", "--json", "none/x.json"], 2, "it must be a file in a folder that exists"),
        (["FILE", "--out", "taken"], 3, "cannot be written"),
        (["BAD"], 3, "2 problem(s) found"),
    ],
)
def test_bad_arguments(place, capsys, arguments, code, text):
    Path("taken").write_text("a file", encoding="utf-8")
    bad = HEAD.replace("samples", "sampels").replace("window", "windwo")
    if "BAD" in arguments:
        Path("x").mkdir()
    file = str(write(place, bad if "BAD" in arguments else HEAD, RTN))
    arguments = [file if a in ("FILE", "BAD") else a for a in arguments]
    assert main(["sweep", *arguments]) == code
    assert text in capsys.readouterr().err


def test_interrupt_keeps_finished_cells(place, tmp_path):
    many = "".join(GPTQ.replace('"GPTQ"', f'"R{i}"') + f"damping = 0.0{i}\n" for i in range(1, 10))
    file = write(place, HEAD, many)
    command = [sys.executable, "-m", "ptqkit", "sweep", str(file), "--out", str(tmp_path / "o")]
    root = ROOT
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=root
    ) as process:
        for line in process.stderr:
            if line.startswith("small/R2/"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait(30) == 130
    assert "finished cells are kept in" in rest and "Traceback" not in rest
    states = [r["status"] for r in lines(tmp_path / "o" / "results.csv")]
    assert states[:3] == ["ok"] * 3 and "missing" in states
    assert len(list((tmp_path / "o" / "cells").iterdir())) == states.count("ok")


def test_help(capsys):
    started = time.perf_counter()
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--help"])
    assert stop.value.code == 0 and time.perf_counter() - started < 2
    shown = capsys.readouterr().out
    for word in ("--list", "--only", "[[recipes]]", "examples:", "results.csv", "chance"):
        assert word in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_the_example_of_the_help_is_a_sweep(tmp_path):
    from ptqkit.cli.sweep import _EPILOG
    from ptqkit.sweep import read_plan

    text = _EPILOG.split("\n\n", 1)[1].split("All keys")[0]
    (tmp_path / "first.toml").write_text("\n".join(x.strip() for x in text.splitlines()))
    assert len(read_plan(tmp_path / "first.toml").recipes) == 2


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_files_that_come_with_it(file):
    from ptqkit.sweep import read_plan
    from ptqkit.sweep.grid import plan_cells

    plan = read_plan(file)
    cells, skipped = plan_cells(plan)
    # Of a file whose models are all trained here, none need be there.
    assert cells or len(skipped) >= len(plan.models) > 0
