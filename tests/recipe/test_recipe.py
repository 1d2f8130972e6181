"""Recipes: presets, validation, overrides, and the way to JSON and back."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ptqkit.arrays.matrix import WeightGrid
from ptqkit.recipe import as_recipe
from ptqkit.recipe.groups import common_group_size, group_size_problem
from ptqkit.recipe.parts import RTN
from ptqkit.recipe.recipe import Recipe, match_pattern


def test_presets():
    quality, reference, rtn = (Recipe.preset(n) for n in ("quality", "reference", "rtn"))
    assert quality == Recipe()
    assert (quality.order, quality.static_groups, quality.grid, quality.refine_passes) == (
        "group-act",
        False,
        "hessian",
        1,
    )
    assert (reference.method, reference.order, reference.grid, reference.refine_passes) == (
        "gptq",
        "natural",
        "minmax",
        0,
    )
    assert reference.damping == 0.01
    assert (rtn.method, rtn.grid) == ("rtn", "minmax")
    assert Recipe.preset("rtn", bits=8, group_size=None).bits == 8
    assert as_recipe("reference") == reference
    assert as_recipe({"preset": "rtn", "bits": 3}) == Recipe.preset("rtn", bits=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits must be an integer from 2 to 8"),
        ({"bits": "two"}, "bits must be"),
        (
            {"group_size": 0},
            "group_size must be an integer of at least 1.*None or 'channel' means one scale",
        ),
        ({"group_size": -1}, "group_size"),
        ({"method": "awq"}, "method must be one of 'gptq', 'rtn', 'obq', not 'awq'"),
        ({"order": "random"}, "order must be one of"),
        ({"grid": "best"}, "grid must be one of"),
        ({"scale_dtype": "float8"}, "scale_dtype must be one of"),
        ({"refine_passes": -1}, "refine_passes must be an integer of at least 0"),
        ({"damping": -0.1}, "damping must be a number of at least 0"),
        ({"damping": float("nan")}, "damping must be a number"),
        ({"damping": 0.5, "max_damping": 0.1}, r"max_damping \(0.1\) must not be below"),
        ({"symmetric": "yes"}, "symmetric must be True or False"),
        ({"min_zero_point": 2}, "min_zero_point must be at most 1"),
        ({"block_size": 0}, "block_size"),
        ({"include": "lm_head"}, "include must be a sequence"),
        ({"overrides": ["x"]}, "overrides must be a mapping"),
        ({"overrides": {"*.mlp": "drop"}}, r"overrides\['\*.mlp'\] must be a mapping of changes"),
        ({"overrides": {"*.mlp": {"bit": 4}}}, "has no option 'bit'"),
        ({"overrides": {"*.mlp": {"bits": 9}}}, r"overrides\['\*.mlp'\]: bits must be"),
        ({"overrides": {"re:(": "skip"}}, "is not a regular expression"),
        ({"overrides": {"*": {"overrides": {}}}}, "cannot hold overrides"),
    ],
)
def test_bad_values_name_the_field(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_a_scale_per_channel_is_none_or_the_word_of_files():
    none = Recipe(group_size=None, overrides={"*.a": {"group_size": None, "bits": 3}})
    word = Recipe(group_size="channel", overrides={"*.a": {"group_size": "channel", "bits": 3}})
    assert word == none and word.to_dict() == none.to_dict()
    assert Recipe.preset("rtn", group_size="channel").group_size is None
    assert as_recipe([RTN(group_size="channel")]) == as_recipe([RTN(group_size=None)])
    with pytest.raises(ValueError, match="group_size must be an integer"):
        Recipe(group_size="tensor")


def test_group_sizes_that_layers_can_have():
    assert group_size_problem("a", 172, 86) == group_size_problem("a", 172, None) == ""
    assert "its 172 inputs; use 86 or 43, or 'channel'" in group_size_problem("a", 172, 64)
    assert "use 'channel'" in group_size_problem("a", 7, 3)
    assert common_group_size([64, 172], 64) == 4 and common_group_size([64, 192], 64) == 64
    assert common_group_size([128], 128) == 128 and common_group_size([7, 64], 64) is None


def test_unknown_names():
    with pytest.raises(ValueError, match=r"recipe must be one of.*'finest'"):
        Recipe.preset("finest")
    with pytest.raises(ValueError, match="recipe has no option 'bit'"):
        Recipe.preset("quality", bit=3)
    with pytest.raises(TypeError, match="recipe must be a Recipe"):
        as_recipe(4)


def test_patterns():
    name = "model.layers.10.mlp.down_proj"
    assert match_pattern("*.down_proj", name) and match_pattern("model.layers.1?.*", name)
    assert match_pattern(r"re:model\.layers\.\d+\.mlp\..*", name)
    assert not match_pattern("re:model", name) and not match_pattern("down_proj", name)


def test_overrides_apply_in_order():
    recipe = Recipe(
        bits=3,
        overrides={
            "*.mlp.*": {"bits": 4, "group_size": 64},
            "*.down_proj": {"bits": 8},
            "*.0.*": "skip",
            "*.0.mlp.up_proj": {"bits": 2},
        },
    )
    down = recipe.for_layer("l.1.mlp.down_proj")
    assert (down.bits, down.group_size, down.overrides) == (8, 64, {})
    assert recipe.for_layer("l.1.attn.q").bits == 3
    assert recipe.for_layer("l.0.attn.q") is None
    assert recipe.for_layer("l.0.mlp.up_proj").bits == 2  # the last match wins over "skip"
    assert recipe.unmatched(["l.0.mlp.up_proj", "l.1.mlp.down_proj"]) == []
    assert recipe.unmatched(["l.1.mlp.down_proj"]) == ["*.0.*", "*.0.mlp.up_proj"]


def test_round_trip_through_json():
    recipe = Recipe(
        bits="ternary",
        group_size=8,
        include=("lm_head",),
        overrides={"a*": "skip", "b": {"bits": 2}},
    )
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("preset", "changes", "reason"),
    [
        ("quality", {}, "method 'gptq'"),
        ("rtn", {}, ""),
        ("rtn", {"grid": "mse"}, ""),
        ("rtn", {"grid": "hessian"}, "grid 'hessian'"),
        ("rtn", {"bias_correction": True}, "bias_correction"),
        ("rtn", {"activations": {"granularity": "token"}}, ""),
        ("rtn", {"activations": {"granularity": "tensor"}}, "a static grid of activations"),
        ("aweq", {}, "equalization"),
        ("llm.int8", {}, ""),
        ("rtn", {"overrides": {"*.o": {"bits": 8}, "*.q": "skip"}}, ""),
        ("rtn", {"overrides": {"*.o": {"method": "gptq"}}}, "method 'gptq' of overrides['*.o']"),
    ],
)
def test_what_needs_calibration(preset, changes, reason):
    assert Recipe.preset(preset, **changes).needs_calibration() == reason


def test_scale_dtype_of_the_weight():
    recipe = Recipe(overrides={"*.o": "skip"})
    half = recipe.with_scale_dtype("float16")
    assert half == dataclasses.replace(recipe, scale_dtype="float16")
    assert half.with_scale_dtype("bfloat16") is half
    assert recipe.with_scale_dtype("float64").scale_dtype == "float32"
    assert recipe.weight_grid == WeightGrid(4, 128, False, False, "float32")
    assert half.weight_grid == WeightGrid(4, 128, scale_dtype="float16")
    ternary = Recipe.preset("rtn", bits="ternary", group_size=None, per_tensor=True)
    assert ternary.weight_grid == WeightGrid("ternary", None, True, True)


def test_bits_with_a_point_are_an_average():
    recipe = Recipe(bits=3.2, overrides={"*.v": {"bits": 4}})
    assert recipe.bits_budget == 3.2 and recipe.for_layer("a.q").bits_budget == 3.2
    assert recipe.for_layer("a.v").bits_budget is None
    assert Recipe(bits=3).bits_budget is None and Recipe(bits=3.0).bits_budget == 3.0
    assert recipe.weight_grid.bits == 4
    assert Recipe(method="rtn", grid="minmax", bits=3.2).needs_calibration() == "bits 3.2"
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("bits", [1.9, 8.1, float("nan"), float("inf")])
def test_average_bits_have_a_range(bits):
    with pytest.raises(ValueError, match="bits as an average must be from 2 to 8"):
        Recipe(bits=bits)


def test_an_override_has_whole_bits():
    with pytest.raises(ValueError, match=r"overrides\['\*'\]: bits must be whole, not 2.5"):
        Recipe(overrides={"*": {"bits": 2.5}})


def test_a_beam_needs_feedback():
    assert Recipe(beam_width=16).beam_width == 16
    with pytest.raises(ValueError, match="beam_width=4 needs feedback=True"):
        Recipe(beam_width=4, feedback=False)
    with pytest.raises(ValueError, match="beam_width must be at most 16"):
        Recipe(beam_width=17)
