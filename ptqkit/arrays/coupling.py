"""Codes of a matrix whose rows answer for each other's errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

import ptqkit._core as _core
from ptqkit.arrays._inputs import as_matrix, check_count, check_number, check_threads, label
from ptqkit.arrays.factorization import as_hessian
from ptqkit.arrays.matrix import QuantizedMatrix

__all__ = ["as_coupling", "couple_rows"]


def couple_rows(
    W: Any,
    matrix: QuantizedMatrix,
    H: Any,
    B: Any,
    *,
    passes: int = 3,
    damping: float = 0.1,
    threads: int = 0,
    name: str | None = None,
) -> QuantizedMatrix:
    """Change the codes of a quantized matrix so that its rows make up for each other's errors.

    With E = W - W_hat the layer's outputs move by E x, and the model's loss, to second order, by
    tr(B E H E^T) up to a factor, where B is the second moment of the loss's gradients at those
    outputs. :func:`ptqkit.gptq` makes e H e^T of each row small, as if B were diagonal. Here
    coordinate descent goes on from its codes under the whole sum, which no step raises; the
    objective of single rows may rise. Scales and zero-points stay.

    Parameters
    ----------
    W : array or tensor, shape (out, in), floating point
        What was quantized.
    matrix : QuantizedMatrix
        Where to start, of the same shape.
    H : Hessian, Factorization or array, shape (in, in)
        Undamped.
    B : array, shape (out, out)
        Symmetric, positive semidefinite, of any scale. Rows without a gradient (B_ii = 0) stay if
        ``damping`` is 0.
    passes : int
        Over all codes.
    damping : float
        Share of B's mean diagonal that is added to its diagonal: as B comes from few tokens.
    threads : int
        0 means automatic. The result does not depend on it.
    name : str, optional
        Layer name for error messages.

    Returns
    -------
    QuantizedMatrix
        With the objectives of its rows afterwards as the last of ``row_objectives``.

    Raises
    ------
    TypeError, ValueError
        For a wrong dtype or shape, NaN or Inf, a B that is not symmetric.

    References
    ----------
    Kronecker-factored curvature: Martens and Grosse, ICML 2015, arXiv:1503.05671; for rounding:
    Tseng, Sun and De Sa, Model-Preserving Adaptive Rounding, 2025, arXiv:2505.22988.

    Examples
    --------
    >>> import numpy as np, ptqkit
    >>> rng = np.random.default_rng(0)
    >>> W, X, g = (rng.normal(size=s) for s in ((8, 16), (200, 16), (200, 8)))
    >>> H = 2 / 200 * X.T @ X
    >>> q = ptqkit.couple_rows(W, ptqkit.gptq(W, H, group_size=16), H, g.T @ g / 200)
    """
    threads = check_threads(threads)
    check_count(passes, "passes", 0, 1000)
    damping = check_number(damping, f"{label(name)}damping")
    if not (np.isfinite(damping) and damping >= 0):
        raise ValueError(f"{label(name)}damping must be a number of at least 0, not {damping!r}")
    W = as_matrix(W, "W", name, threads)
    if W.shape != matrix.shape:
        raise ValueError(f"{label(name)}W must have the shape {matrix.shape}, not {W.shape}")
    power = as_hessian(H, name, threads, inputs=W.shape[1])
    coupling = as_coupling(B, len(W), damping, name)
    codes, objective = matrix.codes.copy(), np.empty(len(W))
    order = np.argsort(-np.diagonal(power), kind="stable")
    _core.couple_rows(
        W,
        power,
        coupling,
        order,
        matrix.g_idx,
        matrix.scales,
        matrix.zero_points,
        (max(1, matrix.max_code), passes),
        codes,
        objective,
        threads,
    )
    history = matrix.row_objectives
    history = objective[None] if history is None else np.concatenate([history, objective[None]])
    return replace(matrix, codes=codes, row_objectives=history)


def as_coupling(B: Any, rows: int, damping: float, name: str | None) -> np.ndarray:
    """Return B in float64, damped and of mean diagonal 1."""
    checked = np.array(B, np.float64, order="C")
    if checked.shape != (rows, rows):
        raise ValueError(f"{label(name)}B must have the shape {(rows, rows)}, not {checked.shape}")
    if not np.isfinite(checked).all():
        raise ValueError(f"{label(name)}B holds NaN or Inf")
    if not np.allclose(checked, checked.T, rtol=1e-5, atol=1e-6 * np.abs(checked).max()):
        raise ValueError(f"{label(name)}B must be symmetric: give a second moment, g.T @ g")
    checked = (checked + checked.T) / 2
    mean = float(np.diagonal(checked).mean())
    if mean > 0:
        checked /= mean
        checked[np.diag_indices(rows)] += damping
    return checked
