"""Coordinate descent over the codes of a matrix, with the large products on a device.

Column by column, in all rows at once: what a block of columns changes reaches the others as one
product, and the descent within a block is a step of :mod:`ptqkit.nn.kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ptqkit.nn.device_matrix import DeviceMatrix
from ptqkit.nn.kernels.choice import steps_on
from ptqkit.nn.on_grid import dequantize_on
from ptqkit.nn.row_products import add_product, row_product, rows_at_once
from ptqkit.nn.statistics import full_float32

__all__ = ["Descent", "descend_rows"]

# Columns of a block: what is changed by them reaches those of a wide one by one product, and all
# later ones by one for the wide block.
_COLUMNS, _WIDE = 128, 1024
# The same where rows see each other: a kernel holds a block of a run of rows.
_COUPLED = 64


def descend_rows(
    weight: torch.Tensor, matrix: DeviceMatrix, H: torch.Tensor, order: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Go over the codes of each row once.

    Parameters
    ----------
    weight : Tensor of float32, shape (out, in)
        On the device that computes.
    matrix : DeviceMatrix
        Where to start.
    H : Tensor of float32, shape (in, in)
        Undamped, on that device.
    order : ndarray of int64, shape (in,)
        Of the columns.

    Returns
    -------
    codes : Tensor of uint8, shape (out, in)
    change : Tensor of float64, shape (out,)
        By how much the objective of each row changes.
    """
    device, inputs = weight.device, weight.shape[1]
    turned, back = (torch.from_numpy(i).to(device) for i in (order, np.argsort(order)))
    natural = np.array_equal(order, np.arange(inputs))
    H = H if natural else H[turned[:, None], turned]
    group = torch.from_numpy(matrix.g_idx[order]).to(device)
    steps, found, changes = steps_on(device), [], []
    count = rows_at_once(len(weight), inputs)
    for start in range(0, len(weight), count):
        part = matrix.rows(start, start + count)
        errors = weight[start : start + count] - dequantize_on(device, part)
        sums = row_product(errors if natural else errors[:, turned], H)
        del errors
        codes = part.codes.clone() if natural else part.codes[:, turned]
        change = torch.zeros(len(codes), dtype=torch.float64, device=device)
        taken = torch.empty((len(codes), min(_WIDE, inputs)), dtype=torch.float32, device=device)
        wide = 0
        for first in range(0, inputs, _COLUMNS):
            block = slice(first, min(first + _COLUMNS, inputs))
            moved, less = steps.descend_columns(
                sums[:, block],
                H[block, block],
                part.scales,
                group[block],
                codes[:, block],
                max(1, matrix.max_code),
            )
            change += less
            taken[:, first - wide : block.stop - wide] = moved
            stop = min(wide + _WIDE, inputs)
            if block.stop < stop:
                add_product(sums[:, block.stop : stop], moved, H[block, block.stop : stop])
            elif stop < inputs:
                own = taken[:, : stop - wide]
                add_product(sums[:, stop:], own, H[wide:stop, stop:])
                wide = stop
        found.append(codes if natural else codes[:, back])
        changes.append(change)
    return torch.cat(found), torch.cat(changes)


class Descent:
    """Runs of rows that answer for each other: codes as (block of columns, run, column, row).

    Runs shorter than the longest are filled up with rows that are not written back.

    Parameters
    ----------
    weight : Tensor of float32, shape (out, in)
        On the device that multiplies.
    matrix : DeviceMatrix
        Where to start.
    H : Tensor of float32, shape (in, in)
        Undamped, on that device.
    order : ndarray of int64, shape (in,)
        Of the columns.
    runs : sequence of slice
    curves : sequence of ndarray of float64, shape (rows, rows)
        B of each run.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        matrix: DeviceMatrix,
        H: torch.Tensor,
        order: np.ndarray,
        runs: Sequence[slice],
        curves: Sequence[np.ndarray],
    ) -> None:
        device, columns = weight.device, weight.shape[1]
        self.max_code, self.order = max(1, matrix.max_code), order
        self.runs, self.rows = len(runs), max(run.stop - run.start for run in runs)
        self._steps = steps_on(device)
        place = np.zeros((self.runs, self.rows), np.int64)
        filled = np.zeros((self.runs, self.rows), bool)
        B = np.zeros((self.runs, self.rows, self.rows), np.float32)
        for number, run in enumerate(runs):
            count = run.stop - run.start
            place[number, :count] = np.arange(run.start, run.stop)
            filled[number, :count] = True
            B[number, :count, :count] = curves[number]
        self._place, self._filled = place.reshape(-1), filled.reshape(-1)
        self._curves = torch.from_numpy(B).to(device)
        own, turned = (torch.from_numpy(i).to(device) for i in (self._place, order))
        self._H = H[turned[:, None], turned]
        errors = (weight - dequantize_on(device, matrix))[own][:, turned]
        self._P = row_product(errors, self._H).view(self.runs, self.rows, columns)
        del errors
        scales = matrix.scales[own].view(self.runs, self.rows, -1)
        self._scales = scales.transpose(1, 2)
        self._group = torch.from_numpy(matrix.g_idx).to(device).long()[turned]
        self._blocks = [slice(k, min(k + _COUPLED, columns)) for k in range(0, columns, _COUPLED)]
        codes = matrix.codes[own][:, turned]
        codes = codes.view(self.runs, self.rows, columns).transpose(1, 2)
        self._codes = [codes[:, block].contiguous() for block in self._blocks]

    def go(self, threads: int = 0) -> bool:
        """Go over all codes once; return whether any has changed."""
        changed = torch.zeros((), dtype=torch.bool, device=self._P.device)
        for block, codes in zip(self._blocks, self._codes, strict=True):
            with full_float32(self._P.device):
                sums = torch.bmm(self._P[:, :, block].transpose(1, 2), self._curves)
            moved = self._steps.couple_columns(
                sums,
                self._curves,
                self._H[block, block],
                self._scales[:, self._group[block]].contiguous(),
                codes,
                self.max_code,
                threads,
            )
            change = moved.transpose(1, 2).reshape(-1, moved.shape[1])
            changed |= change.any()
            add_product(self._P.view(len(change), -1), change, self._H[block])
        return bool(changed)

    def codes(self, before: torch.Tensor) -> torch.Tensor:
        """Return the codes (out, in) of the whole matrix, those of other rows as before."""
        device, filled = self._P.device, torch.from_numpy(self._filled)
        found = torch.cat(self._codes, 1)
        back = torch.from_numpy(np.argsort(self.order)).to(device)
        rows = found.transpose(1, 2).reshape(-1, len(back))[filled.to(device)][:, back]
        result = before.clone()
        result[torch.from_numpy(self._place)[filled].to(device)] = rows
        return result
