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
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from ptqkit.arrays.drift import Drift
from ptqkit.arrays.hessian import Hessian
from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.arrays.ranges import ChannelRanges
from ptqkit.errors import LAYER_FAILURES, CalibrationError, UsageError
from ptqkit.hf.quantization.moments import Moments

__all__ = ["TIMEOUT", "Processes", "launched", "own_device", "started"]

TIMEOUT = 1800
"""Seconds for which a process waits for the others."""

# A process with fewer rows of a stack than this has more to wait for than to do.
_FEWEST_ROWS = 16

T = TypeVar("T")


def launched() -> bool:
    """Whether torchrun, or what sets the same variables, has started several processes."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in names) and os.environ["WORLD_SIZE"] != "1"


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
        If there is no group.
    """

    def __init__(self, device: torch.device, timeout: float = TIMEOUT) -> None:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise UsageError(
                "distributed=True needs the processes of torchrun and a process group: call "
                "torch.distributed.init_process_group first"
            )
        self._dist, self._timeout = dist, timeout
        self._device = device if device.type == "cuda" else torch.device("cpu")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def share(self, batches: Sequence[T]) -> list[T]:
        """Return the batches of this process: runs of neighbours, as even as possible.

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
        bounds = [i * len(batches) // self.size for i in range(self.size + 1)]
        return list(batches[bounds[self.rank] : bounds[self.rank + 1]])

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the order of their ranks."""
        found: list[Any] = [None] * self.size
        with _telling(self._timeout):
            self._dist.all_gather_object(found, value)
        return found

    def first(self, value: T) -> T:
        """Return the value of the first process."""
        return self.gather(value if self.rank == 0 else None)[0]

    def agree(self, reason: str | None) -> str | None:
        """Return the first reason that a process has, or None if none has one."""
        return next((r for r in self.gather(reason) if r is not None), None)

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

    def rows(self, count: int) -> slice:
        """Return the rows of a matrix that this process solves; all if they are few."""
        if count < _FEWEST_ROWS * self.size:
            return slice(0, count)
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def join(self, own: np.ndarray, count: int) -> np.ndarray:
        """Put rows together that :meth:`rows` has shared out; ``own`` are those of this process."""
        if count < _FEWEST_ROWS * self.size:
            return own
        bounds = [i * count // self.size for i in range(self.size + 1)]
        lengths = [b - a for a, b in itertools.pairwise(bounds)]
        padded = torch.zeros((max(lengths), *own.shape[1:]), dtype=torch.from_numpy(own).dtype)
        padded[: len(own)] = torch.from_numpy(np.ascontiguousarray(own))
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with _telling(self._timeout):
            self._dist.all_gather(parts, padded)
        return np.concatenate([p[:n].numpy() for p, n in zip(parts, lengths, strict=True)])

    def join_matrix(self, own: QuantizedMatrix, count: int) -> QuantizedMatrix:
        """Put a quantized matrix together from the rows of all processes."""
        objectives = own.row_objectives
        return replace(
            own,
            codes=self.join(own.codes, count),
            scales=self.join(own.scales, count),
            zero_points=self.join(own.zero_points, count),
            row_objectives=None
            if objectives is None
            else np.ascontiguousarray(self.join(np.ascontiguousarray(objectives.T), count).T),
            rtn_objectives=None
            if own.rtn_objectives is None
            else self.join(own.rtn_objectives, count),
        )

    def reduce(self, own: Moments | Exception | None) -> Moments | Exception | None:
        """Add up the moments of all processes.

        Parameters
        ----------
        own : Moments, Exception or None
            Of this process's batches; None if no token of theirs came to the layer.

        Returns
        -------
        Moments, Exception or None
            The first error that a process has; None if none has seen a token.
        """
        about = self.gather(_describe(own))
        errors = [text for text, _ in about if text is not None]
        if errors:
            return own if isinstance(own, Exception) else CalibrationError(errors[0])
        shapes = next((shapes for _, shapes in about if shapes is not None), None)
        if shapes is None:
            return None
        held = own if isinstance(own, Moments) else Moments()
        tokens = sum(self.gather(held.tokens))
        features = shapes["hessian"]
        hessian = self._mean(held.hessian, (features, features), tokens)
        drift, residuals, ranges = None, {}, None
        if shapes["drift"] is not None:
            drift = Drift.from_matrix(self._mean(held.drift, shapes["drift"], tokens), tokens)
        for name, shape in shapes["residuals"].items():
            total = self._mean(held.residuals.get(name), shape, tokens)
            residuals[name] = Drift.from_matrix(total, tokens)
        if shapes["ranges"]:
            ranges = _merged(self.gather(held.ranges))
        return Moments(
            Hessian.from_matrix(hessian, tokens) if tokens else Hessian(features),
            drift,
            residuals,
            ranges,
            held.seconds,
            held.seconds_drift,
        )

    def _mean(self, own: Any, shape: tuple[int, int], tokens: int) -> np.ndarray:
        """Return the mean over all tokens in float32, added up in float64."""
        total = torch.zeros(shape, dtype=torch.float64, device=self._device)
        if own is not None and own.tokens:
            matrix = torch.from_numpy(np.array(own.matrix)).to(self._device)
            total += matrix.double() * own.tokens
        with _telling(self._timeout):
            self._dist.all_reduce(total)
        return (total / max(1, tokens)).float().cpu().numpy()


def _describe(own: Moments | Exception | None) -> tuple[str | None, dict[str, Any] | None]:
    """Return the text of an error, and the shapes of moments."""
    if isinstance(own, Exception):
        return str(own), None
    if own is None or own.hessian is None:
        return None, None
    residuals: Mapping[str, Drift] = own.residuals
    return None, {
        "hessian": own.hessian.in_features,
        "drift": None if own.drift is None else (own.drift.features, own.drift.in_features),
        "residuals": {n: (d.features, d.in_features) for n, d in residuals.items()},
        "ranges": own.ranges is not None,
    }


def _merged(found: Sequence[Any]) -> ChannelRanges:
    seen = [ranges for ranges in found if ranges is not None]
    total = seen[0].copy()
    for ranges in seen[1:]:
        total.merge(ranges)
    return total
