"""Products of numbers of 16 bits with themselves, as a kernel that Triton compiles.

Only tiles at and above the diagonal are computed, and a tile stays where it is added up while all
tokens of a call go by. To be imported where Triton is known to be there.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ptqkit.nn.kernels.compiled import current
from ptqkit.nn.kernels.plain import check_layout

__all__ = ["add_upper_products"]

# Columns of a tile; tokens of a product.
_TILE, _DEPTH = 128, 32
# Tokens whose products have a sum of their own first, as tensor cores cut the bits off that a long
# sum shifts out, and how many times as many are on the way: what a device has memory for.
_SHAPES = ((128, 3), (64, 3), (64, 2), (64, 1))
# Tiles that are next to each other in both directions run at the same time and read the same.
_GROUP = 12


@triton.jit
def _upper(
    values,
    total,
    tiles,
    tokens,
    columns,
    values_stride,
    total_stride,
    EVEN: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    one = tl.program_id(0)
    above = tl.load(tiles + 2 * one) * TILE + tl.arange(0, TILE)
    across = tl.load(tiles + 2 * one + 1) * TILE + tl.arange(0, TILE)
    token = tl.arange(0, DEPTH)
    left = values + token.to(tl.int64)[:, None] * values_stride + above[None, :]
    right = values + token.to(tl.int64)[:, None] * values_stride + across[None, :]
    step = values_stride.to(tl.int64) * DEPTH
    place = total + above.to(tl.int64)[:, None] * total_stride + across[None, :]
    inside = (above < columns)[:, None] & (across < columns)[None, :]
    if EVEN:
        sums = tl.load(place)
    else:
        sums = tl.load(place, mask=inside, other=0.0)
    for start in tl.range(0, tokens, CHUNK, num_stages=STAGES):
        own = tl.zeros([TILE, TILE], tl.float32)
        for part in tl.static_range(CHUNK // DEPTH):
            if EVEN:
                a = tl.load(left + part * step)
                b = tl.load(right + part * step)
            else:
                there = (start + part * DEPTH + token < tokens)[:, None]
                a = tl.load(left + part * step, mask=there & (above < columns)[None, :], other=0.0)
                b = tl.load(
                    right + part * step, mask=there & (across < columns)[None, :], other=0.0
                )
            own = tl.dot(tl.trans(a), b, own)
        left += step * (CHUNK // DEPTH)
        right += step * (CHUNK // DEPTH)
        sums += own
    if EVEN:
        tl.store(place, sums)
    else:
        tl.store(place, sums, mask=inside)


def add_upper_products(total: torch.Tensor, values: torch.Tensor) -> None:
    """Add values^T values to a sum, at and above its diagonal; what is below has no meaning.

    Parameters
    ----------
    total : Tensor of float32, shape (columns, columns)
    values : Tensor of bfloat16 or float16, shape (tokens, columns)
    """
    check_layout(total, values)
    tokens, columns = values.shape
    count = triton.cdiv(columns, _TILE)
    chunk, stages = _shape(values.device)
    tiles = _tiles(count, total.device)
    with current(values):
        _upper[(len(tiles),)](
            values,
            total,
            tiles,
            tokens,
            columns,
            values.stride(0),
            total.stride(0),
            EVEN=columns % _TILE == 0 and tokens % chunk == 0,
            CHUNK=chunk,
            TILE=_TILE,
            DEPTH=_DEPTH,
            STAGES=stages,
            num_warps=8,
        )


@cache
def _shape(device: torch.device) -> tuple[int, int]:
    """Return the first shape whose values fit the shared memory of a device."""
    if device.type != "cuda":
        return _SHAPES[0]
    about = torch.cuda.get_device_properties(device)
    room = getattr(about, "shared_memory_per_block_optin", 48 << 10) - 1024
    fits = [s for s in _SHAPES if s[0] * s[1] * 2 * _TILE * 2 <= room]
    return fits[0] if fits else _SHAPES[-1]


@cache
def _tiles(count: int, device: torch.device) -> torch.Tensor:
    """Return row and column of each tile at and above the diagonal, near ones together."""
    groups = range(0, count, _GROUP)
    found = [
        (i, j)
        for above in groups
        for across in groups
        for i in range(above, min(above + _GROUP, count))
        for j in range(max(across, i), min(across + _GROUP, count))
    ]
    return torch.tensor(found, dtype=torch.int32, device=device)
