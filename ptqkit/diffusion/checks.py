"""Checks of what users give to :mod:`ptqkit.diffusion`."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import nn

__all__ = ["check_finite", "check_inputs", "check_positive", "device_and_dtype"]


def check_positive(value: Any, name: str) -> int:
    """Return ``value`` if it is a positive integer, else raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be a positive integer, not {value!r}")
    return int(value)


def check_inputs(latents: torch.Tensor, context: torch.Tensor) -> None:
    """Raise ValueError unless latents and contexts fit each other and are finite."""
    if latents.ndim != 4 or not len(latents):
        raise ValueError(
            "latents must have shape (n, channels, height, width) with n > 0, "
            f"not {tuple(latents.shape)}"
        )
    if context.ndim != 3 or len(context) != len(latents):
        raise ValueError(
            f"context must have shape (n, tokens, width) with n = {len(latents)} as the latents, "
            f"not {tuple(context.shape)}"
        )
    check_finite(latents, "latents")
    check_finite(context, "context")


def check_finite(x: torch.Tensor, what: str) -> None:
    """Raise ValueError if a tensor holds NaN or Inf."""
    if not x.is_floating_point():
        raise TypeError(f"{what} must be a floating-point tensor, not {x.dtype}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{what} hold NaN or Inf")


def device_and_dtype(unet: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return device and floating-point type of a model's parameters."""
    first = next(p for p in unet.parameters() if p.is_floating_point())
    return first.device, first.dtype
