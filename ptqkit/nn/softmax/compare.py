"""What a quantized softmax does to the output of its attention module and of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ptqkit.arrays.accumulator import Accumulator
from ptqkit.arrays.metrics import SQNR
from ptqkit.nn.attention import AttentionCall, AttentionHook
from ptqkit.nn.attention_quantizer import AttentionQuantizer
from ptqkit.nn.softmax.statistics import Quantizer, as_calibration_error

__all__ = ["OutputSQNR", "SoftmaxComparison", "softmax_hooks"]


def softmax_hooks(quantizers: Mapping[str, Quantizer]) -> dict[str, AttentionHook]:
    """Return hooks that apply quantizers to the softmax of their modules."""
    return {name: AttentionQuantizer({"softmax": q}) for name, q in quantizers.items()}  # type: ignore[dict-item]


class OutputSQNR(Accumulator):
    """Signal-to-quantization-noise ratio of an output.

    Pandey et al. 2023, eq. 1, a mean of ratios over samples, next to the ratio of the sums. One
    sample without any error makes the first infinite; decisions then take the second.

    Parameters
    ----------
    name : str
        Name of the output, for messages.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._meters = SQNR("sample"), SQNR("tensor")  # replaced together, never changed

    def update(self, reference: np.ndarray, quantized: np.ndarray) -> None:
        """Add a batch of samples (n, ...)."""
        with as_calibration_error(self.name):
            batch = SQNR("sample"), SQNR("tensor")
            for meter in batch:
                meter.update(reference, quantized)
            with self._lock:
                for meter, seen in zip(batch, self._meters, strict=True):
                    meter.merge(seen)
                self._meters = batch

    @property
    def decibel(self) -> float:
        """Decibels as in eq. 1."""
        return float(self._meters[0].decibel)

    @property
    def total(self) -> float:
        """Decibels of the sums over all samples."""
        return float(self._meters[1].decibel)

    def below(self, other: OutputSQNR, by_total: bool) -> bool:
        """Whether this output is worse, by the sums over all samples or as in eq. 1."""
        if by_total or self._meters[0].infinite or other._meters[0].infinite:
            return self.total < other.total
        return self.decibel < other.decibel


class RowSums:
    """Counts, over the allowed entries of the rows that count, what a quantizer made of them."""

    def __init__(self) -> None:
        self._rows, self._entries, self._zeros, self._mass = 0, 0, 0, 0.0

    def update(self, q: torch.Tensor, call: AttentionCall) -> None:
        """Add quantized probabilities (batch, heads, q, k)."""
        seen = torch.ones_like(q, dtype=torch.bool)
        if call.counted is not None:
            seen &= call.counted.to(q.device)
        self._rows += int(seen.any(-1).sum())
        self._entries += int(seen.sum())
        self._zeros += int((seen & (q == 0)).sum())
        self._mass += float(q.masked_fill(~seen, 0.0).sum(dtype=torch.float64))

    @property
    def zero_fraction(self) -> float:
        """Share of the allowed entries that are exactly 0."""
        return self._zeros / self._entries if self._entries else float("nan")

    @property
    def mean_row_sum(self) -> float:
        """Mean of the sums of the rows; 1 if nothing is lost."""
        return self._mass / self._rows if self._rows else float("nan")


class SoftmaxComparison(AttentionHook):
    """Computes one module's output, probabilities times values, float and quantized.

    The float result goes on through the model.

    Parameters
    ----------
    name : str
        Name of the module, for messages.
    quantizers : sequence of SoftmaxQuantizer, StepSoftmaxQuantizer or TableGridQuantizer

    Attributes
    ----------
    sqnr : list of OutputSQNR
        SQNR of the output (batch, heads, q, width) of real tokens, one per quantizer.
    sums : list of RowSums
        What became of the rows, one per quantizer.
    """

    def __init__(self, name: str, quantizers: Sequence[Quantizer]) -> None:
        self.hooks = [AttentionQuantizer({"softmax": q}) for q in quantizers]  # type: ignore[dict-item]
        self.sqnr = [OutputSQNR(f"attention output of {name}") for _ in quantizers]
        self.sums = [RowSums() for _ in quantizers]

    def softmax(self, p: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Compare the outputs."""
        assert call.value is not None
        # The probabilities may be upcast, and several heads may share their values.
        value = call.value.to(p.dtype)
        value = value.repeat_interleave(p.shape[1] // value.shape[1], dim=1)
        reference = _output(p, value, call)
        for hook, sqnr, sums in zip(self.hooks, self.sqnr, self.sums, strict=True):
            q = hook.softmax(p, call)
            sums.update(q, call)
            sqnr.update(reference, _output(q, value, call))
        return p


def _output(p: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> np.ndarray:
    y = (p @ value).detach().float()
    if call.rows is not None:
        y = y * call.rows.to(y.device)[:, None, :, None]
    return y.cpu().numpy()
