"""The range of a quantized softmax chosen together with its correction (beyond the paper).

Probabilities of long rows are small: a range that ends below 1 has finer steps where nearly all of
them are, and clips the few that are larger. For every attention module the range is taken whose
quantized and corrected output has the least error on the calibration set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ptqkit.arrays.softmax import softmax_grid
from ptqkit.nn.attention import AttentionCall, AttentionHook, AttentionModule
from ptqkit.nn.softmax.compare import SoftmaxComparison
from ptqkit.nn.softmax.statistics import SoftmaxStatistics

__all__ = ["RangeSearch", "SearchEnds"]

Runner = Callable[[Mapping[str, AttentionHook]], None]


@dataclass(frozen=True)
class SearchEnds:
    """Ends of the ranges [0, end] to try.

    Attributes
    ----------
    fixed : tuple of float
    shrinks : tuple of float
        Multiples of the largest probability of the module on the calibration set.
    """

    fixed: tuple[float, ...]
    shrinks: tuple[float, ...] = ()

    def of(self, largest: float) -> list[float]:
        """Return the ends for a module, without repetition."""
        return list(dict.fromkeys([*self.fixed, *(min(largest, 1.0) * s for s in self.shrinks)]))


class _FanOut(AttentionHook):
    """Shows the probabilities to several observers."""

    def __init__(self, observers: Sequence[AttentionHook]) -> None:
        self.observers = observers

    def softmax(self, p: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        for observer in self.observers:
            observer.softmax(p, call)
        return p


class RangeSearch:
    """Statistics of one model's attention modules for several ranges, in one pass.

    Parameters
    ----------
    modules : mapping of str to AttentionModule
    bits : int
    ends : mapping of str to sequence of float
        Ends of the ranges to try, by module.
    steps : tuple of int
        Time steps to distinguish; see :class:`SoftmaxStatistics`.
    run : callable
        Runs the calibration set with hooks.

    Attributes
    ----------
    candidates : dict of str to list of SoftmaxStatistics
        By module, one for every range.
    """

    def __init__(
        self,
        modules: Mapping[str, AttentionModule],
        bits: int,
        ends: Mapping[str, Sequence[float]],
        steps: tuple[int, ...],
        run: Runner,
    ) -> None:
        self.candidates = {
            name: [
                SoftmaxStatistics(name, module.heads, softmax_grid(bits, 0.0, end), steps)
                for end in ends[name]
            ]
            for name, module in modules.items()
        }
        self._run = run
        run({name: _FanOut(found) for name, found in self.candidates.items()})

    def best(self, correction: str | None, granularity: str) -> dict[str, SoftmaxStatistics]:
        """Return the statistics of every module's best range under a correction: one more pass."""
        hooks = {
            name: SoftmaxComparison(name, [s.quantizer(correction, granularity) for s in found])
            for name, found in self.candidates.items()
        }
        self._run(hooks)
        chosen = {}
        for name, hook in hooks.items():
            decibels = [sqnr.total for sqnr in hook.sqnr]
            chosen[name] = self.candidates[name][decibels.index(max(decibels))]
        return chosen
