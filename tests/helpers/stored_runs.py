"""What a run has written: its files, and the rows of its report."""

from __future__ import annotations

import json

__all__ = ["files", "read_rows"]


def files(folder):
    """Everything but the report, which holds times."""
    names = sorted(p.name for p in folder.iterdir())
    return {n: (folder / n).read_bytes() for n in names if n != "ptqkit_report.json"}


def read_rows(folder, *more):
    """Rows of the report by name: their status, objectives, and more of their fields."""
    report = json.loads((folder / "ptqkit_report.json").read_text())
    keys = ("name", "status", "objective", "objective_rtn", *more)
    found = [{k: row[k] for k in keys} for row in report["layers"]]
    return sorted(found, key=lambda row: row["name"])
