"""What a quantized softmax costs a language model, and what corrections give back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ptqkit._frames import Tabular
from ptqkit._repr import one_line_repr
from ptqkit._tables import text_table, wrap_line
from ptqkit.errors import check_choice
from ptqkit.hf.data.calibration import CalibrationSet
from ptqkit.hf.evaluation.likelihood import PerplexityResult, perplexity
from ptqkit.hf.evaluation.paired import perplexity_difference
from ptqkit.hf.models.attention import attention_hooks
from ptqkit.hf.softmax.driver import SoftmaxCalibration, describe
from ptqkit.nn.softmax.compare import softmax_hooks
from ptqkit.nn.softmax.report import SoftmaxReport
from ptqkit.nn.softmax.variants import LANGUAGE_MODEL_VARIANTS, row_name

__all__ = ["SoftmaxTable", "SoftmaxTableRow", "softmax_table"]


@dataclass
class SoftmaxTableRow:
    """One line.

    Attributes
    ----------
    bits : int or None
        None for the float softmax.
    correction : str
        Of :data:`ptqkit.nn.softmax.variants.LANGUAGE_MODEL_VARIANTS`.
    perplexity : float
    excess, excess_error : float
        Above that of the float model, and its standard error over the windows, which are paired.
    recovered : float
        Share of the loss on the grid of probabilities without correction that is given back,
        with the same weights; NaN if nothing is lost.
    sqnr_db : float
        Mean over the layers, of the attention's output on the calibration set.
    output_db : float
        Of the logits on the calibration set, all layers quantized.
    left_out : int
        Layers whose correction was left out, with ``guard``.
    weights : str
        Name of the weights, if they are not the float ones.
    """

    __repr__ = one_line_repr

    bits: int | None
    correction: str
    perplexity: float
    excess: float = 0.0
    excess_error: float = 0.0
    recovered: float = math.nan
    sqnr_db: float = math.inf
    output_db: float = math.inf
    left_out: int = 0
    weights: str = ""

    @property
    def name(self) -> str:
        """Name as in the paper's Table 3."""
        return row_name(self.bits, self.correction, self.weights, "float softmax")


