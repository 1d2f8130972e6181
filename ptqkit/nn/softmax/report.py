"""What quantizing the softmax of a model did, layer by layer."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ptqkit.arrays.metrics import SQNR
from ptqkit.hf.data.calibration import CalibrationSet
from ptqkit.nn.attention import AttentionCall, AttentionHook, attention_hooks
from ptqkit.nn.attention_quantizer import AttentionQuantizer
from ptqkit.nn.forward import calibration_mode
from ptqkit.nn.softmax.quantizer import SoftmaxQuantizer, SoftmaxStatistics

__all__ = [
    "SoftmaxComparison",
    "SoftmaxLayerReport",
    "SoftmaxReport",
    "compare_outputs",
    "describe",
    "softmax_row",
]


@dataclass
class SoftmaxLayerReport:
    """One attention module. Numbers that were not computed are NaN (``None`` in JSON).

    Attributes
    ----------
    name : str
    heads, bits : int
    scale : float
    zero_point : int
    correction : str or None
    bias : float
        Mean over heads of beta; NaN where the correction is no constant.
    zero_fraction : float
        Share of the allowed probabilities that round to zero.
    mean_row_sum : float
        Expected row sum of the quantized probabilities before correction; 1 in the float model.
    sqnr_db, sqnr_corrected_db : float
        Signal to error of the attention's output (probabilities times values), all else float;
        mean of the ratios of the samples (SBC eq. 1).
    longest : int
        Most allowed keys of a row.
    notes : str
    """

    name: str
    heads: int = 0
    bits: int = 0
    scale: float = math.nan
    zero_point: int = 0
    correction: str | None = None
    bias: float = math.nan
    zero_fraction: float = math.nan
    mean_row_sum: float = math.nan
    sqnr_db: float = math.nan
    sqnr_corrected_db: float = math.nan
    longest: int = 0
    notes: str = ""


@dataclass
class SoftmaxReport:
    """All attention modules.

    Attributes
    ----------
    layers : list of SoftmaxLayerReport
    calibration : dict
        Source, samples, sequence length, tokens, start token.
    output_db, output_corrected_db : float
        Signal to error of the model's output (logits, where it has them) with all layers
        quantized, without and with corrections, on the calibration set; mean of the ratios of the
        samples.
    notes : str
    """

    layers: list[SoftmaxLayerReport] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    output_db: float = math.nan
    output_corrected_db: float = math.nan
    notes: str = ""

    def __getitem__(self, name: str) -> SoftmaxLayerReport:
        """Row of a layer by name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def totals(self) -> dict[str, float]:
        """Means over the layers."""
        names = ("zero_fraction", "mean_row_sum", "sqnr_db", "sqnr_corrected_db")
        count = max(len(self.layers), 1)
        return {n: math.fsum(getattr(r, n) for r in self.layers) / count for n in names}

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dict per layer, for ``pandas.DataFrame(report.to_dicts())``."""
        return [asdict(layer) for layer in self.layers]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values that are valid JSON (NaN and infinity become None)."""

        def plain(values: dict[str, Any]) -> dict[str, Any]:
            floats = {k: v for k, v in values.items() if isinstance(v, float)}
            return {**values, **{k: None for k, v in floats.items() if not math.isfinite(v)}}

        return {**plain(asdict(self)), "layers": [plain(row) for row in self.to_dicts()]}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the report as JSON text, and write it to ``path`` if one is given."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text + "\n")
        return text

    def table(self) -> str:
        """Plain text table, a line per layer."""
        header = (
            "layer",
            "heads",
            "bits",
            "zero",
            "row sum",
            "dB",
            "corrected",
            "beta",
            "correction",
        )
        cells = [header, *(_cells(row) for row in self.layers)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
        lines = []
        for row in cells:
            middle = [c.rjust(w) for c, w in zip(row[1:-1], widths[1:-1], strict=True)]
            lines.append("  ".join([row[0].ljust(widths[0]), *middle, row[-1]]).rstrip())
        lines.insert(1, "-" * max(len(line) for line in lines))
        lines.append(
            f"output of the model: {self.output_db:.2f} dB, corrected "
            f"{self.output_corrected_db:.2f} dB" + (f" [{self.notes}]" if self.notes else "")
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _cells(row: SoftmaxLayerReport) -> tuple[str, ...]:
    return (
        row.name,
        str(row.heads),
        str(row.bits),
        f"{100 * row.zero_fraction:.1f}%",
        f"{row.mean_row_sum:.4f}",
        f"{row.sqnr_db:.2f}",
        f"{row.sqnr_corrected_db:.2f}",
        "-" if math.isnan(row.bias) else f"{row.bias:.3g}",
        str(row.correction).lower() + (f" [{row.notes}]" if row.notes else ""),
    )


class OutputSQNR:
    """SQNR of eq. 1, a mean of ratios over samples, beside the ratio of the sums.

    One sample without any error makes the first infinite; decisions then take the second.
    """

    def __init__(self) -> None:
        self._samples, self._total = SQNR("sample"), SQNR("tensor")

    def update(self, reference: np.ndarray, quantized: np.ndarray) -> None:
        """Add a batch."""
        self._samples.update(reference, quantized)
        self._total.update(reference, quantized)

    @property
    def decibel(self) -> float:
        """As eq. 1 has it."""
        return float(self._samples.decibel)

    def below(self, other: OutputSQNR) -> bool:
        """Whether this one is worse."""
        if self._samples.infinite or other._samples.infinite:
            return self.total < other.total
        return self.decibel < other.decibel

    @property
    def total(self) -> float:
        """Decibels of the sums over all samples."""
        return float(self._total.decibel)


class SoftmaxComparison(AttentionHook):
    """Runs one attention module float and with every one of several quantizers of its softmax.

    The float result goes on through the model.

    Parameters
    ----------
    quantizers : sequence of SoftmaxQuantizer

    Attributes
    ----------
    sqnr : list of OutputSQNR
        Of the output (batch, q, heads, width) of real tokens, one per quantizer.
    rows : Tensor or None
        Which tokens of the batch at hand count, bool (batch, sequence).
    """

    def __init__(self, quantizers: Sequence[SoftmaxQuantizer]) -> None:
        self.hooks = [AttentionQuantizer({"softmax": q}) for q in quantizers]
        self.sqnr = [OutputSQNR() for _ in quantizers]
        self.rows: torch.Tensor | None = None

    def __call__(self, call: AttentionCall) -> Any:
        """Compare, and return the float attention."""
        output = call.run(None)
        reference = self._numbers(output[0])
        for hook, sqnr in zip(self.hooks, self.sqnr, strict=True):
            sqnr.update(reference, self._numbers(call.run(hook)[0]))
        return output

    def _numbers(self, x: torch.Tensor) -> np.ndarray:
        x = x.detach().float()
        if self.rows is not None:
            x = x * self.rows.to(x.device)[:, :, None, None]
        return x.cpu().numpy()


def compare_outputs(
    model: nn.Module, calibration: CalibrationSet, variants: Sequence[dict[str, SoftmaxQuantizer]]
) -> list[OutputSQNR]:
    """Signal to error of a model's output for several quantizations of its softmax."""
    meters = [OutputSQNR() for _ in variants]
    for batch, rows in zip(calibration.batches, calibration.masks(), strict=True):
        reference = _output(model, batch, rows)
        for quantizers, meter in zip(variants, meters, strict=True):
            hooks = {n: AttentionQuantizer({"softmax": q}) for n, q in quantizers.items()}
            with attention_hooks(model, hooks):
                meter.update(reference, _output(model, batch, rows))
    return meters


def _output(
    model: nn.Module, batch: dict[str, torch.Tensor], rows: torch.Tensor | None
) -> np.ndarray:
    """Logits, or last hidden states, float32, zero where there is padding."""
    device = next(model.parameters()).device
    with calibration_mode(model):
        x = model(**{k: v.to(device) for k, v in batch.items()})[0].float()
    per_token = rows is not None and x.dim() == 3 and x.shape[:2] == rows.shape
    return (x * rows.to(device)[..., None] if per_token else x).cpu().numpy()


def softmax_row(
    statistics: SoftmaxStatistics, quantizer: SoftmaxQuantizer, compared: SoftmaxComparison
) -> SoftmaxLayerReport:
    """Build the row of one attention module, compared without and with its correction."""
    constant = quantizer.correction == "bias" and quantizer.bias is not None
    return SoftmaxLayerReport(
        name=statistics.name,
        heads=statistics.heads,
        bits=quantizer.grid.bits,
        scale=float(quantizer.grid.scale),
        zero_point=int(quantizer.grid.zero_point),
        correction=quantizer.correction,
        bias=float(np.mean(quantizer.bias)) if constant else math.nan,
        zero_fraction=float(statistics.bias.zero_fraction),
        mean_row_sum=float(statistics.bias.mean_row_sum),
        sqnr_db=compared.sqnr[0].decibel,
        sqnr_corrected_db=compared.sqnr[1].decibel,
        longest=statistics.longest,
    )


def describe(calibration: CalibrationSet) -> dict[str, Any]:
    """Return what a report says about calibration data."""
    return {
        "source": calibration.source,
        "samples": calibration.samples,
        "sequence_length": calibration.sequence_length,
        "tokens": calibration.tokens,
        "start_token": calibration.start_token,
    }
