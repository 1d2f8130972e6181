"""Objectives of single rows by torch, where a product with H is fastest."""

from __future__ import annotations

import numpy as np
import torch

from ptqkit.nn.row_products import row_product

__all__ = ["row_objectives"]

# Numbers of a block of rows: its product with H is as large.
_BLOCK = 1 << 25


def row_objectives(errors: np.ndarray | torch.Tensor, hessian: torch.Tensor) -> np.ndarray:
    """Return e H e^T for each row e: as :func:`ptqkit.objective`, in float32 but for the last sum.

    Parameters
    ----------
    errors : ndarray or Tensor of float32, shape (out, in)
    hessian : Tensor of float32, shape (in, in)
        On the device that computes.

    Returns
    -------
    ndarray of float64, shape (out,)
    """
    found = []
    for block in torch.as_tensor(errors).split(max(1, _BLOCK // errors.shape[1])):
        e = block.to(hessian.device)
        found.append(row_product(e, hessian).mul_(e).sum(1, dtype=torch.float64))
    return torch.cat(found).cpu().numpy()
