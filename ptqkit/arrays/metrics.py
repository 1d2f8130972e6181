"""Measure the signal-to-quantization-noise ratio, streaming or at once."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

import ptqkit._core as _core
from ptqkit.arrays._inputs import as_pair, check_count, check_threads
from ptqkit.arrays.accumulator import Accumulator
from ptqkit.errors import CalibrationError, check_choice

__all__ = ["SQNR", "signal_to_error", "sqnr"]

PER = ("sample", "tensor", "channel")


class _Seen(NamedTuple):
    """State of an SQNR; also what one batch adds to it."""

    samples: int = 0
    infinite: int = 0
    ratio: float = 0.0  # sum over the samples whose error is not zero
    energy: np.ndarray | None = None  # signal, noise: (2,) or (2, channels)


class SQNR(Accumulator):
    """Accumulate a signal-to-quantization-noise ratio in decibels [SBC, eq. 1], sums in double.

    An update that fails or is interrupted leaves everything as it was. Several threads may update
    one object.

    Parameters
    ----------
    per : {"sample", "tensor", "channel"}
        "sample": ``10 log10(mean of ||x||^2 / ||y - x||^2)`` over the samples along axis 0: the
        mean of ratios is inside the logarithm. "tensor": the ratio of the two sums over all.
        "channel": the ratio of sums of each channel.
    channel_axis : int
        Axis of the channels, for per="channel" only.
    threads : int
        0 means automatic. Neither it nor the CPU level changes a bit of the result.

    Examples
    --------
    >>> import numpy as np, ptqkit
    >>> x = np.ones((4, 10))
    >>> meter = ptqkit.SQNR()
    >>> meter.update(x, x + 0.1)
    >>> round(meter.decibel, 6), meter.count, meter.infinite
    (20.0, 4, 0)
    """

    def __init__(self, per: str = "sample", *, channel_axis: int = -1, threads: int = 0) -> None:
        super().__init__()
        check_choice("per", per, PER)
        self.per = per
        self.channel_axis = check_count(channel_axis, "channel_axis", -64, 64)
        self.threads = check_threads(threads)
        self._seen = _Seen()  # replaced in one assignment, its array never written to

    @property
    def count(self) -> int:
        """Samples seen."""
        return self._seen.samples

    def update(self, reference: Any, quantized: Any) -> None:
        """Add samples.

        Parameters
        ----------
        reference, quantized : array or tensor, shape (samples, ...)
            Any floating point; float64 if either is, else compared in float32.

        Raises
        ------
        ValueError
            Shapes that differ, nothing in them, NaN or Inf; what was seen is left as it was.
        TypeError
            Not floating point.
        """
        x, y = as_pair(reference, quantized, "reference", "quantized")
        if x.ndim == 0 or x.size == 0:
            raise ValueError(
                f"reference must have at least one element and one axis, not {x.shape}"
            )
        energy = self._channels(x, y) if self.per == "channel" else self._samples(x, y)
        if not np.isfinite(energy).all():
            raise ValueError(
                "reference or quantized holds NaN or Inf (or values whose square overflows); "
                "the batch was not added"
            )
        if self.per != "sample":
            self._add(_Seen(len(x), energy=energy))
        else:
            signal, noise = energy.T
            exact = noise == 0
            ratio = math.fsum(signal[~exact] / noise[~exact])
            self._add(_Seen(len(x), int(exact.sum()), ratio))

    def _add(self, batch: _Seen) -> None:
        with self._lock:
            seen = self._seen
            energy = batch.energy if seen.energy is None else seen.energy
            if seen.energy is not None and batch.energy is not None:
                if seen.energy.shape != batch.energy.shape:
                    raise ValueError(
                        f"there were {seen.energy.shape[1]} channels before, now "
                        f"{batch.energy.shape[1]}"
                    )
                energy = seen.energy + batch.energy
            self._seen = _Seen(
                seen.samples + batch.samples,
                seen.infinite + batch.infinite,
                seen.ratio + batch.ratio,
                energy,
            )

    def _samples(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the energies of signal and noise, (samples, 2), or (2,) of all."""
        whole = self.per == "tensor"
        shape = (1 if whole else len(x), -1)
        out = np.empty((1 if whole else len(x), 2))
        _core.energy(x.reshape(shape), y.reshape(shape), out, self.threads)
        return out[0] if whole else out

    def _channels(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the energies of signal and noise, (2, channels)."""
        axis = self.channel_axis + (x.ndim if self.channel_axis < 0 else 0)
        if not 0 <= axis < x.ndim:
            raise ValueError(f"channel_axis is {self.channel_axis}, but there are {x.ndim} axes")
        channels, inner = x.shape[axis], math.prod(x.shape[axis + 1 :])
        if inner == 1:
            out = np.empty((2, channels))
            shape: tuple[int, ...] = (-1, channels)
            _core.energy_columns(x.reshape(shape), y.reshape(shape), out, self.threads)
            return out
        parts = np.empty((x.size // inner, 2))
        _core.energy(x.reshape(-1, inner), y.reshape(-1, inner), parts, self.threads)
        return parts.reshape(-1, channels, 2).sum(axis=0).T

    def merge(self, other: SQNR) -> None:
        """Add what ``other`` has seen; ``per`` must be the same."""
        if not isinstance(other, SQNR):
            raise TypeError(f"other must be an SQNR, not {type(other).__name__}")
        if (self.per, self.per == "channel" and self.channel_axis) != (
            other.per,
            other.per == "channel" and other.channel_axis,
        ):
            raise ValueError(f"cannot merge an SQNR per {other.per} into one per {self.per}")
        self._add(other._seen)

    @property
    def infinite(self) -> int:
        """Samples (channels; 1 for the tensor) with zero error: one makes the mean +Inf."""
        seen = self._seen
        if self.per == "sample":
            return seen.infinite
        return 0 if seen.energy is None else int(np.sum(seen.energy[1] == 0))

    def _state(self) -> _Seen:
        seen = self._seen
        if seen.samples == 0:
            raise CalibrationError("the SQNR has seen no sample; call update() first")
        return seen

    @property
    def decibel(self) -> float | np.ndarray:
        """SQNR in dB: a float, or float64 (channels,); +Inf if the error is zero.

        A signal of zero with a nonzero error is -Inf.
        """
        seen = self._state()
        if self.per == "sample":
            return math.inf if seen.infinite else _decibel(seen.ratio / seen.samples)
        assert seen.energy is not None
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(seen.energy[1] == 0, np.inf, seen.energy[0] / seen.energy[1])
            found = 10.0 * np.log10(ratio)
        return float(found) if self.per == "tensor" else found

    @property
    def finite_decibel(self) -> float:
        """SQNR per sample over the samples whose error is not zero; NaN if there are none."""
        if self.per != "sample":
            raise ValueError(f"finite_decibel is of an SQNR per sample, not per {self.per}")
        seen = self._state()
        finite = seen.samples - seen.infinite
        return _decibel(seen.ratio / finite) if finite else math.nan

    def __repr__(self) -> str:
        return f"SQNR(per={self.per!r}, count={self.count})"


def signal_to_error(signal: float, error: float) -> float:
    """Return a ratio of powers in dB: NaN without a signal or if one is NaN, +Inf without error."""
    if math.isnan(signal) or math.isnan(error) or signal <= 0:
        return math.nan
    return math.inf if error <= 0 else 10 * math.log10(signal / error)


def _decibel(ratio: float) -> float:
    return 10.0 * math.log10(ratio) if ratio > 0 else -math.inf


def sqnr(
    reference: Any,
    quantized: Any,
    per: str = "sample",
    *,
    channel_axis: int = -1,
    threads: int = 0,
) -> float | np.ndarray:
    """Return the signal-to-quantization-noise ratio in dB [SBC, eq. 1]; see :class:`SQNR`.

    Returns
    -------
    float, or ndarray of float64, shape (channels,)
    """
    meter = SQNR(per, channel_axis=channel_axis, threads=threads)
    meter.update(reference, quantized)
    return meter.decibel
