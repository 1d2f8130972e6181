"""The two ways to run the calibration set through a model while it is being quantized.

``one-pass``: every batch is a coroutine through the whole forward that pauses before each linear
layer. When all wait at the same layer, H is accumulated from the waiting inputs, the layers fed
by that tensor are quantized in place, and all go on: each operation runs once per batch, and every
layer sees inputs from layers that are already quantized.

``re-forward``: no coroutines. For each group of layers every batch runs from the model's start to
that group, with finished blocks replaced by their recorded outputs. It holds one hidden state per
batch, runs each block several times, and gives bit-identical results. It assumes that a block acts
on the rest of the model through its return value alone.

With ``error_propagation`` one-pass has a second coroutine per batch, through the float model (see
:mod:`ptqkit.hf.float_path`); re-forward cannot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ptqkit.errors import CalibrationError, UnsupportedModuleError, prefix_error
from ptqkit.hf.data.calibration import CalibrationSet
from ptqkit.hf.models.inputs import match_mask
from ptqkit.hf.models.replay import Replay
from ptqkit.hf.models.structure import Target
from ptqkit.hf.quantization.coroutines import Coroutine, pause
from ptqkit.hf.quantization.float_model import Moments, OriginalWeights, check_same_tokens
from ptqkit.nn.activations import installed_quantizer
from ptqkit.nn.forward import StopForwardError, forward, hooks, tensor_key, thread_state
from ptqkit.nn.statistics import InputDrift, accumulator, range_accumulator

__all__ = ["Run", "run_one_pass", "run_reforward"]

Quantize = Callable[[list[Target], Moments, str], None]
Fail = Callable[[list[Target], Exception, str], None]
Notify = Callable[[list[Target]], None]


@dataclass
class Run:
    """State of a run, shared by both schedules.

    Attributes
    ----------
    model : nn.Module
    targets : dict of str to Target
    groups : list of list of str
        In order of execution; those fed by one tensor together.
    calibration : CalibrationSet
    blocks : list of str
        Blocks in order of execution.
    quantize : callable
        ``quantize(targets, moments, schedule)`` quantizes a group in place.
    fail : callable
        ``fail(targets, error, schedule)`` raises, or marks the layers and returns.
    notify : callable
        ``notify(targets)`` once a group is finished, either way; its errors are the caller's.
    propagate : bool
        Also run the float model (one-pass only).
    done : set of str
    """

    model: nn.Module
    targets: dict[str, Target]
    groups: list[list[str]]
    calibration: CalibrationSet
    blocks: list[str]
    quantize: Quantize
    fail: Fail
    notify: Notify
    propagate: bool = False
    done: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.masks = self.calibration.masks()
        self.batches = self.calibration.batches
        self.group_of = {name: i for i, group in enumerate(self.groups) for name in group}

    def modules(self) -> dict[str, nn.Module]:
        """Modules of all layers not yet quantized."""
        return {n: t.module for n, t in self.targets.items() if n not in self.done}

    def members(self, name: str) -> list[str]:
        """Layers fed by the same tensor as this one, itself among them."""
        return self.groups[self.group_of[name]] if name in self.group_of else [name]

    def positions(self) -> list[int]:
        """Per group, how many blocks have ended before it runs."""
        result, last = [], -1
        for group in self.groups:
            block = self.targets[group[0]].block
            position = last + 1 if block is None else self.blocks.index(block)
            last = max(last, position - (block is None))
            result.append(position)
        return result

    def late(self, block: str) -> list[str]:
        """Layers of a block that are in no group: the probe did not reach them."""
        return [
            n
            for n, t in self.targets.items()
            if t.block == block and n not in self.group_of and n not in self.done
        ]

    def finish(self, group: list[str], work: _Accumulation, schedule: str) -> None:
        """Quantize a group from its accumulated H."""
        members = [self.targets[name] for name in group]
        try:
            self.quantize(members, work.finish(), schedule)
        except Exception as error:
            self.fail(members, prefix_error(error, ", ".join(group)), schedule)
        self.done.update(group)
        self.notify(members)


class _Accumulation:
    """H (and G) of one group, gathered batch by batch; the first error is kept for later."""

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name = run, name
        self.hessian: Any = None
        self.ranges: Any = None
        self.needs_ranges = any(run.targets[n].needs_ranges for n in run.members(name))
        self.drift: InputDrift | None = None
        self.seconds = self.seconds_drift = 0.0
        self.error: Exception | None = None

    def add(self, value: torch.Tensor, index: int, floats: torch.Tensor | None = None) -> None:
        """Add one batch's input of the layer; ``floats``: the same of the float model."""
        if self.error is not None:
            return
        start = middle = time.perf_counter()
        try:
            if self.hessian is None:
                self.hessian = accumulator(value.shape[-1], value.device)
            batch = self.run.batches[index]
            mask = match_mask(value, batch, self.run.masks[index])
            self.hessian.update(value, mask)
            if self.needs_ranges:
                if self.ranges is None:
                    self.ranges = range_accumulator(value.shape[-1], value.device)
                self.ranges.update(value, mask)
            middle = time.perf_counter()
            if floats is not None:
                check_same_tokens(self.name, floats, value, batch)
                if self.drift is None:
                    self.drift = InputDrift(value.shape[-1], value.device)
                self.drift.update(floats, value, mask)
                self.seconds_drift += time.perf_counter() - middle
        except Exception as error:
            self.error = prefix_error(error, self.name)
        self.seconds += middle - start

    def finish(self) -> Moments:
        """Return H (and G) on the host, or raise what went wrong."""
        if self.error is not None:
            raise self.error
        start = time.perf_counter()
        hessian = self.hessian.finish() if hasattr(self.hessian, "finish") else self.hessian
        ranges = self.ranges.finish() if hasattr(self.ranges, "finish") else self.ranges
        middle = time.perf_counter()
        found = Moments(hessian, ranges=ranges, seconds=self.seconds + middle - start)
        if self.drift is not None and found.tokens:
            found.moment = self.drift.moment(hessian.matrix)
            found.seconds_moment = self.seconds_drift + time.perf_counter() - middle
        return found


