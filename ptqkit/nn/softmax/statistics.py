"""What corrections of a quantized softmax are estimated from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from ptqkit.arrays.softmax import SoftmaxGrid
from ptqkit.arrays.softmax_bias import LENGTH_CLASSES, SoftmaxBias, _class_start
from ptqkit.errors import CalibrationError
from ptqkit.nn.attention import AttentionCall, AttentionHook
from ptqkit.nn.attention_quantizer import not_finite
from ptqkit.nn.softmax.quantizer import SoftmaxQuantizer, row_lengths
from ptqkit.nn.softmax.steps import StepSoftmaxQuantizer, nearest_steps
from ptqkit.nn.softmax.tables import TableGridQuantizer

__all__ = ["Quantizer", "SoftmaxStatistics", "as_calibration_error", "length_edges"]

Quantizer = SoftmaxQuantizer | StepSoftmaxQuantizer | TableGridQuantizer


@contextlib.contextmanager
def as_calibration_error(what: str) -> Iterator[None]:
    """Re-raise a ValueError as CalibrationError, prefixed with ``what``."""
    try:
        yield
    except CalibrationError:
        raise
    except ValueError as error:
        raise not_finite(f"{what}: {error}") from error


def length_edges(longest: int) -> list[int]:
    """Return the last row length of every class of SoftmaxBias, up to ``longest``."""
    starts = np.unique(_class_start(np.arange(LENGTH_CLASSES)))
    return [*(int(s) - 1 for s in starts if 1 < s <= longest), longest]


class SoftmaxStatistics(AttentionHook):
    """Collects, in one pass, what corrections of one attention module are made from.

    Probabilities are those of the model as it is, and stay so.

    Parameters
    ----------
    name : str
        Name of the module, for messages.
    heads : int
    grid : SoftmaxGrid
    steps : tuple of int
        Time steps to distinguish; empty if the model has none. All samples of a batch are
        at one time step.

    Attributes
    ----------
    bias : SoftmaxBias
    longest : int
        Most allowed keys of a row so far.
    """

    def __init__(
        self, name: str, heads: int, grid: SoftmaxGrid, steps: tuple[int, ...] = ()
    ) -> None:
        self.name, self.heads, self.grid, self.steps = name, heads, grid, steps
        self.bias = SoftmaxBias(heads, grid=grid, steps=len(steps) or None)
        self.longest = 0

    def softmax(self, p: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Count the probabilities."""
        if p.shape[1] != self.heads:
            raise ValueError(f"{self.name} has {p.shape[1]} heads, not {self.heads}")
        mask = None if call.allowed is None else call.allowed.cpu()
        step = nearest_steps(self.steps, call.steps)[0] if self.steps else None
        # Rows of padding are not longer than those of the tokens next to it. Before the update: too
        # long a table does no harm if that fails, too short a one would.
        self.longest = max(self.longest, int(row_lengths(call.allowed, p).max()))
        with as_calibration_error(f"softmax of {self.name}"):
            self.bias.update(p.detach().cpu(), mask, step=step, queries=call.rows)
        return p

    def quantizer(self, correction: str | None, granularity: str) -> Quantizer:
        """Return a quantizer with a correction from what was counted."""
        if correction == "row_length":
            edges = length_edges(self.longest)
            # One value per class of lengths says all: n * beta(n) is the same in a class.
            mass = self.bias.bias_by_length(self.longest, granularity)[..., edges] * edges
            return SoftmaxQuantizer(self.grid, correction, mass, edges=edges)
        if correction != "bias":
            return SoftmaxQuantizer(self.grid, correction)
        beta = self.bias.bias(granularity)
        if granularity.startswith("step"):
            return StepSoftmaxQuantizer(self.grid, beta, self.steps)
        # The rows of a diffusion model have one length each; those of a text grow.
        longest = None if self.steps else self.longest
        return SoftmaxQuantizer(self.grid, correction, beta, longest=longest)
