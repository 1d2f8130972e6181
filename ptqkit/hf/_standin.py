"""Stand-in for the array functions of softmax quantization, until they are there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class SoftmaxGrid:
    """Grid."""

    bits: int
    scale: float
    zero_point: int

    def offset(self, bias: Any = 0.0) -> Any:
        """Offset."""
        return self.scale * self.zero_point - bias


def softmax_grid(bits: int = 8, minimum: float = 0.0, maximum: float = 1.0) -> SoftmaxGrid:
    """Grid."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
        raise ValueError(f"bits must be an integer from 2 to 16, not {bits!r}")
    low, high = min(minimum, 0.0), max(maximum, 0.0)
    scale = float(np.float32((high - low) / (2**bits - 1)))
    return SoftmaxGrid(bits, scale, round(-low / scale))


class SoftmaxBias:
    """Bias."""

    def __init__(self, heads: int, *, grid: SoftmaxGrid, steps: int | None = None) -> None:
        self.heads, self.grid = heads, grid
        self.sums = np.zeros((heads, 5))

    def update(self, P: Any, allowed: Any = None, causal: bool = False, step: Any = None) -> None:
        """Update."""
        P = np.asarray(P, np.float32)
        if not np.isfinite(P).all():
            raise ValueError("P holds NaN or infinity")
        a = np.ones(P.shape, bool) if allowed is None else np.broadcast_to(allowed, P.shape)
        g = self.grid
        code = np.clip(np.rint(P / np.float32(g.scale)) + g.zero_point, 0, 2**g.bits - 1)
        q = np.where(a, g.scale * (code.astype(np.float64) - g.zero_point), 0.0)
        rows = a.any(-1)
        parts = (rows.sum((0, 2)), q.sum((0, 2, 3)), ((q == 0) & a).sum((0, 2, 3)),
                 a.sum((0, 2, 3)), rows.sum((0, 2)))  # fmt: skip
        self.sums += np.stack(parts, -1)

    def bias(self, granularity: str = "tensor") -> np.ndarray:
        """Bias."""
        s = self.sums if granularity == "head" else self.sums.sum(0, keepdims=True)
        b = (s[:, 0] - s[:, 1]) / s[:, 3]
        return b if granularity == "head" else b[0]

    @property
    def share_zero(self) -> float:
        """Share."""
        return self.sums[:, 2].sum() / self.sums[:, 3].sum()

    @property
    def row_sum(self) -> float:
        """Row sum."""
        return self.sums[:, 1].sum() / self.sums[:, 4].sum()


class SQNR:
    """SQNR."""

    def __init__(self, per: str = "sample") -> None:
        self.ratios: list[float] = []
        self.infinite = 0

    def update(self, reference: Any, quantized: Any) -> None:
        """Update."""
        r, q = np.asarray(reference, np.float64), np.asarray(quantized, np.float64)
        for a, b in zip(r, q, strict=True):
            e = ((a - b) ** 2).sum()
            self.infinite += e == 0
            self.ratios.append((a**2).sum() / e if e else np.inf)

    @property
    def decibel(self) -> float:
        """Decibel."""
        return 10 * np.log10(np.mean(self.ratios))
