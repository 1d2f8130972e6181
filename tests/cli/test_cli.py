"""The command line: what it writes, prints and returns."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.cli_calls import SMALL, model_of, quantize

import ptqkit
from ptqkit.cli import build_parser, main
from ptqkit.cli.output import SCHEMA, quiet_transformers
from ptqkit.cli.quantize import _recipe, parse_override
from ptqkit.hf.data.text import TextFile

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 42)[None]).logits


def fake_quantized(folder, checkpoint):
    """The float model with the dequantized weights of a checkpoint in place of its own."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    for name, matrix in ptqkit.hf.read_matrices(checkpoint).items():
        model.get_submodule(name).weight.data = torch.from_numpy(matrix.dequantize())
    return model


def test_own_format_round_trips_and_json_says_all(folder, tmp_path, capsys):
    out, file = tmp_path / "q", tmp_path / "q.json"
    assert quantize(folder, "--bits", "3", "--json", str(file), out=out) == 0
    assert capsys.readouterr().out.strip() == str(out)
    found = json.loads(file.read_text(encoding="utf-8"))
    assert (found["schema"], found["command"]) == (SCHEMA, "quantize")
    assert found["version"] == ptqkit.__version__
    assert found["checkpoint"]["format"] == "ptqkit"
    assert found["recipe"]["grid"] == "hessian" and found["recipe"]["refine_passes"] == 1
    assert len(found["report"]["layers"]) == 15  # seven in each of two blocks, and the head
    assert {"objective", "damping", "bits_per_weight"} <= found["report"]["layers"][0].keys()
    # float16 on disk, float32 arithmetic: the scales are float16, so nothing is rounded.
    assert (found["dtype"], found["written_dtype"]) == ("float32", "float16")
    assert ptqkit.hf.read_matrices(out)["model.layers.1.mlp.down_proj"].bits == 3
    model = ptqkit.load(out, dtype=torch.float32)
    assert torch.equal(logits(model), logits(fake_quantized(folder, out)))


def test_bits_with_a_point_are_an_average(folder, tmp_path):
    out = tmp_path / "q"
    assert quantize(folder, "--bits", "3.5", out=out) == 0
    matrices = ptqkit.hf.read_matrices(out).values()
    average = sum(m.bits * m.codes.size for m in matrices) / sum(m.codes.size for m in matrices)
    assert 3.4 < average <= 3.5 and len({m.bits for m in matrices}) > 1


