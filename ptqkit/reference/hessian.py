"""The layer Hessian H = (2/N) sum x x^T and its damping (float64)."""

from __future__ import annotations

import numpy as np

__all__ = ["dampen", "hessian", "merge"]


def hessian(X: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Return H = (2/N) X^T X over the tokens (rows) of X whose mask is true."""
    X = np.asarray(X, np.float64).reshape(-1, np.shape(X)[-1])
    if mask is not None:
        X = X[np.asarray(mask, bool).reshape(-1)]
    return 2.0 / len(X) * (X.T @ X)


def merge(H1: np.ndarray, tokens1: int, H2: np.ndarray, tokens2: int) -> np.ndarray:
    """Return the Hessian of two token sets together: (N1 H1 + N2 H2) / (N1 + N2)."""
    return (tokens1 * H1 + tokens2 * H2) / (tokens1 + tokens2)


def dampen(H: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """Add ``damping * mean(diag H)`` to the diagonal; dead inputs (H_jj = 0) get H_jj = 1.

    The mean runs over live inputs, so that scaling H changes no code.

    Returns
    -------
    damped : ndarray, shape (n, n)
    dead : ndarray of bool, shape (n,)
    """
    H = np.array(H, np.float64)
    diagonal = np.diag(H)
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else 0.0
    H[np.diag_indices_from(H)] += np.where(dead, 1.0, damping * mean)
    return H, dead
