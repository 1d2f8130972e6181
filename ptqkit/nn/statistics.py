"""Moments and ranges of a layer's inputs, accumulated wherever the activations are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ptqkit._repr import one_line_repr
from ptqkit.arrays.accumulator import Accumulator
from ptqkit.arrays.drift import Drift
from ptqkit.arrays.hessian import Hessian
from ptqkit.arrays.ranges import ChannelRanges
from ptqkit.errors import CalibrationError
from ptqkit.nn.device_factor import DeviceHessian
from ptqkit.nn.half_products import add_difference_products, add_products, multiplies_halves
from ptqkit.nn.transfer import host_copy

__all__ = [
    "DeviceMean",
    "DeviceSum",
    "TorchDrift",
    "TorchHessian",
    "TorchRanges",
    "accumulator",
    "drift_accumulator",
    "full_float32",
    "mirror_upper",
    "range_accumulator",
]


class TorchRanges(Accumulator):
    """Minimum, maximum and mean of every channel, accumulated by torch on the inputs' device.

    The same interface as :class:`ptqkit.ChannelRanges`, for models on a GPU: only three vectors
    travel to the host.
    """

    def __init__(self, channels: int, device: torch.device | str) -> None:
        super().__init__()
        self.channels = channels
        infinite = torch.full((channels,), torch.inf, dtype=torch.float32, device=device)
        zero = torch.zeros(channels, dtype=torch.float64, device=device)
        # (minimum, maximum, sum, tokens), replaced in one assignment, never written to
        self._seen = (infinite, -infinite, zero, 0)

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self._seen[3]

    def update(self, values: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add inputs of shape (..., channels); ``mask`` (...) is True where they count."""
        values = values.reshape(-1, self.channels)
        if mask is not None:
            values = values[mask.reshape(-1).to(values.device)]
        if len(values) == 0:
            return
        low, high = values.amin(0).float(), values.amax(0).float()
        total = values.sum(0, dtype=torch.float64)
        with self._lock:
            seen = self._seen
            self._seen = (
                torch.minimum(seen[0], low),
                torch.maximum(seen[1], high),
                seen[2] + total,
                seen[3] + len(values),
            )

    def finish(self) -> ChannelRanges:
        """Return the same on the host.

        Raises
        ------
        CalibrationError
            If an input was not finite.
        """
        minimum, maximum, total, tokens = self._seen
        if not torch.isfinite(total).all():
            raise CalibrationError("the inputs hold values that are not finite")
        mean = total.cpu().numpy() / max(1, tokens)
        return ChannelRanges.from_arrays(minimum.cpu().numpy(), maximum.cpu().numpy(), mean, tokens)


def range_accumulator(channels: int, device: torch.device) -> Any:
    """Return an accumulator of ranges for inputs on this device."""
    if device.type == "cpu":
        return ChannelRanges(channels)
    return TorchRanges(channels, device)


