"""Linear layers on codes whose scales have gradients, and the loss that they learn from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.nn.linear import is_conv1d

__all__ = ["TunableMatrix", "divergence", "round_to", "tokens_at_once", "tunable_forwards"]

# How far a latent may be outside of the codes: less than what would round beyond them.
_BEYOND = 0.49
# Tokens whose logits are turned into probabilities at once; on a GPU, logits.
_TOKENS, _LOGITS = 256, 1 << 22


class TunableMatrix:
    """The codes of a layer on its device, and the scales that make a weight of them.

    Parameters
    ----------
    matrix : QuantizedMatrix
    device : torch.device
        On the host the codes are not copied.
    learn_codes : bool
        Have ``latents``, and round them in every pass.

    Attributes
    ----------
    scales : Tensor of float32, shape (out, groups), or (1, 1) if there is one for the whole matrix
        What is to be learned; a leaf.
    latents : Tensor of float32, shape (out, in), or None
        Codes before rounding, a leaf; rounding passes their gradient on as it is (the
        straight-through estimator, Bengio et al. 2013, arXiv:1308.3432).
    """

    def __init__(
        self, matrix: QuantizedMatrix, device: torch.device, learn_codes: bool = False
    ) -> None:
        self._codes = torch.from_numpy(matrix.codes).to(device)
        self._top = max(1, matrix.max_code)
        self.latents = self._codes.float().requires_grad_() if learn_codes else None
        zeros = torch.from_numpy(matrix.zero_points).to(device, torch.float32)
        scales = torch.from_numpy(matrix.scales.copy()).to(device)
        groups, inputs = scales.shape[1], matrix.shape[1]
        even = inputs % groups == 0 and np.array_equal(
            matrix.g_idx, np.arange(inputs) // (inputs // groups)
        )
        self._zeros, self._index = zeros, None
        self._onto: torch.Tensor | None = None
        if not even:
            self._index = torch.from_numpy(matrix.g_idx).to(device, torch.int64)
            # A product sums over scattered groups in one order on every device.
            self._onto = F.one_hot(self._index, groups).to(torch.float32)
        self._shape = tuple(scales.shape)
        self.scales = (scales[:1, :1] if matrix.per_tensor else scales).requires_grad_()

    def codes(self) -> torch.Tensor:
        """Return the codes: uint8, or whole numbers in float32 if they learn (see `limit`)."""
        if self.latents is None:
            return self._codes
        return self.latents.detach().round()

    @torch.no_grad()
    def limit(self) -> None:
        """Keep latents where a step of one code changes what they round to."""
        if self.latents is not None:
            self.latents.clamp_(-_BEYOND, self._top + _BEYOND)

    def steps(self) -> torch.Tensor:
        """Return ``code - zero`` as float32, (out, in)."""
        rows, groups = self._shape
        codes = self.codes()
        if self._index is not None:
            return codes - self._zeros[:, self._index]
        parts = codes.view(rows, groups, -1) - self._zeros[:, :, None]
        return parts.view(codes.shape)

    def weight(self, scales: torch.Tensor, steps: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``scale * (code - zero)`` as float32, the bits of ``matrix.dequantize()``.

        ``steps``, if they are at hand, are what :meth:`steps` returns.
        """
        return self._times(self.steps() if steps is None else steps, scales)

    def scale_gradient(
        self, gradient: torch.Tensor, steps: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the gradient for the scales from that for the weight, float32 (out, in)."""
        rows, groups = self._shape
        each = (self.steps() if steps is None else steps) * gradient
        if self._onto is not None:
            summed = each @ self._onto
        else:
            summed = each.view(rows, groups, -1).sum(-1)
        return summed.sum().view(1, 1) if self.scales.shape != self._shape else summed

    def code_gradient(self, scales: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient for the latents from that for the weight, float32 (out, in)."""
        return self._times(gradient, scales)

    def _times(self, value: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        rows, groups = self._shape
        if self._index is not None:
            return value * scales.expand(rows, groups)[:, self._index]
        parts = value.view(rows, groups, -1) * scales.expand(rows, groups)[:, :, None]
        return parts.view(value.shape)

    def apply(
        self, scales: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return ``value @ weight.T + bias`` with gradients for all of them."""
        result: torch.Tensor = _Product.apply(value, scales, self.latents, bias, self)
        return result


class _Product(torch.autograd.Function):
    """The product with a weight that is made anew for the gradients, unless codes learn.

    Those have so much memory of their own that keeping the weight is little, and saves time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: torch.Tensor,
        scales: torch.Tensor,
        latents: torch.Tensor | None,
        bias: torch.Tensor | None,
        matrix: TunableMatrix,
    ) -> torch.Tensor:
        steps = matrix.steps()
        weight = matrix.weight(scales, steps).to(value.dtype)
        kept = () if latents is None else (weight, steps)
        ctx.save_for_backward(value, scales, *kept)
        ctx.matrix = matrix
        return F.linear(value, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        value, scales, *kept = ctx.saved_tensors
        matrix: TunableMatrix = ctx.matrix
        weight, steps = kept or (None, None)
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_value = of_scales = of_codes = of_bias = None
        if ctx.needs_input_grad[0]:
            whole = matrix.weight(scales).to(gradient.dtype) if weight is None else weight
            of_value = gradient @ whole
        if ctx.needs_input_grad[1]:
            product = (rows.T @ value.reshape(-1, value.shape[-1])).to(torch.float32)
            of_scales = matrix.scale_gradient(product, steps)
            if ctx.needs_input_grad[2]:
                of_codes = matrix.code_gradient(scales, product)
        if ctx.needs_input_grad[3]:
            of_bias = rows.sum(0)
        return of_value, of_scales, of_codes, of_bias, None


@contextlib.contextmanager
def tunable_forwards(
    modules: Mapping[str, nn.Module],
    matrices: Mapping[str, TunableMatrix],
    scales: Callable[[str], torch.Tensor],
) -> Iterator[None]:
    """Let linear modules run on their codes; their own ``forward`` is back on leaving.

    Parameters
    ----------
    modules : mapping of str to nn.Linear or Conv1D
    matrices : mapping of str to TunableMatrix
        Of the same names.
    scales : callable
        Returns the scales of a layer by name, each time it runs.
    """
    kept: list[tuple[dict[str, Any], Any]] = []
    try:
        for name, module in modules.items():
            own = module.__dict__
            kept.append((own, own.get("forward")))
            own["forward"] = _make_forward(module, matrices[name], name, scales)
        yield
    finally:
        for own, before in kept:
            if before is None:
                own.pop("forward", None)
            else:
                own["forward"] = before


def _make_forward(
    module: nn.Module, matrix: TunableMatrix, name: str, scales: Callable[[str], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(value: torch.Tensor) -> torch.Tensor:
        bias: Any = module.bias
        return matrix.apply(scales(name), value, bias)

    def forward_conv1d(x: torch.Tensor) -> torch.Tensor:
        bias: Any = module.bias
        return matrix.apply(scales(name), x, bias)

    # Callers may name the argument as the class does.
    return forward_conv1d if is_conv1d(module) else lambda input: forward(input)


def tokens_at_once(vocabulary: int, device: torch.device) -> int:
    """Return of how many tokens the loss makes probabilities at once."""
    return _TOKENS if device.type == "cpu" else max(_TOKENS, _LOGITS // vocabulary)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: Callable[[slice], torch.Tensor]
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        size = tokens_at_once(logits.shape[1], logits.device)
        for start in range(0, len(logits), size):
            rows = slice(start, min(start + size, len(logits)))
            log_p = F.log_softmax(target(rows).to(torch.float32), -1)
            log_q = F.log_softmax(logits[rows].to(torch.float32), -1)
            p, q = log_p.exp(), log_q.exp()
            total += _divergences(log_p, log_q, p, q).to(torch.float64).sum()
            if gradient is not None:
                gradient[rows] = (q - p).to(gradient.dtype)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, factor: torch.Tensor) -> Any:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(factor.to(gradient.dtype)), None


def _divergences(
    log_p: torch.Tensor, log_q: torch.Tensor, p: torch.Tensor, q: torch.Tensor
) -> torch.Tensor:
    """Return sum p (log p - log q) + q - p per row, which is KL(p || q).

    No term is negative, so that next to nothing cancels where p and q are nearly the same: with
    d = log p - log q a term is p (d + expm1(-d)). Where p is 0, as of a token that the float model
    rules out, it is q.
    """
    d = log_p - log_q
    terms = torch.where(d > -20, p * (d + torch.expm1(-d)), p * d + (q - p))
    return torch.where(p > 0, terms, q).sum(-1)


def divergence(logits: torch.Tensor, target: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    """Return sum over tokens of KL(softmax(target) || softmax(logits)) in nats, as float64.

    Its gradient for the logits is computed along with it, some tokens at a time, and kept in the
    type of the logits.

    Parameters
    ----------
    logits : Tensor, shape (tokens, vocabulary)
    target : callable
        Returns the logits of the float model of a slice of the tokens.
    """
    result: torch.Tensor = _Divergence.apply(logits, target)
    return result


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, held: torch.dtype, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.dtype = value.dtype
        return value.to(held).to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient.to(ctx.dtype), None, None


def round_to(value: torch.Tensor, held: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """Return the value rounded to what ``held`` can hold, as ``dtype``; gradients pass."""
    result: torch.Tensor = _Round.apply(value, held, dtype)
    return result
