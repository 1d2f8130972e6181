"""Layers, and the checks that hold a solver's result against the float64 twin.

The check of a float32 solver is a replay: each code must be the rounding of its own target, which
the twin computes in float64 from the codes before it; only a target within a stated distance of a
rounding tie may fall on the other side. Comparing whole code matrices would not do: one code on
the other side of a tie rightly changes all later ones.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

import ptqkit
import ptqkit.reference as reference
from helpers.data import SHARED

VECTORS = SHARED / "vectors"
EPS = float(np.finfo(np.float32).eps)


def vector(name: str) -> Path:
    """A published test vector; skips where the data is not there."""
    path = VECTORS / name
    if not path.exists():
        pytest.skip(f"{name} is not here (expected under ../shared/data/vectors)")
    return path


def search_rtol(bits) -> float:
    """Relative float32 error of a grid search's criterion: a weight's own rounding is a larger part
    of a step, the finer the grid. Measured up to 4e-4 at 8 bits, 4e-5 at 4, 1.6e-5 at 2.
    """
    return 4e-5 + 4e-6 * max_code(bits)


def max_code(bits) -> int:
    return 2 if bits == "ternary" else (1 << bits) - 1


@lru_cache(maxsize=64)
def layer(rows: int, n: int, kind: str = "correlated", seed: int = 0):
    """Weights (rows, n) float32 and the Hessian of the inputs (n, n) float32, both read-only.

    "white": independent inputs. "correlated": a random mixing matrix. "outlier": correlated, with a
    few inputs 30 times larger. "ill": fewer tokens than inputs. "dead": every fifth input is zero.
    """
    rng = np.random.default_rng([seed, rows, n])
    tokens = max(2, n // 2) if kind == "ill" else 4 * n + 10
    X = rng.normal(size=(tokens, n))
    if kind != "white":
        X = X @ rng.normal(size=(n, n)) / np.sqrt(n)
    if kind == "outlier":
        X[:, :: max(2, n // 4)] *= 30
    if kind == "dead":
        X[:, ::5] = 0
    W = rng.normal(size=(rows, n)).astype(np.float32)
    H = reference.hessian(X).astype(np.float32)
    W.flags.writeable = H.flags.writeable = False
    return W, H


def replay(W, H, q, F):
    """Codes that follow from q's own earlier codes in float64, and each target's tie distance.

    Returns
    -------
    codes : ndarray of uint8, distance : ndarray of float64, both (rows, n)
        ``distance`` in steps of the grid, 0 at a tie, 0.5 at a grid point.
    """
    damped, dead = reference.dampen(H, q.damping)
    W = np.where(dead, 0.0, np.asarray(W, np.float64))
    scale = q.scales.astype(np.float64)
    zero = q.zero_points.astype(np.float64)
    targets = reference.quantization_targets(W, q.codes, scale, zero, q.g_idx, F.order, damped)
    scale, zero = scale[:, q.g_idx], zero[:, q.g_idx]
    steps = targets / scale
    distance = np.abs(steps - np.floor(steps) - 0.5)
    return reference.quantize(targets, scale, zero, q.max_code), distance


def assert_codes(W, H, q, F, tie):
    """Every code is its target's rounding, but within ``tie`` steps of a tie; returns the worst."""
    expected, distance = replay(W, H, q, F)
    wrong = expected != q.codes
    worst = float(distance[wrong].max()) if wrong.any() else 0.0
    assert worst <= tie, f"{wrong.sum()} codes differ, the worst {worst:.3g} steps from a tie"
    assert np.abs(expected.astype(int) - q.codes)[wrong].max(initial=0) <= 1
    return worst


