"""What quantizing the softmax of a model did, layer by layer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ptqkit._files import JsonReport
from ptqkit._frames import Tabular
from ptqkit._repr import one_line_repr
from ptqkit._tables import text_table, wrap_line

__all__ = ["SoftmaxLayerReport", "SoftmaxReport"]


@dataclass
class SoftmaxLayerReport:
    """One attention module. Numbers that were not computed are NaN (``None`` in JSON).

    Attributes
    ----------
    name : str
    heads, bits : int
    scale : float
    zero_point : int
    correction : str or None
    grid : {"probabilities", "exponentials", "squares", "log2", "twin"}
        What is rounded, on [0, 1] or a range of its own; or a grid of other papers.
    bias : float
        Mean over heads of beta; NaN unless the correction is "bias".
    zero_fraction : float
        Share of the allowed probabilities that round to zero.
    mean_row_sum : float
        Expected row sum of the quantized probabilities before correction; 1 in the float model.
    sqnr_db, sqnr_corrected_db : float
        Signal to error of the attention's output (probabilities times values), all else float;
        mean of the ratios of the samples (SBC eq. 1).
    longest : int
        Most allowed keys of a row.
    notes : str
    """

    __repr__ = one_line_repr

    name: str
    heads: int = 0
    bits: int = 0
    scale: float = math.nan
    zero_point: int = 0
    correction: str | None = None
    grid: str = "probabilities"
    bias: float = math.nan
    zero_fraction: float = math.nan
    mean_row_sum: float = math.nan
    sqnr_db: float = math.nan
    sqnr_corrected_db: float = math.nan
    longest: int = 0
    notes: str = ""


@dataclass
class SoftmaxReport(Tabular, JsonReport):
    """All attention modules.

    Attributes
    ----------
    layers : list of SoftmaxLayerReport
    calibration : dict
        Source, samples, sequence length, tokens, start token.
    output_db, output_corrected_db : float
        Signal to error of the model's output (logits if it has them) with all layers
        quantized, without and with corrections, on the calibration set; mean of the ratios of the
        samples.
    notes : str
    """

    __repr__ = one_line_repr

    layers: list[SoftmaxLayerReport] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    output_db: float = math.nan
    output_corrected_db: float = math.nan
    notes: str = ""

    def __getitem__(self, name: str) -> SoftmaxLayerReport:
        """Row of a layer by name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def totals(self) -> dict[str, float]:
        """Means over the layers."""
        names = ("zero_fraction", "mean_row_sum", "sqnr_db", "sqnr_corrected_db")
        count = max(len(self.layers), 1)
        return {n: math.fsum(getattr(r, n) for r in self.layers) / count for n in names}

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dict per layer, for ``pandas.DataFrame(report.to_dicts())``."""
        return [asdict(layer) for layer in self.layers]

    def _rows(self) -> list[dict[str, Any]]:
        return self.to_dicts()

    def table(self) -> str:
        """Plain text table, a line per layer."""
        header = ["layer", "heads", "bits", "zero", "row sum", "dB", "corrected", "beta"]
        text = text_table([*header, "correction"], map(_cells, self.layers), left=(0, -1))
        notes = f" [{self.notes}]" if self.notes else ""
        lines = [f"{row.name}: {row.notes}" for row in self.layers if row.notes]
        lines.append(
            f"output of the model: {self.output_db:.2f} dB, corrected "
            f"{self.output_corrected_db:.2f} dB{notes}"
        )
        return "\n".join([text, *map(wrap_line, lines)])

    def __str__(self) -> str:
        return self.table()


def _cells(row: SoftmaxLayerReport) -> tuple[str, ...]:
    return (
        row.name,
        str(row.heads),
        str(row.bits),
        f"{100 * row.zero_fraction:.1f}%",
        f"{row.mean_row_sum:.4f}",
        f"{row.sqnr_db:.2f}",
        f"{row.sqnr_corrected_db:.2f}",
        "-" if math.isnan(row.bias) else f"{row.bias:.3g}",
        str(row.correction).lower(),
    )
