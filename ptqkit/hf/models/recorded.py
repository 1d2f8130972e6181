"""Forward passes in which blocks that are finished return what they returned before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ptqkit.nn.forward import StopForwardError, forward

__all__ = ["MemoryOutputs", "Outputs", "RecordedBlocks"]

_TWIN = "twin "


class Outputs(Protocol):
    """Where the output of the latest finished block of each stack is kept, one per batch."""

    def get(self, index: int, stack: str) -> Any:
        """Return a copy of what a batch's last finished block of a stack returned."""

    def put(self, index: int, outputs: dict[str, Any]) -> None:
        """Keep what blocks that were finished just now returned, by their stacks."""

    def turn(self) -> None:
        """Go over to what has been put, which is there for all batches."""


class MemoryOutputs:
    """Outputs in memory."""

    def __init__(self, batches: int) -> None:
        self._held: list[dict[str, Any]] = [{} for _ in range(batches)]

    def get(self, index: int, stack: str) -> Any:
        """Return a copy, because later code may change it in place."""
        return copy_tensors(self._held[index][stack])

    def put(self, index: int, outputs: dict[str, Any]) -> None:
        """Keep new outputs; those they replace are free at once."""
        self._held[index].update(outputs)

    def turn(self) -> None:
        """Do nothing: a batch goes over by itself."""


class RecordedBlocks:
    """Runs the model with finished blocks replaced by what they last returned.

    Of each stack only the latest finished block's output is kept, one per batch: the blocks before
    it return the same, and what the next block receives is right.

    Parameters
    ----------
    model : nn.Module
    blocks : sequence of str
        In order of execution.
    batches : sequence of dict
    outputs : Outputs, optional
        In memory by default.
    finished : int
        Blocks whose outputs are there already.
    twin : nn.Module, optional
        The same model with other weights, whose blocks are recorded along.

    Attributes
    ----------
    twin : RecordedBlocks or None
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        batches: Sequence[Mapping[str, torch.Tensor]],
        outputs: Outputs | None = None,
        finished: int = 0,
        twin: nn.Module | None = None,
    ) -> None:
        self.model, self.blocks, self.batches = model, list(blocks), batches
        self.modules = {name: model.get_submodule(name) for name in blocks}
        self.outputs = MemoryOutputs(len(batches)) if outputs is None else outputs
        self.finished: set[str] = set()
        self.batch = 0
        self.stop_after: str | None = None
        self.recording: set[str] = set()
        self.fresh: dict[str, Any] = {}
        # Per stack the last finished block, and what the others return in this forward pass.
        self._last: dict[str, str] = {}
        self._before: dict[str, Any] = {}
        self._finish(self.blocks[:finished])
        # Both share the outputs, in which the twin's stacks have names of their own.
        self._prefix, self.twin = "", None
        if twin is not None:
            self.twin = RecordedBlocks(twin, blocks, batches, self.outputs, finished)
            self.twin._prefix = _TWIN

    @property
    def position(self) -> int:
        """Number of finished blocks."""
        return len(self.finished)

    def _finish(self, blocks: Sequence[str]) -> None:
        self.finished.update(blocks)
        self._last |= {name.rpartition(".")[0]: name for name in blocks}

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Give every block a forward that replays, records or stops."""
        own = {n: m.forward for n, m in self.modules.items() if "forward" in m.__dict__}
        with contextlib.nullcontext() if self.twin is None else self.twin.patched():
            try:
                for name, module in self.modules.items():
                    module.__dict__["forward"] = self._forward(name, module.forward)
                yield
            finally:
                for name, module in self.modules.items():
                    module.__dict__.pop("forward", None)
                    if name in own:
                        module.__dict__["forward"] = own[name]

    def _forward(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        stack = name.rpartition(".")[0]

        def replayed(*args: Any, **kwargs: Any) -> Any:
            if name in self.finished:
                return self._replay(name, stack)
            output = original(*args, **kwargs)
            if name in self.recording:
                self.fresh[self._prefix + stack] = copy_tensors(output)
            if name == self.stop_after:
                raise StopForwardError
            return output

        return replayed

    def _replay(self, name: str, stack: str) -> Any:
        held = self._prefix + stack
        if self._last[stack] == name:
            return self.outputs.get(self.batch, held)
        # Nobody reads what these return; only its form matters.
        if stack not in self._before:
            self._before[stack] = self.outputs.get(self.batch, held)
        return self._before[stack]

    def forward(self, index: int, stop_after: str | None) -> None:
        """Run one batch until a hook or the end of a block stops it."""
        self.batch, self.stop_after = index, stop_after
        try:
            with contextlib.suppress(StopForwardError):
                forward(self.model, self.batches[index])
        finally:
            self._before = {}

    def advance(self) -> None:
        """Record the outputs of the next block; they are final now."""
        block = self.blocks[self.position]
        runs = [self] if self.twin is None else [self.twin, self]
        for index in range(len(self.batches)):
            fresh: dict[str, Any] = {}
            for run in runs:
                fresh |= run._record(index, block)
            self.outputs.put(index, fresh)
        self.outputs.turn()
        for run in runs:
            run._finish([block])

    def _record(self, index: int, block: str) -> dict[str, Any]:
        """Run one batch to the end of a block, and return the block's output."""
        self.recording, self.fresh = {block}, {}
        self.forward(index, stop_after=block)
        fresh, self.recording, self.fresh = self.fresh, set(), {}
        return fresh


def copy_tensors(value: Any) -> Any:
    """Copy the tensors of a block's output; containers keep their form."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple):
        items = [copy_tensors(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [copy_tensors(v) for v in value]
    if isinstance(value, dict):
        return type(value)((k, copy_tensors(v)) for k, v in value.items())
    return value
