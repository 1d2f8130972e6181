"""The layout of packed weights (:mod:`ptqkit.arrays.packed`) on torch tensors, on any device.

A GPU has no kernels for it, so its codes are unpacked there by shifts.
"""

from __future__ import annotations

import numpy as np
import torch

from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.arrays.packed import LANES, STEPS, PackedMatrix, input_places, stored_bits

__all__ = [
    "BITS",
    "even_groups",
    "has_panels",
    "pack_panels",
    "panel_shapes",
    "scale_panels",
    "unpack_grid",
    "unpack_panels",
    "zero_panels",
]

BITS = (2, 3, 4, 8, "ternary")
_BYTE_SHIFTS = (0, 8, 16, 24)


def has_panels(bits: int | str) -> bool:
    """Whether codes of so many bits can be packed in panels."""
    return bits in BITS


def panel_shapes(
    shape: tuple[int, int], bits: int | str, group_size: int | None
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the shapes of words and of grids, if every group but the last is full.

    Parameters
    ----------
    shape : tuple of int
        (out, in).
    """
    out, inputs = shape
    step, step_words = STEPS[stored_bits(bits)]
    size = min(group_size or inputs, inputs)
    full, rest = divmod(inputs, size)
    steps = full * -(-size // step) + -(-rest // step)
    panels = -(-out // LANES)
    return (panels, steps * step_words, LANES), (panels, full + (rest > 0), LANES)


def even_groups(g_idx: np.ndarray, group_size: int | None) -> bool:
    """Whether every group but the last holds ``group_size`` inputs, as :func:`panel_shapes` says.

    Parameters
    ----------
    g_idx : ndarray of integers from 0, shape (in,)
    """
    wanted = np.bincount(np.arange(len(g_idx)) // (group_size or max(len(g_idx), 1)))
    return np.array_equal(np.bincount(g_idx, minlength=len(wanted)), wanted)


def pack_panels(matrix: QuantizedMatrix) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pack a matrix.

    Returns
    -------
    words : int32 tensor, shape (panels, lane words, 16)
    scales : tensor, shape (panels, groups, 16)
        Of the matrix's ``scale_dtype``; 1 for outputs that fill the last panel.
    zero_points : uint8 tensor, shape (panels, groups, 16)

    Raises
    ------
    ValueError
        If there is no such layout for the bits.
    """
    packed = PackedMatrix.pack(
        matrix.codes, matrix.scales, matrix.zero_points, bits=matrix.bits, g_idx=matrix.g_idx
    )
    words = torch.from_numpy(packed.words.view(np.int32))
    return words, scale_panels(matrix), torch.from_numpy(packed.zeros)


def scale_panels(matrix: QuantizedMatrix) -> torch.Tensor:
    """Return the second tensor of :func:`pack_panels`."""
    return _grid_panels(matrix.scales, 1).to(getattr(torch, matrix.scale_dtype))


def zero_panels(matrix: QuantizedMatrix) -> torch.Tensor:
    """Return the third tensor of :func:`pack_panels`."""
    return _grid_panels(matrix.zero_points, 0)


def _grid_panels(grid: np.ndarray, fill: int) -> torch.Tensor:
    """Lay out (out, groups) as (panels, groups, 16)."""
    out, groups = grid.shape
    rows = np.full((-(-out // LANES) * LANES, groups), fill, grid.dtype)
    rows[:out] = grid
    panels = rows.reshape(-1, LANES, groups).transpose(0, 2, 1)
    return torch.from_numpy(np.ascontiguousarray(panels))


def unpack_grid(panels: torch.Tensor, out: int) -> torch.Tensor:
    """Return (panels, groups, 16) as (out, groups)."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:out]


def unpack_panels(
    words: torch.Tensor, shape: tuple[int, int], bits: int | str, g_idx: np.ndarray, groups: int
) -> torch.Tensor:
    """Unpack codes on the device of ``words``.

    Parameters
    ----------
    words : int32 tensor, shape (panels, lane words, 16)
    shape : tuple of int
        (out, in).
    g_idx : ndarray of int32, shape (in,)

    Returns
    -------
    uint8 tensor, shape (out, in)
    """
    bits = stored_bits(bits)
    step, step_words = STEPS[bits]
    lanes = words.view(len(words), -1, step_words, LANES)
    quads = []
    for quad in range(step // 4):
        for byte in _BYTE_SHIFTS:
            if bits != 3:
                code = lanes[:, :, 0] >> (byte + bits * quad) & ((1 << bits) - 1)
            else:
                code = lanes[:, :, quad // 4] >> (byte + 2 * (quad % 4)) & 3
                code = code | (lanes[:, :, 2] >> (byte + quad) & 1) << 2
            quads.append(code.to(torch.uint8))
    places = torch.stack(quads, 2).flatten(1, 2)  # (panels, places, 16)
    codes = places.transpose(1, 2).reshape(-1, places.shape[1])[: shape[0]]
    at = torch.from_numpy(input_places(g_idx, groups, bits)).to(codes.device)
    return codes[:, at].contiguous()
