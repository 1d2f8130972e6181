"""Products of options, draws and the softmax in sweep files."""

from __future__ import annotations

import csv
import math

import pytest
from helpers.sweep_cases import HEAD, FakeBench, folder, tiny_model, write

from ptqkit.errors import PreflightError
from ptqkit.sweep import read_plan, run_sweep
from ptqkit.sweep.grid import plan_cells
from ptqkit.sweep.results import rows, summary, table, write_results

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

GRID = """
[[recipes]]
name = "GPTQ"
preset = "reference"
bits = [2, 3]
group_size = [16, "channel"]
"""
DRAWS = HEAD.replace("samples = 2", "samples = 2\ndraws = 3")
ONE = '\n[[recipes]]\nname = "GPTQ"\npreset = "reference"\nbits = 4\ngroup_size = 16\n'
SOFTMAX = """
[[recipes]]
name = "W4"
preset = "rtn"
bits = 4
group_size = 16
softmax = ["float", {bits = 4, correction = "row_sum"}]

[[recipes]]
name = "SM4"
preset = "float"
softmax = {bits = 4, correction = "none"}
"""


@pytest.fixture
def bench(monkeypatch):
    FakeBench.install(monkeypatch)
    monkeypatch.setattr(FakeBench, "log", [])
    monkeypatch.setattr(FakeBench, "fail", {})
    return FakeBench


def recipes(path, *parts):
    return read_plan(write(folder(path), *parts)).recipes


def test_lists_are_a_product(tmp_path):
    found = recipes(tmp_path, HEAD, GRID)
    assert [r.name for r in found] == [
        "GPTQ, bits=2, group_size=16",
        "GPTQ, bits=2, group_size=channel",
        "GPTQ, bits=3, group_size=16",
        "GPTQ, bits=3, group_size=channel",
    ]
    assert [r.resolved["group_size"] for r in found] == [16, None, 16, None]
    assert found[2].parameters["bits"] == 3 and found[2].resolved["order"] == "natural"


def test_lists_among_parts_are_a_product(tmp_path):
    parts = (
        '\n[[recipes]]\nname = "AWEQ"\nparts = [{part = "AWE", alpha = [0.5, 0.75]}, '
        '{part = "RTN", bits = [4, 8], group_size = "channel"}]\n'
    )
    found = recipes(tmp_path, HEAD, parts)
    assert [r.name for r in found][:2] == ["AWEQ, alpha=0.5, bits=4", "AWEQ, alpha=0.5, bits=8"]
    assert found[3].resolved["equalization"]["alpha"] == 0.75 and found[3].resolved["bits"] == 8


def test_lists_in_a_softmax_are_a_product(tmp_path):
    softmax = '\n[[recipes]]\nname = "S"\npreset = "float"\nsoftmax = {bits = [8, 4], correction = '
    found = recipes(tmp_path, HEAD, softmax + '["none", "bias"]}\n')
    assert [r.name for r in found][:2] == ["S, softmax=SM8 none", "S, softmax=SM8 bias"]
    assert found[3].softmax == {"bits": 4} and found[0].fitted is False and found[3].fitted


def test_draws_repeat_what_is_fitted(tmp_path, bench):
    plan = read_plan(write(folder(tmp_path), DRAWS, ONE))
    labels = [c.label for c in plan_cells(plan)[0]]
    names = ["small/GPTQ/wiki", "small/GPTQ#1/wiki", "small/GPTQ#2/wiki"]
    assert labels == ["small/float/wiki", *names]
    result = run_sweep(plan, tmp_path / "out")
    assert [line for line in bench.log if "quantize" in line] == [
        "quantize small/GPTQ",
        "quantize small/GPTQ seed 1",
        "quantize small/GPTQ seed 2",
    ]
    assert [r["value"] for r in rows(result)] == [10, 12, 13, 14]
    found = summary(result)[1]
    assert (found["value"], found["excess"], found["draws"]) == (13, 3, 3)
    assert found["se_draws"] == pytest.approx(1 / math.sqrt(3), rel=1e-12)
    assert math.isnan(found["se_windows"]) and found["excess_se"] == found["se_draws"]
    assert "+30.00 ± 5.77" in table(result)
    rtn = ONE.replace("reference", "rtn")
    assert len(plan_cells(read_plan(write(tmp_path, DRAWS, rtn)))[0]) == 2


def test_the_first_draw_is_the_cell_of_a_file_without_draws(tmp_path, bench):
    first = {c.key for c in plan_cells(read_plan(write(folder(tmp_path), HEAD, ONE)))[0]}
    more = {c.key for c in plan_cells(read_plan(write(tmp_path, DRAWS, ONE)))[0]}
    assert first < more and len(more) == 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_weights_and_softmax_in_one_file(tmp_path):
    import ptqkit
    from ptqkit.hf import load_model, perplexity

    path = folder(tmp_path)
    (path / "model" / "config.json").unlink()
    tiny_model(path / "model")
    result = run_sweep(read_plan(write(path, HEAD, SOFTMAX)), tmp_path / "out")
    assert [c.recipe for c in result.cells] == [
        "float",
        "W4, softmax=float",
        "W4, softmax=SM4 row_sum",
        "SM4",
    ]
    text = (path / "test.txt").read_text(encoding="utf-8")
    model, tokenizer, _ = load_model(path / "model", device="cpu")
    options = {"window": 32, "max_tokens": 60, "batch_size": 4}
    softmax = ptqkit.quantize_softmax(model, bits=4, correction=None)
    alone = perplexity(model, tokenizer, text, **options)
    softmax.remove()
    assert result.cells[3].value == alone.perplexity
    made = ptqkit.quantize(
        model, "rtn", bits=4, group_size=16, stored_dtype="float16", progress=False
    ).model
    ptqkit.quantize_softmax(made, bits=4, correction="row_sum")
    assert result.cells[2].value == perplexity(made, tokenizer, text, **options).perplexity
    # A study of the same cells has the same errors as the files.
    study = result.study("small")
    written = write_results(result)
    with open(written[0], encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert float(lines[3]["excess_se"]) == study.excess("SM4").se_windows > 0
    assert lines[0]["excess_se"] == "" and len(result._repr_html_().split("<tr>")) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('bits = [3, 9]\npreset = "rtn"', "R, bits=9: bits must be"),
        ('bits = []\npreset = "rtn"', "bits is an empty list"),
        ('preset = "float"', "float weights need a softmax"),
        ('preset = "float"\nbits = 4', "float weights take no options, but there is 'bits'"),
        ('preset = "rtn"\nsoftmax = "none"', "softmax must be 'float', a table or a list"),
        ('preset = "rtn"\nsoftmax = {bit = 8}', "softmax: unknown key 'bit' .did you mean 'bits'"),
        ('preset = "rtn"\nsoftmax = {correction = "bia"}', "softmax: correction must be"),
    ],
)
def test_what_is_wrong_with_a_product_is_told(tmp_path, change, message):
    file = write(folder(tmp_path), HEAD, f'\n[[recipes]]\nname = "R"\n{change}\n')
    with pytest.raises(PreflightError, match=message):
        read_plan(file)


def test_the_names_of_corrections_are_those_of_the_library():
    from ptqkit.nn.softmax.quantizer import CORRECTIONS
    from ptqkit.nn.softmax.study import GRIDS_OF, RANGES
    from ptqkit.sweep import plan_reader

    assert set(plan_reader._CORRECTIONS) == {c for c in CORRECTIONS if c is not None}
    assert set(plan_reader._GRIDS_OF) <= set(GRIDS_OF)
    assert set(plan_reader._RANGES) == set(RANGES)
