"""Find the layers that write into a residual stream, and prove it by a short forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ptqkit.hf.models.inputs import short_batch
from ptqkit.nn.forward import calibration_mode, forward, hooks
from ptqkit.nn.linear import is_linear

__all__ = ["StreamWriters", "find_writers", "following_streams", "output_hooks"]

# Layers of a block that are as wide as the stream; every subset of them is tried.
_MOST_CANDIDATES = 12


@dataclass
class StreamWriters:
    """Per block, the layers whose outputs are added to the residual stream, and nothing else is.

    Attributes
    ----------
    writers : dict of str to tuple of str
        Layers of each proven block, in order of execution: its output is its input plus the
        outputs of these, one after the other, bit for bit.
    unproven : dict of str to str
        Why the other blocks are not proven.
    """

    writers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unproven: dict[str, str] = field(default_factory=dict)


class _Block:
    """What a block was given, what its layers made of it, and what it returned."""

    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        self.given = value if isinstance(value, torch.Tensor) else None
        self.before = None if self.given is None else self.given.clone()
        self.outputs: list[tuple[str, torch.Tensor]] = []
        self.returned: torch.Tensor | None = None

    def add(self, name: str, output: torch.Tensor) -> None:
        if self.given is None or output.shape[-1] != self.given.shape[-1]:
            return
        if output.numel() == self.given.numel():
            self.outputs.append((name, output.reshape(self.given.shape).clone()))

    def writers(self) -> tuple[str, ...] | str:
        """Return the writers in order, or why they are not known."""
        if self.given is None or self.before is None or self.returned is None:
            return "it does not take and return a tensor"
        if self.returned.shape != self.before.shape:
            return "its output is not like its input"
        if not torch.equal(self.given, self.before):
            return "it changes its input in place"
        if len(self.outputs) > _MOST_CANDIDATES:
            return f"{len(self.outputs)} of its layers are as wide as the stream"
        found = _sum_of(self.before, self.outputs, self.returned)
        return found or "its output is not its input plus outputs of its layers in turn"


def _sum_of(
    stream: torch.Tensor, outputs: list[tuple[str, torch.Tensor]], wanted: torch.Tensor
) -> tuple[str, ...]:
    """Return the outputs that, added to the stream in order, give what is wanted; () if none do."""
    for at, (name, output) in enumerate(outputs):
        total = stream + output
        if torch.equal(total, wanted):
            return (name,)
        rest = _sum_of(total, outputs[at + 1 :], wanted)
        if rest:
            return (name, *rest)
    return ()


def output_hooks(modules: Mapping[str, nn.Module], hook: Any) -> list[Any]:
    """Call ``hook(name, output)`` after each module has run; return the removable handles.

    Of a tuple, the output is the first item.
    """

    def wrap(name: str) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            hook(name, output[0] if isinstance(output, (tuple, list)) else output)

        return after

    return [module.register_forward_hook(wrap(name)) for name, module in modules.items()]


@contextlib.contextmanager
def following_streams(
    model: nn.Module, writers: Mapping[str, tuple[str, ...]], current: Callable[[], Any]
) -> Iterator[None]:
    """Keep the residual stream of the forward pass that is running up to date.

    That is what the block's next writer adds to: the block's input plus the outputs of the writers
    before it.

    Parameters
    ----------
    model : nn.Module
    writers : mapping of str to tuple of str
        Per block, its writers in order of execution.
    current : callable
        Returns what has an attribute ``stream``: a Tensor, or None where nothing is known.
    """
    last = {names[-1] for names in writers.values()}

    def at_block(name: str, value: torch.Tensor) -> None:
        current().stream = value

    def at_output(name: str, output: torch.Tensor) -> None:
        stream = current().stream
        if stream is not None:
            current().stream = None if name in last else stream + output.reshape(stream.shape)

    blocks = {name: model.get_submodule(name) for name in writers}
    layers = {n: model.get_submodule(n) for names in writers.values() for n in names}
    handles = output_hooks(layers, at_output)
    try:
        with hooks(blocks, at_block):
            yield
    finally:
        for handle in handles:
            handle.remove()


def find_writers(
    model: nn.Module, blocks: Mapping[str, nn.Module], batch: Mapping[str, torch.Tensor]
) -> StreamWriters:
    """Run a few tokens through the model and find out which layers write into the stream.

    A block is proven if its output equals, bit for bit, its input plus the outputs of some of its
    linear layers, added in the order in which they run: not so with parallel branches, norms after
    a branch, scaled residuals and gated experts.

    Parameters
    ----------
    model : nn.Module
    blocks : mapping of str to Module
    batch : mapping of str to Tensor
        Of the calibration data.
    """
    open_blocks: dict[str, _Block] = {}
    inside = {
        f"{block}.{name}": block
        for block, module in blocks.items()
        for name, layer in module.named_modules()
        if name and is_linear(layer)
    }
    repeated: set[str] = set()

    def enter(name: str, value: Any) -> None:
        if name in open_blocks:
            repeated.add(name)
        open_blocks[name] = _Block(name, value)

    def at_output(name: str, output: Any) -> None:
        if name in blocks:
            if name in open_blocks and isinstance(output, torch.Tensor):
                open_blocks[name].returned = output.clone()
        elif inside[name] in open_blocks:
            open_blocks[inside[name]].add(name, output)

    layers = {name: model.get_submodule(name) for name in inside}
    handles: list[Any] = []
    with calibration_mode(model), hooks(blocks, enter):
        try:
            handles = output_hooks({**layers, **blocks}, at_output)
            forward(model, short_batch(batch))
        finally:
            for handle in handles:
                handle.remove()
    result = StreamWriters()
    for name in blocks:
        if name not in open_blocks:
            found: tuple[str, ...] | str = "it was not run"
        elif name in repeated:
            found = "it runs more than once"
        else:
            found = open_blocks[name].writers()
        if isinstance(found, str):
            result.unproven[name] = found
        else:
            result.writers[name] = found
    return result
