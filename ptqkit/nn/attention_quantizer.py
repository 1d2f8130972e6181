"""Quantizers of the tensors inside attention: each kind alone or together, per module and head.

The kinds are those of Table 1 of Pandey et al. 2023: query, key, value, scores (the input of the
softmax) and the softmax output. Grids are asymmetric and one per tensor, fixed beforehand: a range
taken from the current tensor would let a later token change earlier results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ptqkit.errors import CalibrationError, UsageError, check_choice
from ptqkit.nn.activation_grids import static_grid
from ptqkit.nn.activations import ActivationQuantizer
from ptqkit.nn.attention import AttentionCall, AttentionHook
from ptqkit.recipe.options import ActivationQuantization

__all__ = ["ATTENTION_KINDS", "AttentionQuantizer", "AttentionRanges"]

ATTENTION_KINDS = ("query", "key", "value", "scores", "softmax")
"""Tensors inside attention that can be quantized alone."""


class AttentionQuantizer(AttentionHook):
    """Quantizes tensors inside one attention module.

    Parameters
    ----------
    quantizers : mapping of str to callable
        By kind. Those of query, key, value and scores are called with the tensor, such as an
        :class:`~ptqkit.nn.ActivationQuantizer`; that of the softmax with the probabilities and
        the allowed entries, such as a :class:`~ptqkit.nn.SoftmaxQuantizer`. Each returns a tensor
        of the same shape and dtype. A quantizer of the softmax may have a method ``at(steps)``,
        which returns the one to use at these time steps, and a method ``fused(scores, allowed)``,
        which replaces the softmax and itself or returns None.
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
        if not quantizers:
            known = ", ".join(map(repr, ATTENTION_KINDS))
            raise UsageError(f"quantizers is empty; its keys are some of {known}")
        for kind in quantizers:
            check_choice("a kind of attention tensor", kind, ATTENTION_KINDS)
        self.quantizers = dict(quantizers)
        self.heads = None if heads is None else _check_heads(heads)

    def _apply(self, kind: str, x: torch.Tensor, call: AttentionCall | None = None) -> torch.Tensor:
        quantizer = self.quantizers.get(kind) if call is None else self._of_softmax(call)
        if quantizer is None:
            return x
        y = quantizer(x) if call is None else quantizer(x, call.allowed)
        if self.heads is None:
            return y
        if max(self.heads) >= x.shape[1]:
            raise ValueError(f"heads has {max(self.heads)}, but {kind} has {x.shape[1]} heads")
        chosen = torch.zeros(x.shape[1], 1, 1, dtype=torch.bool, device=x.device)
        chosen[list(self.heads)] = True
        return torch.where(chosen, y, x)

    def query(self, x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Quantize the query."""
        return self._apply("query", x)

    def key(self, x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Quantize the keys."""
        return self._apply("key", x)

    def value(self, x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Quantize the values."""
        return self._apply("value", x)

    def scores(self, x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Quantize the allowed scores; the forbidden ones stay where the mask put them."""
        if "scores" not in self.quantizers:
            return x
        y = self._apply("scores", x)
        return y if call.allowed is None else torch.where(call.allowed, y, x)

    def fused(self, scores: torch.Tensor, call: AttentionCall) -> torch.Tensor | None:
        """Return quantized probabilities straight from the scores, if the quantizer can."""
        fused = getattr(self._of_softmax(call), "fused", None)
        return None if fused is None or self.heads is not None else fused(scores, call.allowed)

    def softmax(self, p: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Quantize the probabilities."""
        return self._apply("softmax", p, call)

    def _of_softmax(self, call: AttentionCall) -> Any:
        quantizer: Any = self.quantizers.get("softmax")
        return quantizer.at(call.steps) if hasattr(quantizer, "at") else quantizer


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

    Parameters
    ----------
    name : str
        Name of the module, for messages.

    Attributes
    ----------
    minimum, maximum : dict of str to float
        By kind, over tokens that are not padding and scores that the mask allows.
    """

    def __init__(self, name: str = "an attention module") -> None:
        self.name = name
        self.minimum = dict.fromkeys(ATTENTION_KINDS, math.inf)
        self.maximum = dict.fromkeys(ATTENTION_KINDS, -math.inf)

    def _record(self, kind: str, x: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
        seen = x if counted is None else x[counted.to(x.device).expand_as(x)]
        if seen.numel():
            low, high = seen.aminmax()
            # NaN compares false: min() and max() would lose it.
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise not_finite(f"the {kind} of {self.name} is not finite")
            self.minimum[kind] = min(self.minimum[kind], low.item())
            self.maximum[kind] = max(self.maximum[kind], high.item())
        return x

    def query(self, x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Record the query."""
        return self._record("query", x, _tokens(call))

    def key(self, x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Record the keys."""
        return self._record("key", x, _tokens(call))

    def value(self, x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Record the values."""
        return self._record("value", x, _tokens(call))

    def scores(self, x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Record the allowed scores."""
        return self._record("scores", x, call.counted)

    def softmax(self, p: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Record the allowed probabilities."""
        return self._record("softmax", p, call.counted)

    def quantizer(self, kind: str, bits: int, dtype: torch.dtype) -> ActivationQuantizer:
        """Return an asymmetric quantizer of query, key, value or scores for the range seen."""
        low, high = self.minimum[kind], self.maximum[kind]
        if low > high:
            raise CalibrationError(f"no calibration token reached the {kind}")
        scale, zero = static_grid(low, high, bits=bits, symmetric=False, dtype=dtype)
        spec = ActivationQuantization(bits, "tensor")
        return ActivationQuantizer(spec, torch.tensor([scale], dtype=dtype), zero)


def _tokens(call: AttentionCall) -> torch.Tensor | None:
    return None if call.rows is None else call.rows[:, None, :, None]


def not_finite(what: str) -> CalibrationError:
    """Return the error for values inside attention that are not finite, with what to look at."""
    return CalibrationError(
        f"{what}. Check the weights of the model; float16 overflows where bfloat16 and float32 do "
        "not"
    )
