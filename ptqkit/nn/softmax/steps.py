"""The quantized softmax of a diffusion model, with one correction for every time step."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ptqkit.arrays.softmax import SoftmaxGrid
from ptqkit.nn.softmax.quantizer import SoftmaxQuantizer

__all__ = ["StepSoftmaxQuantizer", "check_steps", "nearest_steps"]


def check_steps(steps: Iterable[Any], what: str = "steps") -> tuple[int, ...]:
    """Return time steps as integers.

    Raises
    ------
    ValueError
        If there are none, or one is negative, not an integer, or there twice.
    """
    values = tuple(steps)
    if not values:
        raise ValueError(f"{what} is empty: name at least one time step")
    wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, numbers.Integral)]
    wrong = wrong or [v for v in values if v < 0]
    if wrong:
        raise ValueError(f"{what} must be integers from 0, not {wrong[0]!r}")
    if len(set(values)) != len(values):
        raise ValueError(f"{what} repeats a time step: {sorted(values)}")
    return tuple(int(v) for v in values)


def nearest_steps(known: Sequence[int], steps: Sequence[float]) -> tuple[int, ...]:
    """Return the position in ``known`` of the time step nearest to each of ``steps``.

    So sampling with another number of steps than in calibration is defined. The earlier of two
    equally near steps counts.

    Raises
    ------
    ValueError
        If ``steps`` is empty.
    """
    if not steps:
        raise ValueError("no time step is known: run the whole model, not one module alone")
    return tuple(
        min(range(len(known)), key=lambda i: (abs(known[i] - step), known[i])) for step in steps
    )


class StepSoftmaxQuantizer:
    """Quantizers of the probabilities of one attention module, with a bias for every time step.

    Parameters
    ----------
    grid : SoftmaxGrid
    bias : array of float64, shape (steps,) or (steps, heads)
    steps : iterable of int
        Calibrated time steps, in the order of ``bias``.

    Raises
    ------
    ValueError
        If the bias does not have one row for every time step, or is not finite.
    """

    correction = "bias"

    def __init__(self, grid: SoftmaxGrid, bias: Any, steps: Iterable[int]) -> None:
        self.steps = check_steps(steps)
        values = np.array(bias, dtype=np.float64)
        if values.ndim not in (1, 2) or len(values) != len(self.steps):
            raise ValueError(
                f"bias must have shape ({len(self.steps)},) or ({len(self.steps)}, heads), "
                f"a row for every time step, not {values.shape}"
            )
        self.grid, self.bias = grid, values
        self.quantizers = [SoftmaxQuantizer(grid, "bias", row) for row in values]

    @property
    def heads(self) -> int | None:
        """Heads that the correction is for; None if it is for the whole tensor."""
        return self.quantizers[0].heads

    @property
    def uncorrected(self) -> SoftmaxQuantizer:
        """The same grid without a correction, at every time step."""
        return SoftmaxQuantizer(self.grid)

    def at(self, steps: Sequence[float]) -> SoftmaxQuantizer | _PerSample:
        """Return what quantizes a batch at these time steps, one or one per sample.

        Raises
        ------
        ValueError
            If there are none.
        """
        chosen = [self.quantizers[i] for i in nearest_steps(self.steps, steps)]
        return chosen[0] if all(q is chosen[0] for q in chosen) else _PerSample(chosen)

    def __repr__(self) -> str:
        """Grid and granularity."""
        per = "step and head" if self.bias.ndim == 2 else "step"
        return f"StepSoftmaxQuantizer({self.grid}, per {per}, {len(self.steps)} steps)"


class _PerSample:
    """Quantizes every sample of a batch by a quantizer of its own."""

    def __init__(self, quantizers: Sequence[SoftmaxQuantizer]) -> None:
        self.quantizers = quantizers

    def __call__(self, p: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        if len(p) != len(self.quantizers):
            raise ValueError(f"there are {len(self.quantizers)} time steps for a batch of {len(p)}")
        masks = [None] * len(p) if allowed is None else allowed.expand_as(p).split(1)
        parts = zip(self.quantizers, p.split(1), masks, strict=True)
        return torch.cat([quantizer(one, mask) for quantizer, one, mask in parts])
