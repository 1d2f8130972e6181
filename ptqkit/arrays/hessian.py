"""Accumulate the layer Hessian H = (2/N) sum x x^T over batches of inputs."""

from __future__ import annotations

from typing import Any

import numpy as np

import ptqkit._core as _core
from ptqkit.arrays._inputs import (
    NOT_FINITE,
    TOO_LARGE,
    as_batch,
    as_matrix,
    check_count,
    check_threads,
)
from ptqkit.arrays.accumulator import MatrixSum
from ptqkit.errors import CalibrationError

__all__ = ["SYMMETRY_TOLERANCE", "Hessian"]

SYMMETRY_TOLERANCE = 1e-4  # of the largest entry of H


class Hessian(MatrixSum):
    """Accumulate the Hessian of a linear layer, ``H = (2/N) * sum_t x_t x_t^T`` [GPTQ, section 3].

    Only one triangle is accumulated, in float32. If the CPU can, bfloat16 inputs are multiplied
    without being widened (the products are exact in float32). Several threads may update one
    object.

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

    _quantity = "Hessian"

    def __init__(self, in_features: int, *, threads: int = 0) -> None:
        self.in_features = check_count(in_features, "in_features", 1, 1 << 24)
        self.threads = check_threads(threads)
        super().__init__(self.in_features, self.in_features)
        self._matrix: np.ndarray | None = None
        self._lazy = False  # whether the sum has yet to be made of the mean

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
        with np.errstate(over="ignore"):
            result._sum = matrix * np.float32(tokens / 2.0)
        if not np.isfinite(result._sum.diagonal()).all():
            raise ValueError(f"matrix * tokens / 2 overflows float32 at {tokens} tokens")
        return result

    @classmethod
    def of_mean(cls, matrix: np.ndarray, tokens: int) -> Hessian:
        """As :meth:`from_matrix`, of a symmetric, finite matrix, which it keeps: for accumulators.

        The sum is made if anything asks for it.
        """
        result = cls(len(matrix))
        result.tokens = tokens
        matrix.flags.writeable = False
        result._matrix, result._lazy = matrix, True
        return result

    def _make_sum(self) -> None:
        """Make the sum of a mean that was given."""
        if self._lazy and self._matrix is not None:
            np.multiply(self._matrix, np.float32(self.tokens / 2.0), out=self._sum)
            self._lazy = False

    def update(self, X: Any, mask: Any = None) -> None:
        """Add a batch of inputs.

        Parameters
        ----------
        X : array or torch tensor, shape (..., in_features)
            float32, float16 or bfloat16 (tensor); float64 is rounded to float32. CPUs that multiply
            bfloat16 (AVX512_BF16, AMX) take values and sums below 2**-126 for 0.
        mask : array or tensor of bool or int, shape (...), optional
            Tokens that count (an attention mask); padding must not.

        Raises
        ------
        ValueError
            Wrong shape, NaN or Inf in X, or sums of squares beyond float32; the accumulated value
            is left as it was.
        TypeError
            X is not floating point.
        CalibrationError
            An earlier update was interrupted, by Ctrl-C or an exception of a signal handler.
        """
        X, dtype, rows, tokens = as_batch(X, mask, self.in_features)

        def write() -> None:
            self._make_sum()
            _core.hessian_update(self._sum, X, dtype, rows, self.threads)
            self._matrix = None

        self._add_batch(write, tokens, NOT_FINITE, TOO_LARGE)

    def merge(self, other: Hessian) -> None:
        """Add what ``other`` has seen: H = (N1 H1 + N2 H2) / (N1 + N2)."""
        if not isinstance(other, Hessian):
            raise TypeError(f"other must be a Hessian, not {type(other).__name__}")
        if other.in_features != self.in_features:
            raise ValueError(f"cannot merge {other.in_features} inputs into {self.in_features}")
        first, second = sorted((self._lock, other._lock), key=id)  # one order for all threads
        with first, second:
            self._check_whole()
            other._check_whole()
            self._make_sum()
            other._make_sum()
            with np.errstate(over="ignore"):
                diagonal = self._sum.diagonal() + other._sum.diagonal()
            if not np.isfinite(diagonal).all():
                raise ValueError("the two sums together overflow float32; nothing was added")
            self._torn = True
            self._sum += other._sum
            self.tokens += other.tokens
            self._matrix = None
            self._torn = False

    def copy(self) -> Hessian:
        """Return an independent copy."""
        result = Hessian(self.in_features, threads=self.threads)
        with self._lock:
            self._make_sum()
            result._sum[...] = self._sum
            result.tokens = self.tokens
            result._torn = self._torn
        return result

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            self._make_sum()
            return {**super().__getstate__(), "_matrix": None}

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
        with self._lock:
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
