"""``ptqkit bench``: its arguments, its cases and its files."""

from __future__ import annotations

import json
import math

import pytest
from helpers.cli_calls import quantize

from ptqkit.cli import main

pytest.importorskip("torch")
pytest.importorskip("transformers")


def fails(capsys, *arguments):
    try:
        code = main(["bench", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    shown = capsys.readouterr().err.strip()
    assert "\n" not in shown
    return shown


def test_mistakes_are_one_line(capsys, tmp_path):
    assert "give a MODEL, or --random-1b" in fails(capsys)
    assert "did you mean" in fails(capsys, "demo", "--compute", "pakced")
    assert "did you mean" in fails(capsys, "demo", "--promt", "4")
    assert "--prompt must be at least 1" in fails(capsys, "demo", "--prompt", "0")
    assert "--threads must be at least 0" in fails(capsys, "demo", "--threads", "-1")
    assert "--forms names forms of --random-1b" in fails(capsys, "demo", "--forms", "W4")
    assert "there is no such file" in fails(capsys, "demo", "--text", str(tmp_path / "no.txt"))
    assert "there is no such folder" in fails(capsys, str(tmp_path / "no"))
    assert "--csv" in fails(capsys, "demo", "--csv", str(tmp_path / "no" / "x.csv"))


@pytest.fixture
def asked(monkeypatch):
    """What the command asks to be measured, and a row for each case."""
    from ptqkit.hf.speed import run
    from ptqkit.hf.speed.report import SpeedReport, SpeedRow

    found = {}

    def measure(cases, **options):
        found.update(cases=cases, **options)
        return SpeedReport(
            tuple(
                SpeedRow(c.model, c.form, 10.0 * n, 2.0 * n, 1, 1, 1, 1, 0.5, 512, 8, 2, 7.25)
                for n, c in enumerate(cases, 1)
            ),
            "avx2",
        )

    monkeypatch.setattr(run, "measure_speed", measure)
    return found


def test_folders_and_random_weights(folder, asked, tmp_path, capsys):
    assert quantize(folder, "--bits", "4", out=tmp_path / "w4") == 0
    capsys.readouterr()
    files = {name: tmp_path / f"speed.{name}" for name in ("json", "csv", "png")}
    options = ["--compute", "packed", "int8", "--text", str(folder / "test.txt"), "--quick"]
    outputs = ["--json", files["json"], "--csv", files["csv"], "--picture", files["png"]]
    models = [str(folder / "model"), str(tmp_path / "w4"), "--random-1b", "--forms", "W4"]
    assert main(["bench", *models, *options, *map(str, outputs)]) == 0
    forms = [(c.form, c.compute) for c in asked["cases"]]
    assert [form for form, _ in forms][:2] == ["float32", "bfloat16"]
    assert [compute for _, compute in forms] == [
        "dequantize",
        "dequantize",
        "packed",
        "int8",
        "packed",
    ]
    assert asked["tokens"] == 8 and asked["repeat"] == 1 and asked["max_tokens"] == 1000
    assert len(asked["text"]) == 1
    shown = capsys.readouterr().out
    assert "7.2500" in shown and f"wrote {files['csv']}" in shown and "kernels avx2" in shown
    values = json.loads(files["json"].read_text())
    assert values["command"] == "bench" and len(values["rows"]) == 5
    assert len(files["csv"].read_text().splitlines()) == 6
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_defaults_and_the_embedded_model(asked, capsys):
    assert main(["bench", "demo", "--random-1b", "--quiet", "--float"]) == 0
    assert [c.form for c in asked["cases"]] == [
        "float32",
        "bfloat16",
        "W8A8",
        "W4",
        "W3",
        "W2",
    ]
    assert asked["tell"] is None and asked["text"] and asked["prompt"] == 512
    assert math.isclose(float(capsys.readouterr().out), 12.0)
