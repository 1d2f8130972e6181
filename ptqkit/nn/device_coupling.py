"""Rows that make up for each other's errors, on a device.

:func:`ptqkit.couple_rows` goes over the codes row by row. Here the same descent goes column by
column, through all runs of rows at once, each with its own B. No step of either raises the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ptqkit.arrays.coupling import as_coupling
from ptqkit.nn.device_descent import Descent
from ptqkit.nn.device_factor import hessian_on
from ptqkit.nn.device_matrix import DeviceMatrix
from ptqkit.nn.on_grid import dequantize_on
from ptqkit.nn.row_objectives import row_objectives
from ptqkit.nn.transfer import host_copy

__all__ = ["couple_rows_on"]


def couple_rows_on(
    weight: torch.Tensor,
    matrix: DeviceMatrix,
    source: Any,
    parts: Sequence[tuple[slice, np.ndarray]],
    *,
    passes: int = 3,
    damping: float = 0.1,
    threads: int = 0,
    name: str | None = None,
) -> DeviceMatrix:
    """Change the codes of runs of rows as :func:`ptqkit.couple_rows` does, in another order.

    Parameters
    ----------
    weight : Tensor of float32, shape (out, in)
        On the device that multiplies.
    matrix : DeviceMatrix
    source : Hessian, Factorization or ndarray of float32, shape (in, in)
        Undamped.
    parts : sequence of (slice, ndarray of shape (rows, rows))
        Runs of rows, each with its B; other rows stay as they are.
    passes, damping, threads, name
        As :func:`ptqkit.couple_rows` takes them.
    """
    before = matrix.row_objectives
    if parts:
        H = hessian_on(weight.device, source)
        order = np.argsort(-host_copy(H.diagonal()), kind="stable")
        curves = [as_coupling(B, len(B), damping, name) for _, B in parts]
        descent = Descent(weight, matrix, H, order, [rows for rows, _ in parts], curves)
        for _ in range(passes):
            if not descent.go(threads):
                break
        matrix = replace(matrix, codes=descent.codes(matrix.codes))
        objectives = row_objectives(weight - dequantize_on(weight.device, matrix), H)
    else:
        assert before is not None
        objectives = before[-1]
    history = objectives[None] if before is None else torch.cat([before, objectives[None]])
    return replace(matrix, row_objectives=history)
