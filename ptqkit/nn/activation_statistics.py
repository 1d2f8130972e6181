"""Statistics of activations where they are: by the core on the host, by torch on a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ptqkit.arrays.accumulator import Accumulator
from ptqkit.arrays.statistics import BINS, LARGEST, ActivationStatistics, Seen
from ptqkit.errors import CalibrationError

__all__ = ["TorchActivationStatistics", "statistics_accumulator"]

_CHUNK = 1 << 22
"""Values that are widened to float64 at a time."""


class _Sums(NamedTuple):
    """What :class:`ptqkit.arrays.statistics.Seen` holds, on a device; never written to."""

    tokens: int
    sums: torch.Tensor
    most: torch.Tensor
    counts: torch.Tensor
    histogram: torch.Tensor
    largest: torch.Tensor
    places: torch.Tensor
    finite: torch.Tensor

    def plus(self, other: _Sums) -> _Sums:
        """Both, ``other`` after this; its places count from the first token of all."""
        values = torch.cat([self.largest, other.largest])
        largest, kept = values.topk(min(LARGEST, len(values)))
        return _Sums(
            self.tokens + other.tokens,
            self.sums + other.sums,
            torch.maximum(self.most, other.most),
            self.counts + other.counts,
            self.histogram + other.histogram,
            largest,
            torch.cat([self.places, other.places + self.tokens * len(self.most)])[kept],
            self.finite & other.finite,
        )


class TorchActivationStatistics(Accumulator):
    """The same as :class:`ptqkit.ActivationStatistics`, accumulated by torch on a device.

    Nothing waits for the device before :meth:`finish`. Sums are in float64 and differ from the
    core's in their last bits; of equal largest magnitudes any may be listed.

    Parameters
    ----------
    channels : int
    device : torch.device or str
    bits, threshold
        Of :class:`ptqkit.ActivationStatistics`; every update has a tensor grid of its own.
    """

    def __init__(
        self,
        channels: int,
        device: torch.device | str,
        *,
        bits: int = 8,
        threshold: float = 6.0,
    ) -> None:
        super().__init__()
        self.channels, self.bits, self.threshold = channels, bits, threshold
        # replaced in one assignment: never half updated
        self._seen = _Sums(
            0,
            torch.zeros(6, dtype=torch.float64, device=device),
            torch.zeros(channels, dtype=torch.float32, device=device),
            torch.zeros(channels, dtype=torch.int64, device=device),
            torch.zeros(BINS, dtype=torch.int64, device=device),
            torch.zeros(0, dtype=torch.float32, device=device),
            torch.zeros(0, dtype=torch.int64, device=device),
            torch.ones((), dtype=torch.bool, device=device),
        )

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self._seen.tokens

    def update(self, values: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add inputs of shape (..., channels); ``mask`` (...) tells which positions count."""
        values = values.detach().reshape(-1, self.channels)
        if mask is not None:
            values = values[mask.reshape(-1).to(values.device)]
        if len(values) == 0:
            return
        values = values.float()
        scale = self._scale(values.abs().max())
        parts = values.split(max(1, _CHUNK // self.channels))
        batch = self._sums(parts[0], scale)
        for part in parts[1:]:
            batch = batch.plus(self._sums(part, scale))
        with self._lock:
            self._seen = self._seen.plus(batch)

    def _scale(self, absmax: torch.Tensor) -> torch.Tensor:
        """Return steps of symmetric grids; any positive number where all values are 0."""
        scale = absmax / (2 ** (self.bits - 1) - 1)
        return torch.where(scale > 0, scale, torch.ones_like(scale))

    def _error(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        top = 2 ** (self.bits - 1) - 1
        codes = (x / scale).round().clamp(-top, top)
        return (x.double() - codes.double() * scale.double()).square().sum()

    def _sums(self, x: torch.Tensor, scale: torch.Tensor) -> _Sums:
        magnitudes, wide = x.abs(), x.double()
        squares = (wide - wide.mean(dim=1, keepdim=True)).square()
        second, fourth = squares.mean(dim=1), squares.square().mean(dim=1)
        varied = (x.amax(dim=1) > x.amin(dim=1)) & (second > 0)
        kurtosis = torch.where(varied, fourth / second.square() - 3, torch.zeros_like(second))
        per_token = self._scale(magnitudes.amax(dim=1, keepdim=True))
        sums = [wide.square().sum(), second.sqrt().sum(), kurtosis.sum(), varied.sum().double()]
        largest, places = magnitudes.reshape(-1).topk(min(LARGEST, magnitudes.numel()))
        index = magnitudes.contiguous().view(torch.int32).reshape(-1) >> 18
        return _Sums(
            len(x),
            torch.stack([*sums, self._error(x, per_token), self._error(x, scale)]),
            magnitudes.amax(dim=0),
            (magnitudes >= self.threshold).sum(dim=0),
            torch.bincount(index.clamp(max=BINS - 1), minlength=BINS),
            largest,
            places,
            torch.isfinite(x).all(),
        )

    def finish(self) -> ActivationStatistics:
        """Return the same on the host.

        Raises
        ------
        CalibrationError
            If an input was not finite.
        """
        seen = self._seen
        if not bool(seen.finite):
            raise CalibrationError("the inputs hold values that are not finite")
        result = ActivationStatistics(self.channels, bits=self.bits, threshold=self.threshold)
        if seen.tokens:
            entries = zip(seen.largest.tolist(), seen.places.tolist(), strict=True)
            largest = tuple((v, *divmod(at, self.channels)) for v, at in entries if v > 0)
            sums, most, counts, histogram = (a.cpu().numpy() for a in seen[1:5])
            result._seen = Seen(seen.tokens, sums, most, counts, histogram, largest)
        return result


def statistics_accumulator(channels: int, device: torch.device, **options: Any) -> Any:
    """Return an accumulator of statistics for inputs on this device."""
    if device.type == "cpu":
        return ActivationStatistics(channels, **options)
    return TorchActivationStatistics(channels, device, **options)
