"""Several processes that quantize one model: shares of the data, of the solving, and one result.

Every process holds the model and runs its share of the batches. The moments of a group are added up
over all of them in float64, and the rows of its matrices, which depend on the moments and on
themselves alone, are shared out and put together again, so that all processes go on with equal
weights. What one of them meets (an error, a batch that cannot go on) all learn of before they wait
for each other.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from ptqkit.arrays.drift import Drift
from ptqkit.arrays.hessian import Hessian
from ptqkit.arrays.ranges import ChannelRanges
from ptqkit.errors import LAYER_FAILURES, CalibrationError, UsageError
from ptqkit.hf.quantization.moments import MomentAccumulator, Moments
from ptqkit.nn.device_factor import DeviceHessian
from ptqkit.nn.linear import LinearView
from ptqkit.nn.statistics import DeviceMean, DeviceSum, mirror_upper

__all__ = ["TIMEOUT", "Processes", "SharedMoments", "launched", "own_device", "started"]

TIMEOUT = 1800
"""Seconds for which a process waits for the others."""

# Names of sums next to those of layers.
_HESSIAN, _DRIFT = "/hessian", "/drift"

T = TypeVar("T")


def launched() -> bool:
    """Whether torchrun, or what sets the same variables, has started this process.

    A single process of torchrun counts: its codes are those of several.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    several = os.environ.get("WORLD_SIZE") != "1" or "TORCHELASTIC_RUN_ID" in os.environ
    return several and all(name in os.environ for name in names)


def own_device() -> str:
    """Return the device of this process: a GPU of its own on its host, if there are any."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


@contextlib.contextmanager
def started(timeout: float = TIMEOUT) -> Iterator[None]:
    """Join the processes that torchrun has started: gloo on hosts, NCCL on GPUs.

    Raises
    ------
    ConnectionError
        If not all of them come within the timeout.
    """
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(own_device())
    with _telling(timeout):
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _telling(timeout: float) -> Iterator[None]:
    """Say in one line that the others are gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        raise ConnectionError(
            "another process of this run has ended, or has not answered for "
            f"{timeout:.0f} seconds: its own message says why ({reason})"
        ) from error


