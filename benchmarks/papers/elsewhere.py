"""Results files of other benchmarks, and tables of what `ptqkit sweep` measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.tables import read
from benchmarks.papers.entry import Records
from benchmarks.papers.table import Table, with_error

__all__ = ["RESULTS", "read", "sweep_rows", "sweep_table"]

RESULTS = Path(__file__).resolve().parents[1] / "results"


def sweep_rows(name: str, kind: str) -> Records:
    """Return what `ptqkit sweep` measured."""
    rows = [row for row in read(RESULTS / name) if row["kind"] == kind and row["value"]]
    fields = ("model", "recipe", "task", "value", "count", "chance")
    return [{**{k: row[k] for k in fields}, "value": float(row["value"])} for row in rows]


def sweep_table(records: Records, title: str, recipes: Sequence[str], note: str) -> Table:
    """Rows are recipes, columns models and tasks."""
    kept = [row for row in records if row["recipe"] in recipes]
    columns = list(dict.fromkeys(f"{row['model']}, {row['task']}" for row in kept))
    known = {(row["recipe"], f"{row['model']}, {row['task']}"): row for row in kept}

    def cell(recipe: str, column: str) -> Any:
        row = known.get((recipe, column))
        if row is None or row["value"] > 1:
            return None if row is None else f"{row['value']:.3f}"
        error = math.sqrt(row["value"] * (1 - row["value"]) / int(row["count"]))
        return with_error(100 * row["value"], 100 * error)

    rows = [[recipe, *(cell(recipe, c) for c in columns)] for recipe in recipes]
    return Table(title, ["", *columns], rows, note)