def run_one_pass(run: Run) -> str | None:
    """Quantize everything in one forward pass per batch.

    Returns
    -------
    str or None
        None when every group is done; otherwise why the batches could not go on together. What
        is done by then stays done, and :func:`run_reforward` takes the rest.
    """
    current: list[Coroutine] = []

    def at_layer(name: str, value: torch.Tensor) -> torch.Tensor | None:
        if name not in run.done:
            pause(name, value)
            # Torch collected this call's hooks before the pause, without the quantizer installed
            # in it; at the layers that share the input it comes after this hook.
            quantizer = installed_quantizer(run.targets[name].module)
            return None if quantizer is None else quantizer(value)
        if current[0] in floats:
            originals.ran(name)
        # A layer that was quantized with another one's H: its input must be that one's.
        seen = current[0].keys.get(run.group_of[name])
        if seen is not None and seen != tensor_key(value):
            raise UnsupportedModuleError(
                f"{name} shared its input with {run.groups[run.group_of[name]][0]} in a short "
                "probe, but not on the calibration data; quantize with share_inputs=False"
            )
        return None

    coroutines, floats = (
        [
            Coroutine(lambda batch=batch: forward(run.model, batch))  # type: ignore[misc]
            for batch in batches
        ]
        for batches in (run.batches, run.batches if run.propagate else [])
    )
    originals = OriginalWeights(run.targets, len(floats))
    waiting = None
    try:
        with hooks(run.modules(), at_layer):
            for group in run.groups:
                with originals.in_place(waiting):
                    reason = _step(floats, current)
                reason = reason or _step(coroutines, current) or _met(coroutines + floats, group)
                if reason is not None:
                    return reason
                if floats:
                    originals.keep(group)
                waiting = group[0]
                _quantize_waiting(run, group, coroutines, floats)
    finally:
        for coroutine in [*coroutines, *floats]:
            coroutine.close()
    return None


