"""``ptqkit quantize --tune``."""

from __future__ import annotations

import argparse
import json

import pytest
from helpers.cli_calls import quantize

from ptqkit.cli import build_parser
from ptqkit.cli.quantize import _recipe, _steps


def tuned(*options):
    return _recipe(build_parser().parse_args(["quantize", "demo", "--out", "q", *options])).tune


def test_steps():
    assert tuned() == tuned("--recipe", "best") == tuned("--tune", "0") == 0
    assert tuned("--recipe", "best", "--tune") == 150
    assert tuned("--method", "rtn", "--tune", "20") == 20
    with pytest.raises(argparse.ArgumentTypeError, match="number of steps"):
        _steps("-3")


def test_codes_and_own_text():
    parse = build_parser().parse_args
    args = ("quantize", "demo", "--out", "q", "--tune", "9", "--tune-codes")
    assert _recipe(parse([*args])).tune_codes == 0.01
    recipe = _recipe(parse([*args, "0.03", "--tune-own-text", "64"]))
    assert (recipe.tune, recipe.tune_codes, recipe.tune_own_text) == (9, 0.03, 64)


def test_tunes_and_says_so(folder, tmp_path, capsys):
    file = tmp_path / "q.json"
    options = ("--bits", "2", "--tune", "2", "--json", str(file))
    assert quantize(folder, *options, out=tmp_path / "q") == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["recipe"]["tune"] == 2 and found["report"]["tuning"]["steps"] == 2
    stored = json.loads((tmp_path / "q" / "ptqkit_report.json").read_text(encoding="utf-8"))
    assert stored["tuning"] == found["report"]["tuning"]


def test_ctrl_c_while_tuning_writes_nothing(folder, tmp_path, monkeypatch, capsys):
    def stop(event):
        if event.stage == "tuning":
            raise KeyboardInterrupt

    monkeypatch.setattr("ptqkit.cli.quantize._progress", lambda args: stop)
    assert quantize(folder, "--tune", out=tmp_path / "q") == 130
    error = capsys.readouterr().err
    assert "as it was before tuning" in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_told_before_the_run(folder, tmp_path, capsys):
    options = ("--tune", "--memory-budget", "500kB")
    assert quantize(folder, *options, out=tmp_path / "q") == 3
    assert "tuning needs about" in capsys.readouterr().err
