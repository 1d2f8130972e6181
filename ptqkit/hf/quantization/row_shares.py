"""Rows of a matrix shared out over processes to be solved, and put together again.

A row depends on H and on itself alone, so every process solves a run of them. Runs of rows that are
coupled with each other stay together.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.hf.quantization.processes import Processes

__all__ = ["RowShare"]

# A process with fewer rows of a stack than this has more to wait for than to do.
_FEWEST_ROWS = 16


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

    def join_array(self, own: np.ndarray) -> np.ndarray:
        """Put rows together that are on the host."""
        if not self._lengths:
            return own
        return self.join(torch.from_numpy(np.ascontiguousarray(own))).cpu().numpy()

    def join_matrix(self, own: QuantizedMatrix) -> tuple[QuantizedMatrix, torch.Tensor]:
        """Put a quantized matrix together from the rows of all processes.

        Returns
        -------
        QuantizedMatrix
            Its codes may come later: see :attr:`Processes.copies`.
        Tensor of uint8
            Its codes, where they are now.
        """
        codes = self.join(torch.from_numpy(own.codes))
        objectives, nearest = own.row_objectives, own.rtn_objectives
        if objectives is not None:
            objectives = np.ascontiguousarray(self.join_array(objectives.T).T)
        matrix = replace(
            own,
            codes=self._processes.copies.begin(codes),
            scales=self.join_array(own.scales),
            zero_points=self.join_array(own.zero_points),
            row_objectives=objectives,
            rtn_objectives=None if nearest is None else self.join_array(nearest),
        )
        return matrix, codes


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
