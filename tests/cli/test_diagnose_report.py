"""The full diagnosis from the command line: files, comparison, recipe, and what is refused."""

from __future__ import annotations

import argparse
import csv
import json

import pytest
from helpers.data import shared

import ptqkit
from ptqkit.cli import diagnose, diagnose_report
from ptqkit.errors import UsageError


def run(*arguments):
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command")
    diagnose.add_parser(commands)
    command = commands.choices["diagnose"]
    if not any("--compare" in action.option_strings for action in command._actions):
        diagnose_report.add_options(command)
    options = ["--samples", "2", "--sequence-length", "64"]
    diagnose_report.run(parser.parse_args(["diagnose", *map(str, arguments), *options]))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Once upon a time there was a little girl who liked to play. " * 200)
    return path


@pytest.fixture(scope="module")
def saved(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnosis") / "out"
    run(shared("stories260k"), "--calibration", text, "--fast", "--recipe", "--out", folder)
    return folder


def test_files(saved):
    names = {"report.json", "layers.csv", "recipe.toml"}
    figures = {f"{f}.png" for f in ("depth", "distributions", "channels", "magnitudes")}
    assert {path.name for path in saved.iterdir()} == names | figures
    with open(saved / "layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 35 and all(float(row["rmse_token"]) > 0 for row in rows)
    recipe = pytest.importorskip("tomllib").loads((saved / "recipe.toml").read_text())["recipes"][0]
    assert recipe.pop("name")
    ptqkit.Recipe.from_dict(recipe)


def test_comparison_of_a_model_with_saved_reports(saved, text, capsys, tmp_path):
    again = saved / "report.json"
    published = shared("published/ipqs.toml")
    run(again, "--compare", again, again, "--published", published, "--json", tmp_path / "x.json")
    printed = capsys.readouterr().out
    assert "rmse_token" in printed and "RMSE fp16 / bf16: 6.9" in printed
    values = json.loads((tmp_path / "x.json").read_text())
    assert values["comparison"]["ratios"]["rmse_token"] == [1, 1, 1]
    assert len(values["diagnosis"]["inputs"]) == 20


def test_channel_maxima(capsys):
    run(shared("act_stats/opt-125m.safetensors"))
    assert "channel maxima alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x"], "--calibration FILE is needed"),
        (["demo", "--bits", "9"], "--bits"),
        (["demo", "--published", "x.toml"], "--published needs --compare"),
        (["demo", "--fast", "--recipe", "--recipe-by", "sensitivity"], "--recipe-by sensitivity"),
    ],
)
def test_usage(arguments, message):
    with pytest.raises(UsageError, match=message):
        run(*arguments)
