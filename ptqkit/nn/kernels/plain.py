"""Steps over a few columns in plain torch, and the host's core where rows follow each other too.

What the kernels of :mod:`ptqkit.nn.kernels.compiled` are held against, and what runs where there
are none. The functions of both modules are the same. Columns lie next to each other in the tensors
that they take, of which some are written to.
"""

from __future__ import annotations

import torch

import ptqkit._core as _core
from ptqkit.nn.transfer import host_copy

__all__ = [
    "candidate_errors",
    "check_layout",
    "couple_columns",
    "descend_columns",
    "quantize_columns",
    "round_even",
]

# After x + 2^23 + 2^22 the low bits are x rounded to an integer, ties to even, for |x| < 2^22.
_MAGIC = 12582912.0
# Below it |d|^norm counts as 0.
_TINY = 2.0**-120


def check_layout(*tensors: torch.Tensor) -> None:
    """Raise unless the columns of all lie next to each other, as kernels read them."""
    for tensor in tensors:
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"columns must lie next to each other, not {tensor.stride(-1)} apart")


def round_even(values: torch.Tensor) -> torch.Tensor:
    """Return the nearest integers, ties to even, as the core does; large values stay large."""
    return (values + _MAGIC) - _MAGIC


def quantize_columns(
    weight: torch.Tensor,
    sums: torch.Tensor,
    factor: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    group: torch.Tensor,
    codes: torch.Tensor,
    max_code: int,
    feedback: bool = True,
) -> None:
    """Round columns one after the other, each corrected for the errors of those before it.

    Parameters
    ----------
    weight : Tensor of float32, shape (rows, columns)
    sums : Tensor of float32, shape (rows, columns)
        Of errors before these columns, times R; the errors of these columns afterwards.
    factor : Tensor of float32, shape (columns, columns)
        Their block of R, upper triangular.
    scales, zeros : Tensor of float32, shape (rows, groups)
    group : Tensor of int32, shape (columns,)
    codes : Tensor of uint8, shape (rows, columns)
        Written.
    max_code : int
    feedback : bool
        False: no error reaches another column.
    """
    check_layout(weight, sums, factor, scales, zeros, codes)
    for j, g in enumerate(group.tolist()):
        w, scale, zero = weight[:, j], scales[:, g], zeros[:, g]
        wanted = w + sums[:, j] * (1.0 / factor[j, j]) if feedback else w
        code = (round_even(wanted / scale) + zero).clamp_(0.0, float(max_code))
        error = w - scale * (code - zero)
        codes[:, j] = code.to(torch.uint8)
        sums[:, j] = error
        if feedback:
            sums[:, j + 1 :] += error[:, None] * factor[j, j + 1 :]


def candidate_errors(
    values: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    weight: torch.Tensor | None,
    max_code: int,
    norm: float,
) -> torch.Tensor:
    """Return what rounding a group costs on each of some grids.

    Parameters
    ----------
    values : Tensor of float32, shape (rows, columns)
    scales, zeros : Tensor of float32, shape (rows, grids)
    weight : Tensor of float32, shape (columns,), optional
        Of the squared errors.
    max_code : int
    norm : float
        Without weights: errors count with this power.

    Returns
    -------
    Tensor of float32, shape (rows, grids)
    """
    check_layout(values, scales, zeros)
    inverse, found = 1.0 / scales, torch.empty_like(scales)
    for k in range(scales.shape[1]):
        scale, zero = scales[:, k, None], zeros[:, k, None]
        code = (round_even(values * inverse[:, k, None]) + zero).clamp_(0.0, float(max_code))
        d = scale * (code - zero) - values
        if weight is not None:
            found[:, k] = (d * d * weight).sum(1)
        elif norm == 2.0:
            found[:, k] = (d * d).sum(1)
        else:
            size = d.abs()
            found[:, k] = torch.where(size < _TINY, 0.0, size**norm).sum(1)
    return found


def descend_columns(
    sums: torch.Tensor,
    hessian: torch.Tensor,
    scales: torch.Tensor,
    group: torch.Tensor,
    codes: torch.Tensor,
    max_code: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each column in turn its best codes given all others.

    Parameters
    ----------
    sums : Tensor of float32, shape (rows, columns)
        These columns of E H. They stay.
    hessian : Tensor of float32, shape (columns, columns)
        Their block of H.
    scales : Tensor of float32, shape (rows, groups)
    group : Tensor of int32, shape (columns,)
    codes : Tensor of uint8, shape (rows, columns)
        Changed where that lowers the objective of a row.
    max_code : int

    Returns
    -------
    moved : Tensor of float32, shape (rows, columns)
        By how much errors change.
    change : Tensor of float32, shape (rows,)
        By how much the objectives do.
    """
    check_layout(sums, hessian, scales, codes)
    sums, moved = sums.clone(), torch.zeros_like(sums)
    change = torch.zeros_like(sums[:, 0])
    for j, g in enumerate(group.tolist()):
        scale, code, h, t = scales[:, g], codes[:, j].float(), hessian[j, j], sums[:, j]
        step = scale * h
        able = (scale > 0) & (step > 0)
        step = torch.where(able, step, 1.0)
        found = round_even(code + t / step).clamp_(0.0, float(max_code))
        d = scale * (code - found)
        less = d * (2.0 * t + d * h)
        able &= less < 0
        d = torch.where(able, d, 0.0)
        change += torch.where(able, less, 0.0)
        codes[:, j] = torch.where(able, found, code).to(torch.uint8)
        moved[:, j] = d
        sums[:, j + 1 :] += d[:, None] * hessian[j, j + 1 :]
    return moved, change


def couple_columns(
    sums: torch.Tensor,
    curves: torch.Tensor,
    hessian: torch.Tensor,
    scales: torch.Tensor,
    codes: torch.Tensor,
    max_code: int,
    threads: int = 0,
) -> torch.Tensor:
    """Go over the codes of runs of rows that answer for each other, column by column.

    On the host's core, wherever the tensors are.

    Parameters
    ----------
    sums : Tensor of float32, shape (runs, columns, rows)
        These columns of B E H, transposed.
    curves : Tensor of float32, shape (runs, rows, rows)
        B.
    hessian : Tensor of float32, shape (columns, columns)
        Their block of H.
    scales : Tensor of float32, shape (runs, columns, rows)
    codes : Tensor of uint8, shape (runs, columns, rows)
        Changed where that lowers the sum.
    max_code : int
    threads : int
        Of the core; 0 is its own policy.

    Returns
    -------
    Tensor of float32, shape (runs, columns, rows)
        By how much errors change.
    """
    check_layout(sums, curves, hessian, scales, codes)
    rows = sums.shape[2]
    flat, B, grids, own = (
        host_copy(v.contiguous()).reshape(-1, rows) for v in (sums, curves, scales, codes)
    )
    within, moved = host_copy(hessian.contiguous()), torch.empty(flat.shape, dtype=torch.float32)
    _core.couple_block(flat, B, within, grids, max(1, max_code), own, moved.numpy(), threads)
    codes.copy_(torch.from_numpy(own).view_as(codes))
    return moved.view_as(sums).to(sums.device)
