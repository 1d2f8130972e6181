"""The quantized softmax as a file beside the weights.

No public checkpoint format has a place for it. ``ptqkit_softmax.json`` holds::

    {"format": "ptqkit-softmax", "version": 1, "layers": {NAME: LAYER, ...}}

with one LAYER per quantized attention module, NAME its module name in the model::

    "heads"        int, of the query
    "bits"         int from 2 to 16
    "scale"        number, "zero_point" int: p is s*q - s*z, q the code
    "correction"   null, "bias", "row_length" or "row_sum" (ptqkit.nn.softmax.quantizer)
    "bias"         for "bias" a number or a list of one per head; for "row_length" a list of one
                   per bin, or of such a list per head; else absent
    "longest"      for "bias": int or null
    "edges"        for "row_length": last row length of every bin

:func:`ptqkit.load` installs it; transformers by itself ignores it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ptqkit._files import atomic_directory, write_atomically
from ptqkit.arrays.softmax import SoftmaxGrid
from ptqkit.hf.softmax.driver import SoftmaxQuantization, check_heads
from ptqkit.nn.attention import find_attention, installed_attention
from ptqkit.nn.attention_quantizer import AttentionQuantizer
from ptqkit.nn.softmax.quantizer import SoftmaxQuantizer

__all__ = ["SOFTMAX_FILE", "load_softmax", "save_softmax", "write_installed"]

SOFTMAX_FILE = "ptqkit_softmax.json"

_FORMAT, _VERSION = "ptqkit-softmax", 1
_FIELDS = {"heads", "bits", "scale", "zero_point", "correction", "bias", "longest", "edges"}


def _to_dict(quantizer: SoftmaxQuantizer, heads: int) -> dict[str, Any]:
    grid = quantizer.grid
    values: dict[str, Any] = {
        "heads": heads,
        "bits": grid.bits,
        "scale": float(grid.scale),
        "zero_point": int(grid.zero_point),
        "correction": quantizer.correction,
    }
    if quantizer.bias is not None:
        values["bias"] = quantizer.bias.tolist()
    if quantizer.correction == "bias":
        values["longest"] = quantizer.longest
    if quantizer.edges is not None:
        values["edges"] = list(quantizer.edges)
    return values


def _to_json(model: nn.Module, quantizers: Mapping[str, SoftmaxQuantizer]) -> str:
    modules = find_attention(model)
    check_heads(modules, quantizers)
    layers = {name: _to_dict(q, modules[name].heads) for name, q in quantizers.items()}
    head = {"format": _FORMAT, "version": _VERSION}
    return json.dumps({**head, "layers": layers}, indent=1, allow_nan=False) + "\n"


def save_softmax(
    model: nn.Module,
    quantizers: Mapping[str, SoftmaxQuantizer],
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
) -> Path:
    """Write ``ptqkit_softmax.json`` into a model's folder, and the model if there is none yet.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    quantizers : mapping of str to SoftmaxQuantizer
    directory : path
        Where it exists, it must be the folder of this model: only the one file is written, over
        an earlier one. Where not, the model is saved there first (``save_pretrained``), the
        folder appearing at the end.
    tokenizer : optional
        Saved along with the model.

    Raises
    ------
    ValueError
        If the folder holds another model, or none.
    """
    text = _to_json(model, quantizers)
    target = Path(directory)
    if target.exists():
        _check_folder(model, target)
        write_atomically(target / SOFTMAX_FILE, text)
        return target / SOFTMAX_FILE
    size = sum(p.numel() * p.element_size() for p in model.state_dict().values())
    with atomic_directory(Path(os.path.realpath(target)), overwrite=False, needed=size) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_atomically(folder / SOFTMAX_FILE, text)
    return target / SOFTMAX_FILE


def _check_folder(model: Any, folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"{folder} exists and holds no model: give another name")
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} is not valid JSON: {error}") from None
    mine = model.config.to_dict()
    for key in ("model_type", "num_hidden_layers", "hidden_size", "n_layer", "n_embd"):
        if key in found and key in mine and found[key] != mine[key]:
            raise ValueError(
                f"{folder} holds another model: its {key} is {found[key]!r}, not {mine[key]!r}"
            )


def write_installed(model: nn.Module, folder: Path) -> None:
    """Write the quantized softmax that is installed on a model, if one is, into a new folder.

    Raises
    ------
    ValueError
        If attention is quantized in a way that the file has no place for.
    """
    hooks = installed_attention(model)
    if not hooks:
        return
    quantizers = {}
    for name, hook in hooks.items():
        parts = getattr(hook, "quantizers", {})
        softmax = parts.get("softmax")
        plain = isinstance(hook, AttentionQuantizer) and len(parts) == 1 and hook.heads is None
        if not plain or not isinstance(softmax, SoftmaxQuantizer):
            raise ValueError(
                f"{name} has an attention hook that no file can hold (only a quantized softmax of "
                "all heads can be saved): call ptqkit.nn.remove_attention(model) first"
            )
        quantizers[name] = softmax
    write_atomically(folder / SOFTMAX_FILE, _to_json(model, quantizers))


def load_softmax(model: nn.Module, directory: str | os.PathLike[str]) -> SoftmaxQuantization | None:
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
    modules = find_attention(model)
    quantizers = {}
    for name, layer in values["layers"].items():
        try:
            quantizers[name], heads = _from_dict(layer)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, layer {name}: {error}") from None
        if name in modules and modules[name].heads != heads:
            raise ValueError(
                f"{path} is for another model: {name} has {modules[name].heads} heads, "
                f"the file says {heads}"
            )
    result = SoftmaxQuantization(model, quantizers)
    result.install()
    return result


def read_softmax_file(path: Path, form: str, version: int) -> dict[str, Any]:
    """Values of a file of this format and version that names at least one layer.

    Raises
    ------
    ValueError
        If it is another file, or damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or values.get("format") != form:
        raise ValueError(f"{path} is no {form} file")
    if values.get("version") != version:
        raise ValueError(
            f"{path} has version {values.get('version')!r}; this ptqkit reads {version}"
        )
    layers = values.get("layers")
    if not isinstance(layers, dict) or not layers:
        raise ValueError(f"{path} names no layers")
    return values


def _from_dict(values: Any) -> tuple[SoftmaxQuantizer, int]:
    if not isinstance(values, dict):
        raise ValueError("it must be an object")
    unknown = sorted(set(values) - _FIELDS)
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}")
    for key in ("heads", "bits", "scale", "zero_point", "correction"):
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
    quantizer = SoftmaxQuantizer(
        SoftmaxGrid(bits, float(scale), zero_point),
        values["correction"],
        values.get("bias"),
        longest=longest,
        edges=values.get("edges"),
    )
    if quantizer.heads not in (None, heads):
        raise ValueError(f"bias is for {quantizer.heads} heads, not {heads}")
    return quantizer, heads


def _integer(values: Mapping[str, Any], key: str, low: int, high: int) -> int:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{key} must be an integer from {low} to {high}, not {value!r}")
    return value
