"""A forward pass per group of layers, with finished blocks replaced by their recorded outputs.

It holds one hidden state per batch, runs each block several times, and gives the results of
:mod:`~ptqkit.hf.quantization.one_pass` bit for bit. It assumes that a block acts on the rest of the
model through its return value alone. Where the float model runs along, it is a twin of its own:
each batch goes through its block first, up to the same layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from ptqkit.errors import CalibrationError, UnsupportedModuleError
from ptqkit.hf.models.recorded import RecordedBlocks
from ptqkit.hf.models.stream import following_streams
from ptqkit.hf.quantization.float_twin import FloatTwin
from ptqkit.hf.quantization.memory import HeapPages
from ptqkit.hf.quantization.moments import MomentAccumulator, Moments
from ptqkit.hf.quantization.work import Step, Steps, Work
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
        If some blocks are finished already, their outputs are kept in another place, or the float
        model is one that fills itself. Otherwise the float model, if it is to run along, shares
        its parameters with this one, of which nothing may be quantized yet.
    at_block_end : callable, optional
        Called with the position of each block once its layers are done, and its outputs recorded
        if anything follows that needs them.
    """
    twin = None
    if recorded is None:
        twin = FloatTwin(work.model, work.targets) if work.propagate else None
        second = None if twin is None else twin.model
        recorded = RecordedBlocks(work.model, work.blocks, work.batches, twin=second)
    positions = work.positions()
    pages = HeapPages(device_of(work.model), work.spare)
    with contextlib.ExitStack() as stack:
        stack.callback(pages.release)
        if twin is not None:
            stack.callback(twin.let_go)
        stack.enter_context(recorded.patched())
        for position, block in enumerate([*work.blocks, None]):
            groups = [g for g, p in zip(work.groups, positions, strict=True) if p == position]
            groups = [g for g in groups if not work.done.issuperset(g)]
            unprobed = [] if block is None else work.unprobed(block)
            if not groups and not unprobed:
                continue
            while recorded.position < position:
                work.places.settle()
                finished = work.blocks[recorded.position]
                work.places.enter(finished)
                recorded.advance()
                if twin is not None:
                    twin.let_go(finished)
                work.places.leave(recorded.position)
                pages.release()
                if at_block_end is not None:
                    at_block_end(recorded.position - 1)
            if block is not None:
                work.places.enter(block)
            if block is not None and unprobed:
                groups = _in_order(work, recorded, [*groups, *([n] for n in unprobed)], block)
            for wave, more in _waves(work, groups):
                work.places.settle()
                found = _moments(work, recorded, wave)
                pages.release()
                for group in wave:
                    if twin is not None:
                        twin.keep(group)
                    independent = len(found) > 1 or (more and work.ahead) or work.unwritten
                    yield Step(work.members(group), found.pop(0), independent)
                    work.done.update(group)
    return None


