"""Every public class has a ``repr`` of one line."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.extras import HF, missing

import ptqkit
from ptqkit._repr import LONGEST, summarize

LONG = "model.language_model.decoder.layers.10.mixture_of_experts.experts.127.down_projection"


# Modules whose classes do not leave the package.
INTERNAL = re.compile(
    r"""ptqkit\.(_core|__main__|nn\.linear|nn\.softmax\.(search|file)|sweep\.bench|hf\.(models\..*
    |checkpoint\.(biases|files|plugin|spec)|equalization\.(inputs|trace)
    |quantization\.(inspection|moments|plan|run|solve|work)))""",
    re.VERBOSE,
)


def public_modules() -> list[str]:
    names = [m.name for m in pkgutil.walk_packages(ptqkit.__path__, "ptqkit.")]
    return [name for name in names if not INTERNAL.fullmatch(name)]


def dataclasses_of(name: str) -> list[type]:
    found = vars(importlib.import_module(name)).values()
    own = [c for c in found if isinstance(c, type) and c.__module__ == name]
    return [c for c in own if dataclasses.is_dataclass(c) and not c.__name__.startswith("_")]


def hostile(kind: str) -> object:
    """A value as large as a field of this type can be."""
    if re.fullmatch(r"(int|float|bool|None| |\|)+", kind):
        return 1234567 / 8.1 if "float" in kind else 123456
    if kind.startswith(("str", "Path")):
        return LONG
    if "Module" in kind or kind == "Any":
        import torch

        return torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(30)))
    if "dict" in kind or "Mapping" in kind:
        return {f"{LONG}.{k}": np.zeros((3, 40)) for k in range(300)}
    if "ndarray" in kind or "Tensor" in kind:
        return np.random.default_rng(0).normal(size=(40, 50))
    return [LONG] * 300


def check(text: str) -> None:
    assert "\n" not in text and len(text) <= LONGEST, text[:1000]


@pytest.mark.skipif(bool(missing(HF)), reason="imports all modules")
@pytest.mark.parametrize("name", public_modules())
def test_dataclasses_however_much_they_hold(name):
    try:
        classes = dataclasses_of(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    for made in classes:
        instance = object.__new__(made)
        for field in dataclasses.fields(made):
            object.__setattr__(instance, field.name, hostile(str(field.type)))
        text = repr(instance)
        check(text)
        assert text.startswith(f"{made.__name__}(")


def accumulators() -> list[object]:
    x = np.random.default_rng(0).normal(size=(64, 300)).astype("f4")
    found = [ptqkit.Hessian(300), ptqkit.ChannelRanges(300), ptqkit.SQNR()]
    for each in found[:2]:
        each.update(x)
    found[2].update(x, x + 0.1)
    return [*found, ptqkit.SoftmaxBias(64, grid=ptqkit.softmax_grid(8))]


@pytest.mark.parametrize("each", accumulators(), ids=lambda each: type(each).__name__)
def test_accumulators(each):
    check(repr(each))
    assert re.match(rf"{type(each).__name__}\(\w+=", repr(each))


def test_results_on_arrays():
    w = np.random.default_rng(0).normal(size=(30, 64)).astype("f4")
    matrix = ptqkit.rtn(w, bits=3, group_size=32)
    assert repr(matrix) == (
        "QuantizedMatrix(codes=<ndarray uint8 30x64>, scales=<ndarray float32 30x2>, "
        "zero_points=<ndarray uint8 30x2>, g_idx=<ndarray int32 64>, "
        "grid=WeightGrid(bits=3, group_size=32))"
    )
    check(repr(ptqkit.quantize_activations(w)))
    check(repr(ptqkit.factorize(np.eye(64, dtype=np.float32))))


def test_what_has_a_default_value_is_left_out():
    assert repr(ptqkit.WeightGrid(3)) == "WeightGrid(bits=3)"
    recipe = ptqkit.Recipe(bits=3, overrides={"*.down_proj": {"bits": 8}}, include=("lm_head",))
    assert repr(recipe) == "Recipe(bits=3, overrides=<dict of 1>, include=('lm_head',))"
    recipe = ptqkit.Recipe(bits=3, activations={"bits": 8}, equalization={"alpha": "search"})
    assert eval(repr(recipe), vars(ptqkit) | vars(ptqkit.recipe.options)) == recipe


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1 / 3, "0.333333"),
        (np.zeros((2, 3), "u1"), "<ndarray uint8 2x3>"),
        (np.float32(2), "<float32 float32 scalar>"),
        ([1, 2], "[1, 2]"),
        ([[1]], "<list of 1>"),
        ({"a": 1}, "{'a': 1}"),
        (dict.fromkeys(range(9)), "<dict of 9>"),
        ("x" * 99, f"'{'x' * 55}...'"),
        (Path("a"), repr(Path("a"))),
        (ptqkit.GPTQ(bits=3), "GPTQ(bits=3)"),
    ],
)
def test_values(value, text):
    assert summarize(value) == text
