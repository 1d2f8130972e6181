"""AdaRound as a baseline: rounding up or down is learned per weight (Nagel et al. 2020).

The layer's own objective is tr(E H E^T) with E = W - Q, so that the reconstruction loss, which the
paper takes over batches and before the activation function, is computed from H alone. Grids are
min-max grids of the original weights, as for the other methods here.
"""

from __future__ import annotations

import math

import numpy as np
import torch

import ptqkit

__all__ = ["adaround"]

# Stretch of the sigmoid, exponents of the regularizer and its begin: the paper's. Its weight is
# relative to what rounding to nearest costs per weight: the paper's own, 0.01 of an absolute loss,
# leaves weights between two grid points where outputs are large.
ZETA, GAMMA, FIRST, LAST, WARM = 1.1, -0.1, 20.0, 2.0, 0.2
WEIGHT = 0.5


def adaround(
    weight: np.ndarray,
    hessian: np.ndarray,
    bits: int,
    *,
    steps: int = 2000,
    rate: float = 0.01,
    device: str = "cpu",
) -> np.ndarray:
    """Return a weight (out, in) on its grid, float32.

    Parameters
    ----------
    weight : ndarray of float32, shape (out, in)
    hessian : ndarray of float32, shape (in, in)
        (2/N) X^T X.
    bits : int
    steps, rate : int, float
        Of Adam; the paper takes 10,000 steps over batches, with a smaller rate.
    """
    grid = ptqkit.rtn(weight, bits=bits, group_size=None)
    W, H = (torch.from_numpy(np.array(x)).to(device) for x in (weight, hessian))
    scale = torch.from_numpy(grid.scales).to(device)
    zero = torch.from_numpy(grid.zero_points.astype(np.float32)).to(device)
    low = torch.floor(W / scale)
    rest = (W / scale - low).clamp(1e-3, 1 - 1e-3)
    V = -torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1)  # soft rounding begins at W itself
    V.requires_grad_()
    optimizer = torch.optim.Adam([V], rate)
    top = float(grid.max_code)
    nearest = W - torch.from_numpy(grid.dequantize()).to(device)
    unit = (nearest @ H * nearest).sum() / W.numel()

    def values(up: torch.Tensor) -> torch.Tensor:
        return ((low + up + zero).clamp(0, top) - zero) * scale

    for step in range(steps):
        up = (torch.sigmoid(V) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        error = W - values(up)
        loss = (error @ H * error).sum() / unit
        done = step / steps
        if done >= WARM:
            progress = (done - WARM) / (1 - WARM)
            beta = LAST + 0.5 * (FIRST - LAST) * (1 + math.cos(math.pi * progress))
            loss = loss + WEIGHT * (1 - (2 * up - 1).abs().pow(beta)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return values((V >= 0).float()).cpu().numpy()
