"""A group of columns in one kernel: its grid, its codes, and what errors give to later columns.

What :class:`ptqkit.nn.device_grids.GridFit`, :mod:`ptqkit.nn.kernels.plain` and
:mod:`ptqkit.nn.row_products` do in some hundred calls. To be imported where Triton is known to be
there. No sum runs over rows, and a row's sums are made in an order that does not depend on how many
there are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ptqkit.nn.kernels.compiled import (
    current,
    nearest_code,
    padded,
    power,
    round_even,
    rounding_error,
)
from ptqkit.nn.kernels.plain import check_layout

__all__ = ["GroupGrid", "add_rows", "quantize_groups"]

# Rows of a program that fits and rounds a group, and its warps.
_ROWS, _WARPS = 16, 4
# Rows and columns of a product's tile; of the inner size, what is loaded at once, and what is
# added up by itself first: tensor cores cut the bits off that a long sum shifts out.
_TILE, _DEPTH, _CHUNK = 64, 16, 256
# Within a group, float32 as three products of the tensor cores' own type: exact but for some last
# bits. Elsewhere that is slower than float32's own units.
_PRECISION, _ROWS_PRECISION = "tf32x3", "ieee"


class GroupGrid(NamedTuple):
    """How the grid of a group is fitted.

    Attributes
    ----------
    max_code, min_zero : int
    symmetric : bool
    method : {"minmax", "mse", "hessian"}
    scale_dtype : {"float32", "bfloat16", "float16"}
    shrink : Tensor of float32, shape (steps,)
        By what a range is shrunk, from 1 down; one alone without a search.
    candidates : int
        Of these, how many the whole block of H compares.
    norm : float
        Power of the errors in a search by "mse".
    """

    max_code: int
    min_zero: int
    symmetric: bool
    method: str
    scale_dtype: str
    shrink: torch.Tensor
    candidates: int
    norm: float


@triton.jit
def _grid(
    low,
    high,
    top,
    least_zero,
    distance,
    tiny,
    largest,
    SYMMETRIC: tl.constexpr,
    KIND: tl.constexpr,
):
    if SYMMETRIC:
        reach = tl.maximum(-low, high)
    else:
        reach = high - low
    wanted = tl.where(reach > 0.0, tl.div_rn(reach, distance), 1.0)
    scale = tl.maximum(wanted.to(KIND).to(tl.float32), tiny)
    scale = tl.where(wanted > largest, wanted, scale)  # refused later, with its reason
    if SYMMETRIC:
        zero = tl.zeros_like(scale) + tl.floor((top + 1.0) * 0.5)
    else:
        zero = tl.minimum(tl.maximum(round_even(tl.div_rn(-low, scale)), least_zero), top)
    return scale, zero


@triton.jit
def _searched(
    x,
    t,
    low,
    high,
    weight,
    inverse,
    block,
    shrink,
    row,
    rows,
    width,
    weight_stride,
    block_stride,
    top,
    least_zero,
    distance,
    tiny,
    largest,
    norm,
    steps,
    candidates,
    SYMMETRIC: tl.constexpr,
    METHOD: tl.constexpr,
    KIND: tl.constexpr,
    CORRECTED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    some = tl.arange(0, DEPTH)
    there = row < rows
    known = column < width
    inside = there[:, None] & known[None, :]
    scale = tl.full([ROWS], 1.0, tl.float32)
    zero = tl.zeros([ROWS], tl.float32)
    step = tl.arange(0, STEPS)
    costs = tl.full([ROWS, STEPS], float("inf"), tl.float32)
    if METHOD == "hessian":
        h = tl.load(block + column * (block_stride + 1), mask=known, other=0.0)
    for k in range(0, steps):
        f = tl.load(shrink + k)
        s, z = _grid(low * f, high * f, top, least_zero, distance, tiny, largest, SYMMETRIC, KIND)
        d = rounding_error(x, s, z, top)
        if METHOD == "hessian":
            cost = d * d * h[None, :]
        else:
            cost = power(d, norm)
        total = tl.sum(tl.where(inside, cost, 0.0), 1)
        total = tl.where(total < float("inf"), total, float("inf"))  # not NaN
        costs = tl.where((step == k)[None, :], total[:, None], costs)
    least = tl.full([ROWS], float("inf"), tl.float32)
    for turn in range(0, candidates):
        best = tl.min(costs, 1)
        first = tl.min(tl.where(costs == best[:, None], step[None, :], STEPS), 1)
        first = tl.minimum(first, steps - 1)
        costs = tl.where(step[None, :] == first[:, None], float("inf"), costs)
        f = tl.load(shrink + first)
        s, z = _grid(low * f, high * f, top, least_zero, distance, tiny, largest, SYMMETRIC, KIND)
        if METHOD == "hessian":
            product = tl.zeros([ROWS, COLUMNS], tl.float32)
            for k in range(0, COLUMNS, DEPTH):
                part = k + some
                own = there[:, None] & (part < width)[None, :]
                y = tl.load(
                    weight + row[:, None] * weight_stride + part[None, :], mask=own, other=0.0
                )
                if CORRECTED:
                    turned = tl.load(
                        inverse + column[:, None] * width + part[None, :],
                        mask=known[:, None] & (part < width)[None, :],
                        other=0.0,
                    )
                    y = tl.dot(t, turned, y, input_precision=PRECISION)
                error = tl.where(own, rounding_error(y, s, z, top), 0.0)
                square = tl.load(
                    block + part[:, None] * block_stride + column[None, :],
                    mask=(part < width)[:, None] & known[None, :],
                    other=0.0,
                )
                product = tl.dot(error, square, product, input_precision=PRECISION)
            whole = tl.where(inside, rounding_error(x, s, z, top), 0.0)
            cost = tl.sum(product * whole, 1)
            better = (cost < least) | (turn == 0)
            least = tl.where(better, cost, least)
            scale = tl.where(better, s, scale)
            zero = tl.where(better, z, zero)
        else:
            scale = s
            zero = z
    return scale, zero


@triton.jit
def _group(
    weight,
    sums,
    factor,
    inverse,
    block,
    shrink,
    scales,
    zeros,
    codes,
    rows,
    width,
    weight_stride,
    sums_stride,
    factor_stride,
    block_stride,
    codes_stride,
    groups,
    top,
    least_zero,
    distance,
    tiny,
    largest,
    norm,
    steps,
    candidates,
    SYMMETRIC: tl.constexpr,
    METHOD: tl.constexpr,
    KIND: tl.constexpr,
    CORRECTED: tl.constexpr,
    FEEDBACK: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    there = row < rows
    known = column < width
    inside = there[:, None] & known[None, :]
    some = tl.arange(0, DEPTH)
    at = row[:, None] * weight_stride + column[None, :]
    w = tl.load(weight + at, mask=inside, other=0.0)
    place = sums + row[:, None] * sums_stride + column[None, :]
    t = tl.load(place, mask=inside, other=0.0)
    x = w
    if CORRECTED:
        # A few columns at a time, here and below: what a program holds decides how many run.
        for k in range(0, COLUMNS, DEPTH):
            part = k + some
            a = tl.load(
                sums + row[:, None] * sums_stride + part[None, :],
                mask=there[:, None] & (part < width)[None, :],
                other=0.0,
            )
            b = tl.load(
                inverse + part[:, None] * width + column[None, :],
                mask=(part < width)[:, None] & known[None, :],
                other=0.0,
            )
            x = tl.dot(a, b, x, input_precision=PRECISION)
    low = tl.minimum(tl.min(x, 1), 0.0)
    high = tl.maximum(tl.max(x, 1), 0.0)
    scale, zero = _grid(low, high, top, least_zero, distance, tiny, largest, SYMMETRIC, KIND)
    if METHOD != "minmax":
        scale, zero = _searched(
            x,
            t,
            low,
            high,
            weight,
            inverse,
            block,
            shrink,
            row,
            rows,
            width,
            weight_stride,
            block_stride,
            top,
            least_zero,
            distance,
            tiny,
            largest,
            norm,
            steps,
            candidates,
            SYMMETRIC,
            METHOD,
            KIND,
            CORRECTED,
            PRECISION,
            ROWS,
            COLUMNS,
            DEPTH,
            STEPS,
        )
    tl.store(scales + row * groups, scale, mask=there)
    tl.store(zeros + row * groups, zero, mask=there)
    errors = tl.zeros([ROWS, COLUMNS], tl.float32)
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    if FEEDBACK:
        pivots = tl.load(factor + column * (factor_stride + 1), mask=known, other=1.0)
        share = tl.div_rn(1.0, pivots)
    for j in range(0, width):
        pick = (column == j)[None, :]
        wj = tl.sum(tl.where(pick, w, 0.0), 1)
        wanted = wj
        if FEEDBACK:
            wanted = tl.sum(tl.where(pick, w + t * share[None, :], 0.0), 1)
        code, error = nearest_code(wanted, wj, scale, zero, top)
        errors = tl.where(pick, error[:, None], errors)
        found = tl.where(pick, code[:, None], found)
        if FEEDBACK:
            r = tl.load(factor + j * factor_stride + column, mask=(column > j) & known, other=0.0)
            t += error[:, None] * r[None, :]
    tl.store(place, errors, mask=inside)
    to = codes + row[:, None] * codes_stride + column[None, :]
    tl.store(to, found.to(tl.uint8), mask=inside)


@triton.jit
def _groups(
    weight,
    sums,
    factor,
    inverses,
    blocks,
    shrink,
    scales,
    zeros,
    places,
    codes,
    rows,
    columns,
    width,
    weight_stride,
    sums_stride,
    factor_stride,
    codes_stride,
    groups,
    top,
    least_zero,
    distance,
    tiny,
    largest,
    norm,
    steps,
    candidates,
    SYMMETRIC: tl.constexpr,
    METHOD: tl.constexpr,
    KIND: tl.constexpr,
    CORRECTED: tl.constexpr,
    FEEDBACK: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    some = tl.arange(0, DEPTH)
    wide = tl.arange(0, TILE)
    for number in range(0, columns // width):
        first = number * width
        own = factor + first * (factor_stride + 1)
        place = tl.load(places + number)
        _group(
            weight + first,
            sums + first,
            own,
            inverses + number * width * width,
            blocks + number * width * width,
            shrink,
            scales + place,
            zeros + place,
            codes + first,
            rows,
            width,
            weight_stride,
            sums_stride,
            factor_stride,
            width,
            codes_stride,
            groups,
            top,
            least_zero,
            distance,
            tiny,
            largest,
            norm,
            steps,
            candidates,
            SYMMETRIC,
            METHOD,
            KIND,
            CORRECTED,
            FEEDBACK,
            PRECISION,
            ROWS,
            COLUMNS,
            DEPTH,
            STEPS,
        )
        tl.debug_barrier()  # what other threads have written is read now
        if FEEDBACK:
            for after in range(first + width, columns, TILE):
                later = after + wide
                known = (later < columns)[None, :]
                at = sums + row[:, None] * sums_stride + later[None, :]
                total = tl.load(at, mask=there & known, other=0.0)
                for k in range(0, COLUMNS, DEPTH):
                    part = k + some
                    inside = part < width
                    error = tl.load(
                        sums + row[:, None] * sums_stride + (first + part)[None, :],
                        mask=there & inside[None, :],
                        other=0.0,
                    )
                    r = tl.load(
                        factor + (first + part)[:, None] * factor_stride + later[None, :],
                        mask=inside[:, None] & known,
                        other=0.0,
                    )
                    total = tl.dot(error, r, total, input_precision=PRECISION)
                tl.store(at, total, mask=there & known)
            tl.debug_barrier()


_KINDS = {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}


def quantize_groups(
    weight: torch.Tensor,
    sums: torch.Tensor,
    factor: torch.Tensor,
    inverses: torch.Tensor | None,
    blocks: torch.Tensor | None,
    grid: GroupGrid,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    places: torch.Tensor,
    codes: torch.Tensor,
    feedback: bool = True,
) -> None:
    """Fit the grids of groups of columns, and round these one after the other.

    Parameters
    ----------
    weight, sums, factor, codes, feedback
        As :func:`ptqkit.nn.kernels.plain.quantize_columns` takes them, of all groups.
    inverses : Tensor of float32, shape (groups, size, size), optional
        What the sums of each group are multiplied with, and added to its weights, for the grid
        alone; at most 128 columns make a group.
    blocks : Tensor of float32, shape (groups, size, size), optional
        Of H, for a search under it.
    grid : GroupGrid
    scales, zeros : Tensor of float32, shape (rows, all groups)
        Written.
    places : Tensor of int32, shape (groups,)
        Where each group's are written.
    """
    check_layout(weight, sums, factor, codes)
    rows, columns = weight.shape
    width = columns // len(places)
    limits = torch.finfo(getattr(torch, grid.scale_dtype))
    with current(weight):
        _groups[(triton.cdiv(rows, _ROWS),)](
            weight,
            sums,
            factor,
            factor if inverses is None else inverses.contiguous(),
            factor if blocks is None else blocks.contiguous(),
            grid.shrink,
            scales,
            zeros,
            places,
            codes,
            rows,
            columns,
            width,
            weight.stride(0),
            sums.stride(0),
            factor.stride(0),
            codes.stride(0),
            scales.stride(0),
            float(grid.max_code),
            float(grid.min_zero),
            grid.max_code / 2 if grid.symmetric else float(grid.max_code),
            limits.tiny,
            limits.max,
            float(grid.norm),
            len(grid.shrink),
            min(grid.candidates, len(grid.shrink)),
            SYMMETRIC=grid.symmetric,
            METHOD=grid.method,
            KIND=_KINDS[grid.scale_dtype],
            CORRECTED=inverses is not None,
            FEEDBACK=feedback,
            PRECISION=_PRECISION,
            ROWS=_ROWS,
            COLUMNS=padded(width),
            DEPTH=min(32, padded(width)),
            STEPS=padded(len(grid.shrink)),
            TILE=128,
            num_warps=_WARPS,
        )


@triton.jit
def _rows_product(
    to,
    left,
    right,
    rows,
    columns,
    inner,
    to_stride,
    left_stride,
    right_stride,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    there = (row < rows)[:, None]
    known = (column < columns)[None, :]
    place = to + row[:, None] * to_stride + column[None, :]
    if ADD:
        total = tl.load(place, mask=there & known, other=0.0)
    else:
        total = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, inner, CHUNK):
        own = tl.zeros([TILE, TILE], tl.float32)
        for at in range(start, tl.minimum(start + CHUNK, inner), DEPTH):
            k = at + depth
            a = tl.load(
                left + row[:, None] * left_stride + k[None, :],
                mask=there & (k < inner)[None, :],
                other=0.0,
            )
            b = tl.load(
                right + k.to(tl.int64)[:, None] * right_stride + column[None, :],
                mask=(k < inner)[:, None] & known,
                other=0.0,
            )
            own = tl.dot(a, b, own, input_precision=PRECISION)
        total += own
    tl.store(place, total, mask=there & known)


def add_rows(to: torch.Tensor, left: torch.Tensor, right: torch.Tensor, add: bool = True) -> None:
    """Add ``left @ right`` to a tensor, or write it there.

    Parameters
    ----------
    to : Tensor of float32, shape (rows, columns)
    left : Tensor of float32, shape (rows, inner)
    right : Tensor of float32, shape (inner, columns)
    add : bool
    """
    left, right = (v if v.stride(-1) == 1 else v.contiguous() for v in (left, right))
    check_layout(to, left, right)
    rows, columns = to.shape
    with current(to):
        _rows_product[(triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE))](
            to,
            left,
            right,
            rows,
            columns,
            left.shape[1],
            to.stride(0),
            left.stride(0),
            right.stride(0),
            ADD=add,
            PRECISION=_ROWS_PRECISION,
            TILE=_TILE,
            DEPTH=_DEPTH,
            CHUNK=_CHUNK,
            num_warps=4,
            num_stages=3,
        )
