"""What a quantized softmax does to the output of its attention module."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ptqkit.diffusion.checks import naming
from ptqkit.nn.attention import AttentionHook
from ptqkit.nn.softmax.report import OutputSQNR, SoftmaxLayerReport

__all__ = ["SQNRPair", "SoftmaxComparison", "layer_report"]


class SQNRPair:
    """Signal-to-noise ratios of an output without and with correction.

    Attributes
    ----------
    name : str
        Of the output, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._meters = (OutputSQNR(), OutputSQNR())

    def update(self, place: int, reference: torch.Tensor, quantized: torch.Tensor) -> None:
        """Add samples (n, ...) without (``place`` 0) or with correction (1)."""
        x, y = (t.detach().float().cpu().numpy() for t in (reference, quantized))
        with naming(self.name):
            self._meters[place].update(x, y)

    @property
    def decibel(self) -> tuple[float, float]:
        """SQNR of eq. 1, a mean over samples, without and with correction."""
        plain, corrected = self._meters
        return plain.decibel, corrected.decibel

    @property
    def hurts(self) -> bool:
        """Whether the correction adds to the squared error of all samples together."""
        # Not eq. 1: one sample without error makes it infinite, whatever the others are.
        plain, corrected = self._meters
        return corrected.total < plain.total


class SoftmaxComparison(AttentionHook):
    """Computes one module's output float, quantized, and quantized with correction.

    The float result goes on through the model.

    Attributes
    ----------
    sqnr : SQNRPair
        Of the output, probabilities times values: (batch, heads, q, width).
    """

    def __init__(self, name: str, plain: Any, corrected: Any) -> None:
        self.quantizers = (plain, corrected)
        self.sqnr = SQNRPair(f"attention output of {name}")
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
        value = value.to(p.dtype)  # the probabilities may be upcast
        for place, quantizer in enumerate(self.quantizers):
            self.sqnr.update(place, p @ value, quantizer(p, allowed) @ value)
        return p


def layer_report(
    statistics: Any, quantizer: Any, compared: SoftmaxComparison
) -> SoftmaxLayerReport:
    """Build the row of one attention module."""
    bias = quantizer.bias
    plain, corrected = compared.sqnr.decibel
    return SoftmaxLayerReport(
        name=statistics.name,
        heads=statistics.heads,
        bits=quantizer.grid.bits,
        scale=float(quantizer.grid.scale),
        zero_point=int(quantizer.grid.zero_point),
        correction=quantizer.correction,
        bias=math.nan if bias is None else float(np.mean(bias)),
        zero_fraction=float(statistics.bias.zero_fraction),
        mean_row_sum=float(statistics.bias.mean_row_sum),
        sqnr_db=plain,
        sqnr_corrected_db=corrected,
        longest=statistics.longest,
    )
