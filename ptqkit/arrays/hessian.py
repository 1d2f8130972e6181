"""Accumulate the layer Hessian H = (2/N) sum x x^T over batches of inputs."""

from __future__ import annotations

from typing import Any

import numpy as np

import ptqkit._core as _core
from ptqkit.arrays._inputs import NOT_FINITE, as_batch, as_matrix, check_count, check_threads
from ptqkit.errors import CalibrationError

__all__ = ["SYMMETRY_TOLERANCE", "Hessian"]

SYMMETRY_TOLERANCE = 1e-4  # of the largest entry of H


class Hessian:
    """Accumulate the Hessian of a linear layer, ``H = (2/N) * sum_t x_t x_t^T`` [GPTQ, section 3].

    Only one triangle is accumulated, in float32. If the CPU can, bfloat16 inputs are multiplied
    without being widened (the products are exact in float32).

    Parameters
    ----------
    in_features : int
        Inputs of the layer.
    threads : int
        Threads to use; 0 means automatic.

    Examples
    --------
    >>> import numpy as np, ptqkit
    >>> H = ptqkit.Hessian(64)
    >>> H.update(np.random.default_rng(0).normal(size=(4, 100, 64)))
    >>> H.tokens, H.matrix.shape
    (400, (64, 64))
    """

    def __init__(self, in_features: int, *, threads: int = 0) -> None:
        self.in_features = check_count(in_features, "in_features", 1, 1 << 24)
        self.threads = check_threads(threads)
        self.tokens = 0
        self._sum = np.zeros((self.in_features, self.in_features), np.float32)
        self._matrix: np.ndarray | None = None
        self._interrupted = False  # an interrupted update has left part of a batch in the sum

    @classmethod
    def from_matrix(cls, matrix: Any, tokens: int, *, threads: int = 0) -> Hessian:
        """Return the Hessian with a given value, float32 (n, n), of ``tokens`` tokens."""
        matrix = as_matrix(matrix, "matrix")
        if matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must be square, but has shape {matrix.shape}")
        tolerance = SYMMETRY_TOLERANCE * float(np.abs(np.diagonal(matrix)).max())
        if _core.symmetric_check(matrix, tolerance, check_threads(threads)):
            raise ValueError("matrix must be symmetric: it is the Hessian (2/N) X^T X")
        result = cls(len(matrix), threads=threads)
        result.tokens = check_count(tokens, "tokens", 1, 1 << 62)
        result._sum = matrix * np.float32(tokens / 2.0)
        return result

    def _check_whole(self) -> None:
        if self._interrupted:
            raise CalibrationError(
                "an update of the Hessian was interrupted and part of its batch is in the sum; "
                "accumulate into a new Hessian"
            )

    def update(self, X: Any, mask: Any = None) -> None:
        """Add a batch of inputs.

        Parameters
        ----------
        X : array or torch tensor, shape (..., in_features)
            float32, float16 or bfloat16 (tensor); float64 is rounded to float32.
        mask : array or tensor of bool or int, shape (...), optional
            Tokens that count (an attention mask); padding must not.

        Raises
        ------
        ValueError
            Wrong shape, or NaN or Inf in X; the accumulated value is left as it was.
        TypeError
            X is not floating point.
        """
        self._check_whole()
        X, dtype, rows, tokens = as_batch(X, mask, self.in_features)
        try:
            _core.hessian_update(self._sum, X, dtype, rows, self.threads)
        except FloatingPointError:
            raise ValueError(NOT_FINITE) from None
        except KeyboardInterrupt:
            self._interrupted = True
            raise
        self.tokens += tokens
        self._matrix = None

    def merge(self, other: Hessian) -> None:
        """Add what ``other`` has seen: H = (N1 H1 + N2 H2) / (N1 + N2)."""
        if not isinstance(other, Hessian):
            raise TypeError(f"other must be a Hessian, not {type(other).__name__}")
        if other.in_features != self.in_features:
            raise ValueError(f"cannot merge {other.in_features} inputs into {self.in_features}")
        self._check_whole()
        other._check_whole()
        self._sum += other._sum
        self.tokens += other.tokens
        self._matrix = None

    def copy(self) -> Hessian:
        """Return an independent copy."""
        result = Hessian(self.in_features, threads=self.threads)
        result._sum[...] = self._sum
        result.tokens = self.tokens
        result._interrupted = self._interrupted
        return result

    def finish(self) -> Hessian:
        """Return the Hessian itself: accumulators on other devices return one."""
        return self

    @property
    def matrix(self) -> np.ndarray:
        """H as a read-only float32 array (in_features, in_features).

        Raises
        ------
        CalibrationError
            If no token has been seen, or an update was interrupted.
        """
        self._check_whole()
        if self.tokens == 0:
            raise CalibrationError("the Hessian has seen no token; call update(X) first")
        if self._matrix is None:
            out = np.empty_like(self._sum)
            _core.hessian_finish(self._sum, out, 2.0 / self.tokens, self.threads)
            out.flags.writeable = False
            self._matrix = out
        return self._matrix

    def __repr__(self) -> str:
        return f"Hessian(in_features={self.in_features}, tokens={self.tokens})"
