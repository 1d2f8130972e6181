"""GPTQ as published, in PyTorch: the form every peer runs, for comparison.

Written from Algorithm 1 of Frantar et al. 2022: dampen, Cholesky factor of the inverse, columns in
lazy blocks. Groups fit their grid when they are reached, with lazy blocks no wider than a group, so
that a grid always sees updated weights.
"""

from __future__ import annotations

import torch

__all__ = ["accumulate", "gptq"]


def accumulate(H: torch.Tensor, X: torch.Tensor, seen: int) -> int:
    """H <- mean over tokens of 2 x x^T, in place; returns the new number of tokens."""
    X = X.reshape(-1, X.shape[-1]).float()
    total = seen + len(X)
    H.mul_(seen / total)
    H.addmm_(X.T, X, alpha=2.0 / total)
    return total


def _grid(w: torch.Tensor, top: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    if symmetric:
        reach = torch.maximum(-low, high)
        scale = torch.where(reach > 0, reach / (top / 2), torch.ones_like(reach))
        return scale, torch.full_like(scale, (top + 1) // 2)
    scale = torch.where(high > low, (high - low) / top, torch.ones_like(high))
    return scale, torch.round(-low / scale)


def gptq(
    W: torch.Tensor,
    H: torch.Tensor,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    damping: float = 0.01,
    block: int = 128,
) -> torch.Tensor:
    """Return the quantized weight (out, in), dequantized."""
    W, H = W.clone(), H.clone()
    n, top = W.shape[1], 2**bits - 1
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[:, dead] = 0
    H.diagonal().add_(damping * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    Q = torch.empty_like(W)
    scale, zero = _grid(W, top, symmetric)
    block = min(block, group_size or block)
    for start in range(0, n, block):
        end = min(start + block, n)
        part, errors = W[:, start:end].clone(), torch.empty_like(W[:, start:end])
        inner = U[start:end, start:end]
        for j in range(end - start):
            if group_size and (start + j) % group_size == 0:
                scale, zero = _grid(W[:, start + j : start + j + group_size], top, symmetric)
            w = part[:, j]
            q = scale * ((torch.round(w / scale) + zero).clamp(0, top) - zero)
            Q[:, start + j] = q
            errors[:, j] = (w - q) / inner[j, j]
            part[:, j:] -= errors[:, j : j + 1] * inner[j, j:]
        W[:, end:] -= errors @ U[start:end, end:]
    return Q
