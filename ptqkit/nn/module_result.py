"""What quantizing any torch module returns."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ptqkit._files import plain
from ptqkit._frames import Tabular
from ptqkit._repr import one_line_repr
from ptqkit._tables import text_table
from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.arrays.metrics import signal_to_error
from ptqkit.recipe.recipe import Recipe

__all__ = ["ModuleResult", "ModuleRow"]


@dataclass(frozen=True)
class ModuleRow:
    """One quantized layer. Numbers that were not computed are NaN.

    Attributes
    ----------
    name, kind, method : str
        ``kind`` is the class of the module, such as ``"Conv2d"``.
    shape : tuple of int
        Of the weight: (out, in), or (out, in / groups, kernel...).
    groups : int
        Runs of outputs that have a Hessian of their own.
    bits : int or "ternary"
    group_size : int or None
    objective, objective_rtn : float
        tr((W - Q) H (W - Q)^T) summed over the groups, of the result and of rounding to nearest on
        its grid, or on grids of consecutive inputs if the order permutes the groups.
    output_power : float
        tr(W H W^T): the same unit, for the ratio of signal to error.
    bits_per_weight : float
        With scales and zero-points.
    tokens : int
        Rows of inputs behind H: output positions of a convolution.
    calls : int
        How often it ran in the first batch.
    dead_inputs, damping_raised : int
        Inputs that were always 0, summed over the groups; how often damping had to be raised.
    seconds : float
        Of the solve.
    notes : str
    """

    __repr__ = one_line_repr

    name: str
    kind: str
    method: str
    shape: tuple[int, ...]
    groups: int
    bits: int | str
    group_size: int | None
    objective: float = math.nan
    objective_rtn: float = math.nan
    output_power: float = math.nan
    bits_per_weight: float = math.nan
    tokens: int = 0
    calls: int = 0
    dead_inputs: int = 0
    damping_raised: int = 0
    seconds: float = 0.0
    notes: str = ""

    @property
    def output_sqnr_db(self) -> float:
        """Signal to error of the layer's outputs on the calibration inputs, in decibels."""
        return signal_to_error(self.output_power, self.objective)


@dataclass
class ModuleResult(Tabular):
    """What :func:`ptqkit.nn.quantize_module` returns.

    Attributes
    ----------
    model : nn.Module
        The model given, its weights replaced by their dequantized values.
    matrices : dict of str to QuantizedMatrix
        Codes and grids, (out, in) for linear layers and (out, in / groups * prod(kernel)) for
        convolutions: the order of ``weight.flatten(1)``.
    rows : list of ModuleRow
        In order of execution.
    recipe : Recipe
    seconds : dict of str to float
        ``total``, ``solve``, and ``calibration``: forward passes and Hessians.
    left_float : dict of str to str
        Names and kinds of the other modules that hold matrices or kernels: transposed convolutions,
        embeddings, attention that multiplies its weights itself, and what the recipe skips.
    """

    __repr__ = one_line_repr

    model: nn.Module
    matrices: dict[str, QuantizedMatrix]
    rows: list[ModuleRow]
    recipe: Recipe
    seconds: dict[str, float] = field(default_factory=dict)
    left_float: dict[str, str] = field(default_factory=dict)

    def totals(self) -> dict[str, float]:
        """Return sums over the layers; ``bits_per_weight`` is weighted by size."""
        sizes = [math.prod(row.shape) for row in self.rows]
        bits = math.fsum(n * r.bits_per_weight for n, r in zip(sizes, self.rows, strict=True))
        return {
            "layers": len(self.rows),
            "weights": sum(sizes),
            "bits_per_weight": bits / sum(sizes) if self.rows else math.nan,
            "objective": math.fsum(r.objective for r in self.rows),
            "objective_rtn": math.fsum(r.objective_rtn for r in self.rows),
        }

    def _rows(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Return rows, totals, recipe and seconds as plain values that are valid JSON."""
        return plain(
            {
                "layers": [asdict(row) for row in self.rows],
                "totals": self.totals(),
                "recipe": self.recipe.to_dict(),
                "seconds": self.seconds,
                "left_float": self.left_float,
            }
        )

    def table(self) -> str:
        """Return plain text: a line per layer, and one that names what stays float."""
        header = ("layer", "kind", "shape", "bits", "objective", "rtn", "Y dB", "bpw", "notes")
        rows = [
            (
                row.name,
                row.kind + (f" /{row.groups}" if row.groups > 1 else ""),
                "x".join(map(str, row.shape)),
                str(row.bits),
                f"{row.objective:.4g}",
                f"{row.objective_rtn:.4g}",
                f"{row.output_sqnr_db:.1f}",
                f"{row.bits_per_weight:.2f}",
                row.notes,
            )
            for row in self.rows
        ]
        text = text_table(header, rows, left=(0, 1, -1))
        rest = ", ".join(f"{name} ({kind})" for name, kind in self.left_float.items())
        return f"{text}\nin float: {rest}" if rest else text
