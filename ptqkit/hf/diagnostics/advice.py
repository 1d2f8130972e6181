"""From a diagnosis to a recipe: which layers need more bits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ptqkit.errors import CalibrationError, check_choice
from ptqkit.recipe.recipe import Recipe

__all__ = ["recipe_toml", "suggest_recipe"]

_RULES = ("inputs", "sensitivity")


def suggest_recipe(
    report: Any,
    *,
    by: str = "inputs",
    factor: float = 2.0,
    more: int = 8,
    preset: str = "quality",
    **changes: Any,
) -> dict[str, Any]:
    """Return a recipe with more bits for the layers that stand out.

    Parameters
    ----------
    report : DiagnosisReport
    by : {"inputs", "sensitivity"}
        A layer stands out if the relative rounding error of its input, a grid per token, is at
        least ``factor`` times the median layer's; or if its block alone costs the logits at least
        ``factor`` times the noise of the median block.
    factor : float above 1
    more : int
        Bits of these layers.
    preset : str
        Of the recipe, with ``**changes`` (``bits``, ``group_size``, ...).

    Returns
    -------
    dict
        For :meth:`ptqkit.Recipe.from_dict`; ``overrides`` is empty where nothing stands out.

    Raises
    ------
    CalibrationError
        If the report does not hold what the rule reads.
    """
    check_choice("by", by, _RULES)
    if not factor > 1:
        raise ValueError(f"factor must be above 1, not {factor!r}")
    costs = _inputs(report) if by == "inputs" else _blocks(report)
    limit = factor * float(np.median(list(costs.values())))
    chosen = [pattern for pattern, cost in costs.items() if cost >= limit > 0]
    values = {"preset": preset, **changes, "overrides": {p: {"bits": more} for p in chosen}}
    Recipe.from_dict(values)
    return values


def _inputs(report: Any) -> dict[str, float]:
    found = {c: r.relative_error for r in report.inputs for c in r.consumers}
    if not found or any(math.isnan(v) for v in found.values()):
        raise CalibrationError("the report holds no rounding errors of inputs")
    return found


def _blocks(report: Any) -> dict[str, float]:
    costs = report.sensitivity.get("layer")
    if costs is None:
        raise CalibrationError("the report holds no sensitivity of blocks: ask for 'layer'")
    return {f"{row.layer}.*": 10 ** (-row.sqnr_db / 10) for row in costs.rows}


def recipe_toml(values: Mapping[str, Any], name: str = "more bits where needed") -> str:
    """Return a recipe as TOML text, in the form that a sweep file has."""
    lines = ["[[recipes]]", f"name = {json.dumps(name)}"]
    for key, value in values.items():
        if key != "overrides" and value is not None:
            lines.append(f"{key} = {json.dumps(value)}")
    for pattern, change in values.get("overrides", {}).items():
        inner = ", ".join(f"{k} = {json.dumps(v)}" for k, v in change.items())
        lines.append(f"overrides.{json.dumps(pattern)} = {{ {inner} }}")
    return "\n".join(lines) + "\n"
