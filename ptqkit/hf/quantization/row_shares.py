"""Rows of a matrix shared out over processes to be solved, and put together again.

A row depends on H and on itself alone, so every process solves a run of them. Runs of rows that are
coupled with each other stay together.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ptqkit.hf.quantization.processes import Processes
from ptqkit.nn.device_matrix import DeviceMatrix

__all__ = ["RowShare"]

# A process with fewer rows of a stack than this has more to wait for than to do.
_FEWEST_ROWS = 16
# Before the names of what is beside a matrix.
_BESIDE = "beside "


class RowShare:
    """The run of a matrix's rows that this process solves; all of them if they are few.

    Parameters
    ----------
    processes : Processes
    count : int
        Rows of the matrix.
    together : sequence of slice
        Runs of rows, in order, that one process solves.

    Attributes
    ----------
    own : slice
    """

    def __init__(self, processes: Processes, count: int, together: Sequence[slice] = ()) -> None:
        self._processes = processes
        self._bounds = _bounds(processes.size, count, together)
        lengths = [b - a for a, b in itertools.pairwise(self._bounds)]
        #: Rows of every process; none if each solves all.
        self._lengths = lengths if min(lengths) >= _FEWEST_ROWS else []
        self.own = slice(0, count)
        if self._lengths:
            self.own = slice(*self._bounds[processes.rank : processes.rank + 2])

    def join(self, own: torch.Tensor) -> torch.Tensor:
        """Put rows together, on the device of the processes; ``own`` are those of this one."""
        if not self._lengths:
            return own
        return self._processes.gather_rows(own, self._lengths)

    def join_rows(self, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Put rows of several tensors together at once, those of few bytes each."""
        if not self._lengths:
            return dict(own)
        held = {name: _bytes(values) for name, values in own.items()}
        whole = self.join(torch.cat(list(held.values()), 1))
        found, first = {}, 0
        for name, part in held.items():
            values = _packed(whole[:, first : first + part.shape[1]]).view(own[name].dtype)
            found[name] = values.view(len(whole), *own[name].shape[1:])
            first += part.shape[1]
        return found

    def join_matrix(
        self, own: DeviceMatrix, beside: Mapping[str, torch.Tensor]
    ) -> tuple[DeviceMatrix, dict[str, torch.Tensor]]:
        """Put a quantized matrix together from the rows of all processes, and what goes with it.

        Returns
        -------
        DeviceMatrix
        dict of str to Tensor
            All rows of ``beside``, a tensor with a row for each of the matrix under each key.
        """
        rows = {"scales": own.scales, "zero_points": own.zero_points}
        if own.row_objectives is not None:
            rows["row_objectives"] = own.row_objectives.T
        if own.rtn_objectives is not None:
            rows["rtn_objectives"] = own.rtn_objectives
        found: dict[str, Any] = self.join_rows(rows | {_BESIDE + k: v for k, v in beside.items()})
        extra = {key: found.pop(_BESIDE + key) for key in beside}
        if own.row_objectives is not None:
            found["row_objectives"] = found["row_objectives"].T
        return replace(own, codes=self.join(own.codes), **found), extra


def _bytes(values: torch.Tensor) -> torch.Tensor:
    """Return the bytes of each row, (rows, bytes)."""
    return _packed(values.reshape(len(values), -1)).view(torch.uint8)


def _packed(values: torch.Tensor) -> torch.Tensor:
    """Return a copy that can be viewed as another type.

    What counts as contiguous, with one row or column, need not be so for that.
    """
    return values.clone(memory_format=torch.contiguous_format)


def _bounds(size: int, count: int, together: Sequence[slice]) -> list[int]:
    """Return where the shares of all processes begin, and the end: as even as possible."""
    even = [i * count // size for i in range(size + 1)]
    ends = [run.stop for run in together]
    found = []
    for bound in even:
        index = bisect.bisect_left(ends, bound)
        inside = index < len(together) and together[index].start < bound < ends[index]
        if inside:  # to the nearer end of the run
            run = together[index]
            bound = run.start if bound - run.start <= run.stop - bound else run.stop
        found.append(bound)
    return found
