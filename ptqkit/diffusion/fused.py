"""The quantized softmax straight from the scores, where the C core can do it."""

from __future__ import annotations

import torch

from ptqkit.arrays.softmax import softmax_on_grid
from ptqkit.diffusion.step_quantizer import StepSoftmaxQuantizer
from ptqkit.nn.attention_quantizer import AttentionQuantizer
from ptqkit.nn.softmax.quantizer import SoftmaxQuantizer

__all__ = ["SoftmaxHook"]


class SoftmaxHook(AttentionQuantizer):
    """Quantizes the softmax output of one attention module.

    Scores in float32 on the CPU go through :func:`ptqkit.softmax_on_grid`, which never writes
    the float probabilities; all others through PyTorch's softmax and the quantizer. The two agree
    but for probabilities within about 1e-6 of themselves from a tie.

    Parameters
    ----------
    quantizer : SoftmaxQuantizer or StepSoftmaxQuantizer
    """

    def __init__(self, quantizer: SoftmaxQuantizer | StepSoftmaxQuantizer) -> None:
        super().__init__({"softmax": quantizer})
        self.quantizer = quantizer

    def fused(self, scores: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor | None:
        """Probabilities (batch, heads, q, k), over ``scores``; None where C cannot do it."""
        quantizer: SoftmaxQuantizer | StepSoftmaxQuantizer | None = self.quantizer
        if isinstance(quantizer, StepSoftmaxQuantizer):
            quantizer = quantizer.single(len(scores))
        fits = scores.dtype == torch.float32 and scores.device.type == "cpu"
        if not fits or quantizer is None or quantizer.longest is not None or scores.requires_grad:
            return None
        if quantizer.correction == "row_length":
            return None
        scores = scores.contiguous()
        softmax_on_grid(
            scores.numpy(),
            quantizer.grid,
            correction=quantizer.correction,
            bias=quantizer.bias,
            allowed=None if allowed is None else allowed.numpy(),
            out=scores.numpy(),
        )
        return scores
