"""A quantized matrix whose arrays are where it was solved, until the host needs them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ptqkit._repr import one_line_repr
from ptqkit.arrays.matrix import QuantizedMatrix, WeightGrid
from ptqkit.nn.transfer import HostCopies, host_copy

__all__ = ["DeviceMatrix", "matrix_on"]


@dataclass(frozen=True)
class DeviceMatrix:
    """Hold what a :class:`~ptqkit.QuantizedMatrix` holds, its rows on one device.

    Attributes
    ----------
    codes : Tensor of uint8, shape (out, in)
    scales : Tensor of float32, shape (out, groups)
    zero_points : Tensor of uint8, shape (out, groups)
    row_objectives : Tensor of float64, shape (1 + steps, out), or None
    rtn_objectives : Tensor of float64, shape (out,), or None
    g_idx, grid, damping, damping_raised, dead_inputs
        As there, on the host.
    """

    __repr__ = one_line_repr

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor
    g_idx: np.ndarray
    grid: WeightGrid
    row_objectives: torch.Tensor | None = None
    rtn_objectives: torch.Tensor | None = None
    damping: float = 0.0
    damping_raised: int = 0
    dead_inputs: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix, (out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def max_code(self) -> int:
        """Largest code of the grid."""
        return self.grid.max_code

    def rows(self, start: int, stop: int) -> DeviceMatrix:
        """Return output rows ``start:stop``."""
        steps, nearest = self.row_objectives, self.rtn_objectives
        return replace(
            self,
            codes=self.codes[start:stop],
            scales=self.scales[start:stop],
            zero_points=self.zero_points[start:stop],
            row_objectives=None if steps is None else steps[:, start:stop],
            rtn_objectives=None if nearest is None else nearest[start:stop],
        )

    def finish(self, copies: HostCopies | None = None) -> QuantizedMatrix:
        """Return the matrix on the host.

        Parameters
        ----------
        copies : HostCopies, optional
            Makes the copies of codes, scales and zero-points, which may come later.
        """
        own = HostCopies() if copies is None else copies
        found = QuantizedMatrix(
            own.begin(self.codes),
            own.begin(self.scales),
            own.begin(self.zero_points),
            self.g_idx,
            self.grid,
            None if self.row_objectives is None else host_copy(self.row_objectives),
            None if self.rtn_objectives is None else host_copy(self.rtn_objectives),
            self.damping,
            self.damping_raised,
            self.dead_inputs,
        )
        if copies is None:
            own.wait()
        return found


def matrix_on(device: torch.device, matrix: QuantizedMatrix | DeviceMatrix) -> DeviceMatrix:
    """Return a matrix on a device; what is there already is not copied, nor to be written to."""
    if isinstance(matrix, DeviceMatrix) and matrix.codes.device == device:
        return matrix

    def there(values: Any) -> Any:
        return None if values is None else torch.as_tensor(values).to(device)

    return DeviceMatrix(
        there(matrix.codes),
        there(matrix.scales),
        there(matrix.zero_points),
        matrix.g_idx,
        matrix.grid,
        there(matrix.row_objectives),
        there(matrix.rtn_objectives),
        matrix.damping,
        matrix.damping_raised,
        matrix.dead_inputs,
    )
