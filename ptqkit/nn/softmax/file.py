"""The quantized softmax as a file next to the weights.

No public checkpoint format has a place for it. ``ptqkit_softmax.json`` holds::

    {"format": "ptqkit-softmax", "version": 1, "layers": {NAME: LAYER, ...}}

with one LAYER per quantized attention module, NAME its module name in the model::

    "heads"        int, of the query
    "bits"         int from 2 to 16
    "scale"        number, "zero_point" int: p is s*q - s*z, q the code
    "of"           absent: the grid is that of probabilities; "exponentials": p is s*q over the
                   row's sum of exp(x - max); "squares": (s*q)^2 over it
    "correction"   null, "bias", "row_length", "row_sum" or "code_sum" (see
                   ptqkit.nn.softmax.quantizer)
    "bias"         for "bias" a number or a list of one per head; for "row_length" a list of one
                   per bin, or of such a list per head; else absent
    "longest"      for "bias": int or null
    "edges"        for "row_length": last row length of every bin

For a UNet the format is "ptqkit-softmax-unet", and the file also has "steps", the calibrated time
steps, falling. Its layers have no "longest" and no "edges", and instead::

    "granularity"  for "bias": "tensor", "head", "step" or "step_head"
    "bias"         for "bias": a number; a list of one per head; of one per step; of such a list
                   per head for every step

:func:`ptqkit.load` and :func:`ptqkit.diffusion.load_softmax` install it; transformers and diffusers
by themselves ignore it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptqkit.arrays.softmax import SoftmaxGrid
from ptqkit.errors import check_choice
from ptqkit.nn.attention import AttentionModule
from ptqkit.nn.softmax.quantizer import SoftmaxQuantizer
from ptqkit.nn.softmax.statistics import Quantizer
from ptqkit.nn.softmax.steps import StepSoftmaxQuantizer, check_steps
from ptqkit.nn.softmax.tables import TableGridQuantizer

__all__ = ["SOFTMAX_FILE", "SoftmaxValues", "read_values", "to_json"]

SOFTMAX_FILE = "ptqkit_softmax.json"

_FORMAT, _UNET_FORMAT, _VERSION = "ptqkit-softmax", "ptqkit-softmax-unet", 1
_NEEDED = ("heads", "bits", "scale", "zero_point", "correction")
_GRANULARITIES = ("tensor", "head", "step", "step_head")


@dataclass(frozen=True)
class SoftmaxValues:
    """What a file holds.

    Attributes
    ----------
    quantizers : dict of str to SoftmaxQuantizer or StepSoftmaxQuantizer
        By attention module.
    heads : dict of str to int
        Heads of these modules.
    steps : tuple of int
        Calibrated time steps of a UNet; empty for a language model.
    """

    quantizers: Mapping[str, Quantizer]
    heads: Mapping[str, int]
    steps: tuple[int, ...] = ()


def to_json(values: SoftmaxValues) -> str:
    """Return the text of a file.

    Raises
    ------
    ValueError
        If a grid has no place in it.
    """
    unet = bool(values.steps)
    content: dict[str, Any] = {"format": _UNET_FORMAT if unet else _FORMAT, "version": _VERSION}
    if unet:
        content["steps"] = list(values.steps)
    content["layers"] = {
        name: _to_dict(q, values.heads[name], unet) for name, q in values.quantizers.items()
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _to_dict(quantizer: Quantizer, heads: int, unet: bool) -> dict[str, Any]:
    if isinstance(quantizer, TableGridQuantizer):
        raise ValueError(
            f"a {quantizer.grid.of} grid has no place in {SOFTMAX_FILE}: save one of "
            "probabilities, exponentials or squares"
        )
    grid = quantizer.grid
    values: dict[str, Any] = {
        "heads": heads,
        "bits": grid.bits,
        "scale": float(grid.scale),
        "zero_point": int(grid.zero_point),
        "correction": quantizer.correction,
    }
    if grid.of != "probabilities":
        values["of"] = grid.of
    if quantizer.bias is None:
        return values
    if unet:
        values["granularity"] = _granularity(quantizer)
    values["bias"] = quantizer.bias.tolist()
    if not unet and isinstance(quantizer, SoftmaxQuantizer):
        if quantizer.correction == "bias":
            values["longest"] = quantizer.longest
        if quantizer.edges is not None:
            values["edges"] = list(quantizer.edges)
    return values


def _granularity(quantizer: Quantizer) -> str:
    parts = ["step"] * isinstance(quantizer, StepSoftmaxQuantizer)
    return "_".join(parts + ["head"] * (quantizer.heads is not None)) or "tensor"


def read_values(
    path: Path, modules: Mapping[str, AttentionModule], *, unet: bool = False
) -> SoftmaxValues:
    """Read a file for a model with these attention modules.

    Raises
    ------
    ValueError
        If the file is damaged, from a later version, or for another model; it names the layer.
    """
    content = _read(path, _UNET_FORMAT if unet else _FORMAT)
    try:
        steps = check_steps(content.get("steps") or ()) if unet else ()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    quantizers: dict[str, Quantizer] = {}
    heads: dict[str, int] = {}
    for name, layer in content["layers"].items():
        try:
            quantizers[name], heads[name] = _from_dict(layer, steps)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, layer {name}: {error}") from None
        if name in modules and modules[name].heads != heads[name]:
            raise ValueError(
                f"{path} is for another model: {name} has {modules[name].heads} heads, "
                f"the file says {heads[name]}"
            )
    return SoftmaxValues(quantizers, heads, steps)


def _read(path: Path, form: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or values.get("format") != form:
        raise ValueError(f"{path} is not a {form} file")
    if values.get("version") != _VERSION:
        raise ValueError(
            f"{path} has version {values.get('version')!r}; this ptqkit reads {_VERSION}"
        )
    layers = values.get("layers")
    if not isinstance(layers, dict) or not layers:
        raise ValueError(f"{path} names no layers")
    return values


def _from_dict(values: Any, steps: tuple[int, ...]) -> tuple[Quantizer, int]:
    if not isinstance(values, dict):
        raise ValueError("it must be an object")
    more = ("of", "bias", "granularity") if steps else ("of", "bias", "longest", "edges")
    unknown = sorted(set(values) - {*_NEEDED, *more})
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}")
    for key in _NEEDED:
        if key not in values:
            raise ValueError(f"field {key!r} is missing")
    heads, bits = _integer(values, "heads", 1, 1 << 20), _integer(values, "bits", 2, 16)
    zero_point = _integer(values, "zero_point", 0, (1 << bits) - 1)
    scale = values["scale"]
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not number or not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"scale must be a positive number, not {scale!r}")
    longest = values.get("longest")
    if longest is not None:
        longest = _integer(values, "longest", 1, 1 << 40)
    of = values.get("of", "probabilities")
    grid, bias = SoftmaxGrid(bits, float(scale), zero_point, of), values.get("bias")
    granularity: Any = values.get("granularity")
    quantizer: Quantizer | None = None
    if steps and values["correction"] == "bias":
        check_choice("granularity", granularity, _GRANULARITIES)
        if granularity.startswith("step"):
            quantizer = StepSoftmaxQuantizer(grid, bias, steps)
    if quantizer is None:
        quantizer = SoftmaxQuantizer(
            grid, values["correction"], bias, longest=longest, edges=values.get("edges")
        )
    if quantizer.heads not in (None, heads):
        raise ValueError(f"bias is for {quantizer.heads} heads, not {heads}")
    if granularity is not None and _granularity(quantizer) != granularity:
        raise ValueError(
            f"bias does not have the shape of granularity {granularity!r} and {heads} heads"
        )
    return quantizer, heads


def _integer(values: Mapping[str, Any], key: str, low: int, high: int) -> int:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{key} must be an integer from {low} to {high}, not {value!r}")
    return value
