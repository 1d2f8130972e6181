"""Cells of a study: what a measurement gave, and where finished ones are kept."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ptqkit._files import plain, write_atomically
from ptqkit._repr import one_line_repr
from ptqkit.errors import PtqkitError

__all__ = [
    "FAILED",
    "FLOAT",
    "MISSING",
    "OK",
    "Cell",
    "CellStore",
    "CellsFailed",
    "write_json",
]

OK, FAILED, MISSING = "ok", "failed", "missing"

FLOAT = "float"
"""Name of the row of the model as it is."""


class CellsFailed(PtqkitError):
    """Some cells of a study could not be measured; the others are kept."""


@dataclass
class Cell:
    """One model, one recipe, one task.

    Attributes
    ----------
    model, recipe, task, kind : str
    key : str
        Hash of ``inputs``.
    inputs : dict
        All that decides the value.
    status : {"ok", "failed", "missing"}
    message : str
        Why it failed, or what to know about it.
    value, metric, higher_is_better, count, left_out, truncated, chance
        See :class:`ptqkit.study.measured.Measured`.
    bits_per_weight : float
        Of the quantized layers, with scales and zero-points.
    activation_bits : float
        Of their inputs; 16 if they stay as they are.
    seconds_quantize, seconds_eval : float
        The first is of the recipe, and the same for all its tasks.
    losses, scored : list
        See :class:`ptqkit.study.measured.Measured`.
    draw : int
        Which drawing of calibration windows the recipe was fitted to.
    parameters : dict
        Labels of the recipe along each axis of a product.
    reused : bool
        Whether it was there before this run.
    """

    __repr__ = one_line_repr

    model: str
    recipe: str
    task: str
    kind: str
    key: str
    inputs: dict[str, Any] = field(default_factory=dict, repr=False)
    status: str = MISSING
    message: str = ""
    value: float = math.nan
    metric: str = ""
    higher_is_better: bool = False
    count: int = 0
    left_out: int = 0
    truncated: int = 0
    chance: float = math.nan
    bits_per_weight: float = math.nan
    activation_bits: float = math.nan
    seconds_quantize: float = math.nan
    seconds_eval: float = math.nan
    losses: list[float] = field(default_factory=list, repr=False)
    scored: list[int] = field(default_factory=list, repr=False)
    draw: int = 0
    parameters: dict[str, Any] = field(default_factory=dict)
    reused: bool = False

    @property
    def label(self) -> str:
        """``model/recipe/task``, and ``#1`` for the second draw."""
        draw = f"#{self.draw}" if self.draw else ""
        return f"{self.model}/{self.recipe}{draw}/{self.task}"

    def bare(self) -> Cell:
        """Return the cell as before it was measured."""
        return Cell(**{name: getattr(self, name) for name in _NAMED})

    def filled(self, other: Cell) -> Cell:
        """Return the cell with what was measured for another of the same key."""
        return replace(self, **{name: getattr(other, name) for name in _FIELDS})


_NAMED = ("model", "recipe", "task", "kind", "key", "inputs", "draw", "parameters")
_FIELDS = {f.name for f in fields(Cell)} - {*_NAMED, "reused"}


class CellStore:
    """Folder of finished cells, a small JSON file each.

    Parameters
    ----------
    folder : Path or None
        Created when the first cell is kept. None: cells are kept in memory alone.
    memory : dict of str to Cell, optional
        Cells that are there already, by their keys; gets those that are kept.
    """

    def __init__(self, folder: Path | None, memory: dict[str, Cell] | None = None) -> None:
        self.folder, self._memory = folder, {} if memory is None else memory

    def find(self, cell: Cell) -> Cell | None:
        """Return the cell as an earlier run finished it, under the names of now; None if none.

        A file that cannot be read, or is of something else, counts as none.
        """
        if cell.key in self._memory:
            found = replace(cell.filled(self._memory[cell.key]), reused=True)
            if self.folder is not None and not (self.folder / f"{cell.key}.json").exists():
                self._write(found, {})
            return found
        if self.folder is None:
            return None
        try:
            values = json.loads((self.folder / f"{cell.key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(values, dict) or values.get("key") != cell.key:
            return None
        if values.get("status") != OK or not isinstance(values.get("value"), (int, float)):
            return None
        if not _numbers(values.get("losses")) or not _numbers(values.get("scored")):
            return None
        known: dict[str, Any] = {
            k: math.nan if v is None else v for k, v in values.items() if k in _FIELDS
        }
        return replace(cell, **{**known, "reused": True})

    def keep(self, cell: Cell, environment: dict[str, Any]) -> None:
        """Keep a cell, all at once or not at all."""
        self._memory[cell.key] = cell
        self._write(cell, environment)

    def _write(self, cell: Cell, environment: dict[str, Any]) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        values = {k: v for k, v in asdict(cell).items() if k != "reused"}
        write_json(self.folder / f"{cell.key}.json", {**values, "environment": environment})


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, (int, float)) for v in value)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write plain values, all at once or not at all."""
    text = json.dumps(plain(values), indent=1, allow_nan=False) + "\n"
    write_atomically(path, text)
