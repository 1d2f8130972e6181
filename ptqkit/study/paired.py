"""What a study says of differences: of samples paired in ``ptqkit._paired``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptqkit._frames import Tabular
from ptqkit._paired import Sample
from ptqkit._repr import one_line_repr

__all__ = ["Difference", "mean_of"]


def mean_of(samples: Sequence[Sample]) -> Sample:
    """Return the mean of samples of the same windows and draws."""
    draws = max(len(s.values) for s in samples)
    values = [np.broadcast_to(s.values, draws) for s in samples]
    if len({len(s.influence) for s in samples}) > 1:
        return Sample(np.mean(values, axis=0), np.empty(0, dtype=np.float64))
    return Sample(np.mean(values, axis=0), np.mean([s.influence for s in samples], axis=0))


@dataclass(frozen=True)
class Difference(Tabular):
    """A paired difference, first minus second.

    Attributes
    ----------
    first, second : str
    task : str
    difference : float
        Mean over the draws; below 0 the first has less.
    se_windows, se_draws : float
        Standard errors over the windows of test text and over the draws of calibration windows; NaN
        for fewer than two of them.
    windows, draws : int
    cases : int
        Pairs of cases that the difference is the mean of.
    """

    __repr__ = one_line_repr

    first: str
    second: str
    task: str
    difference: float
    se_windows: float
    se_draws: float
    windows: int
    draws: int
    cases: int = 1

    @property
    def standard_error(self) -> float:
        """Root of the sum of squares of the standard errors that are known; NaN if none is."""
        known = [e for e in (self.se_windows, self.se_draws) if not math.isnan(e)]
        return math.hypot(*known) if known else math.nan

    @property
    def ratio(self) -> float:
        """Difference in standard errors; beyond 2 or so it is hardly noise."""
        error = self.standard_error
        return self.difference / error if error else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return fields and properties as plain values."""
        values = {**vars(self), "standard_error": self.standard_error, "ratio": self.ratio}
        return {k: values[k] for k in _COLUMNS}

    def _rows(self) -> list[dict[str, Any]]:
        return [self.to_dict()]

    def __str__(self) -> str:
        parts = []
        if not math.isnan(self.se_windows):
            parts.append(f"{self.se_windows:.2g} over {self.windows} windows")
        if not math.isnan(self.se_draws):
            parts.append(f"{self.se_draws:.2g} over {self.draws} draws")
        error = self.standard_error
        told = f" ± {error:.2g} ({self.ratio:+.1f} standard errors)" if parts else ""
        of = f", mean of {self.cases} pairs" if self.cases > 1 else ""
        text = f"{self.task}: {self.first} - {self.second} = {self.difference:+.4g}{told}{of}"
        return f"{text}; {', '.join(parts)}" if parts else text


_COLUMNS = (
    "task",
    "first",
    "second",
    "difference",
    "standard_error",
    "ratio",
    "se_windows",
    "se_draws",
    "windows",
    "draws",
    "cases",
)
