"""The full diagnosis from the command line: files, comparison, recipe, and what is refused."""

from __future__ import annotations

import argparse
import csv
import json

import numpy as np
import pytest
from helpers.data import shared

import ptqkit
import ptqkit.reference as reference
from ptqkit.cli import diagnose, diagnose_report
from ptqkit.errors import CalibrationError, UsageError


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
        (["demo", "--max-tokens", "9"], "--max-tokens goes with --sensitivity"),
        (["demo", "--at", "0.5"], "--at needs --compare"),
        (["demo", "--part", "mlp in"], "--part needs --compare"),
        (["demo", "--compare", "demo", "--at", "3"], "--at must be a relative depth from 0 to 1"),
        (["demo", "--compare", "demo", "--part", "mlp"], "--part must be one of 'attention in'"),
        (["demo", "--ratio", "1"], "--ratio must be above 1"),
        (["demo", "--ratio", "nan"], "--ratio must be above 1"),
        (["demo", "--value", "-6"], "--value: the threshold must be a positive number"),
        (["demo", "--layers", "1.5"], "--layers must be a share from 0 to 1"),
        (["demo", "--tokens", "nan"], "--tokens must be a share from 0 to 1"),
    ],
)
def test_usage(arguments, message, monkeypatch):
    monkeypatch.setattr(diagnose_report, "load_model", None)  # refused before a model is read
    with pytest.raises(UsageError, match=message):
        run(*arguments)


def test_files_that_are_refused(tmp_path, text, monkeypatch):
    (tmp_path / "ratios.toml").write_text("[other]\na = 1\n")
    (tmp_path / "half.json").write_text('{"model": "x", "inp')
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(diagnose_report, "load_model", None)
    demo = ["demo", "--compare", "demo", "--published"]
    with pytest.raises(UsageError, match=r"--published: .*ratios\.toml holds no table"):
        run(*demo, tmp_path / "ratios.toml")
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        run(*demo, tmp_path / "none.toml")
    for name in ("half", "other"):
        with pytest.raises(UsageError, match=rf"{name}\.json is not a report\.json that --out"):
            run(tmp_path / f"{name}.json")
    with pytest.raises(FileExistsError, match="--out .*file is a file: give another name"):
        run("demo", "--out", tmp_path / "file")


