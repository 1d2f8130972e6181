"""Bad input at the command line: one clear line, the right code, nothing written."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
from helpers.cli_calls import SMALL, model_of, quantize

from ptqkit.cli import exit_code, main
from ptqkit.errors import (
    CalibrationError,
    NotPositiveDefiniteError,
    PreflightError,
    UsageError,
)
from ptqkit.study.cells import CellsFailed

pytest.importorskip("torch")

# Options after "quantize MODEL --calibration train.txt <small> --out q"; code; part of the message.
QUANTIZE = {
    "no calibration file": (["--calibration", "no.txt"], 2, "--calibration no.txt: there is no"),
    "no token file": (["--calibration", "no.npy"], 2, "--calibration no.npy: there is no"),
    "flat tokens": (["--calibration", "flat.npy"], 2, "integers of shape"),
    "empty text": (["--calibration", "empty.txt"], 2, "empty.txt: the file is empty"),
    "too little text": (["--samples", "900"], 3, "lower samples"),
    "group size": (["--group-size", "48"], 3, "group_size 48 does not divide its 64 inputs"),
    "pattern": (["--override", "*.nothing=skip"], 3, "'*.nothing' of the recipe matches no"),
    "override name": (["--override", "*=bit:4"], 2, "no option 'bit'"),
    "override value": (["--override", "*=bits:9"], 2, "bits must be"),
    "override choice": (["--override", "*=grid:hesian"], 2, "(did you mean 'hessian'?)"),
    "override group": (["--override", "*=group_size:0"], 2, "None or 'channel' means one"),
    "alpha alone": (["--alpha", "0.4"], 2, "--alpha needs --equalize awe or smoothquant, or --rec"),
    "alpha of none": (["--recipe", "aweq", "--equalize", "none", "--alpha", "0.4"], 2, "--alpha"),
    "alpha of smoothquant": (["--recipe", "smoothquant", "--alpha", "search"], 2, "takes a number"),
    "threshold alone": (["--outlier-threshold", "6"], 2, "--outlier-threshold needs"),
    "damping": (["--damping", "-1"], 2, "damping must be"),
    "format": (["--format", "compressed-tensors"], 3, "symmetric=True"),
    "gptq bits": (["--format", "gptq", "--bits", "5"], 3, "no 5-bit layout"),
    "gptq average": (["--format", "gptq", "--bits", "3.5"], 3, "one bits and group_size for all"),
    "recipe of rtn": (["--method", "rtn", "--recipe", "quality"], 2, "is for --method gptq"),
    "order of rtn": (["--method", "rtn", "--order", "act"], 2, "--order has no meaning"),
    "passes of obq": (["--method", "obq", "--refine-passes", "2"], 2, "meaning with --method obq"),
    "start token": (["--start-token", "x"], 2, "--start-token x"),
    "device": (["--device", "cuda:77"], 2, "--device cuda:77 cannot be used"),
    "json": (["--json", "no/where.json"], 2, "--json no/where.json"),
    "memory budget": (["--memory-budget", "much"], 2, "much"),
    "singular": (
        ["--samples", "1", "--sequence-length", "8", "--damping", "0", "--max-damping", "0"],
        4,
        "model.layers.0",
    ),
}

EVAL = {
    "no text": ([], 2, "--text FILE is needed"),
    "no file": (["--text", "no.txt"], 2, "--text no.txt: there is no such file"),
    "empty": (["--text", "empty.txt"], 2, "empty.txt: the file is empty"),
    "window": (["--text", "test.txt", "--window", "500"], 2, "longer than the 128 positions"),
    "zero window": (["--text", "test.txt", "--window", "0"], 2, "--window must be at least 1"),
    "stride": (["--text", "test.txt", "--window", "16", "--stride", "99"], 2, "stride must be"),
}


def check(capsys, code, expected, message):
    printed, error = capsys.readouterr()
    assert code == expected, error
    assert message in error
    assert "Traceback" not in error
    if expected != 3:
        assert len(error.strip().splitlines()) == 1
    return printed


@pytest.mark.parametrize("case", QUANTIZE)
def test_quantize(folder, tmp_path, capsys, monkeypatch, case):
    options, expected, message = QUANTIZE[case]
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    code = quantize(folder, *options, out=tmp_path / "q")
    check(capsys, code, expected, message)
    assert list(tmp_path.iterdir()) == [] and sorted(folder.iterdir()) == before


@pytest.mark.parametrize("case", EVAL)
def test_eval(folder, capsys, monkeypatch, case):
    options, expected, message = EVAL[case]
    monkeypatch.chdir(folder)
    check(capsys, main(["eval", model_of(folder), *options]), expected, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "x", "--out", "q", "--bits", "9"], "'9' is neither a number from 2 to 8"),
        (["quantize", "x", "--out", "q", "--bits", "8.5"], "'8.5' is neither a number from 2"),
        (["quantize", "x", "--out", "q", "--group-size", "0"], "'0' is neither a positive"),
        (["quantize", "x", "--out", "q", "--override", "x"], "must be PATTERN=skip"),
        (["quantize", "x"], "--out"),
        (["quantize", "x", "--out", "q", "--format", "gguf"], "gguf"),
        (["melt"], "melt"),
        ([], "COMMAND"),
    ],
)
def test_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and len(error) < 300


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["quantise", "demo"], "quantize"),
        (["quantize", "demo", "--out", "q", "--recipe", "AWEQ"], "aweq"),
        (["quantize", "demo", "--out", "q", "--order", "group_act"], "group-act"),
        (["quantize", "demo", "--out", "q", "--format", "compressed_tensor"], "compressed-tensors"),
        (["quantize", "demo", "--out", "q", "--grup-size=64"], "--group-size"),
        (["quantize", "demo", "--out", "q", "--equalize", "smooth-quant"], "smoothquant"),
        (["eval", "demo", "--dtype", "float_32"], "float32"),
        (["softmax", "demo", "--correction", "bias", "bias/heads"], "bias/head"),
        (["diagnose", "demo", "--sensitivity", "--kinds", "weight"], "weights"),
        (["diagnose", "demo", "--by", "modules"], "module"),
    ],
)
def test_the_word_that_was_meant_is_named(arguments, meant, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"(did you mean '{meant}'?)" in error and len(error.splitlines()) == 1


def test_a_perplexity_that_is_not_finite_is_a_failure(folder, tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "model")
    file = tmp_path / "eval.json"
    arguments = ["eval", str(tmp_path / "model"), "--text", str(folder / "test.txt"), "--quiet"]
    capsys.readouterr()
    code = main([*arguments, "--json", str(file), "--max-tokens", "20"])
    printed = check(capsys, code, 2, "/model is nan (nan nats per token)")
    assert printed == "" and not file.exists()
    arguments[0] = "softmax"
    code = main([*arguments, "--samples", "2", "--sequence-length", "32", "--correction", "none"])
    assert code == 2


def test_model_that_is_not_there(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = ["--text", str(folder / "test.txt")]
    check(capsys, main(["eval", "./no/such/model", *text]), 2, "there is no such folder")
    (tmp_path / "bare").mkdir()
    check(capsys, main(["eval", "bare", *text]), 2, "the folder has no config.json")
    check(capsys, main(["eval", str(folder / "test.txt"), *text]), 2, "there is no such folder")


def test_gptq_asks_for_text(folder, tmp_path, capsys):
    code = main(["quantize", model_of(folder), "--out", str(tmp_path / "q")])
    check(capsys, code, 2, "--calibration FILE is needed for method 'gptq'")


def test_existing_folder_is_kept(folder, tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("mine", encoding="utf-8")
    code = quantize(folder, out=tmp_path)
    check(capsys, code, 3, "exists already; give --overwrite")
    assert (tmp_path / "kept.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("json_file", "message"),
    [
        ("/dev/null", "it must be a file in a folder"),
        ("model", "it must be a file in a folder"),
        ("n" * 250 + ".json", "it cannot be written (File name too long)"),
        ("/proc/x.json", "it cannot be written"),
    ],
)
def test_json_files_that_cannot_be(folder, capsys, monkeypatch, json_file, message):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    check(capsys, main(["info", "--json", json_file]), 2, message)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("out", "message"),
    [("train.txt", "is a file"), ("train.txt/x", "is a file"), ("n" * 250, "too long")],
)
def test_softmax_checks_its_folder_first(folder, capsys, monkeypatch, out, message):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("ptqkit.cli.softmax.load_model", None)
    given = ["--text", "test.txt", "--bits", "8", "--correction", "bias", "--out", out]
    check(capsys, main(["softmax", "model", *given]), 2, message)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("model", "is the folder of the model itself, kept"),
        ("", "kept: give another name"),
        (".", "kept: give another name"),
        ("..", "kept: give another name"),
        ("train.txt", "is a file"),
        ("train.txt/x", "is a file"),
        ("/dev/null", "is a device"),
        ("n" * 250, "the name is too long"),
        ("a\0b", "cannot be the name of a folder"),
        ("/", "kept: give another name"),
    ],
)
def test_places_that_stay(folder, capsys, monkeypatch, out, message):
    monkeypatch.chdir(folder)
    before = {p: p.stat().st_mtime for p in folder.rglob("*")}
    monkeypatch.setattr("ptqkit.cli.quantize.load_model", None)  # nothing is loaded before
    code = quantize(folder, "--overwrite", out=out)
    check(capsys, code, 3, message)
    assert {p: p.stat().st_mtime for p in folder.rglob("*")} == before


def test_a_folder_with_other_files_stays(folder, tmp_path, capsys):
    assert quantize(folder, out=tmp_path / "q") == 0
    (tmp_path / "q/notes.md").write_text("mine", encoding="utf-8")
    capsys.readouterr()
    code = quantize(folder, "--overwrite", out=tmp_path / "q")
    check(capsys, code, 3, "holds what no checkpoint consists of, kept: notes.md;")
    assert (tmp_path / "q/notes.md").read_text(encoding="utf-8") == "mine"


def test_options_and_files_are_one_report(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--damping", "-1", "--json", "no/where.json", "--memory-budget", "much"]
    options += ["--start-token", "x", "--calibration", "no.txt"]
    assert quantize(folder, *options, out=folder / "train.txt") == 3
    error = capsys.readouterr().err
    for part in ("damping must be", "--json no/where", "--memory", "--start-token x", "no.txt"):
        assert part in error
    assert "is a file" in error and error.startswith("ptqkit quantize: cannot start, 6 problem(s)")


def test_overwrite_replaces(folder, tmp_path, capsys):
    out = tmp_path / "q"
    assert quantize(folder, "--bits", "4", out=out) == 0
    assert quantize(folder, "--bits", "2", "--overwrite", out=out) == 0
    recipe = json.loads((out / "ptqkit_recipe.json").read_text(encoding="utf-8"))
    assert recipe["bits"] == 2


def test_quantized_already(folder, tmp_path, capsys):
    assert quantize(folder, out=tmp_path / "q") == 0
    arguments = ["--calibration", str(folder / "train.txt"), *SMALL, "--out", str(tmp_path / "r")]
    code = main(["quantize", str(tmp_path / "q"), *arguments])
    check(capsys, code, 3, "is quantized already")


def test_all_problems_at_once(folder, tmp_path, capsys):
    options = ["--group-size", "48", "--override", "*.nothing=skip", "--samples", "900"]
    assert quantize(folder, *options, out=tmp_path / "q") == 3
    error = capsys.readouterr().err
    for part in ("does not divide", "'*.nothing'", "lower samples"):
        assert part in error


def test_full_disk(folder, tmp_path, capsys, monkeypatch):
    def full(path, plans, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ptqkit.hf.checkpoint.save.write_tensors", full)
    assert quantize(folder, out=tmp_path / "q") == 1
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where(folder, tmp_path, monkeypatch):
    arguments = ["eval", model_of(folder), "--text", str(tmp_path / "no.txt")]
    with pytest.raises(Exception, match="there is no such file"):
        main([*arguments, "--debug"])
    monkeypatch.setenv("PTQKIT_DEBUG", "1")
    with pytest.raises(Exception, match="there is no such file"):
        main(arguments)


def test_json_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    from ptqkit.cli import info

    file = tmp_path / "info.json"
    file.write_text("before", encoding="utf-8")

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", interrupted)
        assert main(["info", "--json", str(file)]) == 130
    assert file.read_text(encoding="utf-8") == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["info.json"]
    monkeypatch.setattr(info, "collect", lambda: {**info_facts(), "odd": [float("nan"), np.inf]})
    assert main(["info", "--json", str(file)]) == 0
    assert json.loads(file.read_text(encoding="utf-8"))["odd"] == [None, None]


def info_facts():
    from ptqkit import show_config

    packages = dict.fromkeys(("numpy", "torch"), "1")
    environment = dict.fromkeys(
        (
            "PTQKIT_CPU",
            "PTQKIT_BLAS",
            "PTQKIT_OPENMP",
            "PTQKIT_CFLAGS",
            "PTQKIT_DEBUG",
            "OMP_NUM_THREADS",
        )
    )
    return {
        "config": show_config(),
        "python": "3",
        "system": "s",
        "packages": packages,
        "environment": environment,
    }


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (PreflightError(["x"]), 3),
        (NotPositiveDefiniteError("x", 0, 1.0), 4),
        (FileNotFoundError("x"), 2),
        (UsageError("x"), 2),
        (CalibrationError("x"), 2),
        (CellsFailed("x"), 4),
        (ModuleNotFoundError("x"), 2),
        (ValueError("bug"), 1),
        (TypeError("bug"), 1),
        (OSError(errno.ENOSPC, "full"), 1),
        (RuntimeError("bug"), 1),
    ],
)
def test_exit_codes(error, code):
    assert exit_code(error) == code
