"""Hessians of a layer's inputs, one per group of channels, accumulated batch by batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ptqkit._repr import one_line_repr
from ptqkit.errors import LAYER_FAILURES, CalibrationError, prefix_error
from ptqkit.nn.convolution import ConvolutionView
from ptqkit.nn.linear import LinearView
from ptqkit.nn.statistics import accumulator

__all__ = ["GroupMoments", "InputMoments"]


@dataclass(frozen=True)
class GroupMoments:
    """What layers with one input are quantized with.

    Attributes
    ----------
    hessians : list of Hessian
        One per group of channels; empty without calibration.
    means : list of ndarray of float64, shape (in,)
        E[x] per group, if it was asked for.
    """

    __repr__ = one_line_repr

    hessians: list[Any] = field(default_factory=list)
    means: list[np.ndarray] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Rows of inputs behind each H."""
        return int(self.hessians[0].tokens) if self.hessians else 0


class InputMoments:
    """H, and E[x] if asked for, of each group of channels of a layer's input.

    Parameters
    ----------
    name : str
        Of the layer, for messages.
    view : LinearView or ConvolutionView
        Convolutions say how inputs are unfolded.
    with_means : bool
    """

    def __init__(self, name: str, view: LinearView, with_means: bool = False) -> None:
        self.name, self.view, self.with_means = name, view, with_means
        self._hessians: list[Any] = []
        self._sums: list[torch.Tensor] = []

    def add(self, value: torch.Tensor) -> None:
        """Add a batch's input of the layer.

        Raises
        ------
        ValueError, CalibrationError
            If it holds NaN or Inf; the message names the layer.
        """
        try:
            if isinstance(self.view, ConvolutionView):
                for piece in self.view.columns(value):
                    self._add(piece)
            else:
                self._add(value.reshape(1, -1, value.shape[-1]))
        except LAYER_FAILURES as error:
            raise prefix_error(error, f"layer {self.name}") from None

    def _add(self, columns: torch.Tensor) -> None:
        """Add inputs of shape (groups, rows, in)."""
        groups, rows, width = columns.shape
        if not rows:
            return
        if not self._hessians:
            self._hessians = [accumulator(width, columns.device) for _ in range(groups)]
            zero = torch.zeros(width, dtype=torch.float64, device=columns.device)
            self._sums = [zero.clone() for _ in range(groups if self.with_means else 0)]
        for hessian, part in zip(self._hessians, columns, strict=True):
            hessian.update(part)
        for total, part in zip(self._sums, columns, strict=False):
            total += part.sum(0, dtype=torch.float64)

    def finish(self) -> GroupMoments:
        """Return what was accumulated, on the host.

        Raises
        ------
        CalibrationError
            If nothing was added, or something that is not finite.
        """
        if not self._hessians:
            raise CalibrationError(f"layer {self.name} saw no input of the batches")
        try:
            hessians = [h.finish() for h in self._hessians]
        except LAYER_FAILURES as error:
            raise prefix_error(error, f"layer {self.name}") from None
        means = [
            total.cpu().numpy() / h.tokens for total, h in zip(self._sums, hessians, strict=False)
        ]
        return GroupMoments(hessians, means)
