"""Diagnoses of several models side by side, with ratios."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ptqkit._files import plain
from ptqkit._frames import Tabular
from ptqkit._repr import one_line_repr
from ptqkit._tables import text_table
from ptqkit.errors import check_choice
from ptqkit.hf.diagnostics.curves import METRICS, curve
from ptqkit.hf.diagnostics.diagnosis import DiagnosisReport
from ptqkit.hf.diagnostics.rows import PARTS
from ptqkit.hf.diagnostics.text import number

__all__ = ["Comparison", "check_place", "compare", "read_published"]


@dataclass
class Comparison(Tabular):
    """Metrics of several models at one place.

    Attributes
    ----------
    reports : list of DiagnosisReport
    part : str
    at : float or None
        Relative depth, from 0 (first block) to 1 (last); None for the median over the blocks.
    values : dict of str to list of float
        Per metric a number per model; NaN where a model has none.
    published : dict of str to float
        Ratios that others state, for the table.
    """

    __repr__ = one_line_repr

    reports: list[DiagnosisReport]
    part: str
    at: float | None
    values: dict[str, list[float]]
    published: dict[str, float] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the models."""
        return [report.model for report in self.reports]

    @property
    def ratios(self) -> dict[str, list[float]]:
        """Per metric, every model by the first; NaN where that is 0 or unknown."""
        return {
            name: [v / row[0] if row[0] else math.nan for v in row]
            for name, row in self.values.items()
        }

    def table(self) -> str:
        """Plain text: a line per metric, a value and a ratio per model."""
        where = "median of the blocks" if self.at is None else f"relative depth {self.at:g}"
        first, *others = self.names
        header = [f"{self.part}, {where}", first, *(c for n in others for c in (n, "ratio"))]
        cells: list[list[str]] = []
        for name, row in self.values.items():
            ratios = self.ratios[name][1:]
            pairs = zip(row[1:], ratios, strict=True)
            cells.append([name, number(row[0]), *(number(v) for pair in pairs for v in pair)])
        text = text_table(header, cells)
        stated = [f"  {name}: {number(value)}" for name, value in self.published.items()]
        return "\n".join([text, *(["", "published, for other models:", *stated] if stated else [])])

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Values and ratios, as plain values that are valid JSON."""
        parts = {"values": self.values, "ratios": self.ratios, "published": self.published}
        return plain({"models": self.names, "part": self.part, "at": self.at, **parts})

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"metric": metric, "model": name, "value": value, "ratio": ratio}
            for metric, row in self.values.items()
            for name, value, ratio in zip(self.names, row, self.ratios[metric], strict=True)
        ]

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw the curves of all models over relative depth into a file."""
        from ptqkit.hf.diagnostics.figures import draw

        draw(self.reports, path, "depth", part=self.part)


def compare(
    reports: Sequence[DiagnosisReport],
    *,
    part: str = "attention in",
    at: float | None = None,
    names: Sequence[str] | None = None,
    published: str | os.PathLike[str] | None = None,
) -> Comparison:
    """Lay models side by side; ratios are to the first.

    Models of different depths are compared at the same relative depth, between blocks by linear
    interpolation, or by the median over their blocks.

    Parameters
    ----------
    reports : sequence of DiagnosisReport
        At least two.
    part : str
        "attention in", "attention out", "mlp in" or "mlp out"; [IPQS, figure 5] shows the first.
    at : float from 0 to 1, optional
        Relative depth.
    names : sequence of str, optional
        Instead of the reports' own.
    published : path, optional
        TOML file whose table ``figure_5_ratios`` is shown below.
    """
    reports = list(reports)
    if len(reports) < 2:
        raise ValueError(f"compare takes at least two reports, not {len(reports)}")
    check_place(part, at)
    if names is not None:
        if len(names) != len(reports):
            raise ValueError(f"names has {len(names)} entries for {len(reports)} reports")
        pairs = zip(reports, names, strict=True)
        reports = [replace(report, model=name) for report, name in pairs]
    values = {
        metric: [_at(*curve(report, metric, part), report.depth, at) for report in reports]
        for metric in METRICS
    }
    if all(math.isnan(v) for row in values.values() for v in row):
        raise ValueError(f"none of the models has an input that is {part!r}")
    summary = ("sink_share", "mass_lost", "cache_error")
    values |= {name: [getattr(report, name) for report in reports] for name in summary}
    stated = {} if published is None else read_published(published)
    return Comparison(reports, part, at, values, stated)


def check_place(part: str, at: float | None) -> None:
    """Refuse a part or a relative depth that :func:`compare` does not know."""
    check_choice("part", part, PARTS)
    if at is not None and not 0 <= at <= 1:
        raise ValueError(f"at must be a relative depth from 0 to 1, not {at!r}")


def _at(depths: np.ndarray, values: np.ndarray, blocks: int, at: float | None) -> float:
    if len(values) == 0:
        return math.nan
    if at is None:
        return float(np.median(values))
    return float(np.interp(at * (blocks - 1), depths, values))


def read_published(path: str | os.PathLike[str]) -> dict[str, float]:
    """Read the table ``figure_5_ratios`` of a TOML file."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    with open(path, "rb") as file:
        values = tomllib.load(file)
    if "figure_5_ratios" not in values:
        raise ValueError(f"{os.fspath(path)} holds no table figure_5_ratios")
    return dict(values["figure_5_ratios"])
