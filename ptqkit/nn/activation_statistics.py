"""Statistics of activations where they are: by the core on the host, by torch on a GPU."""

from __future__ import annotations

from typing import Any

import torch

from ptqkit.arrays.statistics import BINS, LARGEST, ActivationStatistics, Seen
from ptqkit.errors import CalibrationError

__all__ = ["TorchActivationStatistics", "statistics_accumulator"]

_CHUNK = 1 << 22
"""Values that are widened to float64 at a time."""


class TorchActivationStatistics:
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
        self.channels, self.tokens = channels, 0
        self._result = ActivationStatistics(channels, bits=bits, threshold=threshold)
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)
        self._most = torch.zeros(channels, dtype=torch.float32, device=device)
        self._counts = torch.zeros(channels, dtype=torch.int64, device=device)
        self._histogram = torch.zeros(BINS, dtype=torch.int64, device=device)
        self._largest = torch.zeros(0, dtype=torch.float32, device=device)
        self._places = torch.zeros(0, dtype=torch.int64, device=device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)

    def update(self, values: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add inputs of shape (..., channels); ``mask`` (...) tells which positions count."""
        values = values.detach().reshape(-1, self.channels)
        if mask is not None:
            values = values[mask.reshape(-1).to(values.device)]
        if len(values) == 0:
            return
        values = values.float()
        scale = self._scale(values.abs().max())
        for part in values.split(max(1, _CHUNK // self.channels)):
            self._add(part, scale)

    def _scale(self, absmax: torch.Tensor) -> torch.Tensor:
        """Return steps of symmetric grids; any positive number where all values are 0."""
        top = 2 ** (self._result.bits - 1) - 1
        scale = absmax / top
        return torch.where(scale > 0, scale, torch.ones_like(scale))

    def _error(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        top = 2 ** (self._result.bits - 1) - 1
        codes = (x / scale).round().clamp(-top, top)
        return (x.double() - codes.double() * scale.double()).square().sum()

    def _add(self, x: torch.Tensor, scale: torch.Tensor) -> None:
        magnitudes, wide = x.abs(), x.double()
        self._finite &= torch.isfinite(x).all()
        squares = (wide - wide.mean(dim=1, keepdim=True)).square()
        second, fourth = squares.mean(dim=1), squares.square().mean(dim=1)
        varied = (x.amax(dim=1) > x.amin(dim=1)) & (second > 0)
        kurtosis = torch.where(varied, fourth / second.square() - 3, torch.zeros_like(second))
        per_token = self._scale(magnitudes.amax(dim=1, keepdim=True))
        sums = [wide.square().sum(), second.sqrt().sum(), kurtosis.sum(), varied.sum().double()]
        self._sums += torch.stack([*sums, self._error(x, per_token), self._error(x, scale)])
        self._most = torch.maximum(self._most, magnitudes.amax(dim=0))
        self._counts += (magnitudes >= self._result.threshold).sum(dim=0)
        index = magnitudes.contiguous().view(torch.int32).reshape(-1) >> 18
        self._histogram += torch.bincount(index.clamp(max=BINS - 1), minlength=BINS)
        values, places = magnitudes.reshape(-1).topk(min(LARGEST, magnitudes.numel()))
        values = torch.cat([self._largest, values])
        places = torch.cat([self._places, places + self.tokens * self.channels])
        self._largest, kept = values.topk(min(LARGEST, len(values)))
        self._places = places[kept]
        self.tokens += len(x)

    def finish(self) -> ActivationStatistics:
        """Return the same on the host.

        Raises
        ------
        CalibrationError
            If an input was not finite.
        """
        if not bool(self._finite):
            raise CalibrationError("the inputs hold values that are not finite")
        if self.tokens:
            entries = zip(self._largest.tolist(), self._places.tolist(), strict=True)
            arrays = (self._sums, self._most, self._counts, self._histogram)
            sums, most, counts, histogram = (a.cpu().numpy() for a in arrays)
            largest = tuple((v, *divmod(at, self.channels)) for v, at in entries if v > 0)
            self._result._seen = Seen(self.tokens, sums, most, counts, histogram, largest)
        return self._result


def statistics_accumulator(channels: int, device: torch.device, **options: Any) -> Any:
    """Return an accumulator of statistics for inputs on this device."""
    if device.type == "cpu":
        return ActivationStatistics(channels, **options)
    return TorchActivationStatistics(channels, device, **options)
