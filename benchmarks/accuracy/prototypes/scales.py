"""Exact scales of a grid whose zero-point is known: all intervals of s with equal codes, in order.

As s falls, weight j's code moves away from 0 by one whenever |w_j| / s passes a half. Between two
such breakpoints the codes c are constant and the error is wHw - 2 s cHw + s^2 cHc, whose minimum
is cHw / cHc, clamped to the interval; each breakpoint changes one code, so both products follow by
a rank-one update (the idea of PiSO, arXiv 2606.10890).
"""

from __future__ import annotations

import numpy as np

__all__ = ["exact_scales", "rounding_errors"]


def rounding_errors(
    w: np.ndarray, H: np.ndarray, scale: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Return d H d^T (rows,) of rounding w (rows, G) to scale * (low, ..., high).

    H is (G, G), or (G,) for its diagonal alone; scale, low and high are (rows,).
    """
    codes = np.clip(np.round(w / scale[:, None]), low[:, None], high[:, None])
    d = w - scale[:, None] * codes
    return ((d @ H if H.ndim == 2 else d * H) * d).sum(1)


def exact_scales(
    w: np.ndarray, H: np.ndarray, low: np.ndarray, high: np.ndarray, floor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale of least d H d^T of every row, of all above its floor, and that error.

    Parameters
    ----------
    w : ndarray of float64, shape (rows, G)
    H : ndarray of float64, shape (G, G) or (G,)
        The group's block of the Hessian, or its diagonal.
    low, high : ndarray of int, shape (rows,)
        Least and greatest code less the zero-point: low <= 0 <= high.
    floor : ndarray of float64, shape (rows,)
        Above 0.

    Returns
    -------
    scale, error : ndarray of float64, shape (rows,)
        At a breakpoint the error is the limit from the better side.
    """
    points, columns, steps = _breakpoints(w, low, high, floor)
    weighted = w @ H if H.ndim == 2 else w * H
    base = (weighted * w).sum(1)
    signs = np.take_along_axis(np.sign(w), columns, 1) * (points > 0)
    cHw = np.cumsum(signs * np.take_along_axis(weighted, columns, 1), 1)
    cHc = np.cumsum(_growth(H, signs, columns, steps), 1)
    lower = np.maximum(np.append(points[:, 1:], np.zeros((len(w), 1)), 1), floor[:, None])
    middle = np.divide(cHw, cHc, out=np.zeros_like(cHw), where=cHc > 0)
    scales = np.clip(middle, lower, np.maximum(points, lower))
    errors = base[:, None] + scales * (scales * cHc - 2 * cHw)
    errors[points <= 0] = np.inf
    best = errors.argmin(1)[:, None]
    scale, error = (np.take_along_axis(v, best, 1)[:, 0] for v in (scales, errors))
    zeroed = base <= error  # codes of 0 alone, at every scale above all breakpoints
    above = np.maximum(floor, 4 * np.abs(w).max(1))
    return np.where(zeroed, above, scale), np.minimum(base, error)


def _breakpoints(
    w: np.ndarray, low: np.ndarray, high: np.ndarray, floor: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return all breakpoints of each row, falling; the column that moves; its code's size before.

    All (rows, T); those that are not, or lie below the floor, are 0 and come last.
    """
    limit = np.where(w > 0, high[:, None], -low[:, None])
    most = np.arange(max(1, int(limit.max())))
    points = np.abs(w)[:, :, None] / (most + 0.5)
    points[(most >= limit[:, :, None]) | (points <= floor[:, None, None])] = 0.0
    points = points.reshape(len(w), -1)
    order = np.argsort(-points, axis=1, kind="stable")
    points = np.take_along_axis(points, order, 1)
    order = order[:, : max(1, int((points > 0).sum(1).max()))]
    return points[:, : order.shape[1]], order // len(most), order % len(most)


def _growth(H: np.ndarray, signs: np.ndarray, columns: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return by how much each step changes c H c^T, (rows, T)."""
    if H.ndim == 1:
        return H[columns] * (2 * steps + 1) * np.abs(signs)
    rows, out = np.arange(len(signs)), np.empty(signs.shape)
    cH, diagonal = np.zeros((len(signs), len(H))), np.diag(H)
    for t in range(signs.shape[1]):
        j, sign = columns[:, t], signs[:, t]
        out[:, t] = 2 * sign * cH[rows, j] + sign * sign * diagonal[j]
        cH += sign[:, None] * H[j]
    return out
