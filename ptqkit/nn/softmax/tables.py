"""Grids for a softmax from other papers, to compare with.

``log2``
    Code q = clamp(round(-log2 p), 0, 2**b - 1) stands for 2**-q: products become shifts [FQ-ViT].
``twin``
    Two uniform grids of 2**(b - 1) codes each: steps of 2**-(m + b - 1) below 2**-m and steps of
    2**(1 - b) from there on, so that the coarse is a shift by m of the fine [PTQ4ViT]. Their m is
    chosen per layer; so it is here, by the error of the layer's output on calibration data.

The papers have no correction; ``row_sum`` gives each row its missing mass (which is negative
if rounding adds some) as on the uniform grids. All run in PyTorch and have no place in a file.

- [FQ-ViT] Lin et al. 2022, FQ-ViT, arXiv 2111.13824, Log-Int-Softmax.
- [PTQ4ViT] Yuan et al. 2022, PTQ4ViT, arXiv 2111.12293, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ptqkit._repr import one_line_repr
from ptqkit.errors import check_choice

__all__ = ["TWIN_SHIFTS", "Log2Grid", "TableGridQuantizer", "TwinGrid"]

TWIN_SHIFTS = tuple(range(1, 11))
"""Shifts m that are tried."""


@dataclass(frozen=True)
class Log2Grid:
    """Powers of two: 1, 1/2, ..., 2**-(2**bits - 1).

    Attributes
    ----------
    bits : int
    scale, zero_point
        As of uniform grids, for reports: NaN and 0.
    """

    __repr__ = one_line_repr

    of: ClassVar[str] = "log2"
    scale: ClassVar[float] = float("nan")
    zero_point: ClassVar[int] = 0

    bits: int

    def round(self, p: torch.Tensor) -> torch.Tensor:
        """Return the values that float32 probabilities are rounded to."""
        return torch.exp2(-torch.log2(p).neg_().round_().clamp_(0, (1 << self.bits) - 1))


@dataclass(frozen=True)
class TwinGrid:
    """Fine steps below ``2**-shift``, coarse ones above.

    Attributes
    ----------
    bits, shift : int
    scale : float
        The coarse step.
    """

    __repr__ = one_line_repr

    of: ClassVar[str] = "twin"
    zero_point: ClassVar[int] = 0

    bits: int
    shift: int

    @property
    def scale(self) -> float:
        """Coarse step."""
        return 2.0 ** (1 - self.bits)

    def round(self, p: torch.Tensor) -> torch.Tensor:
        """Return the values that float32 probabilities are rounded to."""
        most, fine = (1 << (self.bits - 1)) - 1, self.scale * 2.0**-self.shift
        step = torch.where(p < 2.0**-self.shift, fine, self.scale)
        return (p / step).round_().clamp_(max=most) * step


class TableGridQuantizer:
    """Quantizes the probabilities of one attention module on one of these grids.

    Parameters
    ----------
    grid : Log2Grid or TwinGrid
    correction : {None, "row_sum"}
    """

    bias = None
    heads = None

    def __init__(self, grid: Log2Grid | TwinGrid, correction: str | None = None) -> None:
        check_choice(f"correction of a {grid.of} grid", correction, (None, "row_sum"))
        self.grid, self.correction = grid, correction

    @property
    def uncorrected(self) -> TableGridQuantizer:
        """The same grid without a correction."""
        return TableGridQuantizer(self.grid)

    @torch.no_grad()
    def __call__(self, p: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        """Return the quantized and corrected probabilities (batch, heads, q, k), dtype as given."""
        y = self.grid.round(p.float())
        seen = torch.ones_like(y, dtype=torch.bool) if allowed is None else allowed.expand_as(y)
        y = y.masked_fill_(~seen, 0.0)
        if self.correction is not None:
            missing = 1.0 - y.sum(-1, keepdim=True, dtype=torch.float64)
            y += (missing / seen.sum(-1, keepdim=True).clamp_(min=1)).float()
            y = y.masked_fill_(~seen, 0.0)
        return y.to(p.dtype)

    def __repr__(self) -> str:
        """Grid and correction."""
        text = "" if self.correction is None else f", {self.correction!r}"
        return f"TableGridQuantizer({self.grid}{text})"
