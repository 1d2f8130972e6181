"""What batches hold on a GPU while they wait at a layer: measured, by one short forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ptqkit.hf.data.calibration import batch_shape
from ptqkit.hf.models.inputs import short_batch
from ptqkit.nn.forward import calibration_mode, device_of, forward, hooks

__all__ = ["waiting_bytes"]


def waiting_bytes(
    model: nn.Module, layers: Sequence[str], batch: Mapping[str, torch.Tensor], positions: int = 1
) -> dict[str, float]:
    """Return the bytes per token that a forward pass holds when it comes to a layer.

    Parameters
    ----------
    model : nn.Module
        On a GPU.
    layers : sequence of str
        Those that are not reached are not in the result.
    batch : mapping of str to Tensor
        Of which a few tokens are taken.
    positions : int
        Of a sample, where the batch does not show them.
    """
    device = device_of(model)
    short = short_batch(batch)
    samples, length = batch_shape(short)
    tokens = samples * max(length, positions)
    found: dict[str, float] = {}

    def note(name: str, value: torch.Tensor) -> None:
        if name not in found:
            found[name] = max(0, torch.cuda.memory_allocated(device) - before) / tokens

    with calibration_mode(model), hooks({n: model.get_submodule(n) for n in layers}, note):
        before = torch.cuda.memory_allocated(device)
        forward(model, short)
    return found
