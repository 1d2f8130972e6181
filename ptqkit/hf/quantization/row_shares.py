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

import numpy as np
import torch

from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.hf.quantization.processes import Processes

__all__ = ["RowShare"]

# A process with fewer rows of a stack than this has more to wait for than to do.
_FEWEST_ROWS = 16
# Before the names of arrays beside a matrix.
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

    def join_arrays(self, own: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Put rows together that are on the host, those of all arrays at once."""
        if not self._lengths:
            return dict(own)
        rows = {key: values.reshape(len(values), -1) for key, values in own.items()}
        held = {key: np.ascontiguousarray(values).view(np.uint8) for key, values in rows.items()}
        # What is wide first, so that every array begins at a multiple of its numbers' size.
        keys = sorted(held, key=lambda key: -own[key].dtype.itemsize)
        together = np.concatenate([held[key] for key in keys], axis=1)
        whole = self.join(torch.from_numpy(together)).cpu().numpy()
        found, first = {}, 0
        for key in keys:
            size, shape = held[key].shape[1], own[key].shape[1:]
            part = np.ascontiguousarray(whole[:, first : first + size])
            found[key] = part.view(own[key].dtype).reshape(len(whole), *shape)
            first += size
        return found

    def join_matrix(
        self, own: QuantizedMatrix, beside: Mapping[str, np.ndarray]
    ) -> tuple[QuantizedMatrix, torch.Tensor, dict[str, np.ndarray]]:
        """Put a quantized matrix together from the rows of all processes, and what goes with it.

        Returns
        -------
        QuantizedMatrix
            Its codes may come later: see :attr:`Processes.copies`.
        Tensor of uint8
            Its codes, where they are now.
        dict of str to ndarray
            All rows of ``beside``, an array with a row for each of the matrix under each key.
        """
        codes = self.join(torch.from_numpy(own.codes))
        arrays = {"scales": own.scales, "zero_points": own.zero_points}
        if own.row_objectives is not None:
            arrays["row_objectives"] = own.row_objectives.T
        if own.rtn_objectives is not None:
            arrays["rtn_objectives"] = own.rtn_objectives
        arrays |= {_BESIDE + key: values for key, values in beside.items()}
        found: dict[str, Any] = self.join_arrays(arrays)
        extra = {key: found.pop(_BESIDE + key) for key in beside}
        if own.row_objectives is not None:
            found["row_objectives"] = np.ascontiguousarray(found["row_objectives"].T)
        matrix = replace(own, codes=self._processes.copies.begin(codes), **found)
        return matrix, codes, extra


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
