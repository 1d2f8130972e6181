"""Result of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ptqkit._frames import Tabular
from ptqkit._repr import one_line_repr
from ptqkit._tables import text_table
from ptqkit.hf.workbench import WorkbenchRow

__all__ = ["METHODS", "DemoResult", "demo_table"]

METHODS = {"rtn": "RTN", "reference": "GPTQ, as published", "quality": "GPTQ, quality recipe"}
"""What the demo calls each recipe, in its order."""

_HEADER = ("", "bits", "perplexity", "excess", "bits/weight", "MB", "seconds", "solving")
# Wide enough for all rows, so that they can be printed one by one.
_WIDTHS = (21, 4, 10, 7, 11, 5, 7, 7)


@dataclass
class DemoResult(Tabular):
    """All rows, how they were measured, and what was written.

    Attributes
    ----------
    rows : list of WorkbenchRow
        The float model first.
    settings : dict
        Conventions: tokens, window, stride, start token, calibration, group size, Python.
    checkpoint : dict
        Directory, format, bytes, the largest difference between the logits of the model loaded
        from it and of the one in memory, its perplexity, and the text it wrote.
    picture : str or None
    seconds : float
    """

    __repr__ = one_line_repr

    rows: list[WorkbenchRow] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    picture: str | None = None
    seconds: float = 0.0

    def _rows(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)

    def row(self, recipe: str, bits: int | float | str) -> WorkbenchRow:
        """Row of a recipe at a number of bits."""
        return next(r for r in self.rows if (r.recipe, r.bits) == (recipe, bits))

    def table(self) -> str:
        """Plain text table."""
        return demo_table(self.rows)


def demo_table(rows: Sequence[WorkbenchRow]) -> str:
    """Plain text table; the first lines are the same for more rows."""
    return text_table(_HEADER, map(_cells, rows), widths=_WIDTHS)


def _cells(row: WorkbenchRow) -> list[str]:
    cells = [METHODS.get(row.recipe, "float16"), str(row.bits), f"{row.perplexity:.3f}"]
    size = [f"{row.bits_per_weight:.2f}", f"{row.megabytes:.2f}"]
    if row.recipe == "float":
        return [*cells, "", *size, "", ""]
    return [*cells, f"{row.excess:.3f}", *size, f"{row.seconds:.2f}", f"{row.seconds_solve:.2f}"]
