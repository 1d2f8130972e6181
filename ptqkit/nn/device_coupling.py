"""Rows that make up for each other's errors, with the large products on a GPU.

:func:`ptqkit.couple_rows` goes over the codes row by row. Here the same descent goes column by
column, through all runs of rows at once, each with its own B: what a block of columns changes
reaches the others as one product on the device, and the host's threads have the descent itself.
No step of either raises the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

import ptqkit._core as _core
from ptqkit.arrays.coupling import as_coupling
from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.nn.on_grid import dequantize_on
from ptqkit.nn.row_objectives import row_objectives
from ptqkit.nn.statistics import full_float32
from ptqkit.nn.transfer import host_copy

__all__ = ["couple_rows_on"]

# Columns of a block: what is changed by them is one product.
_COLUMNS = 128


def couple_rows_on(
    weight: torch.Tensor,
    matrix: QuantizedMatrix,
    hessian: np.ndarray,
    parts: Sequence[tuple[slice, np.ndarray]],
    *,
    passes: int = 3,
    damping: float = 0.1,
    threads: int = 0,
    name: str | None = None,
) -> QuantizedMatrix:
    """Change the codes of runs of rows as :func:`ptqkit.couple_rows` does, in another order.

    Parameters
    ----------
    weight : Tensor of float32, shape (out, in)
        On the device that multiplies.
    matrix : QuantizedMatrix
    hessian : ndarray of float32, shape (in, in)
        Undamped.
    parts : sequence of (slice, ndarray of shape (rows, rows))
        Runs of rows, each with its B; other rows stay as they are.
    passes, damping, threads, name
        As :func:`ptqkit.couple_rows` takes them.
    """
    codes = matrix.codes.copy()
    if parts:
        H = torch.tensor(hessian, device=weight.device)
        descent = _Descent(weight, matrix, H, parts, damping, name)
        for _ in range(passes):
            if not descent.go(threads):
                break
        descent.write(codes)
        changed = replace(matrix, codes=codes)
        objectives = row_objectives(weight - dequantize_on(weight.device, changed), H)
    else:
        assert matrix.row_objectives is not None
        objectives = matrix.row_objectives[-1]
    before = matrix.row_objectives
    history = objectives[None] if before is None else np.concatenate([before, objectives[None]])
    return replace(matrix, codes=codes, row_objectives=history)


class _Descent:
    """The codes of all runs as (block of columns, run, column, row), and P = E H on the device.

    Runs shorter than the longest are filled up with rows that stay: their B is 0.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        matrix: QuantizedMatrix,
        H: torch.Tensor,
        parts: Sequence[tuple[slice, np.ndarray]],
        damping: float,
        name: str | None,
    ) -> None:
        device, columns = weight.device, weight.shape[1]
        self.max_code = max(1, matrix.max_code)
        self.runs, self.rows = len(parts), max(len(B) for _, B in parts)
        curves = np.zeros((self.runs, self.rows, self.rows), np.float32)
        place = np.zeros((self.runs, self.rows), np.int64)
        self._filled = np.zeros((self.runs, self.rows), bool)
        for run, (rows, B) in enumerate(parts):
            count = len(B)
            curves[run, :count, :count] = as_coupling(B, count, damping, name)
            place[run, :count] = np.arange(rows.start, rows.stop)
            self._filled[run, :count] = True
        self._place, self._B = place.reshape(-1), curves.reshape(-1, self.rows)
        self.B = torch.from_numpy(curves).to(device)
        # The columns with the largest H_jj first.
        order = torch.argsort(H.diagonal(), descending=True, stable=True)
        self.H = H[order][:, order]
        own = torch.from_numpy(self._place).to(device)
        errors = (weight - dequantize_on(device, matrix))[own][:, order]
        with full_float32(device):
            self.P = (errors @ self.H).view(self.runs, self.rows, columns)
        del errors
        self.order = order.cpu().numpy()
        scales = torch.from_numpy(matrix.scales).to(device)[own].view(self.runs, self.rows, -1)
        self.scales = scales.transpose(1, 2).contiguous()
        self.group = torch.from_numpy(matrix.g_idx).to(device).long()[order]
        self.blocks = [slice(k, min(k + _COLUMNS, columns)) for k in range(0, columns, _COLUMNS)]
        every = torch.from_numpy(matrix.codes).to(device)[own][:, order]
        turned = every.view(self.runs, self.rows, columns).transpose(1, 2)
        self.codes = [host_copy(turned[:, b].contiguous()) for b in self.blocks]

    def go(self, threads: int) -> bool:
        """Go over all codes once; return whether any has changed."""
        changed = False
        for block, codes in zip(self.blocks, self.codes, strict=True):
            with full_float32(self.P.device):
                sums = torch.bmm(self.P[:, :, block].transpose(1, 2), self.B)
            # The rows of all columns of all runs, below each other.
            flat = [
                host_copy(v).reshape(-1, self.rows)
                for v in (sums, self.scales[:, self.group[block]])
            ]
            moved = np.empty_like(flat[0])
            within = np.ascontiguousarray(host_copy(self.H[block, block]))
            own = codes.reshape(-1, self.rows)
            _core.couple_block(
                flat[0], self._B, within, flat[1], self.max_code, own, moved, threads
            )
            if not moved.any():
                continue
            changed = True
            change = torch.from_numpy(moved).to(self.P.device).view(self.runs, -1, self.rows)
            with full_float32(self.P.device):
                change = change.transpose(1, 2).reshape(-1, change.shape[1])
                self.P.view(-1, self.P.shape[2]).addmm_(change, self.H[block])
        return changed

    def write(self, codes: np.ndarray) -> None:
        """Write the codes into those of the whole matrix."""
        found = np.concatenate(self.codes, axis=1).transpose(0, 2, 1)
        filled = self._filled.reshape(-1)
        rows = found.reshape(-1, len(self.order))[filled]
        back = np.empty_like(self.order)
        back[self.order] = np.arange(len(back))
        codes[self._place[filled]] = rows[:, back]
