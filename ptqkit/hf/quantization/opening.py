"""Open the folder of a model: in memory, or leaving its parameters in their files."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptqkit._places import source_folder
from ptqkit.errors import PreflightError, Problem, UnsupportedModuleError, UsageError
from ptqkit.hf.checkpoint.reader import load
from ptqkit.hf.checkpoint.stored_model import StoredModel, open_stored
from ptqkit.hf.checkpoint.tensors import StoredTensors
from ptqkit.hf.models.dtypes import dtype_of
from ptqkit.hf.models.loading import (
    compute_dtype,
    load_tokenizer,
    model_folder,
    pick_device,
    read_config,
    stored_dtype,
)
from ptqkit.hf.quantization.memory import available_memory
from ptqkit.nn.forward import device_of

__all__ = ["load_model", "open_model", "reopen"]


def load_model(
    name: str | os.PathLike[str], dtype: str = "auto", device: str = "auto"
) -> tuple[nn.Module, Any, dict[str, str]]:
    """Load a float or quantized model and its tokenizer.

    Parameters
    ----------
    name : str or path
        Folder, or name on the Hugging Face Hub.
    dtype : str
        Arithmetic, such as ``"float32"``; ``"auto"`` is that of the files, but on a CPU float16,
        and bfloat16 where the processor has no instructions for it, run as float32 if the memory
        allows.
    device : str
        As torch names it; ``"auto"`` is a GPU if there is one.

    Returns
    -------
    model : nn.Module
        In eval mode.
    tokenizer
        None if the folder holds none.
    facts : dict of str to str
        ``folder``, ``stored_dtype``, ``dtype``, ``device``, ``class``.

    Raises
    ------
    UsageError
        If there is no such model, or dtype or device cannot be used.
    """
    folder = model_folder(name)
    facts = _facts(folder, dtype, device, room=_fits_widened(folder))
    model = load(folder, dtype=getattr(torch, facts["dtype"])).to(facts["device"]).eval()
    return model, load_tokenizer(folder), {**facts, "class": type(model).__name__}


def open_model(
    name: str | os.PathLike[str],
    dtype: str = "auto",
    device: str = "auto",
    stream: bool | None = None,
) -> tuple[nn.Module | StoredModel, Any, dict[str, str]]:
    """Load a model, or leave its parameters in their files if they do not fit into memory.

    Parameters
    ----------
    name, dtype, device
        As for :func:`load_model`.
    stream : bool, optional
        Leave the parameters in their files (True) or not (False). By default they stay there if
        they, and a quarter more for the codes, are larger than the free memory.

    Returns
    -------
    model : nn.Module or StoredModel
    tokenizer, facts
        As for :func:`load_model`.

    Raises
    ------
    UsageError
        As for :func:`load_model`.
    FileNotFoundError, ValueError
        If the files of a model that stays in them are missing or damaged.
    """
    folder = model_folder(name)
    if stream is None:
        facts = _facts(folder, dtype, device, room=_fits_widened(folder))
        quantized = read_config(folder).get("quantization_config") is not None
        stream = not quantized and _too_large(folder, facts)
    if not stream:
        return load_model(folder, dtype, device)
    # One block at a time can be wide, whatever the memory.
    facts = _facts(folder, dtype, device, room=True)
    kind = getattr(torch, facts["dtype"])
    stored = open_stored(folder, kind, device=torch.device(facts["device"]))
    return stored, load_tokenizer(folder), {**facts, "class": type(stored.model).__name__}


def _facts(folder: Path, dtype: str, device: str, *, room: bool) -> dict[str, str]:
    stored, device = stored_dtype(folder), pick_device(device)
    dtype = compute_dtype(dtype, stored, torch.device(device).type, room=room)
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UsageError(f"{folder / 'config.json'} states an unknown dtype {dtype!r}; give dtype")
    return {"folder": str(folder), "stored_dtype": stored, "dtype": dtype, "device": device}


def _fits_widened(folder: Path) -> bool:
    """Return whether the model takes at most half of the free memory in float32."""
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    dtype = getattr(torch, stored_dtype(folder), torch.float32)
    widened = files * torch.float32.itemsize / max(1, dtype.itemsize)
    return widened <= available_memory(torch.device("cpu")) / 2


def _too_large(folder: Path, facts: Mapping[str, str]) -> bool:
    """Whether the parameters and their codes are larger than the free memory."""
    try:
        places = StoredTensors(folder).places.values()
    except (OSError, ValueError):
        return False  # from_pretrained reads other files too, and says what is wrong with these
    size = sum(prod(p.shape) * getattr(torch, facts["dtype"]).itemsize for p in places)
    return size + size // 4 > available_memory(torch.device(facts["device"]))


def reopen(model: nn.Module) -> StoredModel | None:
    """Return a model from its folder, if some of its parameters are not in memory.

    Those are on the meta device: a model that was built there, or loaded with a ``device_map`` that
    leaves parts on the disk or on the host.

    Returns
    -------
    StoredModel or None
        None if all parameters are in memory.

    Raises
    ------
    PreflightError
        If its folder is not known, or holds other values than the parameters that are in memory.
    """
    absent = [n for n, p in model.named_parameters() if p.device.type == "meta"]
    if not absent:
        return None
    where = f"{len(absent)} parameters are on the meta device (the first is {absent[0]})"
    folder = source_folder(model)
    if folder is None:
        raise _absent(
            f"{where}, and the folder of the model is not known: load the weights before "
            "quantizing, or give the path of its folder instead of the model"
        )
    config = copy.deepcopy(getattr(model, "config", None))
    stored = open_stored(folder, dtype_of(model), type(model), config, device_of(model))
    own = {n: p for n, p in stored.model.named_parameters(remove_duplicate=False)}
    dtypes = {n: p.dtype for n, p in own.items()}
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            continue
        same = name in own and own[name].dtype == parameter.dtype
        value = stored.read([name], dtypes)[name] if same else None
        if value is None or not torch.equal(value, parameter.detach().cpu()):
            raise _absent(
                f"{where}, so the weights are read from {folder}, but {name} has other values "
                "there: save the model as it is, and give that folder"
            )
    return stored


def _absent(text: str) -> PreflightError:
    return PreflightError([Problem(text, UnsupportedModuleError)])
