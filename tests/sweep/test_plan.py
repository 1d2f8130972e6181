"""Sweep files: every key is checked, and every problem is named at once."""

from __future__ import annotations

import json

import pytest
from helpers.sweep_cases import HEAD, RTN, ZERO_SHOT, folder, write

from ptqkit.errors import PreflightError
from ptqkit.sweep import read_plan
from ptqkit.sweep.items import chance, read_items

pytest.importorskip("torch")
pytest.importorskip("transformers")


def problems(path, *parts):
    with pytest.raises(PreflightError) as caught:
        read_plan(write(path, *parts))
    return caught.value.problems


def test_a_whole_file(tmp_path):
    extra = """
[[models]]
name = "hard"
path = "demo"
dtype = "float32"
outliers = {channels = 2, factor = 10}
calibration = {samples = 3, start_token = "none"}
tasks = ["choice"]

[[recipes]]
name = "GPTQ"
preset = "reference"
bits = 3
models = ["hard"]

[[published]]
model = "LLaMA-7B"
recipe = "GPTQ"
task = "wiki"
value = 6
source = "README"
"""
    plan = read_plan(write(folder(tmp_path), HEAD, ZERO_SHOT, RTN, extra))
    small, hard = plan.models
    assert plan.name == plan.output == "study"
    assert small.calibration.text.path == str(tmp_path / "train.txt")
    assert (small.calibration.samples, small.calibration.start_token) == (2, "auto")
    assert small.tasks == ("wiki", "choice") and hard.tasks == ("choice",)
    assert (hard.calibration.samples, hard.calibration.start_token) == (3, None)
    assert hard.calibration.sequence_length == 16
    assert hard.outliers == {"channels": 2, "factor": 10.0, "seed": 0}
    rtn, gptq = plan.recipes
    assert rtn.resolved["group_size"] is None and rtn.resolved["method"] == "rtn"
    assert rtn.models == ("small", "hard") and gptq.models == ("hard",)
    assert plan.published[0].value == 6
    assert json.dumps(plan.to_dict())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("samples = 2", "sampels = 2", "calibration: unknown key 'sampels' (did you mean 'sa"),
        ("samples = 2", "samples = '2'", "calibration: samples must be an integer, not a string"),
        ("samples = 2", "samples = true", "samples must be an integer, not true or false"),
        ("samples = 2", "samples = 0", "calibration: samples must be at least 1, not 0"),
        ("samples = 2", "start_token = 'bos'", "start_token must be 'auto', 'none' or a token id"),
        ("samples = 2", "documents = [3, 3]", "documents must be [first, end] with first < end"),
        ("train.txt", "nothing.txt", "text 'nothing.txt': there is no such file"),
        ('kind = "perplexity"', 'kind = "bleu"', "kind must be one of 'perplexity', 'z"),
        ('kind = "perplexity"', "", "tasks[0] 'wiki': key 'kind' is missing"),
        ('path = "model"', 'path = "modle"', "models[0] 'small': path 'modle': there is"),
        ('path = "model"', 'path = "."', "the folder has no config.json, so it is not a model"),
        ('path = "model"', 'path = "model"\ndtype = "int8"', "dtype must be one of 'auto'"),
        (
            'path = "model"',
            'path = "model"\ntasks = ["x"]',
            "tasks names 'x', which is not in",
        ),
        ('path = "model"', 'path = "model"\noutliers = {factor = 0}', "factor must be above 0"),
        ('name = "small"', 'name = "a/b"', "name must be a name without '/'"),
        ("bits = 4", "bits = 9", "recipes[0] 'RTN': bits"),
        ("bits = 4", "bit = 4", "recipes[0] 'RTN': recipe has no option 'bit'"),
        ('name = "RTN"', 'name = "float"', "the name 'float' is that of the model as it is"),
        (
            "bits = 4",
            'models = ["x"]',
            "'RTN': models names 'x', which is not in the file; there are small",
        ),
        ("max_tokens = 60", "max_tokens = 60.5", "tasks[0] 'wiki': max_tokens must be an integer"),
        ('name = "study"', 'nmae = "study"', "study.toml: unknown key 'nmae' (did you mean"),
        ("[calibration]", "[calibrate]", "study.toml: key 'calibration' is missing"),
    ],
)
def test_one_problem(tmp_path, old, new, words):
    text = (HEAD + RTN).replace(old, new)
    assert text != HEAD + RTN
    found = problems(folder(tmp_path), text)
    assert any(words in p for p in found), found
    assert all(p.startswith("study.toml") for p in found)


def test_all_problems_at_once(tmp_path):
    text = (HEAD + RTN).replace("bits = 4", "bits = 1").replace("samples = 2", "sample = 2")
    text = text.replace("window = 32", "windos = 32").replace("test.txt", "none.txt")
    found = problems(folder(tmp_path), text)
    assert len(found) == 4
    for word in ("'sample'", "'windos'", "none.txt", "bits"):
        assert sum(word in p for p in found) == 1, word


