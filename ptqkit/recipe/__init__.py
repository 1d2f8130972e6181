"""What to do with a model: plain values that need neither PyTorch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ptqkit.recipe.options import ActivationQuantization, Equalization
from ptqkit.recipe.parts import (
    AWE,
    GPTQ,
    PARTS,
    RTN,
    BiasCorrection,
    Equalize,
    SmoothQuant,
    combine,
)
from ptqkit.recipe.presets import PRESETS
from ptqkit.recipe.recipe import Recipe, match_pattern

__all__ = [
    "AWE",
    "GPTQ",
    "PARTS",
    "PRESETS",
    "RTN",
    "ActivationQuantization",
    "BiasCorrection",
    "Equalization",
    "Equalize",
    "Recipe",
    "SmoothQuant",
    "as_recipe",
    "match_pattern",
]


def as_recipe(value: Recipe | str | Mapping[str, Any] | Sequence[Any]) -> Recipe:
    """Accept a Recipe, the name of a preset, the mapping of ``to_dict``, or a list of parts."""
    if isinstance(value, Recipe):
        return value
    if isinstance(value, str):
        return Recipe.preset(value)
    if isinstance(value, Mapping):
        return Recipe.from_dict(value)
    if isinstance(value, Sequence):
        return combine(value)
    raise TypeError(
        "recipe must be a Recipe, a preset's name, a dict or a list of parts, not "
        f"{type(value).__name__}"
    )
