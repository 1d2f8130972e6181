"""Channel ranges of a layer's inputs, wherever the activations are."""

from __future__ import annotations

from typing import Any

import torch

import ptqkit
from ptqkit.errors import CalibrationError

__all__ = ["TorchRanges", "range_accumulator"]


class TorchRanges:
    """Minimum, maximum and mean of every channel, accumulated by torch on the inputs' device.

    The same interface as :class:`ptqkit.ChannelRanges`, for models on a GPU: only three vectors
    travel to the host.
    """

    def __init__(self, channels: int, device: torch.device | str) -> None:
        self.channels = channels
        self.tokens = 0
        self._minimum = torch.full((channels,), torch.inf, device=device)
        self._maximum = torch.full((channels,), -torch.inf, device=device)
        self._sum = torch.zeros(channels, dtype=torch.float64, device=device)

    def update(self, values: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add inputs of shape (..., channels); ``mask`` (...) tells which positions count."""
        values = values.reshape(-1, self.channels)
        if mask is not None:
            values = values[mask.reshape(-1).to(values.device)]
        if len(values) == 0:
            return
        self._minimum = torch.minimum(self._minimum, values.amin(0).float())
        self._maximum = torch.maximum(self._maximum, values.amax(0).float())
        self._sum += values.sum(0, dtype=torch.float64)
        self.tokens += len(values)

    def finish(self) -> ptqkit.ChannelRanges:
        """Return the same on the host.

        Raises
        ------
        CalibrationError
            If an input was not finite.
        """
        total = self._sum.cpu().numpy()
        mean = total / max(1, self.tokens)
        if not torch.isfinite(self._sum).all():
            raise CalibrationError("the inputs hold values that are not finite")
        return ptqkit.ChannelRanges.from_arrays(
            self._minimum.cpu().numpy(), self._maximum.cpu().numpy(), mean, self.tokens
        )


def range_accumulator(channels: int, device: torch.device) -> Any:
    """An accumulator of ranges for inputs on this device."""
    if device.type == "cpu":
        return ptqkit.ChannelRanges(channels)
    return TorchRanges(channels, device)
