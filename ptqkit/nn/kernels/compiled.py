"""The functions of :mod:`ptqkit.nn.kernels.plain` as kernels that Triton compiles.

A program has some rows, or a run of rows that follow each other, and all columns of a call. The
column whose turn it is is picked by a mask. No sum runs over rows, so a row's result does not
depend on the rows around it. To be imported where Triton is known to be there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

from ptqkit.nn.kernels.plain import check_layout

__all__ = [
    "candidate_errors",
    "clamp",
    "couple_columns",
    "current",
    "descend_columns",
    "nearest_code",
    "padded",
    "power",
    "quantize_columns",
    "round_even",
    "rounding_error",
]

# Rows of a program.
_ROWS = 16
_MAGIC = tl.constexpr(12582912.0)
_TINY = tl.constexpr(2.0**-120)


@triton.jit
def round_even(x):
    """Return the nearest integers, ties to even."""
    return (x + _MAGIC) - _MAGIC


@triton.jit
def clamp(x, top):
    """Return what is between 0 and the largest code."""
    return tl.minimum(tl.maximum(x, 0.0), top)


@triton.jit
def nearest_code(x, w, scale, zero, top):
    """Return the codes nearest to x, and the errors of w with them."""
    code = clamp(round_even(tl.div_rn(x, scale)) + zero, top)
    return code, w - scale * (code - zero)


@triton.jit
def rounding_error(x, scale, zero, top):
    """Return by how much x (rows, columns) is less than what it is rounded to, with row grids."""
    code = clamp(round_even(x * tl.div_rn(1.0, scale)[:, None]) + zero[:, None], top)
    return scale[:, None] * (code - zero[:, None]) - x


@triton.jit
def power(x, norm):
    """Return powers of magnitudes; tiny ones are 0."""
    size = tl.abs(x)
    found = tl.exp2(norm * tl.log2(tl.maximum(size, _TINY)))
    return tl.where(size < _TINY, 0.0, found)


@triton.jit
def _quantize(
    weight,
    sums,
    factor,
    scales,
    zeros,
    group,
    codes,
    rows,
    width,
    weight_stride,
    sums_stride,
    factor_stride,
    codes_stride,
    groups,
    top,
    FEEDBACK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    there = row < rows
    inside = there[:, None] & (column < width)[None, :]
    at = row[:, None] * weight_stride + column[None, :]
    w = tl.load(weight + at, mask=inside, other=0.0)
    place = sums + row[:, None] * sums_stride + column[None, :]
    t = tl.load(place, mask=inside, other=0.0)
    errors = tl.zeros([ROWS, COLUMNS], tl.float32)
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    for j in range(0, width):
        pick = (column == j)[None, :]
        wj = tl.sum(tl.where(pick, w, 0.0), 1)
        g = tl.load(group + j)
        scale = tl.load(scales + row * groups + g, mask=there, other=1.0)
        zero = tl.load(zeros + row * groups + g, mask=there, other=0.0)
        wanted = wj
        if FEEDBACK:
            tj = tl.sum(tl.where(pick, t, 0.0), 1)
            pivot = tl.load(factor + j * factor_stride + j)
            wanted = wj + tj * tl.div_rn(1.0, pivot)
        code, error = nearest_code(wanted, wj, scale, zero, top)
        errors = tl.where(pick, error[:, None], errors)
        found = tl.where(pick, code[:, None], found)
        if FEEDBACK:
            later = (column > j) & (column < width)
            r = tl.load(factor + j * factor_stride + column, mask=later, other=0.0)
            t += error[:, None] * r[None, :]
    tl.store(place, errors, mask=inside)
    to = codes + row[:, None] * codes_stride + column[None, :]
    tl.store(to, found.to(tl.uint8), mask=inside)


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
    """As that of :mod:`ptqkit.nn.kernels.plain`."""
    check_layout(weight, sums, factor, scales, zeros, codes)
    rows, width = weight.shape
    with current(weight):
        _quantize[(triton.cdiv(rows, _ROWS),)](
            weight,
            sums,
            factor,
            scales,
            zeros,
            group,
            codes,
            rows,
            width,
            weight.stride(0),
            sums.stride(0),
            factor.stride(0),
            codes.stride(0),
            scales.stride(0),
            float(max_code),
            FEEDBACK=feedback,
            ROWS=_ROWS,
            COLUMNS=padded(width),
            num_warps=4,
        )


@triton.jit
def _errors(
    values,
    scales,
    zeros,
    weight,
    errors,
    rows,
    width,
    stride,
    grids,
    top,
    norm,
    WEIGHTED: tl.constexpr,
    SQUARE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    for k in range(0, grids):
        scale = tl.load(scales + row * grids + k, mask=there, other=1.0)
        zero = tl.load(zeros + row * grids + k, mask=there, other=0.0)
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = there[:, None] & (column < width)[None, :]
            x = tl.load(values + row[:, None] * stride + column[None, :], mask=inside, other=0.0)
            d = rounding_error(x, scale, zero, top)
            if WEIGHTED:
                h = tl.load(weight + column, mask=column < width, other=0.0)
                cost = d * d * h[None, :]
            else:
                if SQUARE:
                    cost = d * d
                else:
                    cost = power(d, norm)
            total += tl.sum(tl.where(inside, cost, 0.0), 1)
        tl.store(errors + row * grids + k, total, mask=there)


def candidate_errors(
    values: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    weight: torch.Tensor | None,
    max_code: int,
    norm: float,
) -> torch.Tensor:
    """As that of :mod:`ptqkit.nn.kernels.plain`."""
    check_layout(values)
    rows, width = values.shape
    scales, zeros = scales.contiguous(), zeros.contiguous()
    found = torch.empty_like(scales)
    with current(values):
        _errors[(triton.cdiv(rows, _ROWS),)](
            values,
            scales,
            zeros,
            scales if weight is None else weight.contiguous(),
            found,
            rows,
            width,
            values.stride(0),
            scales.shape[1],
            float(max_code),
            float(norm),
            WEIGHTED=weight is not None,
            SQUARE=norm == 2.0,
            ROWS=_ROWS,
            COLUMNS=min(128, padded(width)),
            num_warps=4,
        )
    return found


@triton.jit
def _descend(
    sums,
    hessian,
    scales,
    group,
    codes,
    moved,
    change,
    rows,
    width,
    sums_stride,
    hessian_stride,
    codes_stride,
    groups,
    top,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    there = row < rows
    inside = there[:, None] & (column < width)[None, :]
    t = tl.load(sums + row[:, None] * sums_stride + column[None, :], mask=inside, other=0.0)
    place = codes + row[:, None] * codes_stride + column[None, :]
    now = tl.load(place, mask=inside, other=0).to(tl.float32)
    steps = tl.zeros([ROWS, COLUMNS], tl.float32)
    less = tl.zeros([ROWS], tl.float32)
    for j in range(0, width):
        pick = (column == j)[None, :]
        tj = tl.sum(tl.where(pick, t, 0.0), 1)
        code = tl.sum(tl.where(pick, now, 0.0), 1)
        h = tl.load(hessian + j * hessian_stride + j)
        g = tl.load(group + j)
        scale = tl.load(scales + row * groups + g, mask=there, other=0.0)
        step = scale * h
        able = (scale > 0.0) & (step > 0.0)
        step = tl.where(able, step, 1.0)
        found = clamp(round_even(code + tl.div_rn(tj, step)), top)
        d = scale * (code - found)
        gain = d * (2.0 * tj + d * h)
        able = able & (gain < 0.0)
        d = tl.where(able, d, 0.0)
        less += tl.where(able, gain, 0.0)
        found = tl.where(able, found, code)
        now = tl.where(pick, found[:, None], now)
        steps = tl.where(pick, d[:, None], steps)
        later = (column > j) & (column < width)
        r = tl.load(hessian + j * hessian_stride + column, mask=later, other=0.0)
        t += d[:, None] * r[None, :]
    tl.store(place, now.to(tl.uint8), mask=inside)
    tl.store(moved + row[:, None] * width + column[None, :], steps, mask=inside)
    tl.store(change + row, less, mask=there)


def descend_columns(
    sums: torch.Tensor,
    hessian: torch.Tensor,
    scales: torch.Tensor,
    group: torch.Tensor,
    codes: torch.Tensor,
    max_code: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As that of :mod:`ptqkit.nn.kernels.plain`."""
    check_layout(sums, hessian, scales, codes)
    rows, width = sums.shape
    change = torch.empty(rows, dtype=torch.float32, device=sums.device)
    moved = torch.empty(rows, width, dtype=torch.float32, device=sums.device)
    with current(sums):
        _descend[(triton.cdiv(rows, _ROWS),)](
            sums,
            hessian,
            scales,
            group,
            codes,
            moved,
            change,
            rows,
            width,
            sums.stride(0),
            hessian.stride(0),
            codes.stride(0),
            scales.stride(0),
            float(max_code),
            ROWS=_ROWS,
            COLUMNS=padded(width),
            num_warps=4,
        )
    return moved, change


