"""RTN, GPTQ as published, OBQ, coordinate descent, fits of scales, targets (float64)."""

from __future__ import annotations

from itertools import product

import numpy as np

from ptqkit.reference.grids import (
    GRID_BLOCK,
    dequantize,
    fit_grid,
    fit_groups,
    quantize,
    round_to_dtype,
)
from ptqkit.reference.hessian import dampen

__all__ = [
    "best_paths",
    "brute_force",
    "couple_rows",
    "gptaq_target",
    "gptq",
    "make_order",
    "objective",
    "obq",
    "propagate_error",
    "qronos_target",
    "quantization_targets",
    "refit",
    "rtn",
    "sweep",
    "target_weights",
    "upper_factor",
]


def objective(E: np.ndarray, H: np.ndarray) -> np.ndarray:
    """Return the per-row objective e H e^T of the error E = W - Q; its sum is tr(E H E^T)."""
    E = np.asarray(E, np.float64)
    return np.einsum("rj,rj->r", E @ np.asarray(H, np.float64), E)


def upper_factor(H: np.ndarray) -> np.ndarray:
    """Return R upper triangular with H = R R^T: Cholesky with rows and columns reversed."""
    return np.linalg.cholesky(H[::-1, ::-1])[::-1, ::-1]


def rtn(W, *, max_code, group_size=None, per_tensor=False, H=None, **grid):
    """Round to nearest on a grid fitted per (row, group), or to all of W.

    Returns
    -------
    codes (rows, n), scales (rows, groups), zeros (rows, groups)
    """
    W = np.asarray(W, np.float64)
    size = group_size or W.shape[1]
    if per_tensor:
        scale, zero, _ = fit_grid(W.reshape(1, -1), max_code=max_code, **grid)
        scales, zeros = (np.full((len(W), 1), v[0]) for v in (scale, zero))
    else:
        scales, zeros = fit_groups(W, size, H=H, max_code=max_code, **grid)
    group = np.arange(W.shape[1]) // size
    return quantize(W, scales[:, group], zeros[:, group], max_code), scales, zeros


