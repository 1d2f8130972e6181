"""Objectives of single rows by torch, where a product with H is fastest."""

from __future__ import annotations

import torch

from ptqkit.nn.row_products import add_product, row_product

__all__ = ["row_objectives"]

# Numbers of a block of rows: its product with H is as large.
_BLOCK = 1 << 25
# Columns of a product.
_COLUMNS = 1024


def row_objectives(errors: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return e H e^T for each row e: as :func:`ptqkit.objective`, in float32 but for the last sum.

    Parameters
    ----------
    errors : Tensor of float32, shape (out, in)
    hessian : Tensor of float32, shape (in, in)
        Where the errors are.

    Returns
    -------
    Tensor of float64, shape (out,)
        There too.
    """
    found, columns = [], errors.shape[1]
    for e in errors.split(max(1, _BLOCK // columns)):
        total = torch.zeros(len(e), dtype=torch.float64, device=e.device)
        for first in range(0, columns, _COLUMNS):
            own = slice(first, min(first + _COLUMNS, columns))
            # What is left of the diagonal is, as H is symmetric, twice what is above it.
            product = row_product(e[:, own], hessian[own, own]).mul_(0.5)
            if first:
                add_product(product, e[:, :first], hessian[:first, own])
            total += product.mul_(e[:, own]).sum(1, dtype=torch.float64)
        found.append(total.mul_(2.0))
    return torch.cat(found)