def test_shared_calibration_is_named_once(tmp_path):
    second = '\n[[models]]\nname = "other"\npath = "model"\n'
    found = problems(folder(tmp_path), HEAD.replace("samples = 2", "samples = 0"), second, RTN)
    assert len(found) == 1


def test_recipes_of_parts(tmp_path):
    parts = """
[[recipes]]
name = "W8A8"
parts = [
    {part = "AWE", alpha = 0.5},
    {part = "RTN", bits = 8, group_size = "channel", symmetric = true},
    {part = "ActivationQuantization", granularity = "tensor"},
    "BiasCorrection",
]
"""
    found = read_plan(write(folder(tmp_path), HEAD, parts)).recipes[0].resolved
    assert found["group_size"] is None and found["bias_correction"]
    assert found["equalization"]["alpha"] == 0.5
    assert found["activations"]["granularity"] == "tensor"
    twice = parts.replace('"BiasCorrection"', '"RTN"')
    assert "recipes[0] 'W8A8': a recipe takes one solver" in problems(tmp_path, HEAD, twice)[0]
    more = parts + "bits = 3\n"
    assert "recipes[0] 'W8A8': unknown key 'bits'" in problems(tmp_path, HEAD, more)[0]


def test_windows_need_their_length_and_nothing_else(tmp_path):
    text = (HEAD + RTN).replace("window = 32", "windows = 3")
    found = problems(folder(tmp_path), text)
    assert "windows needs window" in found[0]
    assert "windows and max_tokens contradict each other" in found[1]


def test_names_used_twice_and_tasks_not_used(tmp_path):
    found = problems(folder(tmp_path), HEAD, RTN, RTN, ZERO_SHOT.replace('"choice"', '"wiki"'))
    assert [p for p in found if "recipes: the name 'RTN' is used twice" in p]
    assert [p for p in found if "tasks: the name 'wiki' is used twice" in p]
    text = HEAD.replace('path = "model"', 'path = "model"\ntasks = ["wiki"]')
    assert "no model runs task 'choice'" in problems(tmp_path, text, ZERO_SHOT, RTN)[0]


def test_optional_things_may_be_missing(tmp_path):
    more = """
[[models]]
name = "far"
path = "elsewhere"
optional = true
calibration = {text = "elsewhere.txt"}

[[tasks]]
name = "far text"
kind = "perplexity"
text = "elsewhere.txt"
optional = true
"""
    plan = read_plan(write(folder(tmp_path), HEAD, RTN, more))
    assert [m.missing for m in plan.models] == [False, True]
    assert [t.missing for t in plan.tasks] == [False, True]


def test_no_file_and_no_toml(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no sweep file"):
        read_plan(tmp_path / "none.toml")
    assert "is not valid TOML" in problems(tmp_path, "name = \n")[0]
    assert "models must be a list" in " ".join(problems(tmp_path, "models = 3\n"))
    assert "models is empty" in " ".join(problems(tmp_path, "models = []\n"))
    assert "models[0] must be a table" in " ".join(problems(tmp_path, "models = [3]\n"))


ITEM = '{"context": "a", "choices": ["b", "c"], "gold": 1}\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no item"),
        ("{\n", "line 1 is not JSON"),
        ("[1]\n", "line 1 is not an object"),
        ('{"context": "a"}\n', "line 1 has none of the forms"),
        (ITEM + '{"context": "a", "continuation": "b"}\n', "line 2 has the fields"),
        (ITEM.replace('["b", "c"]', '["b"]'), "choices must be a list of at least two"),
        (ITEM.replace('"b"', '""'), "choices must hold strings that are not empty"),
        (ITEM.replace("1}", "2}"), "gold must be from 0 to 1, not 2"),
        (ITEM.replace("1}", "true}"), "gold must be from 0 to 1, not True"),
        (ITEM.replace('"a"', "3"), "context must be a string"),
    ],
)
def test_items_that_are_none(tmp_path, text, words):
    (tmp_path / "x.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        read_items(tmp_path / "x.jsonl")
    if text:
        found = problems(folder(tmp_path), HEAD, RTN, ZERO_SHOT.replace("choice.jsonl", "x.jsonl"))
        assert len(found) == 1 and words in found[0]


def test_items_and_chance(tmp_path):
    folder(tmp_path)
    form, items = read_items(tmp_path / "choice.jsonl", 3)
    assert form == "choices" and len(items) == 3
    assert chance(form, items) == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    assert chance("continuation", [{"context": "a", "continuation": "b"}]) == 0
    both = '{"contexts": ["a", "b"], "continuation": "c", "gold": 0}\n'
    (tmp_path / "w.jsonl").write_text(both, encoding="utf-8")
    form, items = read_items(tmp_path / "w.jsonl")
    assert form == "contexts" and chance(form, items) == 0.5
    task = ZERO_SHOT.replace("choice.jsonl", "w.jsonl") + 'metric = "acc_norm"\n'
    assert "'acc_norm' is for items with 'choices' alone" in problems(tmp_path, HEAD, RTN, task)[0]
