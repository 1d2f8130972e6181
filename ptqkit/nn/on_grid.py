"""Weights from codes, and codes from weights, on a grid that is given: by torch, on any device."""

from __future__ import annotations

import numpy as np
import torch

from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.nn.device_matrix import DeviceMatrix, matrix_on

__all__ = ["dequantize", "dequantize_on", "nearest", "row_blocks", "rtn_on_grid"]

# Rows of the weight per step on a CPU, numbers on another device: keeps the temporaries small.
_ROWS = 256
_NUMBERS = 1 << 25


def dequantize(matrix: QuantizedMatrix) -> np.ndarray:
    """As ``matrix.dequantize()``, the same bits, on torch's threads."""
    return dequantize_on(torch.device("cpu"), matrix).numpy()


def dequantize_on(device: torch.device, matrix: QuantizedMatrix | DeviceMatrix) -> torch.Tensor:
    """As ``matrix.dequantize()``, the same bits, on a device, where the matrix may be already."""
    there = matrix_on(device, matrix)
    result = torch.empty(there.shape, dtype=torch.float32, device=device)
    grid = _Grid(there)
    for rows in row_blocks(result):
        scales, zeros = grid.rows(rows)
        own = there.codes[rows].view(zeros.shape[0], zeros.shape[1], -1)
        torch.sub(own, zeros, out=result[rows].view_as(own)).mul_(scales)
    return result


def rtn_on_grid(weight: np.ndarray, matrix: QuantizedMatrix) -> np.ndarray:
    """Round a weight (out, in) to nearest on a result's own grid; returns the dequantized form."""
    return nearest(torch.from_numpy(weight), matrix).numpy()


def nearest(weight: torch.Tensor, matrix: QuantizedMatrix | DeviceMatrix) -> torch.Tensor:
    """As :func:`rtn_on_grid`, on the weight's device."""
    result = torch.empty(matrix.shape, dtype=torch.float32, device=weight.device)
    grid = _Grid(matrix_on(weight.device, matrix))
    for rows in row_blocks(result):
        scales, zeros = grid.rows(rows)
        values = weight[rows].view(zeros.shape[0], zeros.shape[1], -1)
        codes = torch.div(values, scales, out=result[rows].view_as(values)).round_()
        codes.clamp_(-zeros, matrix.max_code - zeros).mul_(scales)
    return result


def row_blocks(values: torch.Tensor) -> list[slice]:
    """Return runs of rows that fit a CPU's cache together with the temporaries; longer on a GPU."""
    count, step = len(values), _ROWS
    if values.device.type != "cpu":
        step = max(step, _NUMBERS // max(1, values.shape[1]))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


class _Grid:
    """Scales and zero-points on a device."""

    def __init__(self, matrix: DeviceMatrix) -> None:
        self._scales, self._zeros = matrix.scales, matrix.zero_points
        device = self._scales.device
        groups, inputs = matrix.scales.shape[1], matrix.shape[1]
        runs = inputs % groups == 0 and np.array_equal(
            matrix.g_idx, np.arange(inputs, dtype=np.int32) // (inputs // groups)
        )
        self._index = None if runs else torch.from_numpy(matrix.g_idx).to(device).long()

    def rows(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return those of some rows as float32 that broadcast to (rows, runs, run length).

        Groups that are runs of consecutive inputs stay as they are; others get one entry per input.
        """
        scales, zeros = self._scales[rows], self._zeros[rows].float()
        if self._index is not None:
            scales, zeros = scales[:, self._index], zeros[:, self._index]
        return scales[:, :, None], zeros[:, :, None]
