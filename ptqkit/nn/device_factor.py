"""A Hessian and its factor that stay on the device where they were made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ptqkit._repr import one_line_repr
from ptqkit.arrays.factorization import Factorization

__all__ = ["DeviceFactorization", "factor_on", "hessian_on"]


@dataclass(frozen=True)
class DeviceFactorization(Factorization):
    """A factorization whose matrices are on a device too.

    Attributes
    ----------
    matrix_there, R_there : Tensor of float32, shape (n, n)
        ``matrix`` and ``R``, with zeros below the diagonal of R.
    """

    __repr__ = one_line_repr

    matrix_there: torch.Tensor = field(repr=False, kw_only=True)
    R_there: torch.Tensor = field(repr=False, kw_only=True)


def hessian_on(device: torch.device, source: Any) -> torch.Tensor:
    """Return the matrix of a Hessian, Factorization or array on a device; not to be written to."""
    if isinstance(source, DeviceFactorization) and source.matrix_there.device == device:
        return source.matrix_there
    return torch.tensor(getattr(source, "matrix", source), dtype=torch.float32, device=device)


def factor_on(device: torch.device, factor: Factorization) -> torch.Tensor:
    """Return R on a device; not to be written to, nor read below its diagonal."""
    if isinstance(factor, DeviceFactorization) and factor.R_there.device == device:
        return factor.R_there
    return torch.tensor(factor.R, device=device)
