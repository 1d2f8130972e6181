"""Ranges and a sample of what layers read, from one forward pass over the calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ptqkit.errors import CalibrationError, prefix_error
from ptqkit.hf.data.calibration import CalibrationSet
from ptqkit.hf.models.inputs import match_mask
from ptqkit.nn.forward import calibration_mode, forward, hooks
from ptqkit.nn.statistics import range_accumulator

__all__ = ["Inputs", "measure_inputs"]


@dataclass
class Inputs:
    """What a layer read.

    Attributes
    ----------
    ranges : ChannelRanges
        Over all calibration tokens, padding excluded.
    sample : Tensor, shape (tokens, in)
        Evenly spread token vectors in the model's dtype, on the CPU.
    """

    ranges: Any
    seen: int = 0
    parts: list[torch.Tensor] = field(default_factory=list)

    @property
    def sample(self) -> torch.Tensor:
        """The sampled vectors in their order, shape (tokens, in)."""
        return torch.cat(self.parts)

    def add(self, value: torch.Tensor, mask: torch.Tensor | None, picks: np.ndarray) -> None:
        """Add an input of shape (..., in); ``picks`` are places in the stream of its tokens."""
        self.ranges.update(value, mask)
        rows = value.reshape(-1, value.shape[-1])
        places = np.arange(len(rows)) if mask is None else np.flatnonzero(mask.cpu().numpy())
        first = np.searchsorted(picks, self.seen)
        last = np.searchsorted(picks, self.seen + len(places))
        if last > first:
            chosen = torch.from_numpy(places[picks[first:last] - self.seen])
            self.parts.append(rows[chosen.to(rows.device)].detach().cpu())
        self.seen += len(places)


def measure_inputs(
    model: nn.Module, modules: Mapping[str, nn.Module], calibration: CalibrationSet, tokens: int
) -> dict[str, Inputs]:
    """Run the calibration data through the model and measure what the given layers read.

    Parameters
    ----------
    model : nn.Module
    modules : mapping of str to nn.Module
    calibration : CalibrationSet
    tokens : int
        Size of the sample; 0 for none.

    Returns
    -------
    dict of str to Inputs
        Layers that saw no token are missing.

    Raises
    ------
    CalibrationError
        If an input is not finite, or padding cannot be separated from tokens; the message names the
        layer.
    """
    found: dict[str, Inputs] = {}
    picks = np.empty(0, np.int64)
    if tokens:
        picks = np.unique(np.linspace(0, calibration.tokens - 1, tokens).round().astype(np.int64))
    current: list[Any] = []

    def record(name: str, value: torch.Tensor) -> None:
        if name not in found:
            found[name] = Inputs(range_accumulator(value.shape[-1], value.device))
        try:
            found[name].add(value, match_mask(value, *current), picks)
        except (ValueError, TypeError) as error:
            raise CalibrationError(str(prefix_error(error, name))) from error

    with calibration_mode(model), hooks(modules, record):
        for batch, mask in zip(calibration.batches, calibration.masks(), strict=True):
            current[:] = batch, mask
            forward(model, batch)
    for inputs in found.values():
        inputs.ranges = inputs.ranges.finish()
    return {name: inputs for name, inputs in found.items() if inputs.ranges.tokens}
