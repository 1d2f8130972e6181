"""What to quantize instead of a layer's weights if earlier layers have made errors already."""

from __future__ import annotations

from typing import Any

import numpy as np

import ptqkit._core as _core
from ptqkit.arrays._inputs import as_matrix, check_number, check_threads, label
from ptqkit.arrays.drift import Drift
from ptqkit.arrays.factorization import Factorization, as_hessian
from ptqkit.errors import NotPositiveDefiniteError, check_choice

__all__ = ["TARGETS", "propagate_error", "target_weights"]

#: Methods of :func:`target_weights`.
TARGETS = ("least-squares", "qronos", "gptaq")


def target_weights(
    W: Any,
    H: Any,
    G: Any = None,
    D: Any = None,
    *,
    alpha: float = 1.0,
    damping: float = 0.01,
    method: str = "least-squares",
    threads: int = 0,
    name: str | None = None,
) -> np.ndarray:
    """Return the weights to quantize instead of W if a layer's surroundings already carry errors.

    With x a layer's inputs in the float model and x~ those in the model quantized so far, the
    layer should give W x but sees x~. If its output is added to a stream, which is r in the float
    model and r~ by now, it can answer for that error too. The least squares of
    ``W* x~ + r~ - W x - r`` is reached at ``alpha`` = 1 of

        W + alpha [W (G - H) + D] (H + lambda I)^-1,  lambda = damping * mean(diag H, live inputs),

    which is to be quantized by any solver with the same H [QEP, section 4, is D = 0]. Computed in
    float64.

    Parameters
    ----------
    W : array or tensor, shape (out, in), floating point
    H : Hessian, Factorization or array, shape (in, in)
        ``(2/N) sum x~ x~^T``, of the quantized model's inputs. A Factorization tells the order of
        quantization, which all methods but "least-squares" depend on; otherwise it is the natural
        one.
    G : Drift or array, shape (in, in), optional
        ``(2/N) sum x x~^T`` over the same tokens, not symmetric; or a :class:`ptqkit.Drift` of x
        and x~, which is G - H. By default the inputs are the float model's. What matters is G - H:
        an array in float64 keeps the digits that float32 would lose.
    D : Drift or array, shape (out, in), optional
        ``(2/N) sum (r - r~) x~^T``.
    alpha : float
        From 0 (W as it is) to 1 (all of the correction, which follows the calibration data most).
    damping : float
        As in :func:`ptqkit.factorize`, and free to differ from the solver's; at 0 the plain least
        squares, if H is positive definite.
    method : {"least-squares", "qronos", "gptaq"}
        The others are published algorithms that, by this target, any solver runs. "qronos"
        [Qronos]: the first column is rounded from ``w + (W (G - H))_1 / H_11``, the others then
        are the least squares given that one. "gptaq" [GPTAQ]: what input q has drifted moves the
        columns after q alone, by that column's weight as it is (the authors' code takes it as
        updated by then, which differs in second order of the drift). Both without D.
    threads : int
        0 means automatic.
    name : str, optional
        Layer name for error messages.

    Returns
    -------
    ndarray of float32, shape (out, in)
        Equal to W if nothing has drifted. Weights of dead inputs (H_jj = 0) stay as they are.

    Raises
    ------
    NotPositiveDefiniteError
        If H cannot be factorized with this damping.
    TypeError, ValueError
        For a wrong dtype or shape, NaN or Inf, alpha outside [0, 1].

    References
    ----------
    [QEP] Arai and Ichikawa 2025, Quantization Error Propagation, arXiv 2504.09629.
    [Qronos] Zhang et al. 2025, arXiv 2505.11695. [GPTAQ] Li et al. 2025, arXiv 2504.02692.

    Examples
    --------
    >>> import numpy as np, ptqkit
    >>> rng = np.random.default_rng(0)
    >>> W, X = rng.normal(size=(8, 16)), rng.normal(size=(200, 16))
    >>> X_q = X + 0.1 * rng.normal(size=X.shape)
    >>> H, drift = ptqkit.Hessian(16), ptqkit.Drift(16, 16)
    >>> H.update(X_q)
    >>> drift.update(X, X_q)
    >>> q = ptqkit.gptq(ptqkit.target_weights(W, H, drift, alpha=0.5), H, group_size=16)
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
    check_choice(f"{label(name)}method", method, TARGETS)
    threads = check_threads(threads)
    if method != "least-squares" and D is not None:
        raise ValueError(f"{label(name)}method {method!r} takes no D; use 'least-squares'")
    W = as_matrix(W, "W", name, threads)
    matrix = as_hessian(H, name, threads, inputs=W.shape[1])
    drift = None if G is None else _drift(G, matrix, name)
    moved = None if D is None else _residual(D, W.shape, matrix, name)
    if alpha == 0 or not any(m is not None and m.any() for m in (drift, moved)):
        return W.copy()
    order = H.order if isinstance(H, Factorization) else np.arange(len(matrix))
    problem = _Problem(W, drift, moved, matrix, damping, threads, name)
    if method == "gptaq":
        correction = problem.later_columns(order)
    else:
        correction = problem.least_squares()
        if method == "qronos":
            problem.fix_first(correction, int(order[0]))
    with np.errstate(over="ignore"):
        result = (W + alpha * correction).astype(np.float32)
    if not np.isfinite(result).all():
        raise ValueError(
            f"{label(name)}the corrected weights are beyond float32: H is too close to singular at "
            f"damping {damping:g}. Raise damping"
        )
    return result


def propagate_error(
    W: Any, H: Any, G: Any, alpha: float, damping: float = 0.01, *, name: str | None = None
) -> np.ndarray:
    """Return ``target_weights(W, H, G, alpha=alpha, damping=damping)``: [QEP, section 4].

    See :func:`ptqkit.target_weights`, of which this is the case without D.

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
    return target_weights(W, H, G, alpha=alpha, damping=damping, name=name)


