"""Forward passes in which blocks that are finished return what they returned before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ptqkit.nn.forward import StopForwardError, forward

__all__ = ["RecordedBlocks"]


class RecordedBlocks:
    """Runs the model with finished blocks replaced by what they last returned.

    Of each stack only the latest finished block's output is kept, one per batch: the blocks before
    it return the same, and what the next block receives is right.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], batches: Sequence[Mapping[str, torch.Tensor]]
    ) -> None:
        self.model, self.blocks, self.batches = model, list(blocks), batches
        self.modules = {name: model.get_submodule(name) for name in blocks}
        self.finished: set[str] = set()
        self.outputs: list[dict[str, Any]] = [{} for _ in batches]
        self.batch = 0
        self.stop_after: str | None = None
        self.recording: set[str] = set()
        self.fresh: dict[str, Any] = {}

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Give every block a forward that replays, records or stops."""
        own = {n: m.forward for n, m in self.modules.items() if "forward" in m.__dict__}
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
                # A copy, because later code may change it in place.
                return _clone(self.outputs[self.batch][stack])
            output = original(*args, **kwargs)
            if name in self.recording:
                self.fresh[stack] = _clone(output)
            if name == self.stop_after:
                raise StopForwardError
            return output

        return replayed

    def forward(self, index: int, stop_after: str | None) -> None:
        """Run one batch until a hook or the end of a block stops it."""
        self.batch, self.stop_after = index, stop_after
        with contextlib.suppress(StopForwardError):
            forward(self.model, self.batches[index])

    def advance(self, position: int) -> None:
        """Record the outputs of the first ``position`` blocks; they are final now."""
        new = [b for b in self.blocks[:position] if b not in self.finished]
        if not new:
            return
        self.recording = set(new)
        for index in range(len(self.batches)):
            self.fresh = {}
            self.forward(index, stop_after=new[-1])
            self.outputs[index].update(self.fresh)
        self.recording = set()
        self.finished.update(new)


def _clone(value: Any) -> Any:
    """Copy the tensors of a block's output; containers keep their form."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple):
        items = [_clone(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_clone(v) for v in value]
    if isinstance(value, dict):
        return type(value)((k, _clone(v)) for k, v in value.items())
    return value
