"""A Hessian and its factor that stay on the device where they were made."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch

from ptqkit._repr import one_line_repr
from ptqkit.arrays.factorization import FactorFacts, Factorization
from ptqkit.arrays.hessian import Hessian
from ptqkit.nn.transfer import host_copy

__all__ = ["DeviceFactorization", "DeviceHessian", "factor_on", "hessian_on"]


class DeviceHessian(Hessian):
    """A finished Hessian on a device; the host has it once something asks for ``matrix``.

    Parameters
    ----------
    matrix : Tensor of float32, shape (n, n)
        Symmetric and finite; kept, and not written to.
    tokens : int

    Attributes
    ----------
    matrix_there : Tensor
    """

    def __init__(self, matrix: torch.Tensor, tokens: int) -> None:
        super().__init__(len(matrix))
        self.tokens = tokens
        self.matrix_there: torch.Tensor | None = matrix
        self._fetched = False

    def _fetch(self) -> None:
        if not self._fetched and self.matrix_there is not None:
            self._matrix, self._lazy, self._fetched = _fixed(self.matrix_there), True, True

    def _make_sum(self) -> None:
        """Make the sum of the mean."""
        self._fetch()
        super()._make_sum()

    @property
    def matrix(self) -> np.ndarray:
        """H as a read-only float32 array (in_features, in_features)."""
        with self._lock:
            self._fetch()
            return super().matrix

    def update(self, X: Any, mask: Any = None) -> None:
        """Add a batch of inputs, on the host from now on."""
        self._make_sum()
        self.matrix_there = None
        super().update(X, mask)

    def merge(self, other: Hessian) -> None:
        """Add what ``other`` has seen, on the host from now on."""
        self._make_sum()
        self.matrix_there = None
        super().merge(other)


class DeviceFactorization(Factorization):
    """A factorization on a device; the host has its matrices once something asks for them.

    Attributes
    ----------
    matrix_there, R_there : Tensor of float32, shape (n, n)
        ``matrix`` and ``R``, with zeros below the diagonal of R.
    """

    __repr__ = one_line_repr

    def __init__(self, matrix: torch.Tensor, R: torch.Tensor, facts: FactorFacts) -> None:
        self.__dict__.update({"matrix_there": matrix, "R_there": R, **facts._asdict()})

    @cached_property
    def matrix(self) -> np.ndarray:
        """The undamped Hessian, original order."""
        return _fixed(self.__dict__["matrix_there"])

    @cached_property
    def R(self) -> np.ndarray:
        """The factor of the damped Hessian in the order of the solve."""
        return _fixed(self.__dict__["R_there"])


def _fixed(values: torch.Tensor) -> np.ndarray:
    found = host_copy(values)
    found.flags.writeable = False
    return found


def hessian_on(device: torch.device, source: Any) -> torch.Tensor:
    """Return the matrix of a Hessian, Factorization or array on a device; not to be written to."""
    there = getattr(source, "matrix_there", None)
    if there is not None and there.device == device:
        return there
    matrix = getattr(source, "matrix", source)
    return torch.tensor(matrix, dtype=torch.float32, device=device)


def factor_on(device: torch.device, factor: Factorization) -> torch.Tensor:
    """Return R on a device; not to be written to, nor read below its diagonal."""
    there = getattr(factor, "R_there", None)
    if there is not None and there.device == device:
        return there
    return torch.tensor(factor.R, dtype=torch.float32, device=device)
