"""Accumulate how far the values of a model have moved, against a layer's inputs, over batches."""

from __future__ import annotations

from typing import Any

import numpy as np

import ptqkit._core as _core
from ptqkit.arrays._inputs import (
    BF16,
    F32,
    as_mask,
    as_matrix,
    as_tokens,
    check_count,
    check_threads,
    widen,
)
from ptqkit.arrays.accumulator import MatrixSum
from ptqkit.errors import CalibrationError

__all__ = ["Drift", "moved_outputs"]

_NOT_FINITE = (
    "the values hold NaN or Inf; the batch was not added. Check the calibration data and the "
    "model's dtype (float16 overflows easily)"
)
_TOO_LARGE = (
    "values are so large (about 1e18) that their products may add up beyond float32; the batch was "
    "not added. Check the calibration data, or scale it down"
)


class Drift(MatrixSum):
    """Accumulate ``(2/N) * sum_t (a_t - b_t) x_t^T``, in float32.

    With a what a value is in the float model and b what it is in the quantized one, x the inputs of
    a layer there: of the inputs themselves (b = x) it is G - H, and of the stream that the layer's
    output is added to it is D, see :func:`ptqkit.target_weights`. Differences are added and
    not moments of a and b alone, whose rounding errors would be as large as what matters if the two
    paths are close; if they are equal it is exactly 0. Several threads may update one object.

    Parameters
    ----------
    features : int
        Of a and b.
    in_features : int
        Of x.
    threads : int
        Threads to use; 0 means automatic.

    Examples
    --------
    >>> import numpy as np, ptqkit
    >>> x = np.random.default_rng(0).normal(size=(4, 100, 64))
    >>> drift = ptqkit.Drift(64, 64)
    >>> drift.update(x, x + 0.01)
    >>> drift.tokens, drift.matrix.shape
    (400, (64, 64))
    """

    _quantity = "drift"

    def __init__(self, features: int, in_features: int, *, threads: int = 0) -> None:
        self.features = check_count(features, "features", 1, 1 << 24)
        self.in_features = check_count(in_features, "in_features", 1, 1 << 24)
        self.threads = check_threads(threads)
        super().__init__(self.features, self.in_features)

    @classmethod
    def from_matrix(cls, matrix: Any, tokens: int, *, threads: int = 0) -> Drift:
        """Return the drift with a given value, float32 (features, in), of ``tokens`` tokens."""
        matrix = as_matrix(matrix, "matrix")
        result = cls(*matrix.shape, threads=threads)
        result.tokens = check_count(tokens, "tokens", 1, 1 << 62)
        with np.errstate(over="ignore"):
            result._sum = matrix * np.float32(tokens / 2.0)
        if not np.isfinite(result._sum).all():
            raise ValueError(f"matrix * tokens / 2 overflows float32 at {tokens} tokens")
        return result

    def update(self, floats: Any, quantized: Any, inputs: Any = None, mask: Any = None) -> None:
        """Add a batch.

        Parameters
        ----------
        floats, quantized : array or torch tensor, shape (..., features)
            a and b: float32, float16 or bfloat16 (tensor); float64 is rounded to float32.
        inputs : array or tensor, shape (..., in_features), optional
            x, of the same tokens; by default ``quantized``.
        mask : array or tensor of bool or int, shape (...), optional
            Tokens that count (an attention mask); padding must not.

        Raises
        ------
        ValueError
            Wrong shape, NaN or Inf, or values so large that sums may leave float32; what is
            accumulated is left as it was.
        TypeError
            Values are not floating point.
        CalibrationError
            An earlier update was interrupted, by Ctrl-C or an exception of a signal handler.
        """
        if inputs is None:
            inputs = quantized
        widths = (self.features, self.features, self.in_features)
        batches = [
            as_tokens(v, n) for v, n in zip((floats, quantized, inputs), widths, strict=True)
        ]
        (a, _, _), (b, _, _), (x, dtype, shape) = batches
        if not len(a) == len(b) == len(x):
            raise ValueError(
                f"floats, quantized and inputs must be of the same tokens, not of {len(a)}, "
                f"{len(b)} and {len(x)}"
            )
        if len({kind for _, kind, _ in batches}) > 1:
            a, b, x = (_as_float32(v, kind) for v, kind, _ in batches)
            dtype = F32
        rows = None if mask is None else as_mask(mask, shape[:-1])
        if rows is not None and len(rows) == len(x):
            rows = None

        def write() -> None:
            _core.cross_update(self._sum, a, b, x, dtype, rows, self.threads)

        self._add_batch(write, len(x) if rows is None else len(rows), _NOT_FINITE, _TOO_LARGE)

    def merge(self, other: Drift) -> None:
        """Add what ``other`` has seen: (N1 D1 + N2 D2) / (N1 + N2)."""
        if not isinstance(other, Drift):
            raise TypeError(f"other must be a Drift, not {type(other).__name__}")
        if other._sum.shape != self._sum.shape:
            raise ValueError(f"cannot merge a drift of {other._sum.shape} into {self._sum.shape}")
        first, second = sorted((self._lock, other._lock), key=id)  # one order for all threads
        with first, second:
            self._check_whole()
            other._check_whole()
            with np.errstate(over="ignore"):
                total = self._sum + other._sum
            if not np.isfinite(total).all():
                raise ValueError("the two sums together overflow float32; nothing was added")
            self._torn = True
            self._sum = total
            self.tokens += other.tokens
            self._torn = False

    def copy(self) -> Drift:
        """Return an independent copy."""
        result = Drift(self.features, self.in_features, threads=self.threads)
        with self._lock:
            result._sum[...] = self._sum
            result.tokens = self.tokens
            result._torn = self._torn
        return result

    def rows(self, start: int, stop: int) -> Drift:
        """Return an independent copy of features ``start:stop``."""
        with self._lock:
            part = self._sum[start:stop]
            result = Drift(len(part), self.in_features, threads=self.threads)
            result._sum[...] = part
            result.tokens = self.tokens
            result._torn = self._torn
        return result

    def finish(self) -> Drift:
        """Return the drift itself: accumulators on other devices return one."""
        return self

    @property
    def matrix(self) -> np.ndarray:
        """The mean as a new array, float64 (features, in_features).

        Raises
        ------
        CalibrationError
            If no token has been seen, or an update was interrupted.
        """
        with self._lock:
            self._check_whole()
            if self.tokens == 0:
                raise CalibrationError("the drift has seen no token; call update() first")
            return np.multiply(self._sum, 2.0 / self.tokens, dtype=np.float64)

    def __repr__(self) -> str:
        return (
            f"Drift(features={self.features}, in_features={self.in_features}, tokens={self.tokens})"
        )


def _as_float32(values: np.ndarray, kind: int) -> np.ndarray:
    """Return tokens of any dtype as float32."""
    return widen(values) if kind == BF16 else np.ascontiguousarray(values, np.float32)


def moved_outputs(outputs: Any, W: np.ndarray, floats: Any, quantized: Any) -> np.ndarray:
    """Return outputs of a layer and by how much they move if its inputs do: ``+ W (x - x~)``.

    Parameters
    ----------
    outputs : array or torch tensor, floating point, shape (..., out)
    W : ndarray of float32, shape (out, in)
    floats, quantized : array or torch tensor, floating point, shape (..., in)
        x and x~, of the same tokens; if they are equal the outputs are as they were.

    Returns
    -------
    ndarray of float32, shape (tokens, out)
    """
    x, y = (_as_float32(*as_tokens(v, W.shape[1])[:2]) for v in (floats, quantized))
    moved = np.array(_as_float32(*as_tokens(outputs, len(W))[:2]), order="C")
    _core.moved_outputs(x, y, W, moved, 0)
    return moved
