"""Which calibrated time step a forward pass of a diffusion model is at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ptqkit.diffusion.checks import check_steps

__all__ = ["StepClock"]


class StepClock:
    """Forward pre-hook that notes which of the calibrated time steps a model is asked for.

    A time step between calibrated ones counts as the nearest of them (the earlier of two), so that
    sampling with another number of steps than in calibration is defined.

    Parameters
    ----------
    steps : iterable of int
        Calibrated time steps, in any order.

    Attributes
    ----------
    index : tuple of int
        Positions in ``steps``, one or one per sample; empty before the first forward pass.
    """

    def __init__(self, steps: Iterable[int]) -> None:
        self.steps = check_steps(steps)
        self.index: tuple[int, ...] = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the time step from the arguments of the model's forward."""
        if len(args) < 2 and "timestep" not in kwargs:
            raise ValueError(f"{type(module).__name__} was called without a time step")
        self.set(args[1] if len(args) > 1 else kwargs["timestep"])

    def set(self, timestep: Any) -> None:
        """Note a time step: a number, or a tensor of one or of one per sample."""
        given = torch.as_tensor(timestep, dtype=torch.float64, device="cpu").reshape(-1)
        if not given.numel() or not bool((given >= 0).all()):
            raise ValueError(f"the time step must be a number from 0, not {timestep!r}")
        known = torch.tensor(self.steps, dtype=torch.float64)
        # A stable order decides between two steps equally far away.
        order = known.argsort(stable=True)
        distance = (given[:, None] - known[order]).abs()
        self.index = tuple(order[distance.argmin(dim=1)].tolist())

    def now(self, batch: int) -> tuple[int, ...]:
        """Position of the time step of every sample of a batch.

        Raises
        ------
        ValueError
            If no time step is known, or there are neither one nor ``batch`` of them.
        """
        if not self.index:
            raise ValueError("no time step is known: run the whole model, not one module alone")
        if len(self.index) not in (1, batch):
            raise ValueError(f"there are {len(self.index)} time steps for a batch of {batch}")
        return self.index * batch if len(self.index) == 1 else self.index
