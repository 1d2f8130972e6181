"""Coordinate descent over the codes of a matrix, with the large products on a GPU.

Column by column, in all runs of rows at once: what a block of columns changes reaches the others as
one product on the device, and the host's threads have the descent itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

import ptqkit._core as _core
from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.nn.on_grid import dequantize_on
from ptqkit.nn.statistics import full_float32
from ptqkit.nn.transfer import host_copy

__all__ = ["Descent"]

# Columns of a block: what is changed by them is one product.
_COLUMNS = 128


class Descent:
    """The codes of runs of rows as (block of columns, run, column, row), and P = E H on the device.

    Runs shorter than the longest are filled up with rows that are not written back.

    Parameters
    ----------
    weight : Tensor of float32, shape (out, in)
        On the device that multiplies.
    matrix : QuantizedMatrix
        Where to start.
    H : Tensor of float32, shape (in, in)
        Undamped, on that device.
    order : ndarray of int64, shape (in,)
        Of the columns.
    runs : sequence of slice
    curves : sequence of ndarray of float64, shape (rows, rows), optional
        B of each run; without, rows do not see each other.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        matrix: QuantizedMatrix,
        H: torch.Tensor,
        order: np.ndarray,
        runs: Sequence[slice],
        curves: Sequence[np.ndarray] | None = None,
    ) -> None:
        device, columns = weight.device, weight.shape[1]
        self.max_code, self.order = max(1, matrix.max_code), order
        self.runs, self.rows = len(runs), max(run.stop - run.start for run in runs)
        place = np.zeros((self.runs, self.rows), np.int64)
        filled = np.zeros((self.runs, self.rows), bool)
        coupled = 0 if curves is None else self.runs
        B = np.zeros((coupled, self.rows, self.rows), np.float32)
        for number, run in enumerate(runs):
            count = run.stop - run.start
            place[number, :count] = np.arange(run.start, run.stop)
            filled[number, :count] = True
            if curves is not None:
                B[number, :count, :count] = curves[number]
        self._place, self._filled = place.reshape(-1), filled.reshape(-1)
        self._B = None if curves is None else B.reshape(-1, self.rows)
        self._curves = None if curves is None else torch.from_numpy(B).to(device)
        own, turned = (torch.from_numpy(i).to(device) for i in (self._place, order))
        self._H = H[turned][:, turned]
        errors = (weight - dequantize_on(device, matrix))[own][:, turned]
        with full_float32(device):
            self._P = (errors @ self._H).view(self.runs, self.rows, columns)
        del errors
        scales = torch.from_numpy(matrix.scales).to(device)[own].view(self.runs, self.rows, -1)
        self._scales = scales.transpose(1, 2)
        self._group = torch.from_numpy(matrix.g_idx).to(device).long()[turned]
        self._blocks = [slice(k, min(k + _COLUMNS, columns)) for k in range(0, columns, _COLUMNS)]
        codes = torch.from_numpy(matrix.codes).to(device)[own][:, turned]
        codes = codes.view(self.runs, self.rows, columns).transpose(1, 2)
        self._codes = [host_copy(codes[:, block].contiguous()) for block in self._blocks]
        most = max(block.stop - block.start for block in self._blocks)
        pinned = device.type == "cuda"
        self._moved = torch.empty(
            self.runs * most, self.rows, dtype=torch.float32, pin_memory=pinned
        ).numpy()

    def go(self, threads: int) -> bool:
        """Go over all codes once; return whether any has changed."""
        changed = torch.zeros((), dtype=torch.bool, device=self._P.device)
        for block, codes in zip(self._blocks, self._codes, strict=True):
            sums = self._P[:, :, block].transpose(1, 2)
            if self._curves is not None:
                with full_float32(sums.device):
                    sums = torch.bmm(sums, self._curves)
            # The columns of all runs below each other.
            flat, scales = (
                host_copy(v.contiguous()).reshape(-1, self.rows)
                for v in (sums, self._scales[:, self._group[block]])
            )
            within, moved = host_copy(self._H[block, block].contiguous()), self._moved[: len(flat)]
            own = codes.reshape(-1, self.rows)
            _core.couple_block(flat, self._B, within, scales, self.max_code, own, moved, threads)
            change = torch.from_numpy(moved).to(sums.device).view(self.runs, -1, self.rows)
            change = change.transpose(1, 2).reshape(-1, change.shape[1])
            changed |= change.any()
            with full_float32(sums.device):
                self._P.view(len(change), -1).addmm_(change, self._H[block])
        return bool(changed)

    def codes(self, before: np.ndarray) -> np.ndarray:
        """Return the codes of the whole matrix, those of other rows as they were."""
        device, filled = self._P.device, torch.from_numpy(self._filled)
        found = torch.cat([torch.from_numpy(codes).to(device) for codes in self._codes], 1)
        back = torch.from_numpy(np.argsort(self.order)).to(device)
        rows = found.transpose(1, 2).reshape(-1, len(back))[filled.to(device)][:, back]
        result = torch.from_numpy(before).to(device, copy=True)
        result[torch.from_numpy(self._place)[filled].to(device)] = rows
        return result.cpu().numpy()
