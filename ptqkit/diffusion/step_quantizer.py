"""The quantized softmax with one correction for every time step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ptqkit.arrays.softmax import SoftmaxGrid
from ptqkit.diffusion.clock import StepClock
from ptqkit.nn.softmax.quantizer import SoftmaxQuantizer

__all__ = ["StepSoftmaxQuantizer"]


class StepSoftmaxQuantizer:
    """Quantizes the probabilities of one attention module, with a bias for every time step.

    Parameters
    ----------
    grid : ptqkit.SoftmaxGrid
    bias : array of float64, shape (steps,) or (steps, heads)
        In the order of ``clock.steps``.
    clock : StepClock
        Knows the time step that the model is at.

    Raises
    ------
    ValueError
        If the bias has not one row for every step of the clock, or is not finite.
    """

    correction = "bias"

    def __init__(self, grid: SoftmaxGrid, bias: Any, clock: StepClock) -> None:
        values = np.array(bias, dtype=np.float64)
        if values.ndim not in (1, 2) or len(values) != len(clock.steps):
            raise ValueError(
                f"bias must have shape ({len(clock.steps)},) or ({len(clock.steps)}, heads), "
                f"a row for every time step, not {values.shape}"
            )
        self.grid, self.bias, self.clock = grid, values, clock
        self.steps = [SoftmaxQuantizer(grid, "bias", row) for row in values]

    @property
    def heads(self) -> int | None:
        """Heads that the correction is for; None where it is for the whole tensor."""
        return self.steps[0].heads

    def single(self, batch: int) -> SoftmaxQuantizer | None:
        """Quantizer of the time step at hand; None where the samples are at several."""
        index = self.clock.now(batch)
        return self.steps[index[0]] if len(set(index)) == 1 else None

    def __call__(self, p: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        """Return the quantized and corrected probabilities (batch, heads, q, k), dtype as given."""
        single = self.single(len(p))
        if single is not None:
            return single(p, allowed)
        index = self.clock.now(len(p))
        masks = [None] * len(p) if allowed is None else allowed.expand_as(p).split(1)
        parts = zip(index, p.split(1), masks, strict=True)
        return torch.cat([self.steps[i](one, mask) for i, one, mask in parts])

    def __repr__(self) -> str:
        """Grid and granularity."""
        per = "step and head" if self.bias.ndim == 2 else "step"
        return f"StepSoftmaxQuantizer({self.grid}, per {per}, {len(self.steps)} steps)"
