"""What a quantized softmax does to the output of its attention module."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ptqkit.hf.attention import AttentionHook
from ptqkit.hf.softmax_report import SoftmaxLayerReport
from ptqkit.sqnr import SQNR

__all__ = ["SoftmaxComparison", "layer_report"]


class SoftmaxComparison(AttentionHook):
    """Computes one module's output float, quantized, and quantized with correction.

    The float result goes on through the model.

    Attributes
    ----------
    plain, corrected : ptqkit.SQNR
        Of the output, probabilities times values: (batch, heads, q, width).
    """

    def __init__(self, plain: Any, corrected: Any) -> None:
        self.quantizers = (plain, corrected)
        self.plain, self.corrected = SQNR("sample"), SQNR("sample")
        self._value: torch.Tensor | None = None

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Keep the values until the probabilities are there."""
        self._value = x
        return x

    def softmax(self, p: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """Compare the outputs."""
        value, self._value = self._value, None
        if value is None:
            raise RuntimeError("the probabilities came before the values")
        reference = _numbers(p @ value)
        for quantizer, sqnr in zip(self.quantizers, (self.plain, self.corrected), strict=True):
            sqnr.update(reference, _numbers(quantizer(p, allowed) @ value))
        return p


def _numbers(x: torch.Tensor) -> np.ndarray:
    return x.float().cpu().numpy()


def layer_report(
    statistics: Any, quantizer: Any, compared: SoftmaxComparison
) -> SoftmaxLayerReport:
    """Build the row of one attention module."""
    bias = quantizer.bias
    return SoftmaxLayerReport(
        name=statistics.name,
        heads=statistics.heads,
        bits=quantizer.grid.bits,
        scale=float(quantizer.grid.scale),
        zero_point=int(quantizer.grid.zero_point),
        correction=quantizer.correction,
        bias=math.nan if bias is None else float(np.mean(bias)),
        share_zero=float(statistics.bias.share_zero),
        row_sum=float(statistics.bias.row_sum),
        sqnr_db=float(compared.plain.decibel),
        sqnr_corrected_db=float(compared.corrected.decibel),
        longest=statistics.longest,
    )
