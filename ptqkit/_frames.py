"""Results as data frames, and as tables of notebooks."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Tabular", "dataframe", "html_table"]

# Rows that a notebook shows.
_SHOWN = 60


class Tabular:
    """Base of the results that are rows of named values: data frames, and tables of notebooks."""

    def _rows(self) -> Sequence[Mapping[str, Any]]:
        raise NotImplementedError

    def to_dataframe(self) -> Any:
        """Return the rows as a pandas.DataFrame."""
        return dataframe(self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._rows())


def dataframe(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return a pandas.DataFrame with a column per key, in the order in which keys appear.

    Raises
    ------
    ModuleNotFoundError
        If pandas is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a data frame needs pandas; install it with: pip install pandas", name="pandas"
        ) from error
    return pandas.DataFrame([dict(row) for row in rows])


def html_table(rows: Sequence[Mapping[str, Any]], caption: str = "") -> str:
    """Return a table of rows; columns that are empty everywhere, and rows beyond 60, are left out.

    Parameters
    ----------
    rows : sequence of mappings
    caption : str
    """
    names = [n for n in dict.fromkeys(k for row in rows for k in row) if _filled(rows, n)]
    head = "".join(f"<th>{html.escape(str(n))}</th>" for n in names)
    lines = [
        "<tr>" + "".join(f"<td>{html.escape(_cell(row.get(n)))}</td>" for n in names) + "</tr>"
        for row in rows[:_SHOWN]
    ]
    if len(rows) > _SHOWN:
        lines.append(f'<tr><td colspan="{len(names)}">and {len(rows) - _SHOWN} more</td></tr>')
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _filled(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(_cell(row.get(name)) for row in rows)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
