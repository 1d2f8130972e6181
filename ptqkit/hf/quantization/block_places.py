"""Blocks of a model on a GPU that wait in the host's memory until their turn comes.

A schedule goes through the blocks one after the other. Those whose turn is over, and those whose
turn is not near, need not be on the device: where memory is short, a number of them waits in
ordinary memory. Whenever a block is finished, it changes places with the next one that waits, by a
thread of its own while the device works on those between. In the end all are back.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["BlockPlaces", "movable_bytes"]

# Bytes that travel at once, through memory that the device can reach.
_STAGE = 1 << 25


def movable_bytes(model: nn.Module, blocks: Sequence[str]) -> int:
    """Return the bytes of each block; 0 if blocks cannot change places.

    For that, all have parameters of the same shapes and types, on the model's device and in one
    piece, which no other module has.
    """
    owned = [dict(model.get_submodule(name).named_parameters()) for name in blocks]
    known = {id(p) for parameters in owned for p in parameters.values()}
    inside = sum(len(parameters) for parameters in owned)
    every = [p for _, p in model.named_parameters(remove_duplicate=False)]
    alone = inside == len(known) and sum(id(p) in known for p in every) == inside
    kinds = {tuple(_kind(n, p) for n, p in parameters.items()) for parameters in owned}
    whole = all(p.is_contiguous() for parameters in owned for p in parameters.values())
    devices = {p.device for p in every}
    if not (owned and alone and whole and len(kinds) == 1 and len(devices) == 1):
        return 0
    return sum(p.numel() * p.element_size() for p in owned[0].values())


def _kind(name: str, parameter: nn.Parameter) -> tuple[Any, ...]:
    return name, parameter.shape, parameter.dtype


class BlockPlaces:
    """Has so many blocks of a model wait on the host, of which :func:`movable_bytes` is not 0.

    Parameters
    ----------
    model : nn.Module
    blocks : sequence of str
        In order of execution.
    count : int
        Blocks on the host at any time; 0: none, and nothing happens.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], count: int) -> None:
        self._modules = {name: model.get_submodule(name) for name in blocks}
        self._blocks, self._count = list(blocks), count
        self._away: set[str] = set()
        self._moves: dict[str, concurrent.futures.Future[None]] = {}
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._stages: list[torch.Tensor] = []
        self._device = torch.device("cpu")

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """Let the last blocks wait on the host; all are on the device again on leaving."""
        if not self._count:
            yield
            return
        self._device = next(self._modules[self._blocks[0]].parameters()).device
        pinned = self._device.type == "cuda"
        self._stages = [torch.empty(_STAGE, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "ptqkit-blocks")
        try:
            for name in reversed(self._blocks[-self._count :]):
                self._begin(name, partial(self._take_away, name))
                self._away.add(name)
            yield
        finally:
            self._bring_back()

    @contextlib.contextmanager
    def entering(self) -> Iterator[None]:
        """Meanwhile a block that is called waits until it is on the device."""
        handles = []
        if self._count:
            handles = [
                module.register_forward_pre_hook(partial(self._called, name))
                for name, module in self._modules.items()
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _called(self, name: str, module: nn.Module, inputs: Any) -> None:
        self.enter(name)

    def settle(self) -> None:
        """Wait until those that wait on the host from the beginning are there."""
        for name in [name for name in self._moves if name in self._away]:
            self._moves.pop(name).result()

    def enter(self, name: str) -> None:
        """Wait until a block is on the device."""
        if name in self._moves:
            self._moves.pop(name).result()
        if name in self._away:  # out of order
            self._away.discard(name)
            self._arrive(name)

    def leave(self, position: int) -> None:
        """Note that the first blocks are finished: they change places with those that wait."""
        waiting = [name for name in self._blocks[position:] if name in self._away]
        for name in self._blocks[:position]:
            if name not in self._away and waiting:
                other = waiting.pop(0)
                self._begin(other, partial(self._change, name, other))
                self._away.discard(other)
                self._away.add(name)

    def _begin(self, name: str, move: Any) -> None:
        assert self._pool is not None
        if self._device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
            move = partial(self._on_a_stream, ready, move)
        self._moves[name] = self._pool.submit(move)

    def _on_a_stream(self, ready: torch.cuda.Event, move: Any) -> None:
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                move()
                stream.synchronize()

    def _parameters(self, name: str) -> Mapping[str, nn.Parameter]:
        return dict(self._modules[name].named_parameters())

    def _take_away(self, name: str) -> None:
        """Put a block into the host's memory."""
        for parameter in self._parameters(name).values():
            there = parameter.data
            # NumPy's large arrays are of large pages, which are there sooner.
            bytes_here = np.empty(there.numel() * there.element_size(), np.uint8)
            here = torch.from_numpy(bytes_here).view(there.dtype).view(there.shape)
            for source, target in _parts(there, here):
                stage = self._stages[0][: len(source)]
                target.copy_(stage.copy_(source))
            parameter.data = here

    def _change(self, name: str, other: str) -> None:
        """Exchange a block on the device for one on the host, in each other's memory."""
        both = self._parameters(other)
        for key, leaving in self._parameters(name).items():
            coming = both[key]
            there, here = leaving.data, coming.data
            for device, host in _parts(there, here):
                old, new = (stage[: len(device)] for stage in self._stages)
                old.copy_(device)  # waits for it
                new.copy_(host)
                device.copy_(new, non_blocking=True)
                host.copy_(old)
                if self._device.type == "cuda":
                    torch.cuda.current_stream().synchronize()
            leaving.data, coming.data = here, there

    def _arrive(self, name: str) -> None:
        for parameter in self._parameters(name).values():
            here = parameter.data
            there = torch.empty(here.shape, dtype=here.dtype, device=self._device)
            for number, (source, target) in enumerate(_parts(here, there)):
                stage = self._stages[number % 2][: len(source)]
                target.copy_(stage.copy_(source))
            parameter.data = there

    def _bring_back(self) -> None:
        assert self._pool is not None
        try:
            for move in self._moves.values():
                move.result()
        finally:
            self._pool.shutdown()
            self._pool = None
            for name in self._blocks:
                if name in self._away:
                    self._arrive(name)
            self._away.clear()
            self._moves.clear()
            self._stages = []


def _parts(source: torch.Tensor, target: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the bytes of two tensors, as many as travel at once."""
    flat = [values.view(-1).view(torch.uint8) for values in (source, target)]
    for start in range(0, len(flat[0]), _STAGE):
        yield tuple(values[start : start + _STAGE] for values in flat)
