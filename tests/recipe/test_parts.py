"""Recipes put together from parts, the presets that quantize activations, and contradictions."""

from __future__ import annotations

import argparse
import json

import pytest

pytest.importorskip("torch")
from ptqkit import AWE, GPTQ, RTN, ActivationQuantization, BiasCorrection, Equalize, SmoothQuant
from ptqkit.cli.quantize import _recipe, add_parser
from ptqkit.recipe import Equalization, as_recipe
from ptqkit.recipe.presets import PRESETS
from ptqkit.recipe.recipe import Recipe

STATIC = {"bits": 8, "granularity": "tensor", "symmetric": False, "outlier_threshold": None}


def test_parts_make_the_recipe_with_the_same_fields():
    parts = [
        AWE(alpha=0.5),
        GPTQ(bits=3, group_size=64),
        ActivationQuantization(8, "tensor"),
        BiasCorrection(),
    ]
    assert as_recipe(parts) == Recipe(
        bits=3,
        group_size=64,
        equalization=Equalization("awe", 0.5),
        activations=ActivationQuantization(8, "tensor", symmetric=False),
        bias_correction=True,
    )
    assert as_recipe([RTN()]) == Recipe.preset("rtn")
    assert as_recipe([GPTQ("reference", bits=2)]) == Recipe.preset("reference", bits=2)
    assert as_recipe([AWE, RTN(bits=8)]).equalization == Equalization("awe", "search")


def test_parts_as_files_write_them():
    parts = [
        "AWE",
        {"part": "RTN", "bits": 8, "per_tensor": True, "symmetric": True},
        {"part": "ActivationQuantization", "granularity": "tensor"},
        "BiasCorrection",
    ]
    recipe = as_recipe(parts)
    assert recipe == Recipe.preset(
        "aweq", equalization={"method": "awe", "alpha": "search", "tokens": 512}
    )
    assert recipe.group_size is None and recipe.activations.to_dict() == STATIC


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    recipe = Recipe.preset(name)
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe and again.activations == recipe.activations


def test_names_of_equalization():
    assert AWE() == Equalize() == Equalization("awe", "search", 512)
    assert AWE(0.5, tokens=64) == Equalize("awe", 0.5, 64)
    assert SmoothQuant() == Equalize("smoothquant") == Equalization("smoothquant", 0.5)
    in_file = {"part": "Equalize", "method": "smoothquant", "alpha": 0.7}
    assert as_recipe([in_file, "RTN"]).equalization == SmoothQuant(0.7)


def test_the_command_line_has_every_preset():
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    for name in PRESETS:
        args = parser.parse_args(["quantize", "model", "--out", "x", "--recipe", name])
        assert _recipe(args) == Recipe.preset(name)
    with pytest.raises(SystemExit):
        parser.parse_args(["quantize", "model", "--out", "x", "--recipe", "none"])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], r"needs a solver, GPTQ\(...\) or RTN"),
        ([AWE()], "to equalize a model alone use ptqkit.equalize"),
        ([GPTQ(), RTN()], r"takes one solver \(GPTQ or RTN\), not 2: GPTQ\(\), RTN\(\)"),
        ([AWE(), SmoothQuant(), RTN()], "takes one equalization"),
        (
            [RTN(), AWE()],
            r"Equalization\(.*\) must come before RTN\(\): it changes the float weights",
        ),
        (
            [RTN(), ActivationQuantization(), ActivationQuantization(6)],
            "takes one ActivationQuantization, not 2",
        ),
        ([RTN(), BiasCorrection(), BiasCorrection()], "takes one BiasCorrection"),
        (["GPTQ", "awe"], r"'awe' is not a part of a recipe; parts are Equalize, AWE"),
        ([{"bits": 4}], "is not a part of a recipe"),
        ([{"part": "AWE", "beta": 1}], "AWE has no option 'beta'"),
        ([{"part": "RTN", "bit": 1}], "recipe has no option 'bit'"),
        ([{"part": "RTN", "bits": 1}], "bits must be an integer from 2 to 8"),
        ([{"part": "GPTQ", "activations": {}}], "GPTQ has no option 'activations'"),
        ([{"part": "GPTQ", "preset": "rtn"}], "preset 'rtn' is of method 'rtn'"),
        ([{"part": "AWE", "alpha": 2}], "alpha must be a number from 0 to 1 or 'search'"),
        ([{"part": "AWE", "tokens": 1}], "tokens must be an integer of at least 2"),
        ([{"part": "SmoothQuant", "alpha": "search"}], "smoothquant takes a number"),
        ([{"part": "GPTQ", "per_tensor": True}], "per_tensor=True needs method 'rtn'"),
        ([{"part": "RTN", "per_tensor": True, "group_size": 8}], "needs group_size=None"),
        ([{"part": "RTN", "per_tensor": True, "grid": "mse"}], "needs grid 'minmax'"),
        ([{"part": "ActivationQuantization", "bits": 1}, "RTN"], "activation bits must be"),
    ],
)
def test_contradictions_are_named(parts, message):
    with pytest.raises(ValueError, match=message):
        as_recipe(parts)


@pytest.mark.parametrize("other", [ActivationQuantization(), BiasCorrection()])
def test_error_propagation_is_alone(other):
    with pytest.raises(ValueError, match="error_propagation=0.5 cannot be combined with"):
        as_recipe([GPTQ(error_propagation=0.5), other])


def test_overrides_of_the_new_fields():
    recipe = Recipe.preset(
        "aweq",
        overrides={
            "*.down_proj": {"activations": None, "bias_correction": False},
            "*.o_proj": {"activations": {"bits": 16}},
        },
    )
    down, o = (recipe.for_layer(f"model.layers.0.{n}") for n in ("mlp.down_proj", "self.o_proj"))
    assert down.activations is None and not down.bias_correction and down.per_tensor
    assert o.activations == ActivationQuantization(16)
    with pytest.raises(ValueError, match=r"cannot hold equalization: it holds for the whole run"):
        Recipe.preset("aweq", overrides={"*": {"equalization": None}})


def test_parts_compare_and_show():
    assert GPTQ(bits=4) == GPTQ() != GPTQ(bits=3)
    assert repr(GPTQ("reference", bits=3)) == "GPTQ('reference', bits=3)"