class Processes:
    """The processes of the default group of ``torch.distributed``.

    Attributes
    ----------
    rank, size : int

    Raises
    ------
    UsageError
        If there is no group, or none for tensors on the host.
    """

    def __init__(self, device: torch.device, timeout: float = TIMEOUT) -> None:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise UsageError(
                "distributed=True needs the processes of torchrun and a process group: call "
                "torch.distributed.init_process_group first"
            )
        if "cpu:" not in dist.get_backend_config():
            raise UsageError(
                "distributed=True needs a process group that joins hosts too: call "
                "torch.distributed.init_process_group('cpu:gloo,cuda:nccl')"
            )
        self._dist, self._timeout = dist, timeout
        self._device = device if device.type == "cuda" else torch.device("cpu")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def share(self, batches: Sequence[T], rank: int | None = None) -> list[T]:
        """Return the batches of a process: runs of neighbours, as even as possible.

        Parameters
        ----------
        batches : sequence
        rank : int, optional
            This process by default; the last one's share is the largest.

        Raises
        ------
        CalibrationError
            If there are fewer batches than processes.
        """
        if len(batches) < self.size:
            raise CalibrationError(
                f"{self.size} processes share {len(batches)} batches, so some would have no data: "
                "start fewer processes, lower batch_size or raise samples"
            )
        bounds = self._bounds(len(batches))
        rank = self.rank if rank is None else rank
        return list(batches[bounds[rank] : bounds[rank + 1]])

    def _bounds(self, count: int) -> list[int]:
        """Return where the shares of all processes begin, and the end: as even as possible."""
        return [i * count // self.size for i in range(self.size + 1)]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the order of their ranks."""
        found: list[Any] = [None] * self.size
        with _telling(self._timeout):
            self._dist.all_gather_object(found, value)
        return found

    def first(self, value: T) -> T:
        """Return the value of the first process."""
        return self.gather(value if self.rank == 0 else None)[0]

    def gather_numbers(self, *own: int) -> list[list[int]]:
        """Return the numbers of all processes, as many each: faster than objects."""
        found = torch.empty((self.size, len(own)), dtype=torch.int64)
        with _telling(self._timeout):
            self._dist.all_gather(list(found.unbind()), torch.tensor(own, dtype=torch.int64))
        return found.tolist()

    def broadcast(self, values: torch.Tensor) -> None:
        """Write the first process's values into a tensor on the host, in all other processes."""
        with _telling(self._timeout):
            self._dist.broadcast(values, 0)

    def agree(self, reason: str | None) -> str | None:
        """Return the first reason that a process has, or None if none has one."""
        if not any(some for (some,) in self.gather_numbers(reason is not None)):
            return None
        return next(r for r in self.gather(reason) if r is not None)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raise the failure of a layer in all processes if one raises it."""
        error: Exception | None = None
        try:
            yield
        except LAYER_FAILURES as failure:
            error = failure
        told = self.agree(None if error is None else str(error))
        if error is not None:
            raise error
        if told is not None:
            raise ValueError(told)

    def gather_rows(self, own: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Return the rows of all processes, which have so many each, on the device they share."""
        padded = own.to(self._device).contiguous()
        most = max(lengths)
        if len(own) < most:
            filling = padded.new_zeros((most - len(own), *own.shape[1:]))
            padded = torch.cat([padded, filling])
        found = padded.new_empty((self.size, *padded.shape))
        with _telling(self._timeout):
            self._dist.all_gather(list(found.unbind()), padded)
        if min(lengths) == most:
            return found.flatten(0, 1)
        return torch.cat([part[:n] for part, n in zip(found, lengths, strict=True)])

    def reduce(self, own: SharedMoments) -> Moments | Exception | None:
        """Add up the moments of all processes; ``own`` are of this process's batches.

        Returns
        -------
        Moments, Exception or None
            The first error that a process has; None if none has seen a token.
        """
        about = own.describe()
        numbers = self.gather_numbers(about.tokens, about.kind, about.plain)
        tokens, shapes, ranges = sum(n[0] for n in numbers), dict(about.shapes), []
        if not all(plain and kind == about.kind for _, kind, plain in numbers):
            every = self.gather(about)
            errors = [each.error for each in every if each.error is not None]
            if errors:
                return own.error or CalibrationError(errors[0])
            for each in every:
                shapes |= {n: shape for n, shape in each.shapes.items() if n not in shapes}
            ranges = [each.ranges for each in every if each.ranges is not None]
        if not shapes:
            return None
        # In one order everywhere: the sums of one name are added up together.
        names = sorted(shapes)
        means = {name: self._mean(own.sums.get(name), shapes[name], tokens) for name in names}
        hessian = means.pop(_HESSIAN)
        drift = means.pop(_DRIFT, None)
        for other in ranges[1:]:
            ranges[0].merge(other)
        if not tokens:
            whole = Hessian(len(hessian))
        elif self._device.type == "cpu":
            whole = Hessian.from_matrix(hessian.numpy(), tokens)
        else:
            mirror_upper(hessian)
            whole = DeviceHessian(hessian, tokens)
        return Moments(
            whole,
            None if drift is None else self._drift(drift, tokens),
            {name: self._drift(mean, tokens) for name, mean in means.items()},
            ranges[0] if ranges else None,
            own.seconds,
            own.seconds_drift,
        )

    def _drift(self, mean: torch.Tensor, tokens: int) -> Drift | DeviceMean:
        """Return G - H or D, on the host unless the processes work on GPUs."""
        if self._device.type == "cpu":
            return Drift.from_matrix(mean.numpy(), tokens)
        return DeviceMean(mean, tokens)

    def _mean(self, own: torch.Tensor | None, shape: tuple[int, int], tokens: int) -> torch.Tensor:
        """Return the mean over all tokens in float32, added up in float64."""
        total = own
        if total is None:
            total = torch.zeros(shape, dtype=torch.float64, device=self._device)
        with _telling(self._timeout):
            self._dist.all_reduce(total)
        return total.div_(max(1, tokens)).float()


class _About(NamedTuple):
    """What a process tells the others of its moments."""

    error: str | None
    shapes: dict[str, tuple[int, int]]
    tokens: int
    ranges: ChannelRanges | None

    @property
    def plain(self) -> bool:
        """Whether there is nothing that has to be told but tokens, if the shapes are known."""
        return self.error is None and self.ranges is None

    @property
    def kind(self) -> int:
        """A number that is the same where shapes are."""
        return zlib.crc32(repr(sorted(self.shapes.items())).encode())


class SharedMoments(MomentAccumulator):
    """Moments of the batches of one process, for :meth:`Processes.reduce`.

    Every batch has sums of its own in float32, which are added up in float64: there the order, and
    so which process had which batch, changes hardly any last bit of the rounded mean.

    Parameters
    ----------
    name, needs_ranges, writer, narrow
        As for :class:`~ptqkit.hf.quantization.moments.MomentAccumulator`.
    on_host : bool
        Whether the inputs are on the host; otherwise the sums stay where they are.
    """

    def __init__(
        self,
        name: str,
        needs_ranges: bool,
        writer: str | None,
        narrow: LinearView | None,
        on_host: bool,
    ) -> None:
        super().__init__(name, needs_ranges, writer, narrow, not on_host)
        self._current: MomentAccumulator | None = None
        self.tokens = 0
        self.sums: dict[str, torch.Tensor] = {}
        self.ranges: ChannelRanges | None = None
        self.seconds = self.seconds_drift = 0.0

    def add(
        self,
        value: torch.Tensor,
        batch: Mapping[str, torch.Tensor],
        mask: torch.Tensor | None,
        floats: torch.Tensor | None = None,
        streams: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Add one batch's input of the layer."""
        if self._current is None:
            self._current = MomentAccumulator(
                self.name, self.needs_ranges, self.writer, self._narrow, self._wide
            )
        self._current.add(value, batch, mask, floats, streams)
        if not self._wide:
            self.close()

    def close(self) -> None:
        """Add what the last batches gave to the sums."""
        current, self._current = self._current, None
        if current is None or self.error is not None:
            return
        found = current.finish()
        if isinstance(found, Exception):
            self.error = found
            return
        self.seconds += found.seconds
        self.seconds_drift += found.seconds_drift
        parts = {_HESSIAN: found.hessian, _DRIFT: found.drift, **found.residuals}
        for name, part in parts.items():
            if part is not None:
                self._add(name, part)
        self.tokens += found.tokens
        if self.ranges is None:
            self.ranges = found.ranges
        elif found.ranges is not None:
            self.ranges.merge(found.ranges)

    def _add(self, name: str, part: Any) -> None:
        if isinstance(part, DeviceSum):
            self.sums[name] = part.matrix  # of all batches
            return
        rows = part.in_features if name == _HESSIAN else part.features
        if name not in self.sums:
            self.sums[name] = torch.zeros((rows, part.in_features), dtype=torch.float64)
        if part.tokens:
            self.sums[name].add_(torch.from_numpy(np.array(part.matrix)), alpha=part.tokens)

    def describe(self) -> _About:
        """Return what the other processes are told of these moments."""
        shapes = {name: (total.shape[0], total.shape[1]) for name, total in self.sums.items()}
        return _About(
            None if self.error is None else str(self.error), shapes, self.tokens, self.ranges
        )
