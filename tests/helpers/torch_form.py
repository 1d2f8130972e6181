"""GPTQ as published, in PyTorch: Algorithm 1 of [Frantar et al. 2022] with its lazy blocks.

Dampen, invert by Cholesky, upper Cholesky factor of the inverse; then block by block, column by
column, each error spread over the rest of its block at once and over later blocks when the block
is done. Written from the paper; grids are min-max.

One code on the other side of a rounding tie rightly changes all later ones, so the form can be
told which side another solver took: ``follow`` decides ties, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Ties:
    """Codes and zero-points of another solver, taken over within ``near`` steps of a tie.

    ``taken`` counts how often that changed what rounding alone would have given.
    """

    codes: torch.Tensor
    zeros: torch.Tensor
    near: float
    taken: int = 0

    def decide(self, steps: torch.Tensor, found: torch.Tensor, other: torch.Tensor, near: float):
        tie = (steps - steps.floor() - 0.5).abs() < near
        other = torch.where(tie & ((other - found).abs() == 1), other, found)
        self.taken += int((other != found).sum())
        return other


@dataclass
class Found:
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


def _fit(w: torch.Tensor, top: int, symmetric: bool, ties: Ties | None, g: int):
    """Min-max grid of each row of w: scale, zero-point."""
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    if symmetric:
        reach = torch.maximum(-low, high)
        scale = torch.where(reach > 0, 2 * reach / top, 1)
        return scale, torch.full_like(scale, (top + 1) // 2)
    scale = torch.where(high > low, (high - low) / top, 1)
    zero = (-low / scale).round()
    if ties is not None:
        zero = ties.decide(-low / scale, zero, ties.zeros[:, g], ties.near * top)
    return scale, zero


def _round(w, scale, zero, top: int, ties: Ties | None, column: int) -> torch.Tensor:
    codes = ((w / scale).round() + zero).clamp(0, top)
    return (
        codes if ties is None else ties.decide(w / scale, codes, ties.codes[:, column], ties.near)
    )


def gptq(
    W: torch.Tensor,
    H: torch.Tensor,
    *,
    top: int,
    group_size: int | None = None,
    symmetric: bool = False,
    act_order: bool = False,
    damping: float = 0.01,
    block: int = 128,
    ties: Ties | None = None,
) -> Found:
    """Quantize W (rows, n) with H (n, n); groups are fitted to the updated weights.

    A group's lazy block must be no wider than the group: the block is cut down to it.
    """
    W, H = W.clone(), H.clone()
    rows, n = W.shape
    size = group_size or n
    block = min(block, size)
    dead = H.diagonal() == 0
    mean = H.diagonal()[~dead].mean() if bool((~dead).any()) else H.new_zeros(())
    H.diagonal().add_(torch.where(dead, torch.ones_like(mean), damping * mean))
    W[:, dead] = 0
    order = torch.arange(n)
    if act_order:
        order = torch.argsort(torch.where(dead, 0, H.diagonal()), descending=True, stable=True)
        W, H = W[:, order], H[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.zeros_like(W)
    scales, zeros = (W.new_zeros(rows, n // size) for _ in range(2))
    for start in range(0, n, block):
        stop = min(start + block, n)
        errors = W.new_zeros(rows, stop - start)
        for j in range(start, stop):
            g = j // size
            if j % size == 0:
                scales[:, g], zeros[:, g] = _fit(W[:, j : j + size], top, symmetric, ties, g)
            codes[:, j] = _round(W[:, j], scales[:, g], zeros[:, g], top, ties, int(order[j]))
            error = (W[:, j] - scales[:, g] * (codes[:, j] - zeros[:, g])) / U[j, j]
            W[:, j + 1 : stop] -= error[:, None] * U[j, None, j + 1 : stop]
            errors[:, j - start] = error
        W[:, stop:] -= errors @ U[start:stop, stop:]
    back = torch.empty_like(codes)
    back[:, order] = codes
    return Found(back.to(torch.uint8), scales, zeros.to(torch.uint8))
