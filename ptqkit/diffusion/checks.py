"""Checks of what users give to :mod:`ptqkit.diffusion`."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ptqkit.errors import CalibrationError

__all__ = [
    "check_choice",
    "check_finite",
    "check_inputs",
    "check_positive",
    "check_steps",
    "home",
    "naming",
]


def check_choice(value: Any, name: str, choices: tuple[Any, ...]) -> Any:
    """Return ``value`` if it is one of ``choices``, else raise ValueError."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, not {value!r}")
    return value


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Say of a ValueError in the block where it was, as CalibrationError."""
    try:
        yield
    except ValueError as error:
        raise CalibrationError(
            f"{what}: {error}. Check the weights of the UNet; float16 overflows where bfloat16 and "
            "float32 do not"
        ) from error


def check_positive(value: Any, name: str) -> int:
    """Return ``value`` if it is a positive integer, else raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be a positive integer, not {value!r}")
    return int(value)


def check_inputs(latents: torch.Tensor, context: torch.Tensor) -> None:
    """Refuse latents and contexts that do not fit each other or are not finite."""
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
    """Refuse NaN and Inf."""
    if not x.is_floating_point():
        raise TypeError(f"{what} must be a floating-point tensor, not {x.dtype}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{what} hold NaN or Inf")


def check_steps(steps: Iterable[Any], what: str = "steps") -> tuple[int, ...]:
    """Return time steps as integers.

    Raises
    ------
    ValueError
        If there are none, or one is negative, no integer, or there twice.
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


def home(unet: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and floating-point type of a model's parameters."""
    first = next(p for p in unet.parameters() if p.is_floating_point())
    return first.device, first.dtype
