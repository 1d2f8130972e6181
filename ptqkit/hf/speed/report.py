"""What was measured of the speed of models: rows, and the table, CSV and picture of them."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ptqkit._files import write_atomically
from ptqkit._frames import Tabular
from ptqkit._repr import one_line_repr
from ptqkit._tables import text_table

__all__ = ["SpeedReport", "SpeedRow"]


@dataclass(frozen=True)
class SpeedRow:
    """One model in one form.

    Attributes
    ----------
    model, form : str
        Folder or shape, and "float32", "bfloat16" or what is packed.
    prompt_rate, generation_rate : float
        Tokens per second of a prompt, and of greedy steps one token at a time; medians.
    peak_bytes : int
        Largest resident memory above that of the libraries, loading included; mapped files count
        as far as they were read.
    tensor_bytes, cache_bytes : int
        Of parameters and buffers, and of keys and values after the generation.
    file_bytes : int
        Of the weights on the disk; of random models the tensors.
    perplexity : float
        NaN without a text.
    load_seconds : float
    prompt, tokens, threads : int
    computed : str
        How quantized layers were computed.
    """

    __repr__ = one_line_repr

    model: str
    form: str
    prompt_rate: float
    generation_rate: float
    peak_bytes: int
    tensor_bytes: int
    cache_bytes: int
    file_bytes: int
    load_seconds: float
    prompt: int
    tokens: int
    threads: int
    perplexity: float = math.nan
    computed: str = ""


@dataclass(frozen=True)
class SpeedReport(Tabular):
    """Rows in the order in which they were measured, and where.

    Attributes
    ----------
    rows : tuple of SpeedRow
    cpu : str
        Kernels in use.
    """

    __repr__ = one_line_repr

    rows: tuple[SpeedRow, ...] = field(default_factory=tuple)
    cpu: str = ""

    def _rows(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Return what is written as JSON."""
        return {"cpu": self.cpu, "rows": [asdict(row) for row in self.rows]}

    def to_csv(self) -> str:
        """Return a line per row, under a header."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [f.name for f in fields(SpeedRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return text.getvalue()

    def table(self) -> str:
        """Return a table; "×" columns compare with the first float row of the model."""
        header = ["model", "form", "prompt t/s", "×", "gen t/s", "×", "peak MB", "file MB"]
        header += ["perplexity"]
        return text_table(header, [self._cells(row) for row in self.rows], left=(0, 1))

    def __str__(self) -> str:
        return self.table()

    def _cells(self, row: SpeedRow) -> list[str]:
        base = next((r for r in self.rows if r.model == row.model), row)
        return [
            Path(row.model).name or row.model,
            row.form,
            _short(row.prompt_rate),
            f"{row.prompt_rate / base.prompt_rate:.2f}",
            _short(row.generation_rate),
            f"{row.generation_rate / base.generation_rate:.2f}",
            f"{row.peak_bytes / 1e6:,.0f}",
            f"{row.file_bytes / 1e6:,.1f}",
            "-" if math.isnan(row.perplexity) else f"{row.perplexity:.4f}",
        ]

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw the rates and the memory as bars.

        Parameters
        ----------
        path : path
            Its ending names the kind of file, such as ``.png``.
        """
        from matplotlib.figure import Figure

        panels = {
            "prompt, tokens/s": [r.prompt_rate for r in self.rows],
            "generation, tokens/s": [r.generation_rate for r in self.rows],
            "peak memory, MB": [r.peak_bytes / 1e6 for r in self.rows],
        }
        several = len({r.model for r in self.rows}) > 1
        names = [f"{Path(r.model).name} {r.form}" if several else r.form for r in self.rows]
        size = (10.5, 1.0 + 0.3 * len(names))
        figure = Figure(figsize=size, layout="constrained")
        places = figure.subplots(1, len(panels), sharey=True)
        for place, (title, values) in zip(places, panels.items(), strict=True):
            _bars(place, title, names, values)
        content = io.BytesIO()
        kind = Path(path).suffix.removeprefix(".") or "png"
        figure.savefig(content, dpi=130, format=kind)
        write_atomically(Path(path), content.getvalue())


def _bars(place: Any, title: str, names: Sequence[str], values: Sequence[float]) -> None:
    bars = place.barh(range(len(names)), values, color="#4c78a8")
    place.bar_label(bars, [_short(v) for v in values], padding=2, fontsize=8)
    place.set_yticks(range(len(names)), names, fontsize=8)
    place.invert_yaxis()
    place.margins(x=0.18)
    place.set_title(title, fontsize=9)
    place.tick_params(labelsize=8)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
