"""What equalization did, group by group."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ptqkit._files import plain
from ptqkit._frames import Tabular
from ptqkit._repr import one_line_repr
from ptqkit._tables import join_names, text_table, wrap_line

__all__ = ["EqualizationReport", "EqualizedGroup"]


@dataclass
class EqualizedGroup:
    """One fold. Numbers that were not computed are NaN (``None`` in JSON).

    Attributes
    ----------
    kind, producer : str
        See :class:`ptqkit.hf.equalization.fold.Fold`.
    consumers : list of str
    alpha : float
        Of the scales; NaN if the search found that no equalization is best.
    error_none, error_closed_form, error : float
        Quantized output error on the sampled calibration inputs, summed over tokens and outputs:
        without equalization, with alpha = 0.5 (AWEQ, eq. 10), and with ``alpha``. Only of a search.
    scale_minimum, scale_maximum : float
    dead_channels : int
        Inputs whose scale is 1 because their activations or weights have no range.
    tokens : int
        Calibration tokens behind the ranges.
    """

    __repr__ = one_line_repr

    kind: str
    producer: str
    consumers: list[str]
    alpha: float
    error_none: float = math.nan
    error_closed_form: float = math.nan
    error: float = math.nan
    scale_minimum: float = math.nan
    scale_maximum: float = math.nan
    dead_channels: int = 0
    tokens: int = 0


@dataclass
class EqualizationReport(Tabular):
    """Every fold that was applied, and the model as a whole.

    Attributes
    ----------
    method : {"awe", "smoothquant"}
    alpha : float or "search"
    groups : list of EqualizedGroup
        In order of execution.
    left_alone : dict of str to str
        Layers (joined by ", ") whose inputs were not equalized, and why.
    logits_difference : float
        Of the float model before and after, on a short batch: largest difference over the largest
        value. NaN if nothing was folded.
    calibration_tokens : int
    search_tokens : int
        Tokens the search measured on; 0 without a search.
    seconds : dict of str to float
        ``folds`` (finding and proving them), ``ranges`` (the forward pass over the calibration
        data), ``scales``, ``total``.
    warnings : list of str
    """

    __repr__ = one_line_repr

    method: str
    alpha: float | str
    groups: list[EqualizedGroup] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    logits_difference: float = math.nan
    calibration_tokens: int = 0
    search_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> EqualizedGroup:
        """Return the group of a consumer by name."""
        for group in self.groups:
            if name in group.consumers:
                return group
        raise KeyError(name)

    def _rows(self) -> list[dict[str, Any]]:
        return [asdict(group) for group in self.groups]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values that are valid JSON (NaN becomes None)."""
        return plain(asdict(self))

    def table(self) -> str:
        """Return plain text: a line per group, then what was left alone, and totals."""
        table = text_table(_HEADER, map(_cells, self.groups), left=(0, 1, -1))
        lines = [f"left alone: {k}: {v}" for k, v in self.left_alone.items()]
        if self.seconds:
            lines.append("seconds " + ", ".join(f"{k} {v:.2f}" for k, v in self.seconds.items()))
        difference = (
            ""
            if math.isnan(self.logits_difference)
            else (f"; float logits differ by {self.logits_difference:.2g} (relative)")
        )
        lines.append(
            f"{self.method}, alpha {self.alpha}: {len(self.groups)} groups equalized{difference}"
        )
        lines += [f"warning: {w}" for w in self.warnings]
        return "\n".join([table, "", *map(wrap_line, lines)])

    def __str__(self) -> str:
        return self.table()


_HEADER = (
    "kind",
    "producer",
    "alpha",
    "error",
    "eq. 10",
    "scales",
    "dead",
    "tokens",
    "consumers",
)


def _cells(group: EqualizedGroup) -> tuple[str, ...]:
    return (
        group.kind,
        group.producer,
        "none" if math.isnan(group.alpha) else f"{group.alpha:g}",
        _relative(group.error, group.error_none),
        _relative(group.error_closed_form, group.error_none),
        f"{group.scale_minimum:.3g}..{group.scale_maximum:.3g}",
        str(group.dead_channels),
        str(group.tokens),
        join_names(group.consumers, group.producer),
    )


def _relative(error: float, base: float) -> str:
    """Show an error as a share of that without equalization."""
    return f"{error / base:.3f}" if base > 0 else "-"
