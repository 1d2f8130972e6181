"""A forward pass per group of layers, with finished blocks replaced by their recorded outputs.

It holds one hidden state per batch, runs each block several times, and gives the results of
:mod:`~ptqkit.hf.quantization.one_pass` bit for bit. It assumes that a block acts on the rest of the
model through its return value alone, and cannot run the float model along.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ptqkit.errors import CalibrationError
from ptqkit.hf.models.recorded import RecordedBlocks
from ptqkit.hf.quantization.memory import HeapPages
from ptqkit.hf.quantization.moments import Moments
from ptqkit.hf.quantization.work import Steps, Work
from ptqkit.nn.forward import StopForwardError, device_of, hooks

__all__ = ["replay_groups"]


def replay_groups(
    work: Work,
    recorded: RecordedBlocks | None = None,
    at_block_end: Callable[[int], None] | None = None,
) -> Steps:
    """Yield every group that is left, running its block per group and once for its outputs.

    Parameters
    ----------
    work : Work
    recorded : RecordedBlocks, optional
        If some blocks are finished already, or their outputs are kept in another place.
    at_block_end : callable, optional
        Called with the position of each block once its layers are done, and its outputs recorded
        if anything follows that needs them.
    """
    if recorded is None:
        recorded = RecordedBlocks(work.model, work.blocks, work.batches)
    positions = work.positions()
    pages = HeapPages(device_of(work.model))
    with recorded.patched():
        for position, block in enumerate([*work.blocks, None]):
            groups = [g for g, p in zip(work.groups, positions, strict=True) if p == position]
            groups = [g for g in groups if not work.done.issuperset(g)]
            unprobed = [] if block is None else work.unprobed(block)
            if not groups and not unprobed:
                continue
            while recorded.position < position:
                recorded.advance()
                pages.release()
                if at_block_end is not None:
                    at_block_end(recorded.position - 1)
            if block is not None and unprobed:
                groups = _in_order(work, recorded, [*groups, *([n] for n in unprobed)], block)
            for group in groups:
                moments = _moments(work, recorded, group)
                pages.release()
                yield work.members(group), moments
                del moments
                work.done.update(group)
    pages.release()
    return None


def _moments(work: Work, recorded: RecordedBlocks, group: list[str]) -> Moments | Exception:
    """Run every batch up to the group, and accumulate its inputs."""
    found = work.accumulator(group)
    target = work.targets[group[0]]

    def at_layer(name: str, value: torch.Tensor) -> None:
        index = recorded.batch
        found.add(value, work.batches[index], work.masks[index])
        raise StopForwardError

    with hooks({group[0]: target.module}, at_layer):
        for index in range(len(work.batches)):
            recorded.forward(index, stop_after=target.block)
    moments = work.finish(found)
    if moments is None:
        return CalibrationError(
            f"{group[0]} saw no token of the calibration data: give more data, or leave it float "
            "with an override 'skip'"
        )
    return moments


def _in_order(
    work: Work, recorded: RecordedBlocks, groups: list[list[str]], block: str
) -> list[list[str]]:
    """Order the groups of a block such that no batch runs one after a group that follows it.

    If batches disagree, what the model registers first comes first.
    """
    waiting = {g[0]: g for g in groups}
    position = {name: i for i, name in enumerate(work.targets)}
    earlier: dict[str, set[str]] = {name: set() for name in waiting}
    seen: list[str] = []

    def at_layer(name: str, value: torch.Tensor) -> None:
        if name not in seen:
            earlier[name].update(seen)
            seen.append(name)

    with hooks({n: work.targets[n].module for n in waiting}, at_layer):
        for index in range(len(work.batches)):
            seen.clear()
            recorded.forward(index, stop_after=block)
    if work.processes is not None:
        for other in work.processes.gather(earlier):
            for name, names in other.items():
                earlier[name] |= names
    ordered: list[list[str]] = []
    while waiting:
        ready = [n for n in waiting if not earlier[n] & waiting.keys()] or list(waiting)
        ordered.append(waiting.pop(min(ready, key=position.__getitem__)))
    return ordered