def make_order(diagonal: np.ndarray, order: str, group_size: int | None) -> np.ndarray:
    """Return the quantization order: entry i is the original column that is quantized i-th.

    "natural"; "act": decreasing H_jj; "group-act": groups by decreasing sum of H_jj, the columns
    of a group by decreasing H_jj (groups stay whole). Ties keep their original order.
    """
    n = len(diagonal)
    if order == "natural":
        return np.arange(n)
    by_diagonal = np.argsort(-diagonal, kind="stable")
    if order == "act":
        return by_diagonal
    size = group_size or n
    totals = np.asarray(diagonal, np.float64).reshape(-1, size).sum(axis=1)
    rank = np.empty(n // size, int)
    rank[np.argsort(-totals, kind="stable")] = np.arange(n // size)
    return by_diagonal[np.argsort(rank[by_diagonal // size], kind="stable")]


def gptq(
    W,
    H,
    *,
    max_code,
    group_size=None,
    order="natural",
    static_groups=False,
    damping=0.01,
    feedback=True,
    refine_passes=0,
    refit_rounds=0,
    **grid,
):
    """Run GPTQ as published [GPTQ, Algorithm 1], with a lazy block of one column.

    With U the upper Cholesky factor of H^-1, column j is rounded, and its error divided by U_jj is
    spread over the later columns by row j of U. A group's grid is fitted to its updated weights
    when its first column is reached; with ``static_groups`` to the original weights beforehand.
    A "feedback" grid reads the group's block of R, H = R R^T; that of a channel, in quantization
    order, diagonal blocks of GRID_BLOCK.

    Returns
    -------
    dict with codes, scales, zeros, g_idx, order, dead, history
    (1 + refine_passes + 2 * refit_rounds, rows)
    """
    H = np.asarray(H, np.float64)
    damped, dead = dampen(H, damping)
    W0 = np.where(dead, 0.0, np.asarray(W, np.float64))
    rows, n = W0.shape
    size = group_size or n
    static_groups = static_groups or size == n  # no feedback has reached a channel's only grid
    perm = make_order(np.diag(H), order, group_size)
    U = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(perm, perm)])).T
    # group of the i-th quantized column: its own, or (act-order with g_idx) a run of the order
    runs = order == "act" and not static_groups
    group = np.arange(n) // size if runs else perm // size
    fed_back = grid.get("method") == "feedback"
    R = upper_factor(damped[np.ix_(perm, perm)]) if fed_back else np.empty((0, 0))
    if static_groups and fed_back:
        blocks = np.arange(n) // GRID_BLOCK
        R = np.where(blocks[:, None] == blocks, R, 0.0)
        scale, zero, _ = fit_grid(W0[:, perm], R=R, max_code=max_code, **grid)
        scales, zeros = scale[:, None], zero[:, None]
    elif static_groups:
        scales, zeros = fit_groups(W0, size, H=H, max_code=max_code, **grid)
    else:
        scales, zeros = np.zeros((2, rows, n // size))
    Wp, codes = W0[:, perm].copy(), np.zeros((rows, n), np.uint8)
    for j in range(n):
        g = group[j]
        if not static_groups and j % size == 0:
            part = slice(j, j + size)
            block = {"R": R[part, part]} if fed_back else {"H": H[np.ix_(perm[part], perm[part])]}
            scales[:, g], zeros[:, g], _ = fit_grid(Wp[:, part], max_code=max_code, **block, **grid)
        codes[:, j] = quantize(Wp[:, j], scales[:, g], zeros[:, g], max_code)
        error = (Wp[:, j] - dequantize(codes[:, j], scales[:, g], zeros[:, g])) / U[j, j]
        if feedback:
            Wp[:, j + 1 :] -= np.outer(error, U[j, j + 1 :])
    out, g_idx = np.empty_like(codes), np.empty(n, np.int32)
    out[:, perm], g_idx[perm] = codes, group
    history = [objective(W0 - dequantize(out, scales[:, g_idx], zeros[:, g_idx]), H)]
    for step in range(refine_passes + 2 * refit_rounds):
        if step >= refine_passes and (step - refine_passes) % 2 == 0:
            scale_dtype = grid.get("scale_dtype", "float32")
            scales = refit(W0, out, scales, zeros, g_idx, H, scale_dtype)
        else:
            out = sweep(W0, out, scales, zeros, g_idx, H, perm, max_code)
        history.append(objective(W0 - dequantize(out, scales[:, g_idx], zeros[:, g_idx]), H))
    return {
        "codes": out,
        "scales": scales,
        "zeros": zeros,
        "g_idx": g_idx,
        "order": perm,
        "dead": dead,
        "history": np.array(history),
    }


def quantization_targets(W, codes, scales, zeros, g_idx, order, damped):
    """Return the real value that each column was rounded from, given the codes before it.

    With H = R R^T (R upper) and E = W - Q the published recursion becomes Babai's nearest plane:
    target_j = w_j + (sum_{k<j} E_k R_kj) / R_jj, which needs no inverse of H.
    A solver in lower precision is right when every code is its target's rounding, but near ties.
    """
    R = upper_factor(damped[np.ix_(order, order)])
    E = (W - dequantize(codes, scales[:, g_idx], zeros[:, g_idx]))[:, order]
    targets = np.empty_like(W, dtype=np.float64)
    targets[:, order] = W[:, order] + (E @ np.triu(R, 1)) / np.diag(R)
    return targets


def sweep(W, codes, scales, zeros, g_idx, H, order, max_code):
    """Run one coordinate-descent pass over the codes in quantization order, without dead inputs.

    q_j = Q(w_j + (E H)_j / H_jj - E_j): the best code for column j given all the others.
    """
    codes = codes.copy()
    E = W - dequantize(codes, scales[:, g_idx], zeros[:, g_idx])
    for j in order:
        if H[j, j] == 0:
            continue
        g = g_idx[j]
        target = W[:, j] + E @ H[:, j] / H[j, j] - E[:, j]
        codes[:, j] = quantize(target, scales[:, g], zeros[:, g], max_code)
        E[:, j] = W[:, j] - dequantize(codes[:, j], scales[:, g], zeros[:, g])
    return codes


def best_paths(W, codes, scales, zeros, g_idx, H, damped, order, max_code, paths):
    """Search codes on given grids with several partial roundings of a row, then sweep once.

    With damped = R R^T in quantization order and y_j = sum_{k<=j} e_k R_kj, the objective is the
    sum of y_j^2. In each column every path goes on with the code nearest to what makes y_j 0 and
    with the next nearest, and the ``paths`` cheapest stay. A row keeps its codes unless its
    objective under H falls.
    """
    R = upper_factor(damped[np.ix_(order, order)])
    out = codes.copy()
    for row, w in enumerate(np.asarray(W, np.float64)):
        s, z = scales[row, g_idx].astype(np.float64), zeros[row, g_idx].astype(np.float64)
        beginnings: list = [(0.0, [], [])]  # cost, errors, codes
        for i, j in enumerate(order):
            grown = []
            for cost, errors, path in beginnings:
                t = np.dot(errors, R[:i, i])
                wanted = w[j] + t / R[i, i]
                code = float(quantize(wanted, s[j], z[j], max_code))
                toward = 1.0 if wanted > s[j] * (code - z[j]) else -1.0
                dead = H[j, j] == 0
                for c in [code] if dead else [code, code + toward]:
                    if 0 <= c <= max_code:
                        e = w[j] - s[j] * (c - z[j])
                        y = 0.0 if dead else t + e * R[i, i]
                        grown.append((cost + y * y, [*errors, e], [*path, c]))
            beginnings = sorted(grown, key=lambda path: path[0])[:paths]
        found = np.empty(len(w), np.uint8)
        found[order] = beginnings[0][2]
        args = (scales[row : row + 1], zeros[row : row + 1], g_idx, H, order, max_code)
        found = sweep(w[None], found[None], *args)[0]
        before, after = (w - s * (q.astype(np.float64) - z) for q in (codes[row], found))
        if after @ H @ after < (1 - 1e-6) * (before @ H @ before):
            out[row] = found
    return out


def couple_rows(W, codes, scales, zeros, g_idx, H, B, order, max_code, passes=1):
    """Descend over the codes of all rows under tr(B E H E^T).

    The gradient for e_ij is 2 (B E H)_ij and the curvature 2 B_ii H_jj; rows come in their order,
    columns in ``order``. Rows with B_ii = 0 and dead inputs stay.
    """
    W, H, B = (np.asarray(x, np.float64) for x in (W, H, B))
    codes = np.array(codes)
    s, z = scales.astype(np.float64)[:, g_idx], zeros.astype(np.float64)[:, g_idx]
    E = W - s * (codes - z)
    for _ in range(passes):
        for i in range(len(W)):
            for j in order:
                curvature = B[i, i] * H[j, j]
                if curvature <= 0:
                    continue
                gradient = B[i] @ E @ H[:, j]
                wanted = W[i, j] - E[i, j] + gradient / curvature
                code = quantize(wanted, s[i, j], z[i, j], max_code)
                d = W[i, j] - s[i, j] * (float(code) - z[i, j]) - E[i, j]
                if d * (2 * gradient + d * curvature) < 0:
                    E[i, j] += d
                    codes[i, j] = code
    return codes


def refit(W, codes, scales, zeros, g_idx, H, scale_dtype="float32"):
    """Fit all scales of each row at once to its codes; a row that does not gain keeps its own.

    With c_g the codes of group g less their zero-points and e the error, the objective of scales
    s + d is e H e^T - 2 b d^T + d A d^T, A_gh = c_g H c_h^T, b_g = e H c_g^T: d = b A^-1. Scales
    are rounded to their storage type; one that would not be positive stays.
    """
    scales = np.array(scales, np.float64)
    members = g_idx == np.arange(scales.shape[1])[:, None]
    for w, q, s, z in zip(W, codes, scales, zeros, strict=True):
        steps = q.astype(np.float64) - z[g_idx]
        C = np.where(members, steps, 0.0)
        e = w - s[g_idx] * steps
        wanted = s + np.linalg.lstsq(C @ H @ C.T, C @ H @ e, rcond=1e-9)[0]
        wanted = np.where(wanted > 0, round_to_dtype(wanted, scale_dtype), s)
        new = w - wanted[g_idx] * steps
        if new @ H @ new < (1 - 1e-6) * (e @ H @ e):
            s[:] = wanted
    return scales


def obq(W, H, *, max_code, group_size=None, damping=0.01, **grid):
    """Run Optimal Brain Quantization [OBQ]: per row, the column that costs least comes next.

    Grids are fitted to the original weights. Of the columns left, j minimises
    (Q(w_j) - w_j)^2 / [H^-1]_jj; the others take w -= (w_j - Q(w_j)) / [H^-1]_jj * [H^-1]_j:, and j
    is eliminated from H^-1 [GPTQ, equations 2 and 3].
    """
    H = np.asarray(H, np.float64)
    damped, dead = dampen(H, damping)
    W0 = np.where(dead, 0.0, np.asarray(W, np.float64))
    size = group_size or W0.shape[1]
    scales, zeros = fit_groups(W0, size, H=H, max_code=max_code, **grid)
    group = np.arange(W0.shape[1]) // size
    inverse = np.linalg.inv(damped)
    codes = np.stack(
        [
            _obq_row(w, inverse.copy(), s[group], z[group], max_code)
            for w, s, z in zip(W0, scales, zeros, strict=True)
        ]
    )
    return codes, scales, zeros


def _obq_row(w, inverse, scale, zero, max_code):
    w, left = w.copy(), np.ones(len(w), bool)
    codes = np.zeros(len(w), np.uint8)
    for _ in range(len(w)):
        q = dequantize(quantize(w, scale, zero, max_code), scale, zero)
        diagonal = np.where(left, np.diag(inverse), 1.0)
        j = np.where(left, (q - w) ** 2 / diagonal, np.inf).argmin()
        codes[j] = quantize(w[j], scale[j], zero[j], max_code)
        w -= (w[j] - q[j]) / inverse[j, j] * inverse[j] * left
        w[j] = q[j]
        left[j] = False
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def target_weights(W, H, G=None, D=None, *, alpha=1.0, damping=0.01):
    """Return W + alpha [W (G - H) + D] (H + lambda I)^-1, to quantize if errors are there already.

    With x the float model's inputs, x~ the quantized one's, r and r~ the streams that the output
    is added to, H = (2/N) sum x~ x~^T, G = (2/N) sum x x~^T and D = (2/N) sum (r - r~) x~^T, the
    least squares of W* x~ + r~ - W x - r is alpha = 1, lambda = 0 (QEP, arXiv 2504.09629, is
    D = 0). x~_j = 0 for a dead input, and so are column j of G - H and of D.
    """
    damped, dead = dampen(H, damping)
    lacks = np.zeros(np.shape(W))
    if G is not None:
        lacks = W @ np.where(dead, 0.0, np.asarray(G, np.float64) - H)
    if D is not None:
        lacks = lacks + np.where(dead, 0.0, D)
    return W + alpha * lacks @ np.linalg.inv(damped)


def propagate_error(W, H, G, alpha, damping):
    """Return the target without D (QEP)."""
    return target_weights(W, H, G, alpha=alpha, damping=damping)


def qronos_target(W, H, G, order, *, alpha=1.0, damping=0.01):
    """Return the target with which GPTQ is Qronos (arXiv 2505.11695).

    Its first column is w_1 + alpha (W (G - H))_1 / H_11, the others the least squares given that
    one.
    """
    damped, dead = dampen(H, damping)
    target, drift = target_weights(W, H, G, alpha=alpha, damping=damping), np.asarray(G) - H
    first, rest = order[0], order[1:]
    value = W[:, first] + alpha * W @ (drift[:, first] * ~dead[first]) / damped[first, first]
    moved = np.linalg.solve(damped[np.ix_(rest, rest)], damped[rest, first])
    target[:, rest] += np.outer(target[:, first] - value, moved)
    target[:, first] = value
    return target


def gptaq_target(W, H, G, order, *, alpha=1.0, damping=0.01):
    """Return the target with which GPTQ is GPTAQ (arXiv 2504.02692), its weights as they were.

    Input q moves the later columns by alpha w_q P_q:, P = ((G - H) L * M_U) L^T, L L^T the inverse
    of the damped H and M_U the strict upper triangle.
    """
    damped, dead = dampen(H, damping)
    drift = np.where(dead, 0.0, np.asarray(G, np.float64) - H)[np.ix_(order, order)]
    L = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)]))
    out = np.array(W, np.float64)
    out[:, order] += alpha * W[:, order] @ (np.triu(drift @ L, 1) @ L.T)
    return out


def brute_force(w, scale, zero, H, max_code):
    """Return the best codes of one row by trying all of them; for up to about six columns."""
    best = min(
        product(range(max_code + 1), repeat=len(w)),
        key=lambda c: objective((w - dequantize(np.array(c), scale, zero))[None], H)[0],
    )
    return np.array(best, np.uint8)
