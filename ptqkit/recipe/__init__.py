"""Say what to do with a model, in plain values without PyTorch or transformers."""

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
    """Return the Recipe of a Recipe, a preset's name, a mapping or a list of parts."""
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