def _drift(G: Any, matrix: np.ndarray, name: str | None) -> np.ndarray:
    """Return G - H in float64; exactly 0 in the columns of dead inputs, as sums of x~_j = 0 are."""
    if isinstance(G, Drift):
        drift = G.matrix
        _check_shape(drift, matrix.shape, "G", "H", name)
    else:
        wide = isinstance(G, np.ndarray) and G.dtype == np.float64
        checked = as_matrix(G, "G", name)
        _check_shape(checked, matrix.shape, "G", "H", name)
        drift = np.subtract(G if wide else checked, matrix, dtype=np.float64)
    drift[:, np.diagonal(matrix) == 0] = 0.0
    return drift


def _residual(D: Any, shape: tuple[int, int], matrix: np.ndarray, name: str | None) -> np.ndarray:
    """Return D in float64, its columns of dead inputs 0."""
    if isinstance(D, Drift):
        moved = D.matrix
    else:
        wide = isinstance(D, np.ndarray) and D.dtype == np.float64
        checked = as_matrix(D, "D", name)
        moved = np.array(D if wide else checked, np.float64, order="C")
    _check_shape(moved, shape, "D", "W", name)
    moved[:, np.diagonal(matrix) == 0] = 0.0
    return moved


def _check_shape(
    found: np.ndarray, shape: tuple[int, ...], what: str, of: str, name: str | None
) -> None:
    if found.shape != shape:
        raise ValueError(
            f"{label(name)}{what} must have the shape {shape} of {of}, not {found.shape}"
        )


class _Problem:
    """The least squares ``(W F + D) (H + lambda I)^-1`` and its parts; F = G - H."""

    def __init__(
        self,
        W: np.ndarray,
        F: np.ndarray | None,
        D: np.ndarray | None,
        matrix: np.ndarray,
        damping: float,
        threads: int,
        name: str | None,
    ) -> None:
        self.W, self.F, self.D, self.matrix = W, F, D, matrix
        self.damping, self.threads, self.name = damping, threads, name
        diagonal = np.diagonal(matrix).astype(np.float64)
        live = diagonal != 0
        self.shift = np.where(live, damping * float(diagonal[live].mean()), 1.0)

    def _solve(
        self,
        W: np.ndarray | None,
        F: np.ndarray | None,
        D: np.ndarray | None,
        order: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return (W F + D) (H + lambda I)^-1; with an order, of H in that order and masked."""
        matrix, shift, below = self.matrix, self.shift, 0
        if order is not None:
            matrix, shift, below = matrix[np.ix_(order, order)], shift[order], 1
        rows = len(self.W) if W is not None else len(D)  # type: ignore[arg-type]
        out = np.empty((rows, len(matrix)), np.float64)
        failed = _core.target_correction(W, F, D, matrix, shift, below, out, self.threads)
        if failed < 0:
            return out
        failed = failed if order is None else int(order[failed])
        raise NotPositiveDefiniteError(
            f"{label(self.name)}the Hessian is not positive definite: the pivot of input {failed} "
            f"failed with damping {self.damping:g} of the mean diagonal. Use more calibration "
            "tokens or raise damping",
            failed,
            self.damping,
        )

    def least_squares(self) -> np.ndarray:
        """Return the whole correction, float64 (out, in)."""
        return self._solve(None if self.F is None else self.W, self.F, self.D)

    def fix_first(self, correction: np.ndarray, first: int) -> None:
        """Move the first column to where the others stay as they are, and the others after it.

        Given one column the least squares of the others is ``x + (v - x_1) P_1 / P_11``, with P
        the inverse of H + lambda I.
        """
        assert self.F is not None
        unit = np.zeros((1, len(self.matrix)))
        unit[0, first] = 1.0
        row = self._solve(None, None, unit)[0]
        alone = (self.W @ self.F[:, first]) / (self.matrix[first, first] + self.shift[first])
        correction += np.outer((alone - correction[:, first]) / row[first], row)

    def later_columns(self, order: np.ndarray) -> np.ndarray:
        """Return W M: row q of M is row q of F (H + lambda I)^-1 restricted to columns after q.

        With L L^T = H + lambda I in reversed order, F L^-T below its diagonal is what H^-1, the
        columns up to q eliminated, leaves of it.
        """
        assert self.F is not None
        turned = np.ascontiguousarray(order[::-1])
        M = self._solve(None, None, np.ascontiguousarray(self.F[np.ix_(turned, turned)]), turned)
        out = np.empty(self.W.shape, np.float64)
        out[:, turned] = self.W[:, turned].astype(np.float64) @ M
        return out
