"""Weights of a UNet rounded to nearest, one grid per output channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ptqkit._repr import one_line_repr
from ptqkit.arrays.solvers import rtn
from ptqkit.nn.convolution import warn_transposed

__all__ = ["WeightQuantization", "quantize_weights"]


@dataclass(frozen=True)
class WeightQuantization:
    """One quantized module.

    Attributes
    ----------
    name : str
    shape : tuple of int
        Of the weight: (out, in) or (out, in / groups, height, width).
    error : float
        Mean squared error of the weight over its mean square.
    """

    __repr__ = one_line_repr

    name: str
    shape: tuple[int, ...]
    error: float


@torch.no_grad()
def quantize_weights(
    unet: nn.Module,
    bits: int = 8,
    *,
    symmetric: bool = True,
    keep: Callable[[str], bool] | None = None,
    threads: int = 0,
) -> list[WeightQuantization]:
    """Round the weights of all linear layers and 2-D convolutions to nearest, in place.

    Every output channel has a min-max grid of its own; a convolution's weight counts as a matrix
    (out, in * height * width). Weights stay in their floating-point type, on the values of the
    grid; activations are left alone (W8A16: they are what the model computes in). Transposed
    convolutions stay float, with a warning that names them.

    Parameters
    ----------
    unet : nn.Module
    bits : int from 2 to 8
    symmetric : bool
    keep : callable, optional
        Names of modules for which it is true stay float.
    threads : int
        0 means automatic.

    Returns
    -------
    list of WeightQuantization

    Raises
    ------
    ValueError
        For bits out of range, or a model without such modules; the module is named where a weight
        holds NaN or Inf.
    """
    chosen = {
        name: module.weight
        for name, module in unet.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not (keep is not None and keep(name))
    }
    warn_transposed(unet, keep or (lambda name: False))
    # Before the first weight changes: an error must not leave half of a model quantized.
    for name, weight in chosen.items():
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}: the weight holds NaN or Inf")
    report = []
    for name, weight in chosen.items():
        W = weight.detach().flatten(1).float().cpu().numpy()
        result = rtn(W, bits=bits, group_size=None, symmetric=symmetric, threads=threads, name=name)
        W_hat = result.dequantize()
        power = float(np.mean(W.astype(np.float64) ** 2))
        error = float(np.mean((W_hat.astype(np.float64) - W) ** 2))
        weight.copy_(torch.from_numpy(W_hat).view(weight.shape))
        report.append(
            WeightQuantization(name, tuple(weight.shape), error / power if power else 0.0)
        )
    if not report:
        raise ValueError(
            f"{type(unet).__name__} has no linear layer or 2-D convolution to quantize"
        )
    return report
