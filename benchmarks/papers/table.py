"""Tables with the figures of a paper in columns of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common import markdown

__all__ = ["Published", "Table", "number", "with_error"]


def number(value: Any, digits: int = 4) -> str:
    """Return a cell: nothing for None and NaN, so many digits of a number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
    return str(value)


def with_error(value: float, error: float) -> str:
    """Return "value ± error", both to the error's second digit."""
    if not error > 0 or not math.isfinite(error):
        return number(float(value))
    places = min(max(1 - math.floor(math.log10(error)), 0), 6)
    return f"{value:.{places}f} ± {error:.{places}f}"


@dataclass(frozen=True)
class Published:
    """Figures of a paper.

    Parameters
    ----------
    model : str
        Whose they are.
    columns : sequence of str
    rows : mapping of str to sequence
        By the label that our row has, as far as there is such a row.
    """

    model: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Table:
    """Our rows; the first cell of each is its label.

    Parameters
    ----------
    title : str
    columns : sequence of str
    rows : sequence of sequences
    note : str
        A line below.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]] = field(default_factory=list)
    note: str = ""

    def beside(self, published: Published | None) -> tuple[list[str], list[list[str]]]:
        """Return columns and cells with a paper's figures at the right.

        Rows that only the paper has come last, with nothing in our columns.
        """
        columns = list(self.columns)
        rows = [[number(cell) for cell in row] for row in self.rows]
        if published is None:
            return columns, rows
        own = {row[0] for row in rows}
        blank = [""] * (len(columns) - 1)
        rows += [[label, *blank] for label in published.rows if label not in own]
        columns += [f"{published.model}: {c}" for c in published.columns]
        empty = [""] * len(published.columns)
        return columns, [row + self._cells(published, row[0], empty) for row in rows]

    @staticmethod
    def _cells(published: Published, label: str, empty: list[str]) -> list[str]:
        found = published.rows.get(label)
        return empty if found is None else [number(cell) for cell in found]

    def markdown(self, published: Published | None = None) -> str:
        """Return the table in Markdown, title and note around it."""
        columns, rows = self.beside(published)
        lines = [f"**{self.title}**", "", markdown(columns, rows)]
        if published is not None:
            lines += ["", f"Columns of {published.model} are the paper's, of another model."]
        if self.note:
            lines += ["", self.note]
        return "\n".join(lines)

    def text(self, published: Published | None = None) -> str:
        """Return the table in plain text, for a terminal."""
        columns, rows = self.beside(published)
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = [self.title]
        for row in (columns, *rows):
            first, *others = (
                cell.rjust(w) if i else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            lines.append("  ".join([first, *others]).rstrip())
        if published is not None:
            lines.append(f"columns of {published.model} are the paper's, of another model")
        return "\n".join([*lines, *([self.note] if self.note else [])])
