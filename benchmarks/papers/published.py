"""What the four papers print, from files that may not be there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.papers.table import Published

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

__all__ = ["read_published", "table_of"]


def read_published(folder: Path | None, paper: str) -> dict[str, Any]:
    """Return the tables of `FOLDER/PAPER.toml`; empty without that file."""
    path = None if folder is None else folder / f"{paper}.toml"
    if path is None or not path.is_file():
        return {}
    return tomllib.loads(path.read_text(encoding="utf-8"))


def table_of(
    figures: dict[str, Any],
    name: str,
    model: str,
    labels: dict[str, str] | None = None,
    columns: list[str] | None = None,
) -> Published | None:
    """Return a table whose rows are lists under `columns`.

    `labels` renames rows as ours are called, and says that only these are wanted. A table without
    columns has one figure a row, and `columns` names it.
    """
    found = dict(figures.get(name, {}))
    if not found:
        return None
    columns = found.pop("columns", columns or ["value"])
    if labels is not None:
        found = {ours: found[theirs] for theirs, ours in labels.items() if theirs in found}
    rows = {k: v if isinstance(v, list) else [v] for k, v in found.items()}
    return Published(model, columns, rows)
