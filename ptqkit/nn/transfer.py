"""Values of a device on the host, through memory that is kept and that the device can reach."""

from __future__ import annotations

import concurrent.futures
import threading
from collections import deque

import numpy as np
import torch

__all__ = ["HostCopies", "computes", "host_copy"]

# Bytes that a device writes at once into memory that it can reach.
_STAGE = 1 << 25
# Values that may wait to be copied, those of three matrices: they hold memory of the device.
_WAITING = 9


def computes(device: torch.device) -> bool:
    """Whether the large products of solving are made on a device, and not by the host's core."""
    return device.type != "cpu"


def host_copy(values: torch.Tensor) -> np.ndarray:
    """Return a tensor's values on the host, in memory of their own.

    From a GPU they come through page-locked memory, which torch keeps for the next ones: pages that
    are new to the process, and copies by way of others, would take longer than all else about them.
    What is kept for long should come by :class:`HostCopies`: locking its pages took 1.3 ms per MiB
    on the host of an H200.
    """
    pinned = values.device.type == "cuda"
    result = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
    return result.copy_(values).numpy()


class HostCopies:
    """Copies of what is on a GPU that are made while the caller goes on.

    They are ordinary memory, into which a thread copies by way of one page-locked buffer. Nothing
    may read them before :meth:`wait`. What is on the host already is returned as it is. Several
    threads may begin copies.
    """

    def __init__(self) -> None:
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._waiting: deque[concurrent.futures.Future[None]] = deque()
        self._stage: torch.Tensor | None = None
        self._failed: BaseException | None = None
        self._lock = threading.Lock()

    def begin(self, values: torch.Tensor) -> np.ndarray:
        """Return an array that holds a tensor's values in the end."""
        if values.device.type == "cpu":
            return values.numpy()
        # Of bytes, since NumPy has not all types; its large arrays are of large pages.
        flat = values.contiguous().view(-1).view(torch.uint8)
        result = torch.empty((), dtype=values.dtype).numpy().dtype
        found = np.empty(tuple(values.shape), result)
        device = values.device
        ready = torch.cuda.Event() if device.type == "cuda" else None
        if ready is not None:
            ready.record(torch.cuda.current_stream(device))
        target = torch.from_numpy(found.reshape(-1).view(np.uint8))
        with self._lock:
            while len(self._waiting) >= _WAITING:
                self._end_one()
            if self._pool is None:
                self._pool = concurrent.futures.ThreadPoolExecutor(1, "ptqkit-copies")
            self._waiting.append(self._pool.submit(self._copy, flat, target, ready))
        return found

    def wait(self) -> None:
        """Wait until all copies are made; raise what went wrong, such as a lack of memory."""
        with self._lock:
            while self._waiting:
                self._end_one()
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None
            failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def _end_one(self) -> None:
        """Wait for the first copy; its failure is not that of what is copied now."""
        failed = self._waiting.popleft().exception()
        self._failed = self._failed or failed

    def _copy(
        self, values: torch.Tensor, target: torch.Tensor, ready: torch.cuda.Event | None
    ) -> None:
        if self._stage is None:
            self._stage = torch.empty(_STAGE, dtype=torch.uint8, pin_memory=ready is not None)
        if ready is None:
            self._parts(values, target)
            return
        with torch.cuda.device(values.device):
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                self._parts(values, target)

    def _parts(self, values: torch.Tensor, target: torch.Tensor) -> None:
        assert self._stage is not None
        for start in range(0, len(values), _STAGE):
            part = values[start : start + _STAGE]
            stage = self._stage[: len(part)]
            stage.copy_(part)  # waits for the device
            target[start : start + _STAGE].numpy()[:] = stage.numpy()
