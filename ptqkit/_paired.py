"""Differences of measurements on the same windows and draws, with standard errors, in float64.

Two things in a measured difference are drawn at random: the windows of test text, and the windows
of calibration text that the recipes were fitted to (a *draw*). Both have a standard error here. All
differences are paired: two recipes are compared on the same windows and on the same draws, so that
what is common to both, such as a hard window, cancels.

With the summed losses ``l[r, i]`` (nats) of window i under draw r, tokens ``n[i]`` and ``N`` their
sum, the perplexity of draw r is ``P[r] = exp(sum_i l[r, i] / N)``, and that of a recipe the mean of
``P`` over the draws. One window moves it, to first order, by

    u[i] = mean_r P[r] (l[r, i] - n[i] sum_j l[r, j] / N) / N,

and the standard error over m windows of the difference of two recipes is

    sqrt(m / (m - 1) sum_i (u_a[i] - u_b[i])^2).

For a value that is a mean of items, such as an accuracy, P is that mean, and the factor P[r] of
u[i] falls away. The standard error over R draws is the sample standard deviation of
``P_a[r] - P_b[r]`` over r, by ``sqrt(R)``. What both have in common, how windows and draws
interact, is in each of them: the root of the sum of their squares is rather too large than too
small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ptqkit._repr import one_line_repr
from ptqkit.errors import UsageError

__all__ = ["Sample", "standard_errors"]


@dataclass(frozen=True)
class Sample:
    """A measured value with what its standard errors come from.

    Attributes
    ----------
    values : ndarray, float64, shape (draws,)
    influence : ndarray, float64, shape (windows,)
        First-order change of the mean value by each window; empty if windows are not known.
    """

    __repr__ = one_line_repr

    values: np.ndarray
    influence: np.ndarray

    @classmethod
    def of(
        cls,
        values: Sequence[float],
        losses: Sequence[Sequence[float]],
        scored: Sequence[int],
        exponential: bool,
    ) -> Sample:
        """Return the sample of one recipe on one task.

        Parameters
        ----------
        values : sequence of float
            Per draw.
        losses : sequence of sequence of float
            Per draw and window; empty sequences if not known.
        scored : sequence of int
            Tokens of each window.
        exponential : bool
            Whether the value is the exponential of the mean loss.
        """
        value = np.asarray(values, dtype=np.float64)
        table = np.asarray(losses, dtype=np.float64)
        if table.size == 0:
            return cls(value, np.empty(0, dtype=np.float64))
        tokens = np.asarray(scored, dtype=np.float64)
        total = tokens.sum()
        means = table.sum(axis=1, keepdims=True) / total
        slope = value[:, None] if exponential else 1.0
        return cls(value, (slope * (table - tokens * means) / total).mean(axis=0))

    def __sub__(self, other: Sample) -> Sample:
        """Pair two samples; one with a single draw goes with every draw of the other."""
        draws = {len(self.values), len(other.values)} - {1}
        if len(draws) > 1:
            raise UsageError(f"{len(self.values)} draws cannot be paired with {len(other.values)}")
        if len(self.influence) != len(other.influence):
            return Sample(self.values - other.values, np.empty(0, dtype=np.float64))
        return Sample(self.values - other.values, self.influence - other.influence)


def standard_errors(sample: Sample) -> tuple[float, float]:
    """Return the standard errors over windows and over draws; NaN for fewer than two."""
    m, draws = len(sample.influence), len(sample.values)
    windows = math.nan
    if m > 1:
        windows = math.sqrt(m / (m - 1) * float(np.square(sample.influence).sum()))
    spread = math.nan
    if draws > 1:
        spread = float(np.std(sample.values, ddof=1)) / math.sqrt(draws)
    return windows, spread
