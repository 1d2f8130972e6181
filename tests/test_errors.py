"""Errors in choices: one line that names the argument and the word that was meant."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers.data import ROOT

import ptqkit
from ptqkit.errors import UsageError, check_choice, did_you_mean

W = np.ones((2, 4), np.float32)
P = np.zeros((1, 2, 4, 4), np.float32)
GRID = ptqkit.softmax_grid(8)


def test_the_closest_word_is_named():
    check_choice("grid", "mse", {"minmax": 0, "mse": 1})
    check_choice("correction", None, (None, "bias"))
    with pytest.raises(UsageError) as caught:
        check_choice("grid", "min_max", ("minmax", "mse"))
    assert str(caught.value) == (
        "grid must be one of 'minmax', 'mse', not 'min_max' (did you mean 'minmax'?)"
    )


def test_case_and_underscores_are_no_obstacle():
    assert did_you_mean("AWEQ", ["quality", "aweq"]) == " (did you mean 'aweq'?)"
    assert did_you_mean("group_act", ["natural", "group-act"]) == " (did you mean 'group-act'?)"
    assert did_you_mean("xyz", ["natural", None]) == ""


@pytest.mark.parametrize("value", [["mse"], 1, True, np.eye(99), {"mse": 1}, "a\nb", "x" * 999])
def test_any_value_is_refused_in_one_line(value):
    with pytest.raises(UsageError, match=r"^grid must be one of 'mse', not ") as caught:
        check_choice("grid", value, ("mse",))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("call", "meant"),
    [
        (lambda: ptqkit.rtn(W, bits=3, group_size=4, grid="min-max"), "minmax"),
        (lambda: ptqkit.factorize(np.eye(4, dtype=np.float32), order="natrual"), "natural"),
        (lambda: ptqkit.quantize_activations(W, granularity="tokens"), "token"),
        (lambda: ptqkit.SQNR("samples"), "sample"),
        (lambda: ptqkit.WeightGrid(scale_dtype="float_32"), "float32"),
        (lambda: ptqkit.softmax_on_grid(P, GRID, correction="row_sums"), "row_sum"),
        (lambda: ptqkit.Recipe(method="gtpq"), "gptq"),
        (lambda: ptqkit.Recipe(scale_dtype="bloat16"), "bfloat16"),
        (lambda: ptqkit.Recipe.preset("smoothQuant"), "smoothquant"),
        (lambda: ptqkit.Recipe.preset("rtn", group_sze=3), "group_size"),
        (lambda: ptqkit.Equalize("smooth-quant"), "smoothquant"),
        (lambda: ptqkit.ActivationQuantization(granularity="tensors"), "tensor"),
        (lambda: ptqkit.Recipe.from_dict({"preset": "referense"}), "reference"),
        (lambda: ptqkit.demo.text("tests"), "test"),
    ],
)
def test_each_choice_names_what_was_meant(call, meant):
    with pytest.raises((UsageError, TypeError)) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 300
    assert re.search(rf"[Dd]id you mean '{meant}'\?", text), text


def test_choices_are_checked_in_one_place():
    sources = [p for p in (ROOT / "ptqkit").rglob("*.py") if p.name != "errors.py"]
    assert len(sources) > 100
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"must be (one|some) of|get_close_matches", text), path
