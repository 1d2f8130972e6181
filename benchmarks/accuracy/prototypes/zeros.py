"""The best integer zero-point of a given scale under the diagonal of H, by prefix sums.

Rounded to codes from 0 to top, the weights of a row fall into three runs once they are sorted:
those that clip below, those inside, those that clip above. Sums of h, hw and hw^2 from the left
give the first and the last run's error for any zero-point, a sum of the rounding errors the middle
one's (the idea of NeUQI, arXiv 2505.17595, for the integers that formats here store).
"""

from __future__ import annotations

import numpy as np

__all__ = ["SortedRows"]


def _prefix(x: np.ndarray) -> np.ndarray:
    return np.pad(np.cumsum(x, axis=1), ((0, 0), (1, 0)))


class SortedRows:
    """Rows of weights in order, with their prefix sums: for any number of scales.

    Parameters
    ----------
    w : ndarray of float64, shape (rows, G)
    h : ndarray of float64, shape (G,)
        Diagonal of the group's block of H.
    """

    def __init__(self, w: np.ndarray, h: np.ndarray) -> None:
        order = np.argsort(w, axis=1, kind="stable")
        self.w, self.h = np.take_along_axis(w, order, 1), h[order]
        self.sums = [_prefix(self.h * self.w**power) for power in range(3)]

    def best_zeros(
        self, scale: np.ndarray, top: int, min_zero: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return zero-point and error (rows,) of the best of all zero-points, scale (rows,)."""
        steps = np.round(self.w / scale[:, None])
        inside = _prefix(self.h * (self.w - scale[:, None] * steps) ** 2)
        counts = self._counts(steps, top)
        zeros = np.arange(min_zero, top + 1)
        errors = np.empty((len(scale), len(zeros)))
        for i, zero in enumerate(zeros):
            # counts[:, top + v]: weights whose step is below v, for v from -top to top + 1
            below, up_to = counts[:, top - zero], counts[:, 2 * top - zero + 1]
            middle = self._at(inside, up_to) - self._at(inside, below)
            errors[:, i] = (
                self._clipped(below, -zero * scale)
                + middle
                + self._clipped(None, (top - zero) * scale)
                - self._clipped(up_to, (top - zero) * scale)
            )
        best = errors.argmin(1)
        return zeros[best].astype(np.float64), errors[np.arange(len(scale)), best]

    @staticmethod
    def _counts(steps: np.ndarray, top: int) -> np.ndarray:
        rows, bins = len(steps), 2 * top + 3
        at = np.clip(steps, -top - 1, top + 1).astype(np.int64) + top + 1
        at += bins * np.arange(rows)[:, None]
        found = np.bincount(at.ravel(), minlength=rows * bins).reshape(rows, bins)
        return np.cumsum(found, axis=1)

    @staticmethod
    def _at(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return np.take_along_axis(sums, counts[:, None], 1)[:, 0]

    def _clipped(self, count: np.ndarray | None, value: np.ndarray) -> np.ndarray:
        """Return the error of the first weights of each row if all of them become ``value``."""
        zero, one, two = (s[:, -1] if count is None else self._at(s, count) for s in self.sums)
        return two - 2 * value * one + value * value * zero
