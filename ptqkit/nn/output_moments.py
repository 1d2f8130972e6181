"""Second moments of the loss's gradients at the outputs of layers that share their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from ptqkit._repr import one_line_repr
from ptqkit.nn.output_gradients import output_gradients

__all__ = ["MOST_ROWS", "OutputMoments", "output_moments"]

#: Outputs that are coupled with each other: runs of at most so many, which bounds the memory.
MOST_ROWS = 256


@dataclass(frozen=True)
class OutputMoments:
    """The second moments ``g^T g`` of groups of layers, of any scale within a group.

    Attributes
    ----------
    groups : dict of tuple of str to list of ndarray of float32, shape (rows, rows)
        By the names of a group, in the order of their stacked outputs: a matrix per run of rows.
    sizes : dict of str to int
        Outputs of each layer.
    """

    __repr__ = one_line_repr

    groups: dict[tuple[str, ...], list[np.ndarray]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def parts(self, names: Sequence[str]) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield runs of the stacked rows of some layers, each with its second moments.

        Layers that are a whole group are coupled with each other, others only each in itself;
        layers that no gradient reached have none.
        """
        if tuple(names) in self.groups:
            start = 0
            for moments in self.groups[tuple(names)]:
                yield slice(start, start + len(moments)), moments
                start += len(moments)
            return
        place = 0
        for name in names:
            for rows, moments in self._alone(name):
                yield slice(place + rows.start, place + rows.stop), moments
            place += self.sizes.get(name, 0)

    def _alone(self, name: str) -> Iterator[tuple[slice, np.ndarray]]:
        for group, runs in self.groups.items():
            if name not in group:
                continue
            first = sum(self.sizes[n] for n in group[: group.index(name)])
            start, end = 0, first + self.sizes[name]
            for moments in runs:
                low, high = max(first, start), min(end, start + len(moments))
                if low < high:
                    own = slice(low - start, high - start)
                    yield slice(low - first, high - first), moments[own, own]
                start += len(moments)


def output_moments(
    model: nn.Module,
    groups: Sequence[Mapping[str, nn.Module]],
    blocks: Sequence[nn.Module],
    batches: Sequence[Mapping[str, torch.Tensor]],
    masks: Sequence[torch.Tensor | None],
    seed: int = 0,
) -> OutputMoments:
    """Measure the second moments of groups of layers, each group fed by one tensor.

    The gradients are those of tokens drawn from the model's own predictions, see
    :func:`ptqkit.nn.output_gradients.output_gradients`, whose other arguments these are.
    """
    layers = {n: layer for group in groups for n, layer in group.items()}
    group_of = {n: tuple(group) for group in groups for n in group}
    sums: dict[tuple[str, ...], list[np.ndarray]] = {}
    sizes: dict[str, int] = {}
    waiting: dict[str, torch.Tensor] = {}

    def seen(name: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        waiting[name] = gradient.reshape(-1, gradient.shape[-1]).float()
        sizes[name] = gradient.shape[-1]
        group = group_of[name]
        if not all(n in waiting for n in group):
            return
        parts = [waiting.pop(n) for n in group]
        if len({len(p) for p in parts}) > 1:
            return
        runs = torch.cat(parts, 1).split(MOST_ROWS, 1)
        found = [(run.T @ run).cpu().numpy() for run in runs]
        before = sums.setdefault(group, found)
        if before is not found:
            for total, new in zip(before, found, strict=True):
                total += new

    output_gradients(model, layers, blocks, batches, masks, seen, waiting.clear, seed)
    return OutputMoments(sums, sizes)