def _step(coroutines: Sequence[Coroutine], current: list[Coroutine]) -> str | None:
    """Let all go on to their next pause; why they cannot go on together, None if they can."""
    baseline = thread_state()
    for coroutine in coroutines:
        current[:] = [coroutine]
        coroutine.step()
        # At once: the next coroutine would run inside this one's mode, and modes that are not left
        # in the order they were entered in leak.
        if thread_state() != baseline:
            return (
                f"{coroutine.name} runs inside a thread-local mode (such as autocast) set by the "
                "model"
            )
    return None


def _met(coroutines: Sequence[Coroutine], group: list[str]) -> str | None:
    """Why the coroutines do not all wait at the group's first layer; None if they do."""
    names = {c.name for c in coroutines}
    if names == {group[0]}:
        return None
    shown = ", ".join(sorted("the end" if n is None else n for n in names)[:4])
    return f"the batches did not meet at {group[0]} (they reached {shown})"


def _quantize_waiting(
    run: Run, group: list[str], coroutines: Sequence[Coroutine], floats: Sequence[Coroutine]
) -> None:
    work = _Accumulation(run, group[0])
    for index, coroutine in enumerate(coroutines):
        assert coroutine.value is not None
        work.add(coroutine.value, index, floats[index].value if floats else None)
    if len(group) > 1:
        for coroutine in [*coroutines, *floats]:
            assert coroutine.value is not None
            coroutine.keys[run.group_of[group[0]]] = tensor_key(coroutine.value)
    run.finish(group, work, "one-pass")


def run_reforward(run: Run) -> None:
    """Quantize what is left, running every block once per group and once for its outputs."""
    replay = Replay(run.model, run.blocks, run.batches)
    positions = run.positions()
    with replay.patched():
        for position, block in enumerate([*run.blocks, None]):
            groups = [g for g, p in zip(run.groups, positions, strict=True) if p == position]
            groups = [g for g in groups if not run.done.issuperset(g)]
            late = [] if block is None else run.late(block)
            if not groups and not late:
                continue
            replay.advance(position)
            if late:
                assert block is not None
                groups = _order_of(run, replay, [*groups, *([n] for n in late)], block)
            for group in groups:
                _reforward_group(run, replay, group)


def _reforward_group(run: Run, replay: Replay, group: list[str]) -> None:
    work = _Accumulation(run, group[0])
    target = run.targets[group[0]]

    def at_layer(name: str, value: torch.Tensor) -> None:
        work.add(value, replay.batch)
        raise StopForwardError

    with hooks({group[0]: target.module}, at_layer):
        for index in range(len(run.batches)):
            replay.forward(index, stop_after=target.block)
    if work.hessian is None and work.error is None:
        work.error = CalibrationError(
            f"{group[0]} saw no token of the calibration data: give more data, or leave it float "
            "with an override 'skip'"
        )
    run.finish(group, work, "re-forward")


def _order_of(run: Run, replay: Replay, groups: list[list[str]], block: str) -> list[list[str]]:
    """Order of groups of a block such that no batch runs one after a group that follows it.

    Where batches disagree, what the model registers first comes first.
    """
    waiting = {g[0]: g for g in groups}
    position = {name: i for i, name in enumerate(run.targets)}
    earlier: dict[str, set[str]] = {name: set() for name in waiting}
    seen: list[str] = []

    def at_layer(name: str, value: torch.Tensor) -> None:
        if name not in seen:
            earlier[name].update(seen)
            seen.append(name)

    with hooks({n: run.targets[n].module for n in waiting}, at_layer):
        for index in range(len(run.batches)):
            seen.clear()
            replay.forward(index, stop_after=block)
    ordered: list[list[str]] = []
    while waiting:
        ready = [n for n in waiting if not earlier[n] & waiting.keys()] or list(waiting)
        ordered.append(waiting.pop(min(ready, key=position.__getitem__)))
    return ordered