class _TorchSum(Accumulator):
    """A sum of products in float32 on the inputs' device, and the first bad update.

    If it is wide, every update has a sum of its own in float32, and these are added up in float64:
    hardly any last bit of the rounded mean depends on which update came when.
    """

    def __init__(
        self, features: int, in_features: int, device: torch.device | str, wide: bool = False
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.tokens = 0
        self._sum = torch.zeros(features, in_features, dtype=torch.float32, device=device)
        self._total = self._sum.double() if wide else None
        # Counted on the device, so that no update waits for it.
        self._whole = torch.zeros((), dtype=torch.int64, device=device)
        self._updates = 0

    def _values(self, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return the rows that count."""
        values = values.reshape(-1, values.shape[-1])
        if mask is not None:
            values = values[mask.reshape(-1).to(values.device)]
        return values

    def _add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add left^T right; what has 16 bits is not widened if possible.

        ``left`` is ``right`` itself, or of float32.
        """
        with self._lock:
            self._check_whole()
            self._torn = True
            halves = multiplies_halves(right.device, right.dtype)
            if left is right and halves:
                add_products(self._sum, right)
            elif right.dtype == torch.bfloat16 and halves:
                add_difference_products(self._sum, left, right)
            else:
                with full_float32(right.device):
                    self._sum.addmm_(left.float().T, right.float())
            total = self._sum
            if self._total is not None:
                total = self._total.add_(self._sum)
                self._sum.zero_()
            # What is not finite stays so.
            square = left.shape[1] == right.shape[1]
            self._whole += torch.isfinite(total.diagonal() if square else total).all()
            self.tokens += len(right)
            self._updates += 1
            self._torn = False

    def _mean(self, what: str) -> torch.Tensor:
        """Return (2 / N) times the sum, or raise CalibrationError."""
        self._check_whole()
        factor = 2.0 / max(1, self.tokens)
        matrix = self._sum * factor if self._total is None else (self._total * factor).float()
        if not bool(torch.isfinite(matrix).all()):
            whole = int(self._whole)
            first = f", first in batch {whole + 1} of {self._updates}"
            raise CalibrationError(
                f"{what} values that are not finite, or whose products overflow float32"
                + (first if whole < self._updates else "")
            )
        return matrix

    def _doubled(self, what: str) -> DeviceSum:
        """Return twice the sum, which is no longer the accumulator's; errors as of the mean."""
        with self._lock:
            assert self._total is not None
            self._mean(what)
            self._torn = True  # nothing can be added any more
            return DeviceSum(self._total.mul_(2), self.tokens)


class TorchHessian(_TorchSum):
    """H = (2/N) sum x x^T accumulated by torch in float32, where the activations are.

    The same interface as :class:`ptqkit.Hessian`, for models on a GPU: only the finished matrix
    travels to the host.
    """

    _quantity = "Hessian"

    def __init__(self, in_features: int, device: torch.device | str, wide: bool = False) -> None:
        super().__init__(in_features, in_features, device, wide)

    def update(self, values: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add inputs of shape (..., in); ``mask`` (...) is True at the positions that count."""
        values = self._values(values, mask)
        self._add(values, values)

    def finish(self) -> Hessian:
        """Return the mean as a host :class:`ptqkit.Hessian`.

        Raises
        ------
        CalibrationError
            If an input was not finite or overflowed; the message names the batch.
        """
        return Hessian.of_mean(host_copy(self._symmetric()), self.tokens)

    def finish_there(self) -> DeviceHessian:
        """Return the mean where the activations are; errors as of :meth:`finish`."""
        return DeviceHessian(self._symmetric(), self.tokens)

    def _symmetric(self) -> torch.Tensor:
        with self._lock:
            mean = self._mean("the inputs hold")
            mirror_upper(mean)
            return mean

    def doubled(self) -> DeviceSum:
        """Return N H of a wide sum, which is over; errors as of :meth:`finish`."""
        return self._doubled("the inputs hold")


def mirror_upper(matrix: torch.Tensor) -> None:
    """Make a matrix symmetric, whose triangles are equal but for rounding."""
    upper = matrix.triu(1)
    matrix.triu_().add_(upper.T)


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


def accumulator(in_features: int, device: torch.device, wide: bool = False) -> Any:
    """Return an accumulator of H for inputs on this device; ``wide`` is for others than the CPU."""
    if device.type == "cpu":
        return Hessian(in_features)
    return TorchHessian(in_features, device, wide)


class TorchDrift(_TorchSum):
    """(2/N) sum (a - b) x^T accumulated by torch in float32, where the activations are.

    The same interface as :class:`ptqkit.Drift`, for models on a GPU.
    """

    _quantity = "drift"

    def update(
        self,
        floats: torch.Tensor,
        quantized: torch.Tensor,
        inputs: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> None:
        """Add a (..., features), b (..., features) and x (..., in), by default b, of a batch."""
        now = self._values(quantized, mask)
        x = now if inputs is None else self._values(inputs, mask)
        self._add(self._values(floats, mask).float() - now.float(), x)

    def finish(self) -> DeviceMean:
        """Return the mean, where the activations are.

        Raises
        ------
        CalibrationError
            If a value was not finite or a sum overflowed; the message names the batch.
        """
        with self._lock:
            mean = self._mean("the float and the quantized model differ by")
            return DeviceMean(mean, max(1, self.tokens))

    def doubled(self) -> DeviceSum:
        """Return 2 sum (a - b) x^T of a wide sum, which is over; errors as of :meth:`finish`."""
        return self._doubled("the float and the quantized model differ by")


@dataclass(frozen=True)
class DeviceMean:
    """A finished sum, where the activations are.

    Attributes
    ----------
    matrix : Tensor of float32, shape (features, in)
        ``(2/N) sum (a - b) x^T``, or of x x^T.
    tokens : int
    """

    __repr__ = one_line_repr

    matrix: torch.Tensor
    tokens: int

    def rows(self, start: int, stop: int) -> DeviceMean:
        """Return features ``start:stop``."""
        return DeviceMean(self.matrix[start:stop], self.tokens)

    def finish(self) -> Drift:
        """Return a drift on the host."""
        return Drift.from_matrix(host_copy(self.matrix), self.tokens)


@dataclass(frozen=True)
class DeviceSum:
    """A sum over the tokens of one process, where the activations are.

    Attributes
    ----------
    matrix : Tensor of float64, shape (features, in)
        ``2 sum (a - b) x^T``, or of x x^T.
    tokens : int
    """

    __repr__ = one_line_repr

    matrix: torch.Tensor
    tokens: int


def drift_accumulator(
    features: int, in_features: int, device: torch.device, wide: bool = False
) -> Any:
    """Return an accumulator of the drift of values on this device; ``wide`` is as for H.

    What its ``finish`` returns has ``tokens``, ``rows`` and ``finish``, which gives a host's.
    """
    if device.type == "cpu":
        return Drift(features, in_features)
    return TorchDrift(features, in_features, device, wide)
