"""Correct errors of earlier layers in the weights of a later one before it is quantized."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptqkit.arrays._inputs import as_matrix, check_number, label
from ptqkit.arrays.factorization import as_hessian
from ptqkit.errors import NotPositiveDefiniteError

__all__ = ["propagate_error"]


def propagate_error(
    W: Any, H: Any, G: Any, alpha: float, damping: float = 0.01, *, name: str | None = None
) -> np.ndarray:
    """Return the weights to quantize instead of W if a layer's inputs already carry errors.

    With x a layer's inputs in the float model and x~ those in the model quantized so far, W x is
    the wanted output, and the layer can give W* x~. The least-squares W* is
    ``W G (H + lambda I)^-1``; the result goes a fraction ``alpha`` of the way [QEP, section 4],

        W + alpha W (G - H) (H + lambda I)^-1,  lambda = damping * mean(diag H over live inputs),

    and is to be quantized by any solver with the same H. Computed in float64.

    Parameters
    ----------
    W : array or tensor, shape (out, in), floating point
    H : Hessian, Factorization or array, shape (in, in)
        ``(2/N) sum x~ x~^T``, of the quantized model's inputs.
    G : array, shape (in, in)
        ``(2/N) sum x x~^T`` over the same tokens. Not symmetric. The difference G - H matters:
        given in float64, G keeps the digits that float32 would lose.
    alpha : float
        From 0 (W as it is) to 1 (all of the correction, which follows the calibration data most).
    damping : float
        As in :func:`ptqkit.factorize`; at 0 the plain least squares, if H is positive definite.
    name : str, optional
        Layer name for error messages.

    Returns
    -------
    ndarray of float32, shape (out, in)
        Equal to W if G equals H. Weights of dead inputs (H_jj = 0) stay as they are.

    Raises
    ------
    NotPositiveDefiniteError
        If H cannot be factorized with this damping.
    TypeError, ValueError
        For a wrong dtype or shape, NaN or Inf, alpha outside [0, 1].

    References
    ----------
    [QEP] Arai and Ichikawa 2025, Quantization Error Propagation, arXiv 2504.09629.

    Examples
    --------
    >>> import numpy as np, ptqkit
    >>> rng = np.random.default_rng(0)
    >>> W, X = rng.normal(size=(8, 16)), rng.normal(size=(200, 16))
    >>> X_q = X + 0.1 * rng.normal(size=X.shape)
    >>> H, G = 2 / 200 * X_q.T @ X_q, 2 / 200 * X.T @ X_q
    >>> q = ptqkit.gptq(ptqkit.propagate_error(W, H, G, alpha=0.5), H, group_size=16)
    """
    alpha = check_number(alpha, f"{label(name)}alpha")
    if not 0 <= alpha <= 1:
        raise ValueError(f"{label(name)}alpha must lie in [0, 1], not {alpha!r}")
    damping = check_number(damping, f"{label(name)}damping")
    if not (np.isfinite(damping) and damping >= 0):
        raise ValueError(
            f"{label(name)}damping must be a fraction of the mean diagonal, at least 0, not "
            f"{damping!r}"
        )
    W = as_matrix(W, "W", name)
    matrix = as_hessian(H, name, inputs=W.shape[1])
    drift = _drift(G, matrix, name)
    if alpha == 0 or not drift.any():
        return W.copy()
    correction = _solve(_product(W.astype(np.float64), drift), matrix, damping, name)
    with np.errstate(over="ignore"):
        result = (W + alpha * correction).astype(np.float32)
    if not np.isfinite(result).all():
        raise ValueError(
            f"{label(name)}the corrected weights are beyond float32: H is too close to singular at "
            f"damping {damping:g}. Raise damping"
        )
    return result


def _drift(G: Any, matrix: np.ndarray, name: str | None) -> np.ndarray:
    """Return G - H in float64; exactly 0 in the columns of dead inputs, as sums of x~_j = 0 are."""
    wide = isinstance(G, np.ndarray) and G.dtype == np.float64
    checked = as_matrix(G, "G", name)
    if checked.shape != matrix.shape:
        raise ValueError(
            f"{label(name)}G must have the shape {matrix.shape} of H, not {checked.shape}"
        )
    drift = np.subtract(G if wide else checked, matrix, dtype=np.float64)
    drift[:, np.diagonal(matrix) == 0] = 0.0
    return drift


# Products are cut into calls of about a tenth of a second: an interrupt waits for the end of one.
_TILE, _DEPTH = 1024, 512


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, stop)) for at in range(start, stop, step)]


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return left @ right."""
    (rows, inner), columns = left.shape, right.shape[1]
    out = np.zeros((rows, columns))
    for i in _slices(0, rows, _TILE):
        for j in _slices(0, columns, _TILE):
            for k in _slices(0, inner, _DEPTH):
                out[i, j] += left[i, k] @ right[k, j]
    return out


def _cholesky(A: np.ndarray) -> int:
    """Put L into the lower triangle of A (Fortran order), A = L L^T; return -1 or a bad pivot."""
    # Imported here: reading the array functions costs no start of scipy.linalg.
    from scipy.linalg.blas import dtrsm
    from scipy.linalg.lapack import dpotrf

    n = len(A)
    for k in _slices(0, n, _DEPTH):
        block, failed = dpotrf(A[k, k], lower=1, clean=1)
        if failed:
            return k.start + int(failed) - 1
        A[k, k] = block
        rest = _slices(k.stop, n, _TILE)
        for i in rest:
            A[i, k] = dtrsm(1.0, block, A[i, k], side=1, lower=1, trans_a=1)
            for j in rest:
                if j.start <= i.start:
                    A[i, j] -= A[i, k] @ A[j, k].T
    return -1


def _solve(right: np.ndarray, matrix: np.ndarray, damping: float, name: str | None) -> np.ndarray:
    """Return right (H + lambda I)^-1 by Cholesky in float64; ``right`` is overwritten."""
    from scipy.linalg.blas import dtrsm

    diagonal = np.diagonal(matrix).astype(np.float64)
    dead = diagonal == 0
    shift = damping * float(diagonal[~dead].mean())
    # Fortran order, as LAPACK wants it. H is symmetric: its transpose is H.
    L = np.array(matrix, np.float64, order="C").T
    L[np.diag_indices_from(L)] += np.where(dead, 1.0, shift)
    failed = _cholesky(L)
    if failed >= 0:
        raise NotPositiveDefiniteError(
            f"{label(name)}the Hessian is not positive definite: the pivot of input {failed} "
            f"failed with damping {damping:g} of the mean diagonal. Use more calibration tokens "
            "or raise damping",
            failed,
            damping,
        )
    blocks = _slices(0, len(L), _DEPTH)
    for rows in _slices(0, len(right), _TILE):
        X = right[rows]
        for k in blocks:  # Y L^T = X
            for j in _slices(0, k.start, _DEPTH):
                X[:, k] -= X[:, j] @ L[k, j].T
            X[:, k] = dtrsm(1.0, L[k, k], X[:, k], side=1, lower=1, trans_a=1)
        for k in reversed(blocks):  # Z L = Y
            for i in _slices(k.stop, len(L), _DEPTH):
                X[:, k] -= X[:, i] @ L[i, k]
            X[:, k] = dtrsm(1.0, L[k, k], X[:, k], side=1, lower=1)
    return right
