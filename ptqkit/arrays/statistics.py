"""How hard activations are to quantize: errors on int8 grids, moments, magnitudes and outliers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

import ptqkit._core as _core
from ptqkit._repr import one_line_repr
from ptqkit.arrays._inputs import (
    NOT_FINITE,
    as_batch,
    check_count,
    check_number,
    check_threads,
)
from ptqkit.arrays.accumulator import Accumulator
from ptqkit.errors import CalibrationError

__all__ = ["ActivationStatistics"]

BINS, BINS_PER_OCTAVE, LARGEST = 8192, 32, 3
_ENERGY, _STD, _KURTOSIS, _VARIED, _TOKEN, _TENSOR = range(6)


@dataclass(frozen=True)
class Seen:
    """What one or more batches add up to; arrays are never written to.

    Attributes
    ----------
    tokens : int
    sums : ndarray of float64, shape (6,)
        As the core writes them.
    most, counts : ndarray, shape (channels,)
    histogram : ndarray of int64, shape (8192,)
    largest : tuple of (magnitude, token, channel)
        Tokens are counted from the first one seen.
    """

    __repr__ = one_line_repr

    tokens: int
    sums: np.ndarray
    most: np.ndarray
    counts: np.ndarray
    histogram: np.ndarray
    largest: tuple[tuple[float, int, int], ...]

    def plus(self, other: Seen) -> Seen:
        """Both, ``other`` after this."""
        later = [(value, token + self.tokens, channel) for value, token, channel in other.largest]
        largest = sorted([*self.largest, *later], key=lambda entry: -entry[0])[:LARGEST]
        return Seen(
            self.tokens + other.tokens,
            self.sums + other.sums,
            np.maximum(self.most, other.most),
            self.counts + other.counts,
            self.histogram + other.histogram,
            tuple(largest),
        )


class ActivationStatistics(Accumulator):
    """Streaming statistics of the input of a layer, one reading of every token.

    What [IPQS, section 4] measures at the input of a linear layer, and what later work added. All
    sums are in float64; an update that fails or is interrupted leaves everything as it was. Several
    threads may update one object.

    Parameters
    ----------
    channels : int
        Inputs of the layer.
    bits : int from 2 to 16
        Of the grids: symmetric, scale absmax / (2^(bits-1) - 1), without the lowest code.
    threshold : float
        Magnitude from which a value counts as an outlier [LLM.int8()].
    absmax : float, optional
        Largest magnitude of the one grid per tensor, beyond which values saturate. The range of a
        stream is not known before its end, so without it every update has a grid of its own: the
        tensor is what one call of :meth:`update` gets.
    threads : int
        Threads to use; 0 means automatic. Neither it nor the CPU level changes a bit of a result.

    Examples
    --------
    >>> import numpy as np, ptqkit
    >>> statistics = ptqkit.ActivationStatistics(64)
    >>> statistics.update(np.random.default_rng(0).normal(size=(4, 100, 64)))
    >>> statistics.tokens, round(statistics.std, 1)
    (400, 1.0)
    """

    def __init__(
        self,
        channels: int,
        *,
        bits: int = 8,
        threshold: float = 6.0,
        absmax: float | None = None,
        threads: int = 0,
    ) -> None:
        super().__init__()
        self.channels = check_count(channels, "channels", 1, 1 << 24)
        self.bits = check_count(bits, "bits", 2, 16)
        self.threshold = _positive(threshold, "threshold")
        self.absmax = None if absmax is None else _positive(absmax, "absmax")
        self.threads = check_threads(threads)
        self._seen: Seen | None = None  # replaced in one assignment: never half updated

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
        sums, histogram = np.empty(6), np.empty(BINS, np.int64)
        most, counts = np.empty(self.channels, np.float32), np.empty(self.channels, np.int64)
        largest, places = np.empty(LARGEST, np.float32), np.empty((LARGEST, 2), np.int64)
        try:
            _core.activation_statistics(
                X,
                dtype,
                rows,
                self.bits,
                self.threshold,
                self.absmax or 0.0,
                sums,
                most,
                counts,
                histogram,
                largest,
                places,
                self.threads,
            )
        except FloatingPointError:
            raise ValueError(NOT_FINITE) from None
        found = zip(largest.tolist(), places.tolist(), strict=True)
        entries = tuple((value, token, channel) for value, (token, channel) in found if value > 0)
        self._add(Seen(tokens, sums, most, counts, histogram, entries))

    def _add(self, seen: Seen) -> None:
        with self._lock:
            self._seen = seen if self._seen is None else self._seen.plus(seen)

    def merge(self, other: ActivationStatistics) -> None:
        """Add what ``other`` has seen, which must have the same options."""
        if not isinstance(other, ActivationStatistics):
            raise TypeError(f"other must be ActivationStatistics, not {type(other).__name__}")
        for name in ("channels", "bits", "threshold", "absmax"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"cannot merge {name}={getattr(other, name)} into {getattr(self, name)}"
                )
        seen = other._seen
        if seen is not None:
            self._add(seen)

    def copy(self) -> ActivationStatistics:
        """Return an independent copy."""
        result = ActivationStatistics(
            self.channels,
            bits=self.bits,
            threshold=self.threshold,
            absmax=self.absmax,
            threads=self.threads,
        )
        result._seen = self._seen
        return result

    def _state(self) -> Seen:
        seen = self._seen
        if seen is None:
            raise CalibrationError("the statistics have seen no token; call update(X) first")
        return seen

    def _mean(self, which: int) -> float:
        """Mean over all values of a sum of squares, and its root."""
        seen = self._state()
        return math.sqrt(seen.sums[which] / (seen.tokens * self.channels))

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        seen = self._seen
        return 0 if seen is None else seen.tokens

    @property
    def rms(self) -> float:
        """Root mean square of all values.

        This and the other values raise CalibrationError while no token has been seen.
        """
        return self._mean(_ENERGY)

    @property
    def rmse_token(self) -> float:
        """Root mean square error with one grid per token, as vector-wise int8 has it [IPQS]."""
        return self._mean(_TOKEN)

    @property
    def rmse_tensor(self) -> float:
        """Root mean square error with one grid per tensor; see ``absmax``."""
        return self._mean(_TENSOR)

    @property
    def std(self) -> float:
        """Standard deviation over the channels of a token, mean over tokens [IPQS]."""
        seen = self._state()
        return float(seen.sums[_STD] / seen.tokens)

    @property
    def kurtosis(self) -> float:
        """Excess kurtosis over the channels of a token, mean over tokens.

        It is 0 for a normal distribution. Tokens whose values are all equal have none and are left
        out; NaN if no token has one.
        """
        sums = self._state().sums
        return float(sums[_KURTOSIS] / sums[_VARIED]) if sums[_VARIED] else math.nan

    @property
    def largest(self) -> list[tuple[float, int, int]]:
        """Up to three largest magnitudes with their (token, channel), in falling order.

        Tokens are counted from the first one seen, masked ones left out; zeros are not listed.
        """
        return list(self._state().largest)

    @property
    def maximum(self) -> float:
        """Largest magnitude."""
        return float(self._state().most.max())

    @property
    def median(self) -> float:
        """Median magnitude (of two middle ones the lower), from the histogram.

        Off by less than 1.6 % of itself: half the width of a bin, the 32nd part of an octave. A
        median below 2^-126 counts as 0.
        """
        seen = self._state()
        middle = (seen.tokens * self.channels - 1) // 2
        index = int(np.searchsorted(np.cumsum(seen.histogram), middle, side="right"))
        low, high = _edges(np.array([index, index + 1]))
        return math.sqrt(low * high) if index >= BINS_PER_OCTAVE else 0.0

    @property
    def max_to_median(self) -> float:
        """Largest magnitude by the median; infinite where the median is 0."""
        return self.maximum / self.median if self.median else math.inf

    def histogram(self, bins_per_octave: int = 2) -> tuple[np.ndarray, np.ndarray]:
        """Return how many magnitudes lie in every bin between the smallest and the largest.

        Parameters
        ----------
        bins_per_octave : {1, 2, 4, 8, 16, 32}
            Bins of equal width in each octave [2^e, 2^(e+1)).

        Returns
        -------
        edges : ndarray of float64, shape (bins + 1,)
            0 and other magnitudes below 2^-126 are in no bin.
        counts : ndarray of int64, shape (bins,)
        """
        widths = (1, 2, 4, 8, 16, 32)
        if bins_per_octave not in widths:
            raise ValueError(f"bins_per_octave must be in {widths}, not {bins_per_octave!r}")
        join = BINS_PER_OCTAVE // bins_per_octave
        counts = self._state().histogram[BINS_PER_OCTAVE:].reshape(-1, join).sum(axis=1)
        filled = np.flatnonzero(counts)
        first, last = (filled[0], filled[-1] + 1) if len(filled) else (0, 0)
        edges = _edges(BINS_PER_OCTAVE + join * np.arange(first, last + 1))
        return edges, counts[first:last]

    @property
    def channel_absmax(self) -> np.ndarray:
        """Largest magnitude of each channel, float32 (channels,)."""
        return self._state().most.copy()

    @property
    def channel_counts(self) -> np.ndarray:
        """Tokens with a magnitude of at least ``threshold``, int64 (channels,)."""
        return self._state().counts.copy()

    def __repr__(self) -> str:
        return f"ActivationStatistics(channels={self.channels}, tokens={self.tokens})"


def _edges(index: np.ndarray) -> np.ndarray:
    """Lower edges of histogram bins: the magnitude whose upper bits are the index."""
    octave, part = np.divmod(np.asarray(index, np.int64), BINS_PER_OCTAVE)
    return np.ldexp(1.0 + part / BINS_PER_OCTAVE, octave - 127)


def _positive(value: Any, what: str) -> float:
    value = float(np.float32(check_number(value, what)))
    if not 0 < value < math.inf:
        raise ValueError(f"{what} must be a positive number, not {value!r}")
    return value
