"""The range of a quantized softmax chosen together with its correction.

With few bits a range shorter than [0, 1] can cost less than it gains: large probabilities are
clipped, small ones get finer steps. For every attention module the range is taken whose quantized
and corrected output has the least error on the calibration set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ptqkit.arrays.softmax import softmax_grid
from ptqkit.nn.attention import AttentionHook, AttentionModule
from ptqkit.nn.softmax.quantizer import SoftmaxStatistics
from ptqkit.nn.softmax.report import SoftmaxComparison

__all__ = ["RangeSearch"]

TOPS = (1.0, 0.8, 0.6)
"""Ends of the ranges tried; shorter ones were never better, at 4 to 8 bits."""

Runner = Callable[[Mapping[str, AttentionHook]], None]


class _Each(AttentionHook):
    """Shows the probabilities to several observers."""

    def __init__(self, observers: Sequence[SoftmaxStatistics]) -> None:
        self.observers = observers

    @property
    def rows(self) -> torch.Tensor | None:
        """Which tokens of the batch at hand count, bool (batch, sequence)."""
        return self.observers[0].rows

    @rows.setter
    def rows(self, value: torch.Tensor | None) -> None:
        for observer in self.observers:
            observer.rows = value

    def softmax(self, p: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        for observer in self.observers:
            observer.softmax(p, allowed)
        return p


class RangeSearch:
    """Statistics of one model's attention modules for several ranges, in one pass.

    Parameters
    ----------
    modules : mapping of str to AttentionModule
    bits : int
    run : callable
        Runs the calibration set with hooks.

    Attributes
    ----------
    candidates : dict of str to list of SoftmaxStatistics
        By module, one for every range of :data:`TOPS`.
    """

    def __init__(self, modules: Mapping[str, AttentionModule], bits: int, run: Runner) -> None:
        grids = [softmax_grid(bits, 0.0, top) for top in TOPS]
        self.candidates = {
            name: [SoftmaxStatistics(name, module.heads, grid) for grid in grids]
            for name, module in modules.items()
        }
        self._run = run
        run({name: _Each(found) for name, found in self.candidates.items()})

    def best(self, correction: str | None, granularity: str) -> dict[str, SoftmaxStatistics]:
        """Statistics of every module's best range under a correction, one more pass."""
        hooks = {
            name: SoftmaxComparison([s.quantizer(correction, granularity) for s in found])
            for name, found in self.candidates.items()
        }
        self._run(hooks)
        chosen = {}
        for name, hook in hooks.items():
            decibels = [sqnr.total for sqnr in hook.sqnr]
            chosen[name] = self.candidates[name][decibels.index(max(decibels))]
        return chosen
