"""What diagnostics of a model found: ranked tables, JSON and pictures."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from ptqkit._files import JsonReport
from ptqkit._frames import Tabular
from ptqkit._repr import one_line_repr
from ptqkit._tables import text_table

__all__ = ["SensitivityReport", "SensitivityRow"]

_SHOWN = 30


@dataclass
class SensitivityRow:
    """One case.

    Attributes
    ----------
    kind : str
        "all" if a case is a whole block.
    layer : str
        Module or block; "all" if a case is one kind everywhere.
    tensors : int
        How many are quantized together.
    sqnr_db : float
        Of the final logits against the float model's, mean of the samples' ratios (SBC eq. 1);
        infinite if a sample came out equal.
    infinite : int
        Samples without any error.
    perplexity : float or None
    """

    __repr__ = one_line_repr

    kind: str
    layer: str
    tensors: int
    sqnr_db: float = math.nan
    infinite: int = 0
    perplexity: float | None = None

    @property
    def name(self) -> str:
        """Short name of the case."""
        if self.layer == "all":
            return self.kind
        return self.layer if self.kind == "all" else f"{self.layer} {self.kind}"


@dataclass
class SensitivityReport(Tabular, JsonReport):
    """Cases, the most harmful first.

    Attributes
    ----------
    rows : list of SensitivityRow
    bits : int
    by : str
    calibration : dict
    float_perplexity : float or None
    """

    __repr__ = one_line_repr

    rows: list[SensitivityRow] = field(default_factory=list)
    bits: int = 8
    by: str = "kind"
    calibration: dict[str, Any] = field(default_factory=dict)
    float_perplexity: float | None = None

    def __getitem__(self, name: str) -> SensitivityRow:
        """Return the row of a case by its name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dict per case, for ``pandas.DataFrame(report.to_dicts())``."""
        return [asdict(row) for row in self.rows]

    def _rows(self) -> list[dict[str, Any]]:
        return [{"name": row.name, **asdict(row)} for row in self.rows]

    def table(self) -> str:
        """Return a plain text table, the most harmful case first."""
        header = ["case", "tensors", "dB of the logits"]
        cells = [[r.name, str(r.tensors), _decibel(r)] for r in self.rows]
        if self.float_perplexity is not None:
            header += ["perplexity", "more"]
            for line, row in zip(cells, self.rows, strict=True):
                value = row.perplexity if row.perplexity is not None else math.nan
                line += [f"{value:.4f}", f"{value - self.float_perplexity:+.4f}"]
        return text_table(header, cells)

    def __str__(self) -> str:
        return self.table()

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw the cases as bars into a file (type by its suffix); no display is needed.

        At most 30 are shown, the most harmful.
        """
        from matplotlib.figure import Figure

        rows = self.rows[:_SHOWN]
        finite = [r.sqnr_db for r in rows if math.isfinite(r.sqnr_db)]
        longest = max(finite, default=1.0)
        figure = Figure(figsize=(7.5, 1.2 + 0.28 * len(rows)), layout="constrained")
        axes = figure.subplots()
        values = [r.sqnr_db if math.isfinite(r.sqnr_db) else longest for r in rows]
        drawn = axes.barh(range(len(rows)), values, color="#4c78a8")
        axes.bar_label(drawn, [_decibel(r) for r in rows], fontsize=7, padding=2)
        axes.set_yticks(range(len(rows)), [r.name for r in rows], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(f"signal to noise of the logits with {self.bits} bits, dB (less is worse)")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=130)


def _decibel(row: SensitivityRow) -> str:
    return "inf" if math.isinf(row.sqnr_db) else f"{row.sqnr_db:.2f}"
