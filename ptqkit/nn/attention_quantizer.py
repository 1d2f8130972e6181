"""Quantizers of the tensors inside attention: each kind alone or together, per module and head.

The kinds are those of Table 1 of Pandey et al. 2023: query, key, value, scores (the input of the
softmax) and the softmax output. Grids are asymmetric and one per tensor, fixed beforehand: a range
taken from the tensor at hand would let a later token change earlier results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ptqkit.errors import CalibrationError
from ptqkit.nn.activation_grids import static_grid
from ptqkit.nn.activations import ActivationQuantizer
from ptqkit.nn.attention import AttentionHook, attention_hooks, find_attention
from ptqkit.nn.forward import calibration_mode, forward
from ptqkit.recipe.options import ActivationQuantization

__all__ = ["ATTENTION_KINDS", "AttentionQuantizer", "AttentionRanges", "measure_ranges"]

ATTENTION_KINDS = ("query", "key", "value", "scores", "softmax")
"""Tensors inside attention that can be quantized alone."""

MaskedFunction = Callable[[torch.Tensor, "torch.Tensor | None"], torch.Tensor]


class AttentionQuantizer(AttentionHook):
    """Quantizes tensors inside one attention module.

    Parameters
    ----------
    quantizers : mapping of str to callable
        By kind. Those of query, key, value and scores are called with the tensor, such as an
        :class:`~ptqkit.nn.ActivationQuantizer`; that of the softmax with the probabilities and
        the allowed entries. Each returns a tensor of the same shape and dtype.
    heads : sequence of int, optional
        Quantize these heads only (for key and value: key heads); by default all.

    Raises
    ------
    ValueError
        If a kind is unknown, or heads is empty, negative or repeats a head.
    """

    def __init__(
        self, quantizers: Mapping[str, Callable[..., torch.Tensor]], heads: Any = None
    ) -> None:
        unknown = [kind for kind in quantizers if kind not in ATTENTION_KINDS]
        if unknown or not quantizers:
            raise ValueError(
                f"kinds of attention tensors are {', '.join(ATTENTION_KINDS)}; "
                + (f"{unknown[0]!r} is none of them" if unknown else "none is given")
            )
        self.quantizers = dict(quantizers)
        self.heads = None if heads is None else _check_heads(heads)

    def _apply(self, kind: str, x: torch.Tensor, *more: Any) -> torch.Tensor:
        quantizer = self.quantizers.get(kind)
        if quantizer is None:
            return x
        y = quantizer(x, *more)
        if self.heads is None:
            return y
        if max(self.heads) >= x.shape[1]:
            raise ValueError(f"heads has {max(self.heads)}, but {kind} has {x.shape[1]} heads")
        chosen = torch.zeros(x.shape[1], 1, 1, dtype=torch.bool, device=x.device)
        chosen[list(self.heads)] = True
        return torch.where(chosen, y, x)

    def query(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize the query."""
        return self._apply("query", x)

    def key(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize the keys."""
        return self._apply("key", x)

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize the values."""
        return self._apply("value", x)

    def scores(self, x: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """Quantize the allowed scores; the forbidden ones stay where the mask put them."""
        if "scores" not in self.quantizers:
            return x
        y = self._apply("scores", x)
        return y if allowed is None else torch.where(allowed, y, x)

    def softmax(self, p: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """Quantize the probabilities."""
        return self._apply("softmax", p, allowed)


def _check_heads(heads: Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(heads)
    if not chosen:
        raise ValueError("heads is empty: name at least one head, or leave it out for all")
    wrong = [h for h in chosen if isinstance(h, bool) or not isinstance(h, int) or h < 0]
    if wrong:
        raise ValueError(f"heads must be integers from 0, not {wrong[0]!r}")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"heads repeats a head: {list(chosen)}")
    return chosen


class AttentionRanges(AttentionHook):
    """Smallest and largest value of every kind of tensor in one attention module.

    Attributes
    ----------
    minimum, maximum : dict of str to float
        By kind, over tokens that are not padding and scores that the mask allows.
    rows : Tensor or None
        Which tokens of the batch at hand count, bool (batch, sequence).
    """

    def __init__(self) -> None:
        self.minimum = dict.fromkeys(ATTENTION_KINDS, math.inf)
        self.maximum = dict.fromkeys(ATTENTION_KINDS, -math.inf)
        self.rows: torch.Tensor | None = None

    def _see(self, kind: str, x: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
        seen = x if counted is None else x[counted.expand_as(x)]
        if seen.numel():
            low, high = seen.aminmax()
            # NaN compares false: min() and max() would lose it.
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise CalibrationError(f"the {kind} of an attention module is not finite")
            self.minimum[kind] = min(self.minimum[kind], low.item())
            self.maximum[kind] = max(self.maximum[kind], high.item())
        return x

    def _tokens(self, x: torch.Tensor) -> torch.Tensor | None:
        return None if self.rows is None else self.rows[:, None, :, None].to(x.device)

    def query(self, x: torch.Tensor) -> torch.Tensor:
        """Record the query."""
        return self._see("query", x, self._tokens(x))

    def key(self, x: torch.Tensor) -> torch.Tensor:
        """Record the keys."""
        return self._see("key", x, self._tokens(x))

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Record the values."""
        return self._see("value", x, self._tokens(x))

    def scores(self, x: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """Record the allowed scores."""
        return self._see("scores", x, counted_entries(allowed, self.rows))

    def softmax(self, p: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """Record the allowed probabilities."""
        return self._see("softmax", p, counted_entries(allowed, self.rows))

    def quantizer(self, kind: str, bits: int, dtype: torch.dtype) -> ActivationQuantizer:
        """Asymmetric quantizer of query, key, value or scores with the range seen."""
        low, high = self.minimum[kind], self.maximum[kind]
        if low > high:
            raise CalibrationError(f"no calibration token reached the {kind}")
        scale, zero = static_grid(low, high, bits=bits, symmetric=False, dtype=dtype)
        spec = ActivationQuantization(bits, "tensor")
        return ActivationQuantizer(spec, torch.tensor([scale], dtype=dtype), zero)


def counted_entries(allowed: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor | None:
    """Allowed entries in the rows of real tokens: bool, broadcastable to the scores, or None."""
    if rows is None:
        return allowed
    rows = rows[:, None, :, None]
    return rows if allowed is None else allowed & rows.to(allowed.device)


def measure_ranges(model: nn.Module, calibration: Any) -> dict[str, AttentionRanges]:
    """Ranges of every kind in every attention module, in one pass over calibration data.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    calibration : CalibrationSet
        See :func:`ptqkit.hf.prepare_calibration`.
    """
    hooks = {name: AttentionRanges() for name in find_attention(model)}
    with attention_hooks(model, hooks), calibration_mode(model):
        for batch, rows in zip(calibration.batches, calibration.masks(), strict=True):
            for hook in hooks.values():
                hook.rows = rows
            forward(model, batch)
    return hooks