@dataclass
class SoftmaxTable(Tabular):
    """Perplexities of one model with a quantized softmax.

    Attributes
    ----------
    rows : list of SoftmaxTableRow
    layers : dict of int to list of dict
        By bits: every layer's share rounded to zero, expected row sum and decibels without
        correction.
    float_result : PerplexityResult
        With the conventions of all rows.
    calibration : dict
    """

    __repr__ = one_line_repr

    float_result: PerplexityResult
    calibration: dict[str, Any]
    rows: list[SoftmaxTableRow] = field(default_factory=list)
    layers: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def _rows(self) -> list[dict[str, Any]]:
        return [{"name": row.name, **asdict(row)} for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values; NaN and infinity stay."""
        return {
            "rows": [{**asdict(row), "name": row.name} for row in self.rows],
            "layers": {str(bits): rows for bits, rows in self.layers.items()},
            "conventions": self.float_result.to_dict(),
            "calibration": self.calibration,
        }

    def table(self) -> str:
        """Plain text table."""
        header = ("softmax", "perplexity", "excess", "±", "recovered", "attention dB", "logits dB")
        cells = (
            (
                row.name,
                f"{row.perplexity:.4f}",
                "" if index == 0 else f"{row.excess:+.4f}",
                "" if index == 0 or math.isnan(row.excess_error) else f"{row.excess_error:.4f}",
                "" if math.isnan(row.recovered) else f"{100 * row.recovered:.0f} %",
                "" if math.isinf(row.sqnr_db) else f"{row.sqnr_db:.2f}",
                "" if math.isinf(row.output_db) else f"{row.output_db:.2f}",
            )
            for index, row in enumerate(self.rows)
        )
        zeros = [self._zeros(bits) for bits in self.layers]
        return "\n".join([text_table(header, cells), "", *map(wrap_line, zeros)])

    def _zeros(self, bits: int) -> str:
        zero = [row["zero_fraction"] for row in self.layers[bits]]
        sums = [row["mean_row_sum"] for row in self.layers[bits]]
        return (
            f"{bits} bits: {100 * sum(zero) / len(zero):.1f} % of the allowed probabilities round "
            f"to zero ({100 * min(zero):.1f} to {100 * max(zero):.1f} % by layer); expected row "
            f"sum {sum(sums) / len(sums):.4f} ({min(sums):.4f} to {max(sums):.4f})"
        )


def softmax_table(
    model: nn.Module,
    tokenizer: Any,
    text: Any,
    calibration: CalibrationSet,
    *,
    bits: Sequence[int] = (8,),
    corrections: Sequence[str] = ("none", "bias", "bias/head", "row_length/head", "row_sum"),
    grid_range: str = "fixed",
    guard: bool = False,
    rounded: nn.Module | None = None,
    rounded_name: str = "W8A16",
    progress: Callable[[str], None] | None = None,
    **windows: Any,
) -> SoftmaxTable:
    """Measure perplexities with a float and a quantized softmax, corrected or not.

    The quantized softmax without correction is always measured. The model stays as it was.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    tokenizer, text, **windows
        See :func:`ptqkit.hf.perplexity`.
    calibration : CalibrationSet
        See :func:`ptqkit.hf.prepare_calibration`.
    bits : sequence of int from 2 to 16
    corrections : sequence of str
        Of :data:`ptqkit.nn.softmax.variants.LANGUAGE_MODEL_VARIANTS`.
    grid_range : {"fixed", "calibrated", "search"}
    guard : bool
        Leave out corrections that lower signal-to-noise ratios, as :func:`quantize_softmax` does;
        here every line is by default what it says.
    rounded : nn.Module, optional
        The same model with quantized weights: all lines again, with the corrections of its own.
    rounded_name : str
        What these lines are called after.
    progress : callable, optional
        Called with the name of what comes next.

    Raises
    ------
    NotFiniteError
        If the perplexity with the float softmax is not finite. With a quantized one that is a
        warning: the table goes on.
    """
    for correction in corrections:
        check_choice("each of corrections", correction, LANGUAGE_MODEL_VARIANTS)
    chosen = list(dict.fromkeys(["none", *corrections]))
    report_next = progress or (lambda name: None)

    report_next("float softmax")
    first = perplexity(model, tokenizer, text, **windows)
    table = SoftmaxTable(first, describe(calibration))
    table.rows.append(SoftmaxTableRow(None, "none", first.perplexity))
    for weights, net in (("", model), (rounded_name, rounded)):
        if net is None:
            continue
        base = first
        if weights:
            report_next(weights)
            base = perplexity(net, tokenizer, text, check=False, **windows)
            table.rows.append(
                SoftmaxTableRow(
                    None,
                    "none",
                    base.perplexity,
                    *perplexity_difference(base, first),
                    weights=weights,
                )
            )
        for width in bits:
            label = f"{weights} SM{width}".strip()
            report_next(f"{label}: calibration")
            study = SoftmaxCalibration(net, calibration, bits=width, grid_range=grid_range)
            lost = math.nan
            for name in chosen:
                report_next(f"{label} {name}")
                quantizers = study.quantizers(*LANGUAGE_MODEL_VARIANTS[name])
                report = study.compare(quantizers, guard)
                with attention_hooks(net, softmax_hooks(quantizers)):
                    found = perplexity(net, tokenizer, text, check=False, **windows)
                above = found.perplexity - base.perplexity
                lost = above if name == "none" else lost
                row = _row(width, name, found.perplexity, report)
                row.excess, row.excess_error = perplexity_difference(found, first)
                row.recovered = math.nan if name == "none" or lost <= 0 else 1 - above / lost
                row.weights = weights
                found.warn_unless_finite(f"the model with {row.name}")
                table.rows.append(row)
                if name == "none" and not weights:
                    table.layers[width] = report.to_dict()["layers"]
    return table


def _row(bits: int, name: str, value: float, report: SoftmaxReport) -> SoftmaxTableRow:
    left_out = sum(bool(row.notes) for row in report.layers)
    return SoftmaxTableRow(
        bits,
        name,
        value,
        sqnr_db=report.totals()["sqnr_corrected_db"],
        output_db=report.output_corrected_db,
        left_out=left_out,
    )