@triton.jit
def _couple(
    sums,
    curves,
    hessian,
    scales,
    codes,
    moved,
    rows,
    width,
    hessian_stride,
    top,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    run = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    there = row < rows
    first = run * rows * width
    inside = (column < width)[:, None] & there[None, :]
    s = tl.load(sums + first + column[:, None] * rows + row[None, :], mask=inside, other=0.0)
    B = curves + run * rows * rows
    diagonal = tl.load(B + row * (rows + 1), mask=there, other=0.0)
    for j in range(0, width):
        pick = (column == j)[:, None]
        base = tl.sum(tl.where(pick, s, 0.0), 0)
        at = first + j * rows + row
        code = tl.load(codes + at, mask=there, other=0).to(tl.float32)
        scale = tl.load(scales + at, mask=there, other=0.0)
        h = tl.load(hessian + j * hessian_stride + j)
        curve = diagonal * h
        able = there & (curve > 0.0) & (scale > 0.0)
        step = tl.where(able, curve * scale, 1.0)
        t = tl.zeros([ROWS], tl.float32)
        change = tl.zeros([ROWS], tl.float32)
        # The next row that changes, as often as there is one: none before it would have.
        last = -1
        turn = 0
        while turn < ROWS:
            gradient = base + h * t
            found = clamp(round_even(code + tl.div_rn(gradient, step)), top)
            d = scale * (code - found)
            takes = able & (row > last) & (d * (2.0 * gradient + d * curve) < 0.0)
            turn = tl.min(tl.where(takes, row, ROWS), 0)
            mine = row == turn
            moves = tl.sum(tl.where(mine, d, 0.0), 0)
            code = tl.where(mine, found, code)
            change = tl.where(mine, d, change)
            b = tl.load(B + tl.minimum(turn, rows - 1) * rows + row, mask=there, other=0.0)
            t += moves * b
            last = turn
        tl.store(codes + at, code.to(tl.uint8), mask=there)
        tl.store(moved + at, change, mask=there)
        later = (column > j) & (column < width)
        r = tl.load(hessian + j * hessian_stride + column, mask=later, other=0.0)
        s += r[:, None] * t[None, :]


def couple_columns(
    sums: torch.Tensor,
    curves: torch.Tensor,
    hessian: torch.Tensor,
    scales: torch.Tensor,
    codes: torch.Tensor,
    max_code: int,
    threads: int = 0,
) -> torch.Tensor:
    """As that of :mod:`ptqkit.nn.kernels.plain`, but on the device: no threads are used."""
    check_layout(hessian)
    if not all(v.is_contiguous() for v in (sums, curves, scales, codes)):
        raise ValueError("runs of rows must be contiguous")
    runs, width, rows = sums.shape
    moved = torch.empty(runs, width, rows, dtype=torch.float32, device=sums.device)
    with current(sums):
        _couple[(runs,)](
            sums,
            curves,
            hessian,
            scales,
            codes,
            moved,
            rows,
            width,
            hessian.stride(0),
            float(max_code),
            ROWS=padded(rows),
            COLUMNS=padded(width),
            num_warps=8,
        )
    return moved


def current(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Make a tensor's GPU the current one, on which kernels start."""
    if not tensor.is_cuda:
        return nullcontext()
    return torch.cuda.device(tensor.device)


def padded(count: int) -> int:
    """Return the power of two, at least 16, that holds so many."""
    return max(16, triton.next_power_of_2(count))
