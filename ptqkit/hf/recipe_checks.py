"""Checks of a recipe's fields and of their combinations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptqkit.hf.recipe import Recipe

__all__ = [
    "check_combination",
    "check_int",
    "check_names",
    "check_overrides",
    "check_propagation",
]


def check_int(name: str, value: Any, low: int, high: int | None = None, hint: str = "") -> None:
    """Refuse what is no integer within the limits."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, not {value!r}{hint}")
    if high is not None and value > high:
        raise ValueError(f"{name} must be at most {high}, not {value!r}{hint}")


def check_propagation(alpha: Any, method: str) -> None:
    """Refuse an error propagation out of range, or without a solver that it is made for."""
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not number or not 0 <= alpha <= 1:
        raise ValueError(f"error_propagation must be a number from 0 to 1, not {alpha!r}")
    if alpha > 0 and method != "gptq":
        raise ValueError(
            f"error_propagation={alpha} needs method 'gptq', not {method!r}: it is made for a "
            "solver with the Hessian; use error_propagation=0, or 'skip' the layer"
        )


def check_names(changes: Mapping[str, Any], where: str, kind: type) -> None:
    """Refuse names that are no field of a dataclass."""
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise ValueError(f"{where} has no option {unknown[0]!r}; options are {sorted(known)}")


def check_overrides(recipe: Recipe) -> None:
    """Every override must be a valid change, alone, of this recipe."""
    if not isinstance(recipe.overrides, Mapping):
        raise ValueError(f"overrides must be a mapping, not {type(recipe.overrides).__name__}")
    for pattern in [*recipe.overrides, *recipe.include]:
        if not isinstance(pattern, str):
            raise ValueError(f"a pattern must be a string, not {pattern!r}")
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from None
    for pattern, change in recipe.overrides.items():
        if change == "skip":
            continue
        if not isinstance(change, Mapping):
            raise ValueError(
                f"overrides[{pattern!r}] must be a mapping of changes or 'skip', not {change!r}"
            )
        check_names(change, f"overrides[{pattern!r}]", type(recipe))
        if {"overrides", "include"} & set(change):
            raise ValueError(f"overrides[{pattern!r}] cannot hold overrides or include")
        for name in ("error_propagation", "equalization"):
            if name in change:
                raise ValueError(
                    f"overrides[{pattern!r}] cannot hold {name}: it holds for the whole run"
                )
        try:
            replace(recipe, **change, overrides={}, include=())
        except ValueError as error:
            raise ValueError(f"overrides[{pattern!r}]: {error}") from None


def check_combination(recipe: Recipe) -> None:
    """Refuse fields that contradict each other."""
    if recipe.per_tensor:
        if recipe.method != "rtn":
            raise ValueError(
                "per_tensor=True needs method 'rtn': GPTQ fits grids per channel or group"
            )
        if recipe.group_size is not None:
            raise ValueError(
                f"per_tensor=True needs group_size=None (one scale), not {recipe.group_size}"
            )
        if recipe.grid != "minmax":
            raise ValueError(f"per_tensor=True needs grid 'minmax', not {recipe.grid!r}")
    if recipe.error_propagation > 0:
        for name in ("bias_correction", "activations"):
            if getattr(recipe, name):
                raise ValueError(
                    f"error_propagation={recipe.error_propagation:g} cannot be combined with "
                    f"{name}: its float model runs in the same modules; use error_propagation=0"
                )
