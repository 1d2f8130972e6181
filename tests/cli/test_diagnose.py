"""``ptqkit softmax`` and ``ptqkit diagnose``."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import ptqkit  # noqa: E402
from ptqkit.cli import main  # noqa: E402

SMALL = ["--samples", "3", "--sequence-length", "40"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny LLaMA model and token files."""
    path = tmp_path_factory.mktemp("cli")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformers.LlamaForCausalLM(config).save_pretrained(path / "model")
    generator = np.random.default_rng(0)
    np.save(path / "train.npy", generator.integers(3, 64, (6, 40)))
    np.save(path / "test.npy", generator.integers(3, 64, (4, 60)))
    return path


def run(folder, command, *options):
    return main([command, str(folder / "model"), *(str(o) for o in options)])


def test_softmax_table_and_json(folder, capsys):
    data = ["--text", folder / "test.npy", "--calibration", folder / "train.npy"]
    json_file = folder / "s.json"
    assert run(folder, "softmax", *data, *SMALL, "--bits", 8, 4, "--json", json_file) == 0
    out = capsys.readouterr().out
    assert "float softmax" in out and "SM4 + bias/head" in out and "round to zero" in out
    found = json.loads(json_file.read_text(encoding="utf-8"))
    assert found["command"] == "softmax" and found["schema"] == 1
    assert [r["name"] for r in found["rows"]][:3] == ["float softmax", "SM8", "SM8 + bias"]
    assert len(found["rows"]) == 1 + 2 * 7
    assert "SM4 + before/row_sum" in out and all(r["excess_error"] > 0 for r in found["rows"][1:])
    assert set(found["layers"]) == {"8", "4"}
    assert {"zero_fraction", "mean_row_sum", "sqnr_db"} <= set(found["layers"]["4"][0])
    assert found["conventions"]["tokens"] == 4 * 59
    assert found["calibration"]["samples"] == 3


def test_softmax_calibrates_on_the_beginning_of_the_text(folder, capsys):
    arguments = ["--text", folder / "test.npy", *SMALL, "--json", "-", "--correction", "bias"]
    assert run(folder, "softmax", *arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["calibration"]["tokens"] == 120
    # 240 tokens, of which 120 calibrate: two windows, whose first tokens are not scored.
    assert found["conventions"]["tokens"] == 120 - 2
    arguments[-1:] = ["row_sum", "--samples", "6"]
    assert run(folder, "softmax", *arguments) == 2
    assert "calibrating takes the first 240" in capsys.readouterr().err


def test_softmax_saves(folder, tmp_path, capsys):
    data = ["--text", folder / "test.npy", *SMALL, "--quiet", "--bits", 5]
    out = tmp_path / "m"
    assert run(folder, "softmax", *data, "--correction", "bias/head", "--out", out) == 0
    quiet = capsys.readouterr().out.strip()
    model = ptqkit.load(out)
    assert len(ptqkit.hf.installed_attention(model)) == 2
    assert float(quiet) > 1
    # Installed already: not measured twice.
    assert main(["softmax", str(out), *(str(d) for d in data)]) == 2
    assert "hooks already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--text FILE is needed"),
        (["--text", "missing.txt"], "no such file"),
        (["--text", "TEST", "--bits", "1"], "--bits must be from 2 to 16"),
        (["--text", "TEST", "--samples", "0"], "--samples must be at least 1"),
        (["--text", "TEST", "--out", "x"], "give one --bits and one --correction"),
        (["--text", "TEST", "--json", "nowhere/x.json"], "--json nowhere/x.json"),
        (["--text", "TEST", "--weights", "9"], "--weights must be from 2 to 8"),
        (["--text", "TEST", "--correction", "bias/step"], "bias/step is for diffusion models"),
        (["--text", "TEST", "--out", "x", "--correction", "log2"], "log2 has no place in a file"),
        (["--text", "TEST", "--out", "x", "--correction", "none", "--weights", "4"], "--weights"),
    ],
)
def test_softmax_mistakes(folder, capsys, options, message):
    options = [str(folder / "test.npy") if o == "TEST" else o for o in options]
    assert run(folder, "softmax", *options) == 2
    assert message in capsys.readouterr().err


def test_diagnose(folder, tmp_path, capsys):
    data = ["--calibration", folder / "train.npy", "--text", folder / "test.npy", *SMALL]
    more = ["--json", tmp_path / "d.json", "--picture", tmp_path / "d.svg", "--bits", 6]
    assert run(folder, "diagnose", "--sensitivity", *data, *more) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:2] == ["case", "tensors"] and "perplexity" in out
    found = json.loads((tmp_path / "d.json").read_text(encoding="utf-8"))
    assert found["command"] == "diagnose" and len(found["sensitivity"]["rows"]) == 7
    assert found["sensitivity"]["float_perplexity"] > 1
    assert (tmp_path / "d.svg").read_text(encoding="utf-8").startswith("<?xml")
    options = ["--sensitivity", *data[:2], *SMALL, "--quiet", "--kinds", "key", "--by", "module"]
    assert run(folder, "diagnose", *options) == 0
    assert capsys.readouterr().out.strip().endswith("self_attn key")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--picture", "x.png"], "--picture shows a sensitivity"),
        (["--text", "x.txt"], "--text goes with --sensitivity"),
        (["--sensitivity"], "--calibration FILE is needed"),
        (["--sensitivity", "--calibration", "TRAIN", "--bits", "17"], "--bits must be"),
        (["--sensitivity", "--calibration", "TRAIN", "--bits", "9"], "weights take at most 8"),
        (["--sensitivity", "--calibration", "TRAIN", "--picture", "x.txt"], "--picture x.txt"),
        (["--sensitivity", "--calibration", "TRAIN", "--text", "no.txt"], "no such file"),
        (["--sensitivity", "--calibration", "TRAIN", "--max-tokens", "0"], "--max-tokens"),
    ],
)
def test_diagnose_mistakes(folder, capsys, options, message):
    options = [str(folder / "train.npy") if o == "TRAIN" else o for o in options]
    assert run(folder, "diagnose", *options) == 2
    assert message in capsys.readouterr().err
