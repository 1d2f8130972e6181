"""Fit the grids of a group of inputs on a device: as the core does, for all rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch

from ptqkit.arrays._grids import GridSpec
from ptqkit.arrays.matrix import GRID_METHODS, SCALE_TYPES
from ptqkit.nn.kernels.plain import round_even
from ptqkit.nn.statistics import full_float32

__all__ = ["GRID_BLOCK", "fit_grids"]

#: Inputs of a block on the diagonal of H that a search reads: blocks stand for H in wider groups.
GRID_BLOCK = 128
_DTYPES = {number: getattr(torch, name) for name, number in SCALE_TYPES.items()}


def fit_grids(
    values: torch.Tensor, blocks: Sequence[torch.Tensor], spec: GridSpec, steps: ModuleType
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zero-points of a group.

    Parameters
    ----------
    values : Tensor of float32, shape (rows, inputs)
    blocks : sequence of Tensor of float32, shape (block, block)
        Of H, of ``GRID_BLOCK`` inputs and of the rest, for a search under H.
    spec : GridSpec
    steps : module
        Of :func:`ptqkit.nn.kernels.choice.steps_on`.

    Returns
    -------
    scales, zeros : Tensor of float32, shape (rows,)
    """
    low, high = values.amin(1).clamp_(max=0.0), values.amax(1).clamp_(min=0.0)
    search = spec.method != GRID_METHODS["minmax"]
    shrink = torch.from_numpy(_factors(spec) if search else np.ones(1, np.float32))
    shrink = shrink.to(values.device, non_blocking=True)
    scales, zeros = _grids(low[:, None] * shrink, high[:, None] * shrink, spec)
    if not search:
        return scales[:, 0], zeros[:, 0]
    hessian = spec.method == GRID_METHODS["hessian"]
    weight = torch.cat([block.diagonal() for block in blocks]) if hessian else None
    errors = steps.candidate_errors(values, scales, zeros, weight, spec.max_code, spec.norm)
    best = _ranked(errors)[:, : min(spec.candidates, spec.steps) if hessian else 1]
    scales, zeros = scales.gather(1, best), zeros.gather(1, best)
    if best.shape[1] == 1:
        return scales[:, 0], zeros[:, 0]
    first = _ranked(_quadratic(values, blocks, scales, zeros, spec.max_code))[:, :1]
    return scales.gather(1, first)[:, 0], zeros.gather(1, first)[:, 0]


def _factors(spec: GridSpec) -> np.ndarray:
    """Return by what a range is shrunk, from 1 down."""
    step = np.arange(spec.steps) / max(1, spec.steps - 1)
    return (1.0 - step * (1.0 - float(np.float32(spec.min_shrink)))).astype(np.float32)


def _grids(
    low: torch.Tensor, high: torch.Tensor, spec: GridSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the grids of ranges that hold 0."""
    top = float(spec.max_code)
    # Divided by a tensor: by a number, a GPU would multiply with its inverse.
    count = torch.full((), top / 2 if spec.symmetric else top, device=low.device)
    reach = torch.maximum(-low, high) if spec.symmetric else high - low
    wanted = torch.where(reach > 0, reach / count, 1.0)
    kind = _DTYPES[spec.scale_type]
    limits = torch.finfo(kind)
    scales = wanted.to(kind).float().clamp_(min=limits.tiny)
    scales = torch.where(wanted > limits.max, wanted, scales)  # refused later, with its reason
    if spec.symmetric:
        return scales, torch.full_like(scales, (spec.max_code + 1) // 2)
    return scales, round_even(-low / scales).clamp_(float(spec.min_zero), top)


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
    """Return d B d^T of the rounding errors d on each grid, summed over the blocks B."""
    total, start = torch.zeros_like(scales), 0
    inverse = (1.0 / scales)[:, :, None]
    scales, zeros = scales[:, :, None], zeros[:, :, None]
    for block in blocks:
        x = values[:, None, start : start + len(block)]
        code = round_even(x * inverse).add_(zeros).clamp_(0.0, float(max_code))
        d = code.sub_(zeros).mul_(scales).sub_(x)
        with full_float32(values.device):
            product = (d.view(-1, len(block)) @ block).view_as(d)
        total += product.mul_(d).sum(2)
        start += len(block)
    return total
