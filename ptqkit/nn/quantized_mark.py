"""A mark on linear layers whose weight is a quantized one.

The mark is a sample of the weight, kept on the module: it holds for copies of the model too, and
stops holding once other weights are loaded, by whatever way.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["is_quantized", "mark_quantized", "marks_of", "put_marks", "unmark_quantized"]

_MARK = "_ptqkit_quantized"
# On a module that holds the weights of several layers: their marks, by name.
_MARKS = "_ptqkit_quantized_parts"
_SAMPLE = 64


def _sample(linear: nn.Module) -> torch.Tensor:
    """Return evenly spread entries of a weight, on the CPU."""
    weight = linear.get_parameter("weight").detach()
    if weight.dim() > 2:  # of a convolution
        weight = weight.flatten(1)
    count = weight.numel()
    places = torch.arange(_SAMPLE, dtype=torch.long, device=weight.device) * (count - 1)
    places = places.div(_SAMPLE - 1, rounding_mode="floor")
    rows, columns = places.div(weight.shape[1], rounding_mode="floor"), places % weight.shape[1]
    return weight[rows, columns].cpu()


def mark_quantized(linear: nn.Module) -> None:
    """Note that a layer's weight is a quantized one from now on."""
    linear.__dict__[_MARK] = _sample(linear)


def is_quantized(linear: nn.Module) -> bool:
    """Whether the weight that :func:`mark_quantized` noted is still there, in whatever dtype."""
    noted = linear.__dict__.get(_MARK)
    if noted is None or linear.get_parameter("weight").device.type == "meta":
        return False
    found = _sample(linear)
    # A conversion of the model rounds its weights; another one back leaves them rounded.
    kinds = (noted.dtype, found.dtype, torch.bfloat16, torch.float16)
    return any(torch.equal(found, noted.to(kind).to(found.dtype)) for kind in kinds)


def unmark_quantized(module: nn.Module) -> None:
    """Take the mark off, if there is one."""
    module.__dict__.pop(_MARK, None)
    module.__dict__.pop(_MARKS, None)


def marks_of(parts: nn.Module, whole: nn.Module) -> None:
    """Keep the marks of a module's layers on another one, which holds the same weights."""
    marks = {n: m.__dict__[_MARK] for n, m in parts.named_modules() if _MARK in m.__dict__}
    unmark_quantized(whole)
    if marks:
        whole.__dict__[_MARKS] = marks


def put_marks(whole: nn.Module, parts: nn.Module) -> None:
    """Put the marks that :func:`marks_of` has kept back on the layers."""
    for name, mark in whole.__dict__.get(_MARKS, {}).items():
        parts.get_submodule(name).__dict__[_MARK] = mark
