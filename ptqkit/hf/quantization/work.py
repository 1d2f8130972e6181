"""What a schedule runs through: a model, its groups of layers, and the calibration data."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from ptqkit.hf.data.calibration import CalibrationSet
from ptqkit.hf.models.structure import Target
from ptqkit.hf.quantization.block_places import BlockPlaces
from ptqkit.hf.quantization.moments import MomentAccumulator, Moments
from ptqkit.hf.quantization.processes import Processes, SharedMoments
from ptqkit.nn.experts import ExpertLinears
from ptqkit.nn.forward import device_of
from ptqkit.nn.linear import LinearView

__all__ = ["Step", "Steps", "Work"]


class Step(NamedTuple):
    """A group of layers whose turn it is.

    Attributes
    ----------
    members : list of Target
    moments : Moments or Exception
        Of their inputs, or the error that prevents them.
    independent : bool
        The next group's moments do not depend on what is written into these layers.
    """

    members: list[Target]
    moments: Moments | Exception
    independent: bool = False


#: Groups of layers in order. The consumer quantizes a group before it asks for the next one, unless
#: that is independent. Returned at the end: why the rest is left.
Steps = Generator[Step, None, "str | None"]


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
        Also run the float model.
    writers : mapping of str to tuple of str
        Per block, the layers that write into its residual stream, in order of execution, if they
        are to answer for its errors.
    experts : mapping of str to ExpertLinears
        The modules that route tokens to layers, by name.
    experts_at_once : int
        Experts whose moments replay accumulates in one forward pass.
    ahead : bool
        Yield experts as independent where the next ones' moments are still to be accumulated.
    unwritten : bool
        Nothing is written before the end, so all groups are independent.
    done : set of str
        Layers whose turn is over, quantized or failed.
    processes : Processes, optional
        Others that run other batches.
    spare : int
        Bytes by which the process may grow before free pages are given back.
    expected : int
        Bytes that one pass is expected to need; the process may grow by half of them as well.
    on_host : int
        Blocks that are not on the device at any time.

    Attributes
    ----------
    places : BlockPlaces
    """

    model: nn.Module
    targets: dict[str, Target]
    groups: list[list[str]]
    blocks: list[str]
    calibration: CalibrationSet
    propagate: bool = False
    writers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts: Mapping[str, ExpertLinears] = field(default_factory=dict)
    experts_at_once: int = 1
    ahead: bool = False
    unwritten: bool = False
    done: set[str] = field(default_factory=set)
    processes: Processes | None = None
    spare: int = 0
    expected: int = 0
    on_host: int = 0

    def __post_init__(self) -> None:
        self.places = BlockPlaces(self.model, self.blocks, self.on_host)
        self.masks = self.calibration.masks()
        self.batches = self.calibration.batches
        self._pools: dict[str, Any] = {}
        # Only first layers tell how many tokens come: without, last ones are told of all.
        first = {n.rsplit(".", 1)[0] for n in self.targets if not n.endswith(".down_proj")}
        for target in self.targets:
            name, _, place = target.rpartition(".")[0].rpartition(".")
            if name in self.experts and f"{name}.{place}" not in first:
                self.experts[name].short.add(int(place))
        self.group_of = {name: i for i, group in enumerate(self.groups) for name in group}

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules of all layers not yet quantized."""
        return {n: t.module for n, t in self.targets.items() if n not in self.done}

    def members(self, group: list[str]) -> list[Target]:
        """Return the layers of a group."""
        return [self.targets[name] for name in group]

    def accumulator(self, group: list[str]) -> MomentAccumulator:
        """Return an empty accumulator for the inputs of a group."""
        needs_ranges = any(target.options.needs_ranges for target in self.members(group))
        about = (group[0], needs_ranges, self.writer(group), self._narrow(group))
        if self.processes is None:
            return MomentAccumulator(*about)
        return SharedMoments(*about, on_host=device_of(self.model).type == "cpu")

    def _narrow(self, group: list[str]) -> LinearView | None:
        """Return the only layer of a group, if it has fewer outputs than inputs."""
        target = self.targets[group[0]]
        outputs, inputs = target.view.shape
        alone = len(group) == 1 and target.options.target == "least-squares"
        return target.view if alone and outputs < inputs else None

    def agree(self, reason: str | None) -> str | None:
        """Return a reason not to go on that this process has, or another one."""
        return reason if self.processes is None else self.processes.agree(reason)

    def finish(self, found: MomentAccumulator) -> Moments | Exception | None:
        """Return the moments of all batches, the error that prevents them, or None if none came."""
        if self.processes is None or not isinstance(found, SharedMoments):
            return None if found.empty else found.finish()
        found.close()
        return self.processes.reduce(found)

    def expert(self, group: list[str]) -> tuple[ExpertLinears, int, bool] | None:
        """Return module and number of the expert of a group, and whether the layer is its last."""
        parts = group[0].rsplit(".", 2)
        module = self.experts.get(parts[0])
        return None if module is None else (module, int(parts[1]), parts[2] == "down_proj")

    def note_routed(self, group: list[str], found: MomentAccumulator) -> None:
        """Have the expert's last layer told of other tokens too, if too few come to it."""
        expert, routed = self.expert(group), found.routed
        if expert is None or routed is None:
            return
        module, index, last = expert
        if not last and routed < module.shape.inner:
            module.short.add(index)

    def borrow_pool(self, group: list[str], found: MomentAccumulator) -> None:
        """Give a first layer the moments of the pool, if another of its module has made them."""
        expert = self.expert(group)
        if found.lacks_tokens and expert is not None and not expert[2]:
            found.use_pool(self._pools.get(expert[0].name))

    def use_pool(self, group: list[str], found: MomentAccumulator, pool: Any) -> None:
        """Give a layer the moments of the pool, and keep those that serve others."""
        found.use_pool(pool)
        expert = self.expert(group)
        if expert is not None and not expert[2]:
            self._pools = {expert[0].name: pool}

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
