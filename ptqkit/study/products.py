"""Recipes and products of their options, spelled out as cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ptqkit._repr import one_line_repr
from ptqkit.arrays.softmax import UNFITTED
from ptqkit.errors import PreflightError, did_you_mean
from ptqkit.recipe import Recipe, as_recipe
from ptqkit.recipe.presets import PRESETS
from ptqkit.study.cells import FLOAT

__all__ = [
    "RECIPE",
    "Axis",
    "Case",
    "axes_of",
    "cases_of",
    "expand_parts",
    "label_of",
    "named_cases",
]

RECIPE = "recipe"
"""Name of the axis of several recipes."""

_KNOWN = (*PRESETS, FLOAT)
_FIELDS = tuple(f.name for f in fields(Recipe))


@dataclass(frozen=True)
class Case:
    """One recipe of a study.

    Attributes
    ----------
    name : str
    recipe : Recipe or None
        None leaves weights and activations float.
    softmax : mapping or None
        Options of :func:`ptqkit.quantize_softmax`.
    parameters : mapping of str to str, int, float or bool
        Label along each axis.
    """

    __repr__ = one_line_repr

    name: str
    recipe: Recipe | None
    softmax: Mapping[str, Any] | None
    parameters: Mapping[str, Any]

    @property
    def needs_calibration(self) -> bool:
        """Whether the case depends on calibration windows."""
        if self.recipe is not None and self.recipe.needs_calibration():
            return True
        if self.softmax is None:
            return False
        given = {"correction": "bias", "grid_range": "fixed", **self.softmax}
        return given["correction"] not in UNFITTED or given["grid_range"] != "fixed"


@dataclass(frozen=True)
class Axis:
    """Values of one parameter: a label, and the options that it stands for."""

    __repr__ = one_line_repr

    name: str
    values: Mapping[Any, Mapping[str, Any]]


def label_of(name: str, value: Any) -> Any:
    """Return what tables and axes call the value of an option."""
    if value is None:
        return "channel" if name == "group_size" else FLOAT if name == "softmax" else "none"
    if isinstance(value, (str, int, float)):
        return value
    if name == "softmax" and isinstance(value, Mapping):
        plain = {"bits": 8, "correction": "bias", **value}
        text = f"SM{plain.pop('bits')} {plain.pop('correction') or 'none'}"
        return " ".join([text, *(f"{k}={v}" for k, v in plain.items())])
    return str(value)


def axes_of(products: Mapping[str, Any], problems: list[str]) -> list[Axis]:
    """Return the axes of a product.

    A list, tuple or range of values of an option of recipes is an axis, a single value holds for
    all cases; a mapping of labels to options, under any other name, is an axis of options that
    change together. ``softmax`` may be a mapping of options, each of which may be a list, too.

    Parameters
    ----------
    products : mapping
    problems : list of str
        Gets a line for every name that is neither.
    """
    axes = []
    for name, value in products.items():
        if name == "softmax" and isinstance(value, Mapping):
            axes += _softmax_axes(value)
        elif name in _FIELDS or name == "softmax":
            listed = isinstance(value, (list, tuple, range))
            if listed and not value:
                problems.append(f"{name} is an empty list: give at least one value")
            values = list(value) if listed else [value]
            if len({label_of(name, v) for v in values}) < len(values):
                problems.append(f"{name} holds a value twice: {values}")
            axes.append(Axis(name, {label_of(name, v): {name: v} for v in values}))
        elif isinstance(value, Mapping) and all(isinstance(v, Mapping) for v in value.values()):
            axes.append(Axis(name, value))
        else:
            hint = did_you_mean(name, _FIELDS) or (
                ": give a mapping of labels to options for an axis of your own"
            )
            problems.append(f"{name!r} is no option of recipes{hint}")
    return axes


def _softmax_axes(options: Mapping[str, Any]) -> list[Axis]:
    """Return an axis per option; a list is one of several values."""
    axes = []
    for key, value in options.items():
        values = value if isinstance(value, (list, tuple, range)) else [value]
        labelled = {label_of(key, v): {"softmax": {key: v}} for v in values}
        axes.append(Axis(f"softmax {key}", labelled))
    return axes


def cases_of(
    recipes: Any,
    products: Mapping[str, Any],
    where: Callable[[Mapping[str, Any]], bool] | None = None,
) -> list[Case]:
    """Spell out recipes and products.

    Parameters
    ----------
    recipes : Recipe, preset name, mapping of options, list of parts; or several
        Several are a mapping of names to recipes, or a list of presets' names and Recipe objects.
        None or "float" leaves weights and activations float.
    products : mapping
        See :func:`axes_of`.
    where : callable, optional
        Called with the labels of a case; False leaves it out.

    Raises
    ------
    PreflightError
        With all problems: unknown names, values out of range, no case left.
    """
    return named_cases(_named(recipes), products, where)


def named_cases(
    named: Mapping[str, Any],
    products: Mapping[str, Any],
    where: Callable[[Mapping[str, Any]], bool] | None = None,
) -> list[Case]:
    """Do the same for recipes by their names, whatever these are; see :func:`cases_of`."""
    problems: list[str] = []
    several = len(named) > 1
    axes = axes_of(products, problems)
    varying = [a.name for a in axes if len(a.values) > 1]
    cases: dict[str, Case] = {}
    for base, value in named.items():
        for chosen in itertools.product(*(axis.values.items() for axis in axes)):
            labels = {axis.name: label for axis, (label, _) in zip(axes, chosen, strict=True)}
            parameters = {RECIPE: base, **labels} if several else labels
            if where is not None and not where(parameters):
                continue
            options: dict[str, Any] = {}
            for _, more in chosen:
                # Axes of the softmax have an option each.
                if options.get("softmax") and more.get("softmax"):
                    more = {"softmax": {**options["softmax"], **more["softmax"]}}
                options |= more
            shown = [f"{n}={labels[n]}" for n in varying]
            if value is None and options.get("softmax") is None:
                continue  # the float model, which every study has
            if value is None and base == FLOAT:
                # That is the name of the model as it is.
                name = ", ".join(shown or [label_of("softmax", options["softmax"])])
            else:
                name = ", ".join([base, *shown])
            try:
                cases[name] = _case(name, value, options, parameters)
            except (ValueError, TypeError) as error:
                problems.append(f"{name}: {error}")
    if not cases and not problems:
        problems.append("no case is left: 'where' is False for all of them")
    if problems:
        raise PreflightError(problems)
    return list(cases.values())


def _case(name: str, value: Any, options: dict[str, Any], parameters: Mapping[str, Any]) -> Case:
    softmax = options.pop("softmax", None)
    if value is None:
        if options:
            raise ValueError(f"float weights take no options, but {', '.join(options)} is given")
        return Case(name, None, softmax, parameters)
    return Case(name, replace(as_recipe(value), **options), softmax, parameters)


def _named(recipes: Any) -> dict[str, Any]:
    """Return the recipes by their names."""
    if recipes is None or recipes == FLOAT:
        return {FLOAT: None}
    if isinstance(recipes, str):
        return {recipes: recipes}
    if isinstance(recipes, Recipe):
        return {_called(recipes): recipes}
    if isinstance(recipes, Mapping):
        if recipes and all(k not in (*_FIELDS, "preset") for k in recipes):
            return {str(k): None if v == FLOAT else v for k, v in recipes.items()}
        return {_called(as_recipe(recipes)): recipes}
    if _are_recipes(recipes):
        named = {
            r if isinstance(r, str) else _called(r): None if r == FLOAT else r for r in recipes
        }
        if len(named) < len(recipes):
            raise PreflightError(["two recipes have one name: give a mapping of names to recipes"])
        return named
    return {" + ".join(map(str, recipes)): recipes}


def expand_parts(parts: Sequence[Any]) -> list[tuple[dict[str, Any], list[Any]]]:
    """Spell out the lists among the options of parts.

    Parameters
    ----------
    parts : sequence
        Of names, and mappings with ``part``.

    Returns
    -------
    list of (dict, list)
        Labels and parts; an option of two parts is named with its part, as in ``RTN.bits``.
    """
    axes: list[tuple[int, str, list[Any]]] = []
    for place, part in enumerate(parts):
        if isinstance(part, Mapping):
            axes += [(place, k, v) for k, v in part.items() if isinstance(v, list)]
    keys = [key for _, key, _ in axes]
    names = [
        key if keys.count(key) == 1 else f"{parts[place].get('part', '')}.{key}"
        for place, key, _ in axes
    ]
    found = []
    for values in itertools.product(*(listed for _, _, listed in axes)):
        made = [dict(p) if isinstance(p, Mapping) else p for p in parts]
        labels = {}
        for (place, key, _), name, value in zip(axes, names, values, strict=True):
            made[place][key] = value
            labels[name] = label_of(key, value)
        found.append((labels, made))
    return found


def _are_recipes(values: Iterable[Any]) -> bool:
    return all(isinstance(v, Recipe) or (isinstance(v, str) and v in _KNOWN) for v in values)


def _called(recipe: Recipe) -> str:
    """Return the name of the preset that a recipe equals, or what is usual to say of it."""
    for name in PRESETS:
        if Recipe.preset(name) == recipe:
            return name
    group = "channel" if recipe.group_size is None else recipe.group_size
    return f"{recipe.method} {recipe.bits} bits, group {group}, {recipe.order}, {recipe.grid}"
