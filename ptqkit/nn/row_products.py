"""Products of float32 rows on a device, of which each is the same whichever rows are around it.

What sums a library makes of a product depends on its shape. So that the rows of a matrix may be
shared out, they are multiplied by so many at a time, the last ones filled up with zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ptqkit.nn.kernels.choice import groups_on
from ptqkit.nn.statistics import full_float32

__all__ = ["WEIGHTS_AT_ONCE", "add_product", "row_product", "rows_at_once"]

#: Weights of the rows that are worked on at once: of each, some 14 bytes are there meanwhile.
WEIGHTS_AT_ONCE = 1 << 26
# Rows of one product.
_ROWS = 1024
# Up to so many numbers inside, a kernel of its own is quicker than calls for so many rows.
_SMALL = 256


def rows_at_once(rows: int, inputs: int) -> int:
    """Return how many rows are worked on at once: even parts of all, none above the limit."""
    return -(-rows // -(-rows * inputs // WEIGHTS_AT_ONCE))


def row_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return ``left @ right``.

    Parameters
    ----------
    left : Tensor of float32, shape (rows, inner)
    right : Tensor of float32, shape (inner, columns)
    """
    shape = (left.shape[0], right.shape[1])
    found = torch.empty(shape, dtype=torch.float32, device=left.device)
    _multiply(found, left, right, 0.0)
    return found


def add_product(to: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``left @ right`` to a tensor.

    Parameters
    ----------
    to : Tensor of float32, shape (rows, columns)
        Also of columns of a wider one.
    left, right
        As :func:`row_product` takes them.
    """
    _multiply(to, left, right, 1.0)


def _multiply(to: torch.Tensor, left: torch.Tensor, right: torch.Tensor, beta: float) -> None:
    kernels = groups_on(to.device)
    if kernels is not None and left.shape[1] <= _SMALL:
        kernels.add_rows(to, left, right, bool(beta))
        return
    with full_float32(to.device):
        for start in range(0, len(left), _ROWS):
            rows = slice(start, min(start + _ROWS, len(left)))
            short = _ROWS - (rows.stop - start)
            if not short or not _fills_up(to.device):
                to[rows].addmm_(left[rows], right, beta=beta)
                continue
            own, found = (F.pad(v[rows], (0, 0, 0, short)) for v in (left, to))
            to[rows] = found.addmm_(own, right, beta=beta)[: rows.stop - start]


def _fills_up(device: torch.device) -> bool:
    """Whether fewer rows are filled up: not by a CPU, on which tests alone come here."""
    return device.type != "cpu"