def updated_weights(W, H, q, F, group_size, static):
    """Weights that each group's grid was fitted to, in float64.

    Yields group, weights (rows, G), the group's undamped block of H. With dynamic groups these are
    the updated weights W_g + D with D R_gg = E[:, :g] R[:g, g].
    """
    H = np.asarray(H, np.float64)
    damped, dead = reference.dampen(H, q.damping)
    W = np.where(dead, 0.0, np.asarray(W, np.float64))
    n = W.shape[1]
    size = group_size or n
    if static or size == n:
        for g in range(n // size):
            part = slice(g * size, (g + 1) * size)
            yield g, W[:, part], H[part, part]
        return
    R = reference.upper_factor(damped[np.ix_(F.order, F.order)])
    E = (W - q.dequantize(np.float64))[:, F.order]
    for start in range(0, n, size):
        part = slice(start, start + size)
        columns = F.order[part]
        D = np.linalg.solve(R[part, part].T, (E[:, :start] @ R[:start, part]).T).T
        yield q.g_idx[columns[0]], W[:, columns] + D, H[np.ix_(columns, columns)]


def _residuals(w, scale, zero, top):
    """Rounding errors, and the same with every weight that is near a tie rounded the other way."""
    steps = w / scale
    down = np.floor(steps)
    near = np.abs(steps - down - 0.5) < 1e-4
    nearest = np.round(steps)
    flipped = np.where(near, 2 * down + 1 - nearest, nearest)
    for rounded in (nearest, flipped):
        yield scale * (np.clip(rounded + zero, 0, top) - zero) - w


def grid_errors(w, scale, zero, top, method, H, norm=2.4):
    """Least and largest criterion of a grid search over the two ways of rounding ties, per row.

    A symmetric min-max grid puts the largest weight on a tie, and the sign of its error matters
    under H.
    """
    found = []
    for d in _residuals(w, scale[:, None].astype(float), zero[:, None].astype(float), top):
        if method == "mse":
            found.append((np.abs(d) ** norm).sum(axis=1))
            continue
        total = np.zeros(len(w))
        for start in range(0, w.shape[1], 128):
            part = slice(start, start + 128)
            total += reference.objective(d[:, part], H[part, part])
        found.append(total)
    return np.minimum(*found), np.maximum(*found)


def best_error(
    w, top, method, H, rtol, *, steps=40, min_shrink=0.3, norm=2.4, candidates=4, **options
):
    """Criterion that a search must reach, per row: the best over all factors that the cheap filter
    surely lets through, ties counted against it.
    """
    cheap, full = [], []
    for p in reference.shrink_factors(steps, min_shrink):
        # the grid of the range shrunk by p is the min-max grid of p times the range
        ends = p * np.stack([np.minimum(w.min(axis=1), 0), np.maximum(w.max(axis=1), 0)], axis=1)
        scale, zero, _ = reference.fit_grid(ends, max_code=top, **options)
        if method == "hessian":
            cheap.append(grid_errors(w, scale, zero, top, method, np.diag(np.diag(H)))[0])
        full.append(grid_errors(w, scale, zero, top, method, H, norm)[1])
    if method == "mse":
        return np.min(full, axis=0)
    cutoff = np.sort(cheap, axis=0)[min(candidates, steps) - 1]
    first = np.argmin(cheap, axis=0)[None] == np.arange(steps)[:, None]
    let_through = first | (cheap < cutoff * (1 - rtol)) | (candidates >= steps)
    return np.where(let_through, full, np.inf).min(axis=0)


def assert_grid(w, H, scale, zero, *, bits, method, symmetric, rtol, **options):
    """One group's grids are the twin's: min-max equal, a search as good as the twin's best."""
    top = max_code(bits)
    if method == "minmax":
        want_scale, want_zero, _ = reference.fit_grid(
            w, max_code=top, symmetric=symmetric, **options
        )
        np.testing.assert_allclose(scale, want_scale, rtol=rtol, atol=0)
        low = np.minimum(w.min(axis=1), 0) / want_scale
        near_tie = np.abs(-low - np.floor(-low) - 0.5) < top * rtol
        assert np.all((zero == want_zero) | near_tie)
        return
    some = slice(None, None, -(-len(w) // 12))  # a search in float64 is slow: at most 12 rows
    w, scale, zero = w[some], scale[some], zero[some]
    best = best_error(w, top, method, H, rtol, symmetric=symmetric, **options)
    reached = grid_errors(w, scale, zero, top, method, H, options.get("norm", 2.4))[0]
    floor = 1e-12 * (w**2).sum(axis=1) * (1 if method == "mse" else np.diag(H).max())
    assert np.all(reached <= best * (1 + rtol) + floor), np.max(reached / np.maximum(best, 1e-300))


def assert_solution(W, H, q, F, *, static=False, grid="minmax", tie):
    """Codes, grids, g_idx and objective of a result of ``ptqkit.gptq``, all against the twin."""
    worst = assert_codes(W, H, q, F, tie)
    n = W.shape[1]
    size = q.group_size or n
    runs = F.order_name == "act" and not (static or size == n)
    group = np.empty(n, np.int64)
    group[F.order] = (np.arange(n) if runs else F.order) // size
    np.testing.assert_array_equal(q.g_idx, group)
    options = {"bits": q.bits, "method": grid, "symmetric": q.symmetric}
    options |= {"rtol": 1e-5 if grid == "minmax" else search_rtol(q.bits)}
    for g, w, block in updated_weights(W, H, q, F, q.group_size, static):
        scale, zero = q.scales[:, g], q.zero_points[:, g]
        assert_grid(w, block, scale, zero, scale_dtype=q.scale_dtype, **options)
    return worst


def true_objective(W, H, q):
    """e H e^T per row in float64, dead inputs left out."""
    dead = np.diag(H) == 0
    E = np.where(dead, 0.0, np.asarray(W, np.float64)) - q.dequantize(np.float64)
    return reference.objective(E, H)


def same_result(a: ptqkit.QuantizedMatrix, b: ptqkit.QuantizedMatrix) -> bool:
    """Codes, scales, zero-points and g_idx bit for bit the same."""
    return all(
        getattr(a, name).tobytes() == getattr(b, name).tobytes()
        for name in ("codes", "scales", "zero_points", "g_idx")
    )