def _waves(work: Work, groups: list[list[str]]) -> Iterator[tuple[list[list[str]], bool]]:
    """Yield the groups whose moments one forward pass accumulates.

    One at a time, but for the experts of a module: they read what no other expert writes. Second,
    whether the next ones do not read what these write either.
    """
    waiting = list(groups)
    while waiting:
        expert = work.expert(waiting[0])
        if expert is None:
            yield [waiting.pop(0)], False
            continue
        found = [(g, e[2]) for g in waiting if (e := work.expert(g)) and e[0] is expert[0]]
        waiting = [g for g in waiting if g not in [f for f, _ in found]]
        size = max(1, work.experts_at_once // (2 if work.ahead else 1))
        for last in (False, True):
            wave = [g for g, is_last in found if is_last == last]
            for start in range(0, len(wave), size):
                yield wave[start : start + size], start + size < len(wave)


def _moments(
    work: Work, recorded: RecordedBlocks, wave: list[list[str]]
) -> list[Moments | Exception]:
    """Run every batch up to the groups, and accumulate their inputs."""
    found = {group[0]: work.accumulator(group) for group in wave}

    def add(name: str, value: torch.Tensor, index: int) -> None:
        found[name].add(value, work.batches[index], work.masks[index])

    if recorded.twin is None:
        _each_input(work, recorded, list(found), add)
    else:
        _each_input_of_both(work, recorded, recorded.twin, found)
    for group in wave:
        work.note_routed(group, found[group[0]])
    _pool(work, recorded, wave, found)
    return [
        work.finish(each)
        or CalibrationError(
            f"{name} saw no token of the calibration data: give more data, or leave it float "
            "with an override 'skip'"
        )
        for name, each in found.items()
    ]


def _pool(
    work: Work,
    recorded: RecordedBlocks,
    wave: list[list[str]],
    found: dict[str, MomentAccumulator],
) -> None:
    """Give experts with too few tokens the moments of the others, by one more forward pass."""
    for group in wave:
        work.borrow_pool(group, found[group[0]])
    lacking = {g[0]: g for g in wave if found[g[0]].lacks_tokens}
    if not lacking:
        return
    expert = work.expert(next(iter(lacking.values())))
    first = expert is not None and not expert[2]
    # The first layers of all experts have one pool.
    makers = list(lacking)[:1] if first else list(lacking)
    pools: dict[str, Any] = dict.fromkeys(makers)

    def add(name: str, value: torch.Tensor, index: int) -> None:
        batch, mask = work.batches[index], work.masks[index]
        pools[name] = found[name].add_pool(value, batch, mask, pools[name])

    _each_input(work, recorded, makers, add)
    for name in makers:
        work.use_pool(lacking[name], found[name], pools[name])
    for name, group in lacking.items():
        work.borrow_pool(group, found[name])


def _each_input(
    work: Work,
    recorded: RecordedBlocks,
    names: list[str],
    add: Callable[[str, torch.Tensor, int], None],
    before: Callable[[int], None] | None = None,
) -> None:
    """Run every batch until all of these layers have been met; ``before`` is called first."""
    met: set[str] = set()

    def at_layer(name: str, value: torch.Tensor) -> None:
        add(name, value, recorded.batch)
        met.add(name)
        if len(met) == len(names):
            raise StopForwardError

    with hooks({name: work.targets[name].module for name in names}, at_layer):
        for index in range(len(work.batches)):
            met.clear()
            if before is not None:
                before(index)
            recorded.forward(index, stop_after=work.targets[names[0]].block)


def _each_input_of_both(
    work: Work,
    recorded: RecordedBlocks,
    twin: RecordedBlocks,
    found: Mapping[str, MomentAccumulator],
) -> None:
    """Run every batch through the float model, then through this one, and add the inputs of both.

    With each input goes the residual stream, where it is known.
    """
    seen: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
    followed = (SimpleNamespace(stream=None), SimpleNamespace(stream=None))

    def at_float(name: str, value: torch.Tensor) -> None:
        seen[name] = (value, followed[0].stream)
        if len(seen) == len(found):
            raise StopForwardError

    def add(name: str, value: torch.Tensor, index: int) -> None:
        if name not in seen:
            found[name].fail(_unseen(name))
            return
        other, stream = seen.pop(name)
        now = followed[1].stream
        streams = None if stream is None or now is None else (stream, now)
        found[name].add(value, work.batches[index], work.masks[index], other, streams)

    def before(index: int) -> None:
        seen.clear()
        twin.forward(index, stop_after=work.targets[next(iter(found))].block)

    layers = {name: twin.model.get_submodule(name) for name in found}
    with (
        hooks(layers, at_float),
        following_streams(twin.model, work.writers, lambda: followed[0]),
        following_streams(work.model, work.writers, lambda: followed[1]),
    ):
        _each_input(work, recorded, list(found), add, before)


def _unseen(name: str) -> UnsupportedModuleError:
    """Return the error of a layer that the float model's forward pass has not come to."""
    return UnsupportedModuleError(
        f"{name}: error_propagation needs every token's input in both models, but the float one "
        "did not come to this layer; leave it out with an override 'skip', or quantize with "
        "error_propagation=0"
    )


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