def copy_of(source, folder, change=None, leave_out=()):
    """Copy a model's folder without some files, its tensors changed in place."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for path in source.iterdir():
        if path.is_file() and not any(word in path.name for word in leave_out):
            (folder / path.name).write_bytes(path.read_bytes())
    if change is not None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_what_is_not_finite_is_named(text, tmp_path):
    def blow_up(state):
        state["model.layers.2.mlp.up_proj.weight"][0, 0] = float("inf")

    def forget(state):
        state["model.layers.4.mlp.down_proj.weight"][0, 0] = float("nan")  # no layer reads it

    options = ["--calibration", text, "--fast"]
    folder = copy_of(shared("stories260k"), tmp_path / "one", blow_up)
    with pytest.raises(CalibrationError, match=r"the input of model\.layers\.2\.mlp\.down_proj"):
        run(folder, *options)
    folder = copy_of(shared("stories260k"), tmp_path / "two", forget)
    with pytest.raises(CalibrationError, match=r"the weight of model\.layers\.4\.mlp\.down_proj"):
        run(folder, *options)


def test_without_a_tokenizer(text, tmp_path):
    folder = copy_of(shared("stories260k"), tmp_path / "model", leave_out=("token",))
    with pytest.raises(UsageError, match=r"MODEL has no tokenizer; give tokens \(\.npy\)"):
        run(folder, "--calibration", text, "--fast")
    ids = np.random.default_rng(0).integers(0, 512, (2, 64))
    np.save(tmp_path / "ids.npy", ids)
    run(folder, "--calibration", tmp_path / "ids.npy", "--fast", "--json", tmp_path / "x.json")
    assert len(json.loads((tmp_path / "x.json").read_text())["diagnosis"]["inputs"]) == 20


@pytest.fixture(params=["demo", "stories260k", "babyllama105", "nanosort_gpt2"])
def recorded(request, text, tmp_path, monkeypatch):
    """What the command reports of a real model, the model, and what its layers really read."""
    name, seen, kept = request.param, {}, []

    def load(args):
        model, tokenizer, facts = load_model(args)
        for path, module in model.named_modules():
            module.register_forward_pre_hook(
                lambda _, inputs, path=path: seen.setdefault(path, []).append(inputs[:1])
            )
        kept.append(model)
        return model, tokenizer, facts

    load_model = diagnose_report.load_model
    monkeypatch.setattr(diagnose_report, "load_model", load)
    options = ["--fast", "--value", "2", "--json", tmp_path / "x.json"]
    if name == "nanosort_gpt2":
        np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 3, (16, 11)))
        options += ["--calibration", tmp_path / "ids.npy"]
    elif name != "demo":
        options += ["--calibration", text]
    run(name if name == "demo" else shared(name), *options)
    return json.loads((tmp_path / "x.json").read_text())["diagnosis"], kept[0], seen


def test_numbers_of_the_command_equal_the_twins(recorded):
    report, model, seen = recorded
    assert report["inputs"] and report["weights"] and report["norms"] and report["attention"]
    for row in report["inputs"]:
        batches = [x.reshape(-1, x.shape[-1]).double().numpy() for (x,) in seen[row["name"]]]
        X = np.concatenate(batches)
        expected = reference.activation_statistics(X, threshold=2.0)
        assert row["tokens"] == len(X)
        for key in ("rms", "std", "kurtosis"):
            assert row[key] == pytest.approx(expected[key], rel=1e-9), key
        # the tensor of a grid per tensor is a batch
        parts = [reference.activation_statistics(x)["rmse_tensor"] ** 2 * len(x) for x in batches]
        assert row["rmse_token"] == pytest.approx(expected["rmse_token"], rel=1e-5)
        assert row["rmse_tensor"] == pytest.approx(np.sqrt(sum(parts) / len(X)), rel=1e-5)
        assert [value for value, *_ in row["largest"]] == expected["largest"].tolist()
        assert all(abs(X[token, c]) == value for value, token, c in row["largest"])
        assert row["median"] == pytest.approx(expected["median"], rel=0.016)
        assert row["channel_absmax"] == expected["channel_absmax"].tolist()
        assert row["channel_counts"] == expected["channel_counts"].tolist()
        counts, _ = np.histogram(np.abs(X), row["histogram"]["edges"])
        assert row["histogram"]["counts"] == counts.tolist()
    for row in report["weights"]:
        module = model.get_submodule(row["name"])
        W = module.weight.detach().double().numpy()
        W = W.T if type(module).__name__ == "Conv1D" else W
        z = (W - W.mean()) / W.std()
        assert row["spectral_norm"] == pytest.approx(reference.spectral_norm(W), rel=1e-10)
        assert row["stable_rank"] == pytest.approx(reference.stable_rank(W), rel=1e-10)
        assert row["std"] == pytest.approx(W.std(), rel=1e-9)
        assert row["kurtosis"] == pytest.approx((z**4).mean() - 3, rel=1e-5, abs=1e-5)
    for row in report["norms"]:
        gain = model.get_submodule(row["name"]).weight.detach().double().numpy()
        assert row["std"] == pytest.approx(gain.std(), rel=1e-12)
    followed = [row for row in report["inputs"] if row["norm"] is not None]
    hidden = [
        np.concatenate([x.reshape(-1, x.shape[-1]).double() for (x,) in seen[row["name"]]])
        for row in followed
    ]
    expected = reference.outlier_dimensions(hidden, value=2.0).tolist()
    assert report["outlier_dimensions"] == expected
    assert any(row["channel_counts"] for row in report["inputs"])
