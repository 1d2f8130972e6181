"""What a diagnosis of a model found: per layer, as a table, JSON, a data frame and figures."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from ptqkit._files import JsonReport, plain
from ptqkit._frames import Tabular
from ptqkit._repr import one_line_repr
from ptqkit.hf.diagnostics.report import SensitivityReport, SensitivityRow
from ptqkit.hf.diagnostics.rows import NAN, AttentionRow, InputRow, NormRow, WeightRow

__all__ = ["DiagnosisReport"]


@dataclass
class DiagnosisReport(Tabular, JsonReport):
    """Why a model is hard to quantize, and where.

    Attributes
    ----------
    model : str
    inputs : list of InputRow
    norms : list of NormRow
    weights : list of WeightRow
    attention : list of AttentionRow
    sensitivity : dict of str to SensitivityReport
        "kind", "layer" (blocks) and "depth" (all blocks up to one), as far as they were asked for.
    outliers : dict of str to list of int
        Channels that are outliers by the rule "relative", per input that holds some.
    outlier_dimensions : list of int
        By the rule of Dettmers et al., over the inputs that follow a norm.
    bits : int
    options : dict
        Of the outlier rules.
    quantiles : list of float
    calibration : dict
    notes : list of str
        What could not be measured, and why.
    """

    __repr__ = one_line_repr

    model: str = ""
    inputs: list[InputRow] = field(default_factory=list)
    norms: list[NormRow] = field(default_factory=list)
    weights: list[WeightRow] = field(default_factory=list)
    attention: list[AttentionRow] = field(default_factory=list)
    sensitivity: dict[str, SensitivityReport] = field(default_factory=dict)
    outliers: dict[str, list[int]] = field(default_factory=dict)
    outlier_dimensions: list[int] = field(default_factory=list)
    bits: int = 8
    options: dict[str, float] = field(default_factory=dict)
    quantiles: list[float] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        rows: list[InputRow | WeightRow] = [*self.inputs, *self.weights]
        return 1 + max((row.depth for row in rows), default=-1)

    @property
    def sink_share(self) -> float:
        """Share of all heads whose mean attention to the first token exceeds 0.3."""
        heads = [value for row in self.attention for value in row.sink]
        return float(np.mean([h > 0.3 for h in heads])) if heads else NAN

    @property
    def mass_lost(self) -> float:
        """Mean over all heads of the mass that the softmax loses."""
        return _mean(value for row in self.attention for value in row.mass_lost)

    @property
    def cache_error(self) -> float:
        """Mean over layers and heads of the relative error of keys and values."""
        return _mean(v for r in self.attention for v in [*r.key_error, *r.value_error])

    def layers(self) -> list[dict[str, Any]]:
        """One flat dict per linear layer: its weight, the tensor it reads, and that one's norm."""
        reads = {name: row for row in self.inputs for name in row.consumers}
        weights = {row.name: row for row in self.weights}
        found = []
        for name in weights or reads:
            values: dict[str, Any] = {"layer": name}
            if name in weights:
                own = weights[name]
                values |= {k: getattr(own, k) for k in ("block", "depth", "part")}
                values["shape"] = "x".join(map(str, own.shape))
                values |= {f"weight_{k}": getattr(own, k) for k in ("std", "absmax", "kurtosis")}
                values |= {"spectral_norm": own.spectral_norm, "stable_rank": own.stable_rank}
            if name in reads:
                row = reads[name]
                values |= {k: getattr(row, k) for k in ("block", "depth", "part", *INPUT_NUMBERS)}
                values["outliers"] = len(self.outliers.get(row.name, ()))
            found.append(values)
        return found

    def _rows(self) -> list[dict[str, Any]]:
        return self.layers()

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values that are valid JSON (NaN and infinity become None)."""
        values = plain(asdict(self))
        values["sensitivity"] = {k: v.to_dict() for k, v in self.sensitivity.items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiagnosisReport:
        """Inverse of :meth:`to_dict`; what was not finite is NaN."""
        values = dict(values)
        rows = {"inputs": InputRow, "norms": NormRow, "weights": WeightRow}
        for name, kind in {**rows, "attention": AttentionRow}.items():
            values[name] = [kind(**_numbers(kind, row)) for row in values.get(name, ())]
        found = values.get("sensitivity", {})
        values["sensitivity"] = {k: _sensitivity(v) for k, v in found.items()}
        return cls(**values)

    def table(self) -> str:
        """Plain text: a line per input, then attention, outliers and sensitivity."""
        from ptqkit.hf.diagnostics.text import write_table

        return write_table(self)

    def __str__(self) -> str:
        return self.table()

    def draw(self, path: str | os.PathLike[str], figure: str = "depth") -> None:
        """Draw a figure into a file (type by its suffix); no display is needed.

        Parameters
        ----------
        path : str or path
        figure : {"depth", "distributions", "channels", "magnitudes"}
            Curves over depth as in [IPQS, figure 5]; distributions of weights and gains as in its
            figure 4; a heat map of channels and blocks; largest and median magnitudes by depth.
        """
        from ptqkit.hf.diagnostics.figures import draw

        draw([self], path, figure)

    def recipe(self, **options: Any) -> dict[str, Any]:
        """Return a recipe with overrides for the layers that need more bits.

        See :func:`ptqkit.hf.diagnostics.advice.suggest_recipe` for the options.
        """
        from ptqkit.hf.diagnostics.advice import suggest_recipe

        return suggest_recipe(self, **options)


#: Numbers of an input that are one value.
INPUT_NUMBERS = (
    "norm_std",
    "rms",
    "rmse_token",
    "rmse_tensor",
    "relative_error",
    "std",
    "kurtosis",
    "maximum",
    "median",
    "max_to_median",
)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return float(np.mean(found)) if found else NAN


def _numbers(kind: type[Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with NaN where JSON has None for a number."""
    floats = {f.name for f in fields(kind) if f.type == "float"}
    return {k: NAN if v is None and k in floats else v for k, v in row.items()}


def _sensitivity(values: Mapping[str, Any]) -> SensitivityReport:
    rows = [SensitivityRow(**row) for row in values["rows"]]
    for row in rows:
        row.sqnr_db = math.inf if row.sqnr_db is None else row.sqnr_db
    return SensitivityReport(**{**values, "rows": rows})
