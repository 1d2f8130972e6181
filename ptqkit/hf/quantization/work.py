"""What a schedule runs through: a model, its groups of layers, and the calibration data."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from ptqkit.hf.data.calibration import CalibrationSet
from ptqkit.hf.models.structure import Target
from ptqkit.hf.quantization.moments import MomentAccumulator, Moments
from ptqkit.hf.quantization.processes import Processes, SharedMoments
from ptqkit.nn.forward import device_of

__all__ = ["Steps", "Work"]

#: Groups of layers in order, each with its moments or the error that prevents them. The consumer
#: quantizes a group before it asks for the next one. Returned at the end: why the rest is left.
Steps = Generator[tuple[list[Target], Moments | Exception], None, "str | None"]


@dataclass
class Work:
    """What both schedules run through.

    Attributes
    ----------
    model : nn.Module
    targets : dict of str to Target
    groups : list of list of str
        In order of execution; layers fed by one tensor together.
    blocks : list of str
        In order of execution.
    calibration : CalibrationSet
    propagate : bool
        Also run the float model (one pass only).
    writers : mapping of str to tuple of str
        Per block, the layers that write into its residual stream, in order of execution, if they
        are to answer for its errors.
    done : set of str
        Layers whose turn is over, quantized or failed.
    processes : Processes, optional
        Others that run other batches.
    """

    model: nn.Module
    targets: dict[str, Target]
    groups: list[list[str]]
    blocks: list[str]
    calibration: CalibrationSet
    propagate: bool = False
    writers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    processes: Processes | None = None

    def __post_init__(self) -> None:
        self.masks = self.calibration.masks()
        self.batches = self.calibration.batches
        self.group_of = {name: i for i, group in enumerate(self.groups) for name in group}

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules of all layers not yet quantized."""
        return {n: t.module for n, t in self.targets.items() if n not in self.done}

    def members(self, group: list[str]) -> list[Target]:
        """Return the layers of a group."""
        return [self.targets[name] for name in group]

    def accumulator(self, group: list[str]) -> MomentAccumulator | SharedMoments:
        """Return an empty accumulator for the inputs of a group."""
        needs_ranges = any(target.options.needs_ranges for target in self.members(group))
        make = partial(MomentAccumulator, group[0], needs_ranges, self.writer(group))
        if self.processes is None:
            return make()
        return SharedMoments(make, device_of(self.model).type == "cpu")

    def agree(self, reason: str | None) -> str | None:
        """Return a reason not to go on that this process has, or another one."""
        return reason if self.processes is None else self.processes.agree(reason)

    def finish(self, found: MomentAccumulator | SharedMoments) -> Moments | Exception | None:
        """Return the moments of all batches, the error that prevents them, or None if none came."""
        if isinstance(found, MomentAccumulator):
            return None if found.empty else found.finish()
        assert self.processes is not None
        found.close()
        return self.processes.reduce(found)

    def writer(self, group: list[str]) -> str | None:
        """Return the first layer of a group that writes into a stream.

        When the group's turn comes, the stream is as it will be when that layer runs; before a
        second one, it would have changed.
        """
        known = {name for names in self.writers.values() for name in names}
        return next((name for name in group if name in known), None)

    def positions(self) -> list[int]:
        """Return per group how many blocks have ended before it runs."""
        result, last = [], -1
        for group in self.groups:
            block = self.targets[group[0]].block
            position = last + 1 if block is None else self.blocks.index(block)
            last = max(last, position - (block is None))
            result.append(position)
        return result

    def unprobed(self, block: str) -> list[str]:
        """Return the layers of a block that are in no group: the probe did not reach them."""
        return [
            n
            for n, t in self.targets.items()
            if t.block == block and n not in self.group_of and n not in self.done
        ]
