"""Measuring speed: what is run for which folder, and what the report says."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest
import torch
from helpers.checkpoint_models import build, fake_quantize

from ptqkit.errors import PtqkitError
from ptqkit.hf.checkpoint.save import save_checkpoint
from ptqkit.hf.speed import run
from ptqkit.hf.speed.report import SpeedReport, SpeedRow
from ptqkit.hf.speed.run import SpeedCase, folder_cases, measure_speed, random_cases
from ptqkit.hf.speed.shapes import ModelShape
from ptqkit.hf.speed.worker import measure, memory

TINY = ModelShape(128, 256, 2, 4, 2, 64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("speed")
    model = build("llama")
    model.save_pretrained(root / "float")
    layers = fake_quantize(model, bits=4, group_size=32)
    for form in ("ptqkit", "ptqkit_v3"):
        save_checkpoint(model, layers, None, root / form, checkpoint_format=form)
    return root


def job(case, **changes):
    from dataclasses import asdict

    options = {"prompt": 24, "tokens": 3, "repeat": 1, "threads": 0, "text": None}
    return {**asdict(case), **options, "max_tokens": None, "int8_cache": False, **changes}


def test_cases_of_folders(folders):
    named = {name: folders / name for name in ("float", "ptqkit", "ptqkit_v3")}
    cases = folder_cases(named, ["auto", "int8"])
    assert [(c.model, c.form) for c in cases] == [
        ("float", "float32"),
        ("float", "bfloat16"),
        ("ptqkit", "ptqkit v1"),
        ("ptqkit", "ptqkit v1 int8"),
        ("ptqkit_v3", "ptqkit v3"),
        ("ptqkit_v3", "ptqkit v3 int8"),
    ]
    alone = folder_cases({"w4": folders / "ptqkit"})
    assert [(c.form, c.dequantized) for c in alone] == [
        ("float32", True),
        ("bfloat16", True),
        ("ptqkit v1", False),
    ]
    assert [c.form for c in random_cases("r", TINY, ["W4", "W8A8"], floats=[])] == ["W4", "W8A8"]


def test_every_form_is_measured(folders):
    steps = []
    cases = folder_cases({"w4": folders / "ptqkit_v3"}, floats=["bfloat16"])
    for case in (*cases, SpeedCase("r", "W8A8", variant="W8A8", shape=TINY, compute="packed")):
        values = measure(job(case, int8_cache=case.form == "W8A8"), steps.append)
        assert values["prompt_rate"] > 0 and values["generation_rate"] > 0
        assert values["prompt"] == 24 and values["tokens"] == 3
        assert bool(values["computed"]) == (case.form != "bfloat16")
    assert values["cache_bytes"] == TINY.cache_bytes(16 + 3, bits=8, scale_bits=32)
    assert "int8 inputs as simulated" in values["computed"]
    assert steps[:3] == ["loading", "prompt of 24 tokens", "generating 3 tokens"]
    assert memory() >= memory("VmRSS") > 2**20


def test_a_case_runs_in_a_process_of_its_own(folders):
    told = []
    case = folder_cases({"w4": folders / "ptqkit_v3"}, floats=[])
    report = measure_speed(case, prompt=8, tokens=2, repeat=1, threads=1, tell=told.append)
    [row] = report.rows
    assert (
        row.threads == 1
        and row.peak_bytes > 0
        and row.computed == "compute='auto': 14 x packed; 2 blocks fused for single tokens"
    )
    weights = folders / "ptqkit_v3" / "model.safetensors"
    assert row.file_bytes == weights.stat().st_size and report.cpu
    assert told[0] == "[1/1] w4 ptqkit v3: loading"
    rates = f"{row.prompt_rate:.4g} and {row.generation_rate:.4g} tokens/s"
    assert told[-1] == f"[1/1] w4 ptqkit v3: {rates}"
    assert torch.get_num_threads() > 0


def test_a_failing_process_is_named(monkeypatch):
    monkeypatch.setattr(run.sys, "executable", "false")
    with pytest.raises(PtqkitError, match=r"\[1/1\] r W4 could not be measured"):
        measure_speed([SpeedCase("r", "W4", variant="W4", shape=TINY)])


def rows():
    base = dict(peak_bytes=2**30, tensor_bytes=1, cache_bytes=1, file_bytes=10**9)
    rest = dict(load_seconds=1.0, prompt=512, tokens=32, threads=2)
    return SpeedReport(
        (
            SpeedRow("m/a", "float32", 100.0, 4.0, **base, **rest, perplexity=12.5),
            SpeedRow("m/a", "W4", 150.0, 24.0, **base, **rest, computed="packed"),
        ),
        "avx2",
    )


def test_the_report_is_a_table_csv_json_and_a_picture(tmp_path):
    report = rows()
    last = report.table().splitlines()[-1].split()
    assert last == ["a", "W4", "150", "1.50", "24", "6.00", "1,074", "1,000.0", "-"]
    read = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [r["form"] for r in read] == ["float32", "W4"] and read[0]["perplexity"] == "12.5"
    assert json.dumps(report.to_dict()) and math.isnan(report.to_dict()["rows"][1]["perplexity"])
    report.draw(tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
