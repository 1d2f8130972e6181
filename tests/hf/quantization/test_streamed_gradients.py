"""Streamed runs that first ask the float model's gradients, or calibrate on its inputs alone."""

from __future__ import annotations

import pytest
from helpers.driver_models import build, padded_batches, tokens
from helpers.stored_runs import files, read_rows

from ptqkit import ActivationQuantization, Recipe
from ptqkit.errors import PreflightError, Problems
from ptqkit.hf import quantize
from ptqkit.hf.quantization.state import RunState
from ptqkit.hf.quantization.streamed import check_stream

WAYS = ("memory", "streamed")
RECIPES = {
    "float": ("quality", {"bits": 3, "calibrate_on": "float", "include": ("lm_head",)}),
    "float, static": (
        "reference",
        {
            "calibrate_on": "float",
            "symmetric": True,
            "activations": ActivationQuantization(8, "tensor"),
            "bias_correction": True,
        },
    ),
    "best": ("best", {"bits": 2.5}),
}


def run(folder, out, way, recipe, data):
    method, options = RECIPES[recipe]
    given = {"group_size": 16, "progress": False, "stream": way, "out_dir": out}
    return quantize(str(folder), method, data, **given, **options)


@pytest.mark.parametrize(
    "name, recipe",
    [
        ("llama", "float"),
        ("opt", "float, static"),
        ("llama", "best"),
    ],
)
def test_files_are_those_of_a_run_in_memory(name, recipe, tmp_path):
    build(name).save_pretrained(tmp_path / "model")
    data = padded_batches(name)
    found = [run(tmp_path / "model", tmp_path / w, w == "streamed", recipe, data) for w in WAYS]
    assert files(tmp_path / "streamed") == files(tmp_path / "memory")
    rows = [read_rows(tmp_path / w, "target", "tokens", "bits_per_weight") for w in WAYS]
    assert rows[0] == rows[1]
    memory, streamed = (r.report for r in found)
    assert streamed.rounding_losses == memory.rounding_losses
    assert bool(memory.rounding_losses) == (recipe == "best")
    assert ("row_coupling" in streamed.seconds) == (recipe == "best")


@pytest.mark.parametrize("recipe", ["float, static", "best"])
def test_a_run_that_was_stopped_goes_on(recipe, tmp_path, monkeypatch):
    build().save_pretrained(tmp_path / "model")
    run(tmp_path / "model", tmp_path / "whole", True, recipe, tokens())
    keep = RunState.keep

    def stop(self, block):
        if self.finished == 1:
            raise RuntimeError("stop")
        return keep(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "keep", stop)
        with pytest.raises(RuntimeError, match="stop"):
            run(tmp_path / "model", tmp_path / "out", True, recipe, tokens())
    run(tmp_path / "model", tmp_path / "out", True, recipe, tokens())
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_what_needs_the_whole_model_is_refused():
    for recipe, text in (
        (Recipe(tune=5), "tune=5 needs the whole model in memory"),
        (Recipe.preset("aweq"), "equalization scales the whole model at once"),
    ):
        problems = Problems()
        check_stream(problems, recipe)
        with pytest.raises(PreflightError, match=text):
            problems.raise_if_any()


def test_the_backward_pass_and_what_it_finds_are_counted(tmp_path):
    build().save_pretrained(tmp_path / "model")
    needed = {}
    for coupled in (0, 1):
        options = {"group_size": 16, "progress": False, "stream": True, "row_coupling": coupled}
        result = quantize(
            str(tmp_path / "model"),
            "reference",
            tokens(),
            out_dir=tmp_path / str(coupled),
            **options,
        )
        needed[coupled] = result.report.memory["estimate_streamed"]
    layers = [r.shape[0] for r in result.report.quantized]
    assert needed[1] - needed[0] >= 4 * sum(rows * min(rows, 256) for rows in layers)
