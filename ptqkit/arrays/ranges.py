"""Accumulate minimum, maximum and mean of a layer's input channels over batches of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

import ptqkit._core as _core
from ptqkit.arrays._inputs import NOT_FINITE, as_batch, as_vector, check_count, check_threads
from ptqkit.arrays.accumulator import Accumulator
from ptqkit.errors import CalibrationError

__all__ = ["ChannelRanges", "batch_ranges", "span_of"]


def _read_only(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


def batch_ranges(
    X: np.ndarray, dtype: int, rows: np.ndarray | None, threads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return minimum and maximum (float32) and sum (float64) of every column of the given rows.

    Arguments as :func:`ptqkit.arrays._inputs.as_batch` returns them, at least one row; raises
    FloatingPointError for NaN and Inf.
    """
    low, high = np.empty((2, X.shape[1]), np.float32)
    total = np.empty(X.shape[1], np.float64)
    _core.channel_ranges(X, dtype, rows, low, high, total, threads)
    return low, high, total


class ChannelRanges(Accumulator):
    """Accumulate minimum, maximum and mean of every input channel of a linear layer.

    Equalization and static activation grids are computed from them [AWEQ, section 3.2]. The
    activations themselves are not kept; sums are in float64. An update that fails or is interrupted
    leaves everything as it was. Several threads may update one object.

    Parameters
    ----------
    channels : int
        Inputs of the layer.
    threads : int
        Threads to use; 0 means automatic. No result depends on it.

    Examples
    --------
    >>> import numpy as np, ptqkit
    >>> ranges = ptqkit.ChannelRanges(64)
    >>> ranges.update(np.random.default_rng(0).normal(size=(4, 100, 64)))
    >>> ranges.tokens, ranges.span.shape
    (400, (64,))
    """

    def __init__(self, channels: int, *, threads: int = 0) -> None:
        super().__init__()
        self.channels = check_count(channels, "channels", 1, 1 << 24)
        self.threads = check_threads(threads)
        # (minimum, maximum, sum, tokens), replaced in one assignment: never half updated
        self._seen: tuple[np.ndarray, np.ndarray, np.ndarray, int] | None = None

    @classmethod
    def from_arrays(
        cls, minimum: Any, maximum: Any, mean: Any, tokens: int, *, threads: int = 0
    ) -> ChannelRanges:
        """Return the ranges with the given values, of ``tokens`` tokens.

        Parameters
        ----------
        minimum, maximum, mean : array, shape (channels,)
            Finite, with minimum <= mean <= maximum up to rounding.
        tokens : int
            At least 1.
        """
        tokens = check_count(tokens, "tokens", 1, 1 << 62)
        low, high = (
            as_vector(minimum, "minimum", np.float32),
            as_vector(maximum, "maximum", np.float32),
        )
        middle = as_vector(mean, "mean")
        if not len(low) == len(high) == len(middle):
            raise ValueError(
                f"minimum, maximum and mean must have one length, not {len(low)}, {len(high)} "
                f"and {len(middle)}"
            )
        slack = 1e-6 * np.maximum(np.abs(low), np.abs(high)).astype(np.float64)
        wrong = (low > high) | (middle < low - slack) | (middle > high + slack)
        if wrong.any():
            raise ValueError(
                f"minimum <= mean <= maximum does not hold for channel {int(wrong.argmax())}"
            )
        result = cls(len(low), threads=threads)
        result._seen = (_read_only(low), _read_only(high), middle * tokens, tokens)
        return result

    def update(self, X: Any, mask: Any = None) -> None:
        """Add a batch of inputs.

        Parameters
        ----------
        X : array or torch tensor, shape (..., channels)
            float32, float16 or bfloat16 (tensor); float64 is rounded to float32.
        mask : array or tensor of bool or int, shape (...), optional
            Tokens that count (an attention mask); padding must not.

        Raises
        ------
        ValueError
            Wrong shape, or NaN or Inf in X; what was seen before is left as it was.
        TypeError
            X is not floating point.
        """
        X, dtype, rows, tokens = as_batch(X, mask, self.channels)
        if tokens == 0:
            return
        try:
            low, high, total = batch_ranges(X, dtype, rows, self.threads)
        except FloatingPointError:
            raise ValueError(NOT_FINITE) from None
        self._add(low, high, total, tokens)

    def _add(self, low: np.ndarray, high: np.ndarray, total: np.ndarray, tokens: int) -> None:
        with self._lock:
            if self._seen is not None:
                low, high = np.minimum(low, self._seen[0]), np.maximum(high, self._seen[1])
                total, tokens = total + self._seen[2], tokens + self._seen[3]
            self._seen = (_read_only(low), _read_only(high), total, tokens)

    def merge(self, other: ChannelRanges) -> None:
        """Add what ``other`` has seen."""
        if not isinstance(other, ChannelRanges):
            raise TypeError(f"other must be ChannelRanges, not {type(other).__name__}")
        if other.channels != self.channels:
            raise ValueError(f"cannot merge {other.channels} channels into {self.channels}")
        seen = other._seen
        if seen is not None:
            self._add(*seen)

    def copy(self) -> ChannelRanges:
        """Return an independent copy."""
        result = ChannelRanges(self.channels, threads=self.threads)
        result._seen = self._seen  # never written to, so it can be shared
        return result

    def finish(self) -> ChannelRanges:
        """Return the ranges themselves: accumulators on other devices return some."""
        return self

    def _state(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        seen = self._seen
        if seen is None:
            raise CalibrationError("the ranges have seen no token; call update(X) first")
        return seen

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        seen = self._seen
        return 0 if seen is None else seen[3]

    @property
    def minimum(self) -> np.ndarray:
        """Smallest value of each channel, read-only float32 (channels,).

        This and the other values raise CalibrationError if no token has been seen yet.
        """
        return self._state()[0]

    @property
    def maximum(self) -> np.ndarray:
        """Largest value of each channel, read-only float32 (channels,)."""
        return self._state()[1]

    @property
    def absmax(self) -> np.ndarray:
        """Largest absolute value of each channel, float32 (channels,)."""
        low, high = self._state()[:2]
        return np.maximum(-low, high) + np.float32(0)  # no negative zero

    @property
    def span(self) -> np.ndarray:
        """r^X of [AWEQ, eq. 10], maximum - minimum; float32 (channels,), never infinite."""
        low, high = self._state()[:2]
        return span_of(low, high)

    @property
    def mean(self) -> np.ndarray:
        """Mean of each channel, float64 (channels,)."""
        total, tokens = self._state()[2:]
        return total / tokens

    def __repr__(self) -> str:
        return f"ChannelRanges(channels={self.channels}, tokens={self.tokens})"


def span_of(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return high - low as float32, at most its largest finite number."""
    wide = high.astype(np.float64) - low
    return np.minimum(wide, np.finfo(np.float32).max).astype(np.float32)
