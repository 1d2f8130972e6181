"""Hashes of what is in memory: models, calibration sets, texts."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from ptqkit.hf.data.calibration import CalibrationSet
from ptqkit.study.keys import key_of

__all__ = ["calibration_digest", "module_digest", "values_digest"]


def calibration_digest(data: CalibrationSet) -> str:
    """Hash of all inputs of a calibration set."""
    found = hashlib.sha256()
    for batch in data.batches:
        for name, value in sorted(batch.items()):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(_bytes(value))
    return found.hexdigest()


def module_digest(model: nn.Module) -> str:
    """Hash of the class of a model in memory, its configuration, parameters and buffers."""
    found = hashlib.sha256(f"{type(model).__qualname__} {getattr(model, 'config', '')}".encode())
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(_bytes(value))
    return found.hexdigest()


def values_digest(values: Any) -> str:
    """Hash of a text, of several, or of a tensor of tokens."""
    if isinstance(values, torch.Tensor):
        content = f"{tuple(values.shape)}".encode() + _bytes(values.long())
        return hashlib.sha256(content).hexdigest()
    return key_of({"texts": [values] if isinstance(values, str) else list(values)})


def _bytes(value: torch.Tensor) -> bytes:
    raw = value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return raw.numpy().tobytes()
