"""Better codes and scales for a quantized matrix, on a device.

What ``refine_passes`` and ``refit_rounds`` of :func:`ptqkit.gptq` say, after its solve: the same
steps in the same order, whose results differ by what float32 rounds.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ptqkit.arrays.factorization import Factorization
from ptqkit.nn.device_descent import descend_rows
from ptqkit.nn.device_factor import hessian_on
from ptqkit.nn.device_matrix import DeviceMatrix
from ptqkit.nn.row_products import WEIGHTS_AT_ONCE, row_product

__all__ = ["refine_on"]

# Bytes of the systems of rows whose scales are fitted at once.
_SYSTEMS = 1 << 30
# What changes an objective by a smaller share is rounding, and so is a smaller pivot.
_ROUNDING = 1e-6


def refine_on(
    weight: torch.Tensor,
    matrix: DeviceMatrix,
    factor: Factorization,
    *,
    refine_passes: int,
    refit_rounds: int,
) -> DeviceMatrix:
    """Make passes over the codes, and fit the scales to them again.

    Parameters
    ----------
    weight : Tensor of float32, shape (out, in)
        On the device that multiplies.
    matrix : DeviceMatrix
        What :func:`~ptqkit.nn.device_gptq.gptq_on` has made of it, without passes.
    factor : Factorization
        Of its Hessian, in the order of the solve.
    refine_passes, refit_rounds
        As :func:`ptqkit.gptq` takes them.
    """
    assert matrix.row_objectives is not None
    H = hessian_on(weight.device, factor)
    if factor.dead.any():
        weight = weight * torch.from_numpy(~factor.dead).to(weight.device)
    history = [matrix.row_objectives]
    steps = ["sweep"] * refine_passes + ["refit", "sweep"] * refit_rounds
    for step in steps:
        if step == "refit":
            before = history[-1][-1]
            count = max(1, _SYSTEMS // (8 * matrix.scales.shape[1] ** 2))
            count = min(count, max(1, WEIGHTS_AT_ONCE // weight.shape[1]))
            found = [
                _refitted(
                    weight[k : k + count], matrix.rows(k, k + count), H, before[k : k + count]
                )
                for k in range(0, len(weight), count)
            ]
            scales, change = (torch.cat(values) for values in zip(*found, strict=True))
            matrix = replace(matrix, scales=scales)
            history.append((before + change)[None])
            continue
        codes, change = descend_rows(weight, matrix, H, factor.order)
        matrix = replace(matrix, codes=codes)
        history.append((history[-1] + change).clamp(min=0.0))
    return replace(matrix, row_objectives=torch.cat(history))


def _refitted(
    weight: torch.Tensor, matrix: DeviceMatrix, H: torch.Tensor, objective: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales fitted to the codes, and how they change the objective of each row.

    With c_g the codes of group g less their zero-points and e the row's error, scales s + d give
    the objective e H e^T - 2 b d^T + d A d^T, where A_gh = c_g H c_h^T and b_g = e H c_g^T.
    """
    device, (rows, inputs) = weight.device, weight.shape
    groups = matrix.scales.shape[1]
    # The inputs of a group next to each other.
    order = np.argsort(matrix.g_idx, kind="stable")
    place = None
    if not np.array_equal(order, np.arange(inputs)):
        place = torch.from_numpy(order).to(device)
    scales, codes, zeros = matrix.scales, matrix.codes, matrix.zero_points.float()
    if place is not None:
        codes, weight, H = codes[:, place], weight[:, place], H[place[:, None], place]
    codes = codes.view(rows, groups, -1)
    C = codes - zeros[:, :, None]
    errors = weight - (C * scales[:, :, None]).view(rows, inputs)
    A = torch.empty(rows, groups, groups, dtype=torch.float64, device=device)
    size = inputs // groups
    b = row_product(errors, H).view_as(C).mul_(C).sum(2, dtype=torch.float64)
    del errors
    for g in range(groups):  # A is symmetric
        first = g * size
        product = row_product(C[:, g], H[first : first + size, first:]).view(rows, -1, size)
        A[:, g, g:] = product.mul_(C[:, g:]).sum(2, dtype=torch.float64)
        A[:, g:, g] = A[:, g, g:]
    wanted = scales.double() + _solved(A, b)
    largest = 65504.0
    if matrix.grid.scale_dtype != "float16":
        largest = float(np.finfo(np.float32).max) / (2.0 * matrix.max_code)
    fits = (wanted > 0) & (wanted < largest)
    kind = getattr(torch, matrix.grid.scale_dtype)
    rounded = wanted.float().to(kind).clamp(min=torch.finfo(kind).tiny).float()
    found = torch.where(fits, rounded, scales)
    d = found.double() - scales.double()
    change = ((A @ d[:, :, None])[:, :, 0] * d - 2 * b * d).sum(1)
    better = (change < -_ROUNDING * objective) & (change < 0)
    found = torch.where(better[:, None], found, scales)
    return found, torch.where(better, change, 0.0)


def _solved(A: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return b A^-1 of each row; 0 for a group whose pivot is noise, as if its codes are all 0."""
    count = A.shape[1]
    L, root, d = torch.zeros_like(A), torch.zeros_like(b), torch.zeros_like(b)
    for g in range(count):
        below = A[:, g:, g] - (L[:, g:, :g] @ L[:, g, :g, None])[:, :, 0]
        fine = below[:, 0] > _ROUNDING * A[:, g, g]
        root[:, g] = torch.where(fine, below[:, 0].clamp(min=1e-300).rsqrt(), 0.0)
        L[:, g:, g] = below * root[:, g, None]
    for g in range(count):
        d[:, g] = (b[:, g] - (L[:, g, :g] * d[:, :g]).sum(1)) * root[:, g]
    for g in reversed(range(count)):
        d[:, g] = (d[:, g] - (L[:, g + 1 :, g] * d[:, g + 1 :]).sum(1)) * root[:, g]
    return d