def test_symmetric_checkpoint_loads_in_stock_transformers(folder, tmp_path, capsys):
    out = tmp_path / "q"
    assert quantize(folder, "--symmetric", out=out) == 0
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(logits(model), logits(fake_quantized(folder, out)))
    capsys.readouterr()
    assert main(["eval", str(out), "--text", str(folder / "test.txt"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""  # no progress bar of another package


def test_bars_of_other_packages_are_as_before(folder):
    from huggingface_hub.utils import are_progress_bars_disabled
    from tqdm import tqdm
    from transformers.utils import logging

    make, found = vars(tqdm)["__init__"], []
    before = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    with quiet_transformers():
        assert not logging.is_progress_bar_enabled() and are_progress_bars_disabled()
        found.append(vars(tqdm)["__init__"])
    assert found == [make]
    assert (logging.is_progress_bar_enabled(), are_progress_bars_disabled()) == before


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_gptq_formats(folder, tmp_path, format, capsys):
    out = tmp_path / "q"
    assert quantize(folder, "--format", format, out=out) == 0
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["checkpoint_format"] == format
    assert main(["eval", str(out), "--text", str(folder / "test.txt"), "--quiet"]) == 0
    assert float(capsys.readouterr().out.split()[-1]) > 1


def test_reports_layers_format_and_how_to_load(folder, tmp_path, capsys):
    given = ["--calibration", str(folder / "train.txt"), *SMALL[:-1], "--symmetric"]
    out = tmp_path / "q"
    assert main(["quantize", model_of(folder), *given, "--out", str(out)]) == 0
    printed, progress = capsys.readouterr()
    assert "model.layers.1.mlp.down_proj" in printed and "objective" in printed
    assert f"wrote {out}" in printed and "format compressed-tensors" in printed
    assert "AutoModelForCausalLM.from_pretrained(" in printed
    lines = progress.strip().splitlines()
    assert len(lines) == 14
    assert re.fullmatch(r"\[14/14\] model\.layers\.1\.\S+  loss \S+  0 s left", lines[-1])


def test_overrides_and_rtn_without_text(folder, tmp_path, capsys):
    out = tmp_path / "q"
    arguments = [
        "quantize",
        model_of(folder),
        "--method",
        "rtn",
        "--group-size",
        "channel",
        "--quiet",
        "--override",
        "*.mlp.*=bits:8,group-size:32",
        "--override",
        "re:.*[.]0[.].*=skip",
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    layers = ptqkit.hf.read_matrices(out)
    assert len(layers) == 7 and not any(".0." in name for name in layers)
    found = {name.split(".")[-1]: (q.bits, q.group_size) for name, q in layers.items()}
    assert found["up_proj"] == (8, 32) and found["q_proj"] == (4, None)


def test_tokens_from_a_file(folder, tmp_path, capsys):
    out = tmp_path / "q"
    assert quantize(folder, "--calibration", str(folder / "tokens.npy"), out=out) == 0
    text = ["--text", str(folder / "tokens.npy"), "--json", "-"]
    assert main(["eval", str(out), *text]) == 0
    found = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert found["texts"] == 6 and found["tokens"] == 6 * 20


def test_model_without_a_tokenizer(folder, tmp_path, capsys):
    config = transformers.GPT2Config(
        vocab_size=4000, n_embd=32, n_layer=1, n_head=2, n_positions=32
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    out, tokens = str(tmp_path / "q"), str(folder / "tokens.npy")
    given = ["--group-size", "16", "--samples", "4", "--calibration", tokens, "--out", out]
    assert main(["quantize", str(tmp_path / "m"), *given]) == 0
    assert "--symmetric" not in capsys.readouterr().out  # would not help: Conv1D
    assert not list((tmp_path / "q").glob("token*"))
    assert main(["eval", out, "--text", tokens]) == 0
    assert "start token none" in capsys.readouterr().out
    given = ["--text", str(folder / "test.txt")]
    assert main(["eval", out, *given]) == 2
    assert "MODEL has no tokenizer" in capsys.readouterr().err


def test_eval_states_its_conventions(folder, capsys, tmp_path):
    file = tmp_path / "e.json"
    text = ["--text", str(folder / "test.txt")]
    options = ["--window", "32", "--stride", "16", "--max-tokens", "100", "--json", str(file)]
    assert main(["eval", model_of(folder), *text, *options]) == 0
    printed = capsys.readouterr().out
    assert "window 32, stride 16, start token '<s>' (id 0)" in printed
    assert "tokens 100 scored" in printed and "float32 arithmetic on cpu" in printed
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["perplexity"] == pytest.approx(np.exp(found["nll_per_token"]))
    assert found["quantization"] == "float"
    assert main(["eval", model_of(folder), *text, *options, "--start-token", "none"]) == 0
    assert "tokens 99 scored" in capsys.readouterr().out


def test_eval_equals_the_library(folder, capsys):
    path = folder / "test.txt"
    assert main(["eval", model_of(folder), "--text", str(path), "--quiet"]) == 0
    model = ptqkit.load(folder / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    expected = ptqkit.hf.perplexity(model, tokenizer, path.read_text(encoding="utf-8"))
    assert float(capsys.readouterr().out) == pytest.approx(expected.perplexity, rel=1e-5)


def test_info(capsys, monkeypatch):
    monkeypatch.setenv("PTQKIT_DEBUG", "0")
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in ("cpu_level", "blas", "torch", "PTQKIT_CPU", transformers.__version__):
        assert word in printed
    assert main(["info", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"] == ptqkit.show_config()
    assert found["environment"]["PTQKIT_DEBUG"] == "0"


@pytest.mark.parametrize("command", [[], ["quantize"], ["eval"], ["demo"], ["info"]])
def test_help_is_worth_reading(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "example" in printed or "exit codes" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_help_and_mistakes_do_not_import_torch(script):
    code = """
import sys
from ptqkit.cli import main
for arguments in (
    ["--help"],
    ["quantize", "--help"],
    ["quantize", "x", "--out", "no such folder", "--calibration", "no such file"],
    ["eval", "x", "--text", "no such file"],
):
    try:
        main(arguments)
    except SystemExit:
        pass
assert not {"torch", "transformers"} & set(sys.modules)
"""
    script(code)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*.up_proj=skip", ("*.up_proj", "skip")),
        ("a=bits:8", ("a", {"bits": 8})),
        ("re:a=b=bits:ternary,symmetric:true", ("re:a=b", {"bits": "ternary", "symmetric": True})),
        (
            "a=group_size:channel,damping:0.1",
            ("a", {"group_size": "channel", "per_tensor": False, "damping": 0.1}),
        ),
        ("a=group-size:none, bits:3", ("a", {"group_size": None, "bits": 3})),
    ],
)
def test_override_syntax(text, expected):
    assert parse_override(text) == expected


def recipe_of(*options):
    return _recipe(build_parser().parse_args(["quantize", "demo", "--out", "q", *options]))


def test_options_change_the_parts_that_a_recipe_has():
    from ptqkit import Recipe

    searched = recipe_of("--recipe", "aweq", "--alpha", "search")
    assert searched == Recipe.preset("aweq", equalization={"method": "awe", "alpha": "search"})
    smooth = recipe_of("--recipe", "smoothquant", "--alpha", "0.75").equalization
    assert (smooth.method, smooth.alpha) == ("smoothquant", 0.75)
    other = recipe_of("--recipe", "llm.int8", "--outlier-threshold", "4").activations
    assert (other.bits, other.granularity, other.outlier_threshold) == (8, "token", 4.0)
    assert recipe_of("--recipe", "aweq", "--equalize", "none").equalization is None
    assert recipe_of("--calibrate-all-experts").calibrate_all_experts
    assert not recipe_of("--no-calibrate-all-experts").calibrate_all_experts
    given = recipe_of("--recipe", "aweq", "--override", "*.q_proj=group_size:channel")
    assert not given.for_layer("a.q_proj").per_tensor and given.for_layer("a.k_proj").per_tensor


def test_recipe_aweq_with_alpha_search_runs(folder, tmp_path, capsys):
    file = tmp_path / "q.json"
    options = ("--recipe", "aweq", "--alpha", "search", "--group-size", "tensor")
    assert quantize(folder, *options, "--json", str(file), out=tmp_path / "q") == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["recipe"]["equalization"]["alpha"] == "search"


@pytest.mark.parametrize("text", ["a", "=bits:4", "a=", "a=bits", "a=bits:", "a=:4"])
def test_override_mistakes(text):
    with pytest.raises(argparse.ArgumentTypeError):
        parse_override(text)


def test_ctrl_c_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    def stop(event):
        if event.index == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("ptqkit.cli.quantize._progress", lambda args: stop)
    assert quantize(folder, out=tmp_path / "q") == 130
    error = capsys.readouterr().err
    assert "of 14 layers are already quantized" in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_interrupt_of_the_process(folder, tmp_path, name):
    root = Path(ptqkit.__file__).resolve().parents[1]
    command = [sys.executable, "-m", "ptqkit", "quantize", "demo", "--out", "q"]
    options = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    number = getattr(signal, name)
    # tests that run as a background job inherit SIGINT ignored
    options["preexec_fn"] = lambda: signal.signal(number, signal.SIG_DFL)
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(command, env=environment, **options) as process:
        line = process.stderr.readline()
        assert line.startswith("[1/"), line + process.stderr.read()
        process.send_signal(number)
        started = time.monotonic()
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert time.monotonic() - started < 30
    assert "Traceback" not in error and "interrupted" in error
    assert list(tmp_path.iterdir()) == []


def test_signals_are_as_before(capsys):
    def mine(*args):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, mine)
    try:
        assert main(["info"]) == 0
        assert signal.getsignal(signal.SIGTERM) is mine
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert main(["info"]) == 0
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("output", [["--quiet"], ["--json", "-"]])
def test_the_own_format_is_never_quiet(folder, tmp_path, capsys, output):
    given = ["--calibration", str(folder / "train.txt"), *SMALL[:-1], *output]
    out = tmp_path / "q"
    assert main(["quantize", model_of(folder), *given, "--out", str(out)]) == 0
    printed, error = capsys.readouterr()
    [line] = [line for line in error.splitlines() if line.startswith("ptqkit quantize: ")]
    assert "has format ptqkit: compressed-tensors cannot carry" in line and "ptqkit.load" in line
    # What a script reads is the folder, or the JSON, alone.
    assert printed.strip() == str(out) or json.loads(printed)["checkpoint"]["format"] == "ptqkit"
    for options in (["--symmetric"], ["--format", "ptqkit"]):  # nothing unexpected
        given = ["--calibration", str(folder / "train.txt"), *SMALL, *options, "--overwrite"]
        assert main(["quantize", model_of(folder), *given, "--out", str(out)]) == 0
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("output", [[], ["--quiet"], ["--json", "-"]])
def test_what_other_readers_refuse_is_never_quiet(folder, tmp_path, capsys, output):
    given = ["--calibration", str(folder / "train.txt"), *SMALL, "--symmetric", *output]
    given += ["--override", "*.q_proj=bits:8", "--out", str(tmp_path / "q")]
    assert main(["quantize", model_of(folder), *given]) == 0
    printed, error = capsys.readouterr()
    lines = [line for line in error.splitlines() if "warning" in line.lower()]
    [line] = [line for line in lines if "q_proj" in line]
    assert line.startswith("ptqkit quantize: warning: ") and "vLLM" in line
    assert lines == [line]
    if output == ["--json", "-"]:
        assert json.loads(printed)["checkpoint"]["warnings"] == [line.partition("warning: ")[2]]


def bomb(path):
    """Write 30 kB that expand to 30 MB: more than fits a test that reads it all."""
    line = b"def read(path):\n    return path\n"
    path.write_bytes(gzip.compress(line * (30_000_000 // len(line))))
    return str(path)


def test_no_more_text_is_read_than_is_needed(folder, tmp_path, capsys, monkeypatch):
    file, read = bomb(tmp_path / "bomb.txt.gz"), []
    real = TextFile.read
    monkeypatch.setattr(
        TextFile, "read", lambda self, size=-1: read.append(size) or real(self, size)
    )
    assert main(["eval", model_of(folder), "--text", file, "--max-tokens", "10", "--quiet"]) == 0
    few = capsys.readouterr().out
    (tmp_path / "few.txt").write_text("def read(path):\n    return path\n" * 20, encoding="utf-8")
    text = str(tmp_path / "few.txt")
    assert main(["eval", model_of(folder), "--text", text, "--max-tokens", "10", "--quiet"]) == 0
    assert capsys.readouterr().out == few
    out = str(tmp_path / "q")
    assert main(["quantize", model_of(folder), "--calibration", file, *SMALL, "--out", out]) == 0
    given = ["--text", str(folder / "test.txt"), "--max-tokens", "40", "--bits", "4"]
    given += ["--samples", "2", "--sequence-length", "24", "--quiet"]
    assert main(["softmax", model_of(folder), "--calibration", file, *given]) == 0
    given[1] = file  # its beginning calibrates, what follows is measured
    assert main(["softmax", model_of(folder), *given]) == 0
    assert min(read) > 0 and sum(read) < 1_000_000


def test_blanks_without_end_are_no_text(folder, tmp_path, capsys, monkeypatch):
    file, read = tmp_path / "blanks.txt.gz", []
    file.write_bytes(gzip.compress(b" \n" * 15_000_000))
    real = TextFile.read
    monkeypatch.setattr(
        TextFile, "read", lambda self, size=-1: read.append(size) or real(self, size)
    )
    assert main(["eval", model_of(folder), "--text", str(file), "--max-tokens", "10"]) == 2
    assert "blanks.txt.gz: the file is empty, or begins with blanks" in capsys.readouterr().err
    assert sum(read) < 20_000_000


def test_reader_that_goes_away(tmp_path):
    root = Path(ptqkit.__file__).resolve().parents[1]
    code = "import sys; from ptqkit.cli import main; input(); sys.exit(main(['info']))"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes) as process:
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        error = process.stderr.read()
        assert process.wait(60) == 1
    assert error == ""


def test_obq_on_float_inputs_from_the_command_line(folder, tmp_path):
    file, out = tmp_path / "q.json", tmp_path / "q"
    options = ["--method", "obq", "--damping", "0.02", "--calibrate-on", "float"]
    assert quantize(folder, *options, "--bits", "3", "--json", str(file), out=out) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert {r["method"] for r in found["report"]["layers"] if r["status"] == "quantized"} == {"obq"}
    recipe = found["recipe"]
    assert (recipe["method"], recipe["damping"], recipe["group_size"]) == ("obq", 0.02, 32)
    assert recipe["calibrate_on"] == "float"
    assert ptqkit.hf.read_matrices(out)["model.layers.1.mlp.down_proj"].bits == 3
