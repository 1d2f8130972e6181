"""What a GPU does better than its host for the solver: factors, and weights corrected for errors.

The same results as :func:`ptqkit.factorize` and :func:`ptqkit.target_weights` but for rounding, in
float64, which such devices multiply fast.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from ptqkit.arrays.factorization import Factorization, factor_damped
from ptqkit.arrays.hessian import Hessian
from ptqkit.errors import NotPositiveDefiniteError
from ptqkit.nn.device_factor import DeviceFactorization, hessian_on
from ptqkit.nn.transfer import host_copy

__all__ = ["corrected_weights", "factorize_on"]

# A pivot at the level of rounding in float32, which the solver works in, is noise.
_LEAST_PIVOT = 4 * float(np.finfo(np.float32).eps)


def factorize_on(
    device: torch.device,
    hessian: Hessian,
    *,
    order: str = "natural",
    group_size: int | None = 128,
    damping: float = 0.01,
    max_damping: float = 1.0,
    threads: int = 0,
    name: str | None = None,
) -> Factorization:
    """Dampen and factorize a Hessian on a device, where its matrices stay.

    Parameters
    ----------
    device : torch.device
    hessian : Hessian
        Symmetric and finite, as accumulators make it.
    order, group_size, damping, max_damping, threads, name
        As :func:`ptqkit.factorize` takes them.
    """
    there = hessian_on(device, hessian)
    R, facts = factor_damped(
        host_copy(there.diagonal()),
        order=order,
        group_size=group_size,
        damping=damping,
        max_damping=max_damping,
        factor=partial(_factor, there),
        name=name,
    )
    return DeviceFactorization(there, R, facts)


def _factor(H: torch.Tensor, order: np.ndarray, shift: np.ndarray) -> torch.Tensor | int:
    """Return R, upper triangular, R R^T = (H + shift)[order][:, order], or the input that fails."""
    turned = torch.from_numpy(order[::-1].copy()).to(H.device)
    wide = H[turned[:, None], turned].double()
    wide.diagonal().add_(torch.from_numpy(shift).to(H.device)[turned])
    L, first = _cholesky(wide)
    del wide
    if first >= 0:
        return int(order[::-1][first])
    R = L.float()
    del L
    # A GPU's L is stored column by column.
    return R.flip(0, 1).contiguous()


def _cholesky(matrix: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return L, and the first row whose pivot is not positive, or -1."""
    L, info = torch.linalg.cholesky_ex(matrix)
    failed = int(info)
    bad = ~(L.diagonal().square() > _LEAST_PIVOT * matrix.diagonal())
    if failed:
        bad[failed - 1] = True
    return L, int(bad.int().argmax()) if bool(bad.any()) else -1


def corrected_weights(
    weight: torch.Tensor,
    hessian: Hessian | Factorization,
    drift: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    alpha: float,
    damping: float,
    name: str = "",
) -> torch.Tensor:
    """Return what to quantize instead of a weight: the least squares of ``target_weights``.

    Parameters
    ----------
    weight : Tensor of float32, shape (out, in)
        On the device that computes.
    hessian : Hessian or Factorization
        Of the quantized model's inputs.
    drift : Tensor of float32, shape (in, in), optional
        G - H, on that device.
    residual : Tensor of float32, shape (out, in), optional
        D.
    alpha, damping, name
        As :func:`ptqkit.target_weights` takes them.

    Raises
    ------
    NotPositiveDefiniteError
        If H cannot be factorized with this damping.
    ValueError
        If a corrected weight is beyond float32.
    """
    parts = [p for p in (drift, residual) if p is not None and bool(p.any())]
    if alpha == 0 or not parts:
        return weight
    label = f"{name}: " if name else ""
    H = hessian_on(weight.device, hessian).double()
    diagonal = H.diagonal().clone()
    live = diagonal != 0
    mean = diagonal[live].mean() if bool(live.any()) else diagonal.new_zeros(())
    H.diagonal().add_(torch.where(live, damping * mean, torch.ones_like(mean)))
    L, failed = _cholesky(H)
    if failed >= 0:
        raise NotPositiveDefiniteError(
            f"{label}the Hessian is not positive definite: the pivot of input {failed} failed "
            f"with damping {damping:g} of the mean diagonal. Use more calibration tokens or "
            "raise damping",
            failed,
            damping,
        )
    del H
    wide = weight.double()
    right = torch.zeros_like(wide) if residual is None else residual.double()
    if drift is not None:
        right = torch.addmm(right, wide, drift.double())
    right *= live  # sums of inputs that are 0 are 0
    result = (wide + alpha * torch.cholesky_solve(right.T, L).T).float()
    if not bool(torch.isfinite(result).all()):
        raise ValueError(
            f"{label}the corrected weights are beyond float32: H is too close to singular at "
            f"damping {damping:g}. Raise damping"
        )
    return result
