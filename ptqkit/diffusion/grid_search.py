"""The grid of a softmax output, chosen together with its correction (beyond the paper).

Probabilities of long rows are small: a grid that ends well below 1 has finer steps where nearly all
of them are, and clips the few that are larger. Which end is best depends on the values too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ptqkit.arrays.metrics import SQNR
from ptqkit.arrays.softmax import SoftmaxGrid, softmax_grid
from ptqkit.arrays.softmax_bias import SoftmaxBias
from ptqkit.diffusion.attention import UNetAttention
from ptqkit.diffusion.calibration import CalibrationLatents, run_calibration
from ptqkit.diffusion.checks import naming
from ptqkit.nn.attention import AttentionHook
from ptqkit.nn.attention_quantizer import AttentionRanges
from ptqkit.nn.softmax.quantizer import SoftmaxQuantizer

__all__ = ["NamedRanges", "search_grids"]

SHRINKS = tuple(2.0 ** (-k / 2) for k in range(12))


class NamedRanges(AttentionRanges):
    """Ranges in one attention module, named where they are not finite."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _see(self, kind: str, x: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
        with naming(self.name):
            return super()._see(kind, x, counted)


class _Biases(AttentionHook):
    """Bias per head of one module on every candidate grid."""

    def __init__(self, name: str, heads: int, grids: list[SoftmaxGrid]) -> None:
        self.name = name
        self.biases = [SoftmaxBias(heads, grid=grid) for grid in grids]

    def softmax(self, p: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        on_host = p.detach().cpu()
        mask = None if allowed is None else allowed.cpu()
        with naming(f"softmax of {self.name}"):
            for bias in self.biases:
                bias.update(on_host, allowed=mask)
        return p


class _Errors(AttentionHook):
    """Error of the output of one module on every candidate grid, corrected per head."""

    def __init__(self, name: str, biases: list[SoftmaxBias]) -> None:
        self.name = name
        self.quantizers = [SoftmaxQuantizer(b.grid, "bias", b.bias("head")) for b in biases]
        self.sqnr = [SQNR("tensor") for _ in biases]
        self._value: torch.Tensor | None = None

    def value(self, x: torch.Tensor) -> torch.Tensor:
        self._value = x
        return x

    def softmax(self, p: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        value, self._value = self._value, None
        if value is None:
            raise RuntimeError("the probabilities came before the values")
        value = value.to(p.dtype)  # the probabilities may be upcast
        reference = (p @ value).float().cpu().numpy()
        with naming(f"attention output of {self.name}"):
            for quantizer, sqnr in zip(self.quantizers, self.sqnr, strict=True):
                sqnr.update(reference, (quantizer(p, allowed) @ value).float().cpu().numpy())
        return p

    def best(self) -> SoftmaxGrid:
        place = int(np.argmax([float(sqnr.decibel) for sqnr in self.sqnr]))
        return self.quantizers[place].grid


def search_grids(
    unet: nn.Module,
    calibration: CalibrationLatents,
    modules: dict[str, UNetAttention],
    largest: dict[str, float],
    bits: int,
) -> dict[str, SoftmaxGrid]:
    """Grid of every module with the least error of its output, its bias corrected per head.

    Candidates are [0, 1] and [0, m * 2**(-k/2)], k from 0 to 11, with m the largest probability
    seen; so on the calibration set the choice is never worse than [0, 1]. Two passes.

    Parameters
    ----------
    largest : dict of str to float
        m of every module.
    """
    hooks: dict[str, Any] = {}
    for name, module in modules.items():
        ends = dict.fromkeys([1.0, *(min(largest[name], 1.0) * shrink for shrink in SHRINKS)])
        hooks[name] = _Biases(name, module.heads, [softmax_grid(bits, 0.0, e) for e in ends])
    run_calibration(unet, calibration, hooks)
    errors = {name: _Errors(name, hook.biases) for name, hook in hooks.items()}
    run_calibration(unet, calibration, errors)
    return {name: hook.best() for name, hook in errors.items()}
