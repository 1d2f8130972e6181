"""Grids of activations on torch tensors, and rounding to them.

The formulas are those that compressed-tensors runs when it loads a W8A8 checkpoint, operation by
operation in the dtype of the tensor, so that a simulated model and the loaded one give the same
bits. With ``b`` bits, signed codes from ``low = -2**(b-1)`` to ``high = 2**(b-1) - 1`` and
``lo = min(x, 0)``, ``hi = max(x, 0)``::

    symmetric:   scale = max(-lo, hi) / ((2**b - 1) / 2),   zero_point = 0
    asymmetric:  scale = (hi - lo) / (2**b - 1),            zero_point = round(low - lo / scale)
    x_hat = (round(clamp(x / scale + zero_point, low, high)) - zero_point) * scale

Halves are rounded to even. Half-precision types have no room for codes of more than 8 bits: there
the formulas run in float32 and only ``x_hat`` is rounded.
"""

from __future__ import annotations

import math

import torch

from ptqkit.arrays.activations import activation_grid

__all__ = ["dynamic_grid", "fake_quantize", "grid_codes", "limits", "static_grid"]


def limits(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code."""
    half = 1 << (bits - 1)
    return -half, half - 1


def grid_codes(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """Return the signed codes of ``x`` as whole numbers of its own dtype.

    Parameters
    ----------
    x : floating tensor
    scale : tensor of the same dtype, broadcastable to x
    zero_point : tensor in the range of the signed codes, or None
    bits : int
    """
    low, high = limits(bits)
    steps = x / scale
    if zero_point is not None:
        steps += zero_point.to(x.dtype)
    return steps.clamp_(low, high).round_()


def fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """Round ``x`` to the grid and back, in the dtype of ``x``: as :func:`grid_codes` takes it."""
    steps = grid_codes(x, scale, zero_point, bits)
    if zero_point is not None:
        steps -= zero_point.to(x.dtype)
    return steps.mul_(scale)


def dynamic_grid(
    x: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scale of every token of ``x``, and the zero-point or None, of shape (..., 1)."""
    low, high = limits(bits)
    # A tensor on the device of x: dividing by a Python number there multiplies by its inverse.
    span = x.new_full((), high - low)
    bottom = x.amin(-1, keepdim=True).clamp_(max=0)
    top = x.amax(-1, keepdim=True).clamp_(min=0)
    zero_point = None
    if symmetric:
        scale = torch.maximum(bottom.abs(), top.abs()) / (span / 2)
    else:
        scale = (top - bottom) / span
        zero_point = low - bottom / scale
        # A token of zeros gives 0 / 0 here; with any zero-point it is zeros again.
        zero_point = zero_point.clamp_(low, high).round_().nan_to_num_(nan=0.0)
    return torch.where(scale == 0, torch.finfo(x.dtype).eps, scale), zero_point


def static_grid(
    minimum: float, maximum: float, *, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[float, int]:
    """Return the scale and the zero-point of one grid for a whole tensor.

    The scale is rounded to ``dtype``, in which the model holds it, before the zero-point is found.

    Parameters
    ----------
    minimum, maximum : float
        Of the calibration inputs; the grid always holds 0.
    dtype : torch.dtype
        Of the inputs.

    Raises
    ------
    ValueError
        If the range is not finite, or does not fit ``dtype``.
    """
    exact, zero_point = activation_grid(minimum, maximum, bits=bits, symmetric=symmetric)
    scale = float(torch.tensor(float(exact), dtype=torch.float32).to(dtype))
    if scale == float(exact):
        return scale, zero_point
    if not math.isfinite(scale):
        raise ValueError(f"the range {minimum} to {maximum} needs a scale too large for {dtype}")
    if scale == 0:
        scale = torch.finfo(dtype).eps
    low, high = limits(bits)
    moved = low - min(float(minimum), 0.0) / scale
    return scale, 0 if symmetric else min(max(round(moved), low), high)
