"""Fit the grids of a group of inputs on a device: as the core does, for all rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ptqkit.arrays._grids import GridSpec
from ptqkit.arrays.matrix import GRID_METHODS, SCALE_TYPES
from ptqkit.nn.kernels.choice import steps_on
from ptqkit.nn.kernels.plain import round_even
from ptqkit.nn.row_products import row_product

__all__ = ["GRID_BLOCK", "GridFit"]

#: Inputs of a block on the diagonal of H that a search reads: blocks stand for H in wider groups.
GRID_BLOCK = 128
_DTYPES = {number: getattr(torch, name) for name, number in SCALE_TYPES.items()}


class GridFit:
    """How the grids of a matrix are fitted on a device.

    Parameters
    ----------
    spec : GridSpec
    device : torch.device
    """

    def __init__(self, spec: GridSpec, device: torch.device) -> None:
        self.spec, self._steps = spec, steps_on(device)
        self._search = spec.method != GRID_METHODS["minmax"]
        self._hessian = spec.method == GRID_METHODS["hessian"]
        shrink = _factors(spec) if self._search else np.ones(1, np.float32)
        self._shrink = torch.from_numpy(shrink).to(device)
        # Ranges are divided by a tensor: by a number, a GPU would multiply with its inverse.
        distance = spec.max_code / 2 if spec.symmetric else float(spec.max_code)
        self._steps_wide = torch.full((), distance, dtype=torch.float32, device=device)

    def __call__(
        self, values: torch.Tensor, blocks: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scales and zero-points of a group.

        Parameters
        ----------
        values : Tensor of float32, shape (rows, inputs)
        blocks : sequence of Tensor of float32, shape (block, block)
            Of H, of ``GRID_BLOCK`` inputs and of the rest, for a search under H.

        Returns
        -------
        scales, zeros : Tensor of float32, shape (rows,)
        """
        spec = self.spec
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        scales, zeros = self._grids(low.clamp_(max=0.0), high.clamp_(min=0.0))
        if not self._search:
            return scales[:, 0], zeros[:, 0]
        weight, count = None, 1
        if self._hessian:
            count = min(spec.candidates, spec.steps)
            weight = torch.cat([block.diagonal() for block in blocks])
        errors = self._steps.candidate_errors(
            values, scales, zeros, weight, spec.max_code, spec.norm
        )
        best = _ranked(errors)[:, :count]
        scales, zeros = scales.gather(1, best), zeros.gather(1, best)
        if count > 1:
            first = _ranked(_quadratic(values, blocks, scales, zeros, spec.max_code))[:, :1]
            scales, zeros = scales.gather(1, first), zeros.gather(1, first)
        return scales[:, 0], zeros[:, 0]

    def of_group(self, groups: ModuleType) -> Any:
        """Return the same for :mod:`ptqkit.nn.kernels.groups`."""
        spec = self.spec
        method = next(name for name, number in GRID_METHODS.items() if number == spec.method)
        kind = next(name for name, number in SCALE_TYPES.items() if number == spec.scale_type)
        return groups.GroupGrid(
            spec.max_code,
            spec.min_zero,
            bool(spec.symmetric),
            method,
            kind,
            self._shrink,
            spec.candidates if self._hessian else 1,
            spec.norm,
        )

    def _grids(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the grids of all shrunk ranges, (rows, factors)."""
        spec, low, high = self.spec, low * self._shrink, high * self._shrink
        reach = torch.maximum(-low, high) if spec.symmetric else high - low
        wanted = torch.where(reach > 0, reach / self._steps_wide, 1.0)
        kind = _DTYPES[spec.scale_type]
        limits = torch.finfo(kind)
        scales = wanted.to(kind).float().clamp_(min=limits.tiny)
        scales = torch.where(wanted > limits.max, wanted, scales)  # refused later, with its reason
        if spec.symmetric:
            return scales, torch.full_like(scales, (spec.max_code + 1) // 2)
        zeros = round_even(-low / scales)
        return scales, zeros.clamp_(float(spec.min_zero), float(spec.max_code))


def _factors(spec: GridSpec) -> np.ndarray:
    """Return by what a range is shrunk, from 1 down."""
    step = np.arange(spec.steps) / max(1, spec.steps - 1)
    return (1.0 - step * (1.0 - float(np.float32(spec.min_shrink)))).astype(np.float32)


def _ranked(errors: torch.Tensor) -> torch.Tensor:
    """Return the candidates of each row from the best on; the first of equals first."""
    known = torch.nan_to_num(errors, nan=torch.inf, posinf=torch.inf)
    return torch.sort(known, dim=1, stable=True).indices


def _quadratic(
    values: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    scales: torch.Tensor,
    zeros: torch.Tensor,
    max_code: int,
) -> torch.Tensor:
    """Return d B d^T of the rounding errors d on each grid, summed over the blocks B.

    In float64 at last: in which order a device adds up depends on how many rows there are.
    """
    total, start = torch.zeros_like(scales, dtype=torch.float64), 0
    inverse = (1.0 / scales)[:, :, None]
    scales, zeros = scales[:, :, None], zeros[:, :, None]
    for block in blocks:
        x = values[:, None, start : start + len(block)]
        code = round_even(x * inverse).add_(zeros).clamp_(0.0, float(max_code))
        d = code.sub_(zeros).mul_(scales).sub_(x)
        product = row_product(d.view(-1, len(block)), block).view_as(d)
        total += product.mul_(d).sum(2, dtype=torch.float64)
        start += len(block)
    return total
