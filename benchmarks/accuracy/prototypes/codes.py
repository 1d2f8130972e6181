"""Codes and grids searched further after the solve, each row's objective e H e^T never rising."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        raise NotImplementedError(dtype)
    return x.astype(dtype).astype(np.float64)


def _with_codes(matrix: Any, **changes: Any) -> Any:
    kinds = {"codes": np.uint8, "zero_points": np.uint8, "scales": np.float32}
    made = {k: np.ascontiguousarray(v.astype(kinds[k])) for k, v in changes.items()}
    return replace(matrix, **made, row_objectives=None)


def _finished(matrix: Any, error: np.ndarray, H: np.ndarray, **changes: Any) -> Any:
    found = _with_codes(matrix, **changes)
    return replace(found, row_objectives=((error @ H) * error).sum(1)[None])


def sweep(
    W: np.ndarray, q: np.ndarray, s: np.ndarray, z: np.ndarray, top: int, H: np.ndarray
) -> None:
    """One coordinate-descent pass in place; ``s`` and ``z`` are per weight (rows, n)."""
    E = W - s * (q - z)
    for j in np.argsort(-np.diagonal(H)):
        if H[j, j] == 0:
            continue
        wanted = W[:, j] + E @ H[:, j] / H[j, j] - E[:, j]
        q[:, j] = np.clip(np.round(wanted / s[:, j]) + z[:, j], 0, top)
        E[:, j] = W[:, j] - s[:, j] * (q[:, j] - z[:, j])


def fit_again(weight: np.ndarray, matrix: Any, H: np.ndarray, zeros: int = 0) -> Any:
    """Search each group's grid under the whole H, the other groups as they are; then sweep.

    With e the row's error outside of the group, the group's best weights are
    w_g + H_gg^-1 (H e)_g; candidates round those on grids of 0.7 to 1.2 times the scale, with
    ``zeros`` zero-points to either side, and are compared by d H_gg d^T.
    """
    W, group = weight.astype(np.float64), matrix.g_idx
    q, top = matrix.codes.astype(np.float64), matrix.max_code
    scales, zero = matrix.scales.astype(np.float64), matrix.zero_points.astype(np.float64)
    factors = np.concatenate([np.linspace(0.7, 1.2, 51), [1.0]])
    damping = 0.01 * np.diagonal(H).mean()
    for _ in range(2):
        E = W - scales[:, group] * (q - zero[:, group])
        for g in range(scales.shape[1]):
            c = np.flatnonzero(group == g)
            block = H[np.ix_(c, c)]
            other = E.copy()
            other[:, c] = 0.0
            target = W[:, c] + np.linalg.solve(
                block + damping * np.eye(len(c)), H[c] @ other.T
            ).T  # fmt: skip
            best = np.full(len(W), np.inf)
            kept = [q[:, c], scales[:, g], zero[:, g]]

            def cost(codes, s, z, c=c, block=block, other=other):
                d = W[:, c] - s[:, None] * (codes - z[:, None])
                return ((d @ block) * d).sum(1) + 2 * ((other @ H[:, c]) * d).sum(1)

            best = cost(*kept)
            start = scales[:, g].copy(), zero[:, g].copy()
            for shift in range(-zeros, zeros + 1):
                z = start[1] + shift
                if matrix.symmetric and shift:
                    continue
                z = np.clip(z, 0, top)
                for factor in factors:
                    s = _rounded(start[0] * factor, matrix.scale_dtype)
                    s = np.where(s > 0, s, start[0])
                    codes = np.clip(np.round(target / s[:, None]) + z[:, None], 0, top)
                    found = cost(codes, s, z)
                    better = found < best
                    best = np.where(better, found, best)
                    kept = [
                        np.where(better[:, None], codes, kept[0]),
                        np.where(better, s, kept[1]),
                        np.where(better, z, kept[2]),
                    ]
            q[:, c], scales[:, g], zero[:, g] = kept
            E[:, c] = W[:, c] - scales[:, [g]] * (q[:, c] - zero[:, [g]])
        sweep(W, q, scales[:, group], zero[:, group], top, H)
    E = W - scales[:, group] * (q - zero[:, group])
    return _finished(matrix, E, H, codes=q, scales=scales, zero_points=zero)
