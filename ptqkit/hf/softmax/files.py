"""The quantized softmax of a transformers model in the model's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ptqkit._files import write_atomically
from ptqkit._folders import atomic_directory, check_path, has_content
from ptqkit.hf.models.attention import find_attention, installed_attention
from ptqkit.nn.attention_quantizer import AttentionQuantizer
from ptqkit.nn.softmax.file import SOFTMAX_FILE, SoftmaxValues, to_json
from ptqkit.nn.softmax.quantizer import SoftmaxQuantizer
from ptqkit.nn.softmax.statistics import Quantizer
from ptqkit.nn.softmax.study import check_heads

__all__ = ["check_installed", "save_softmax", "write_installed"]


def save_softmax(
    model: nn.Module,
    quantizers: Mapping[str, Quantizer],
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
        If it exists, it must be the folder of this model: only the one file is written, over an
        earlier one. If not, the model is saved there first (``save_pretrained``), and the folder
        appears at the end.
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
    with atomic_directory(target, check=_check_new, needed=size) as folder:
        saved: Any = model
        saved.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_atomically(folder / SOFTMAX_FILE, text)
    return target / SOFTMAX_FILE


def check_installed(model: nn.Module) -> dict[str, Quantizer]:
    """Return the quantized softmax that is installed on a model, by name; empty if none is.

    Raises
    ------
    ValueError
        If attention is quantized in a way that the file has no place for.
    """
    quantizers: dict[str, Quantizer] = {}
    for name, hook in installed_attention(model).items():
        softmax = None
        if (
            isinstance(hook, AttentionQuantizer)
            and hook.heads is None
            and len(hook.quantizers) == 1
        ):
            softmax = hook.quantizers.get("softmax")
        if not isinstance(softmax, SoftmaxQuantizer):
            raise ValueError(
                f"{name} has an attention hook that no file can hold (only a quantized softmax of "
                "all heads can be saved): call ptqkit.hf.remove_attention(model) first"
            )
        quantizers[name] = softmax
    return quantizers


def write_installed(model: nn.Module, folder: Path) -> None:
    """Write the quantized softmax that is installed on a model, if one is, into a new folder."""
    quantizers = check_installed(model)
    if quantizers:
        write_atomically(folder / SOFTMAX_FILE, _to_json(model, quantizers))


def _check_new(target: Path) -> None:
    """Refuse a name that somebody has taken meanwhile."""
    check_path(target)
    if has_content(target):
        raise FileExistsError(f"directory {target} is not empty: give a new name")


def _to_json(model: nn.Module, quantizers: Mapping[str, Quantizer]) -> str:
    modules = find_attention(model)
    check_heads(modules, quantizers)
    return to_json(SoftmaxValues(quantizers, {name: m.heads for name, m in modules.items()}))


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
