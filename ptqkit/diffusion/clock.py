"""The time step that a forward pass of a diffusion model is at."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ptqkit.nn.attention import BatchFacts

__all__ = ["StepClock", "read_steps"]


def read_steps(timestep: Any) -> tuple[float, ...]:
    """Return the time steps of a batch, one or one per sample.

    Parameters
    ----------
    timestep : number, or tensor of one or of one per sample

    Raises
    ------
    ValueError
        If there is none, or one is not a number from 0.
    """
    given = torch.as_tensor(timestep, dtype=torch.float64, device="cpu").reshape(-1)
    if not given.numel() or not bool((given >= 0).all()):
        raise ValueError(f"the time step must be a number from 0, not {timestep!r}")
    return tuple(given.tolist())


class StepClock:
    """Forward pre-hook that notes the time step of a model for the hooks in its attention.

    Parameters
    ----------
    facts : BatchFacts
        Shared with the hooks.
    """

    def __init__(self, facts: BatchFacts) -> None:
        self.facts = facts

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the time step from the arguments of the model's forward."""
        timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
        self.facts.steps = () if timestep is None else read_steps(timestep)
