"""Moments and ranges of a layer's inputs, accumulated wherever the activations are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ptqkit.arrays.hessian import Hessian
from ptqkit.arrays.ranges import ChannelRanges
from ptqkit.errors import CalibrationError

__all__ = [
    "InputDrift",
    "TorchHessian",
    "TorchRanges",
    "accumulator",
    "full_float32",
    "range_accumulator",
]


class TorchRanges:
    """Minimum, maximum and mean of every channel, accumulated by torch on the inputs' device.

    The same interface as :class:`ptqkit.ChannelRanges`, for models on a GPU: only three vectors
    travel to the host.
    """

    def __init__(self, channels: int, device: torch.device | str) -> None:
        self.channels = channels
        self.tokens = 0
        self._minimum = torch.full((channels,), torch.inf, dtype=torch.float32, device=device)
        self._maximum = torch.full((channels,), -torch.inf, dtype=torch.float32, device=device)
        self._sum = torch.zeros(channels, dtype=torch.float64, device=device)

    def update(self, values: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add inputs of shape (..., channels); ``mask`` (...) is True where they count."""
        values = values.reshape(-1, self.channels)
        if mask is not None:
            values = values[mask.reshape(-1).to(values.device)]
        if len(values) == 0:
            return
        self._minimum = torch.minimum(self._minimum, values.amin(0).float())
        self._maximum = torch.maximum(self._maximum, values.amax(0).float())
        self._sum += values.sum(0, dtype=torch.float64)
        self.tokens += len(values)

    def finish(self) -> ChannelRanges:
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
        return ChannelRanges.from_arrays(
            self._minimum.cpu().numpy(), self._maximum.cpu().numpy(), mean, self.tokens
        )


def range_accumulator(channels: int, device: torch.device) -> Any:
    """Return an accumulator of ranges for inputs on this device."""
    if device.type == "cpu":
        return ChannelRanges(channels)
    return TorchRanges(channels, device)


class TorchHessian:
    """H = (2/N) sum x x^T accumulated by torch in float32, where the activations are.

    The same interface as :class:`ptqkit.Hessian`, for models on a GPU: only the finished matrix
    travels to the host.
    """

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        self.in_features = in_features
        self.tokens = 0
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def update(self, values: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add inputs of shape (..., in); ``mask`` (...) is True at the positions that count."""
        values = values.reshape(-1, self.in_features)
        if mask is not None:
            values = values[mask.reshape(-1).to(values.device)]
        values = values.float()
        with full_float32(values.device):
            self._sum.addmm_(values.T, values)
        self.tokens += len(values)

    def finish(self) -> Hessian:
        """Return the mean as a host :class:`ptqkit.Hessian`.

        Raises
        ------
        CalibrationError
            If an input was not finite.
        """
        matrix = (self._sum * (2.0 / max(1, self.tokens))).cpu().numpy()
        if not np.isfinite(matrix.diagonal()).all():
            raise CalibrationError("the inputs hold values that are not finite")
        return Hessian.from_matrix(matrix, self.tokens)


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Switch TF32 off for float32 products on a GPU, and back as it was."""
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cuda.matmul
    # torch 2.9 replaced allow_tf32, and refuses programs that use both.
    name, full = ("fp32_precision", "ieee")
    if not hasattr(settings, name):
        name, full = ("allow_tf32", False)  # type: ignore[assignment]
    before = getattr(settings, name)
    setattr(settings, name, full)
    try:
        yield
    finally:
        setattr(settings, name, before)


def accumulator(in_features: int, device: torch.device) -> Any:
    """Return an accumulator of H for inputs on this device."""
    if device.type == "cpu":
        return Hessian(in_features)
    return TorchHessian(in_features, device)


class InputDrift:
    """G - H = (2/N) sum (x - x~) x~^T, in float32, where the activations are.

    Their difference and not G alone: if the two paths are close, the rounding errors of G and H
    would be as large as what matters; if they are equal (the first layers), this is zero.
    """

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        self.in_features = in_features
        self.tokens = 0
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def update(
        self, floats: torch.Tensor, quantized: torch.Tensor, mask: torch.Tensor | None = None
    ) -> None:
        """Add inputs of shape (..., in) of the float and of the quantized model."""
        parts = []
        for values in (floats, quantized):
            values = values.reshape(-1, self.in_features)
            if mask is not None:
                values = values[mask.reshape(-1).to(values.device)]
            parts.append(values.float())
        with full_float32(parts[1].device):
            self._sum.addmm_((parts[0] - parts[1]).T, parts[1])
        self.tokens += len(parts[1])

    def cross_moment(self, hessian: np.ndarray) -> np.ndarray:
        """Return G = (2/N) sum x x~^T in float64, shape (in, in), given H.

        Raises
        ------
        CalibrationError
            If an input was not finite.
        """
        drift = (self._sum * (2.0 / max(1, self.tokens))).cpu().numpy()
        if not np.isfinite(drift).all():
            raise CalibrationError(
                "the inputs of the float and the quantized model differ by values that are not "
                "finite"
            )
        return np.add(hessian, drift, dtype=np.float64)
