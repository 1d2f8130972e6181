"""The quantized softmax of a UNet as a file beside its weights.

No format of diffusers has a place for it. ``ptqkit_softmax.json`` holds::

    {"format": "ptqkit-softmax-unet", "version": 1, "steps": [INT, ...], "layers": {NAME: LAYER}}

``steps`` are the calibrated time steps, falling. NAME is the name of an attention module; a LAYER::

    "heads"        int
    "bits"         int from 2 to 16
    "scale"        number, "zero_point" int: p is s*q - s*z, q the code
    "correction"   null, "bias" or "row_sum"
    "granularity"  for "bias": "tensor", "head", "step" or "step_head"
    "bias"         for "bias": a number; a list of one per head; of one per step; of such a list
                   per head for every step

:func:`load_softmax` installs it on a UNet; diffusers by itself ignores it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ptqkit._files import write_atomically
from ptqkit.arrays.softmax import SoftmaxGrid
from ptqkit.diffusion.attention import find_attention
from ptqkit.diffusion.clock import StepClock
from ptqkit.diffusion.softmax import GRANULARITIES, UNetSoftmaxQuantization, check_heads
from ptqkit.diffusion.step_quantizer import StepSoftmaxQuantizer
from ptqkit.nn.softmax.file import SOFTMAX_FILE, read_softmax_file
from ptqkit.nn.softmax.quantizer import SoftmaxQuantizer

__all__ = ["SOFTMAX_FILE", "load_softmax", "save_softmax"]

_FORMAT, _VERSION = "ptqkit-softmax-unet", 1
_NEEDED = ("heads", "bits", "scale", "zero_point", "correction")


def save_softmax(
    unet: nn.Module,
    quantizers: Mapping[str, Any],
    clock: StepClock,
    directory: str | os.PathLike[str],
) -> Path:
    """Write ``ptqkit_softmax.json`` into an existing folder, all at once or not at all.

    Returns
    -------
    Path
        Of the file.

    Raises
    ------
    NotADirectoryError
        If there is no such folder.
    """
    path = Path(directory) / SOFTMAX_FILE
    if not path.parent.is_dir():
        raise NotADirectoryError(f"{path.parent} is no folder: save the UNet there, or make it")
    modules = find_attention(unet)
    check_heads(modules, dict(quantizers))
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "steps": list(clock.steps),
        "layers": {name: _to_dict(q, modules[name].heads) for name, q in quantizers.items()},
    }
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def load_softmax(
    unet: nn.Module, directory: str | os.PathLike[str]
) -> UNetSoftmaxQuantization | None:
    """Install what ``ptqkit_softmax.json`` in a folder says; None where there is no such file.

    Raises
    ------
    ValueError
        If the file is damaged, from a later version, or for another model; it names the layer.
    """
    path = Path(directory) / SOFTMAX_FILE
    if not path.is_file():
        return None
    values = read_softmax_file(path, _FORMAT, _VERSION)
    try:
        clock = StepClock(values.get("steps"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    modules, quantizers = find_attention(unet), {}
    for name, layer in values["layers"].items():
        try:
            quantizers[name] = _from_dict(layer, clock)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, layer {name}: {error}") from None
        if name in modules and modules[name].heads != layer["heads"]:
            raise ValueError(
                f"{path} is for another model: {name} has {modules[name].heads} heads, "
                f"the file says {layer['heads']}"
            )
    result = UNetSoftmaxQuantization(unet, quantizers, clock)
    result.install()
    return result


def _granularity(quantizer: Any) -> str:
    per_head = quantizer.heads is not None
    if isinstance(quantizer, StepSoftmaxQuantizer):
        return "step_head" if per_head else "step"
    return "head" if per_head else "tensor"


def _to_dict(quantizer: Any, heads: int) -> dict[str, Any]:
    grid = quantizer.grid
    values: dict[str, Any] = {
        "heads": heads,
        "bits": grid.bits,
        "scale": float(grid.scale),
        "zero_point": int(grid.zero_point),
        "correction": quantizer.correction,
    }
    if quantizer.correction == "bias":
        values["granularity"] = _granularity(quantizer)
        values["bias"] = quantizer.bias.tolist()
    return values


def _from_dict(values: Any, clock: StepClock) -> SoftmaxQuantizer | StepSoftmaxQuantizer:
    if not isinstance(values, dict):
        raise ValueError("it must be an object")
    for key in _NEEDED:
        if key not in values:
            raise ValueError(f"field {key!r} is missing")
    unknown = sorted(set(values) - {*_NEEDED, "granularity", "bias"})
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}")
    heads, correction = values["heads"], values["correction"]
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads must be a positive integer, not {heads!r}")
    grid = SoftmaxGrid(values["bits"], values["scale"], values["zero_point"])
    if correction != "bias":
        return SoftmaxQuantizer(grid, correction, values.get("bias"))
    granularity = values.get("granularity")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {GRANULARITIES}, not {granularity!r}")
    if granularity in ("step", "step_head"):
        quantizer: Any = StepSoftmaxQuantizer(grid, values.get("bias"), clock)
    else:
        quantizer = SoftmaxQuantizer(grid, "bias", values.get("bias"))
    expected = heads if granularity.endswith("head") else None
    if quantizer.heads != expected:
        raise ValueError(f"bias has not the shape of granularity {granularity!r} and {heads} heads")
    return quantizer
