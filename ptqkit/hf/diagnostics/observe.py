"""Watch a model run: what its linear layers read, which norm made it, and its attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ptqkit._repr import one_line_repr
from ptqkit.arrays.softmax import softmax_grid
from ptqkit.arrays.statistics import ActivationStatistics
from ptqkit.errors import CalibrationError
from ptqkit.hf.models.inputs import match_mask
from ptqkit.nn.activation_statistics import statistics_accumulator
from ptqkit.nn.attention import AttentionCall, AttentionHook
from ptqkit.nn.forward import hooks, tensor_key
from ptqkit.nn.linear import is_linear

__all__ = ["AttentionObserver", "InputObserver", "Place", "is_norm"]

_RECENT = 4
"""Outputs of norms that are kept: parallel attention and MLP have two at a time."""


def is_norm(module: nn.Module) -> bool:
    """Whether a module without children holds only vectors and a gain among them, as norms do."""
    own = dict(module.named_parameters(recurse=False))
    leaf = next(module.children(), None) is None
    vectors = all(p.dim() == 1 and p.is_floating_point() for p in own.values())
    return leaf and "weight" in own and vectors and not is_linear(module)


@dataclass
class Place:
    """A tensor that linear layers read.

    Attributes
    ----------
    consumers : list of str
        Layers that read it, in order of execution.
    norm : str or None
        The norm whose output it is.
    statistics : ActivationStatistics
        On a GPU until the end :class:`~ptqkit.nn.activation_statistics.TorchActivationStatistics`.
    """

    __repr__ = one_line_repr

    consumers: list[str]
    statistics: Any
    norm: str | None = None

    def finish(self) -> ActivationStatistics:
        """Return the statistics on the host."""
        try:
            finish = getattr(self.statistics, "finish", None)
            return self.statistics if finish is None else finish()
        except CalibrationError as error:
            raise CalibrationError(f"the input of {self.consumers[0]}: {error}") from None


class InputObserver:
    """Accumulates statistics of the inputs of linear layers while the model runs.

    Layers that read one tensor one after the other share a place. Of the activations at most the
    last input and the outputs of the last four norms are kept.

    Parameters
    ----------
    linears, norms : mapping of str to Module
    **options
        Of :class:`ptqkit.ActivationStatistics`.
    """

    def __init__(
        self, linears: Mapping[str, nn.Module], norms: Mapping[str, nn.Module], **options: Any
    ) -> None:
        self.linears, self.norms, self.options = linears, norms, options
        self.places: dict[str, Place] = {}
        self.batch: dict[str, torch.Tensor] = {}
        self.mask: torch.Tensor | None = None
        self._last: tuple[torch.Tensor, Place] | None = None
        self._made: list[tuple[str, torch.Tensor]] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks for the time of a ``with`` block."""
        with contextlib.ExitStack() as stack:
            for name, module in self.norms.items():
                stack.callback(module.register_forward_hook(self._made_by(name)).remove)
            stack.enter_context(hooks(self.linears, self._see))
            try:
                yield
            finally:
                self._last, self._made = None, []

    def _made_by(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                self._made = [*self._made[1 - _RECENT :], (name, output)]

        return hook

    def _see(self, name: str, x: torch.Tensor) -> None:
        if self._last is not None and tensor_key(self._last[0]) == tensor_key(x):
            place = self._last[1]
            if name not in place.consumers:
                place.consumers.append(name)
            return
        if name not in self.places:
            made = statistics_accumulator(x.shape[-1], x.device, **self.options)
            self.places[name] = Place([name], made, self._maker(x))
        place = self.places[name]
        self._last = (x, place)
        rows = match_mask(x, self.batch, self.mask)
        try:
            place.statistics.update(x, rows)
        except ValueError as error:
            raise CalibrationError(f"the input of {name}: {error}") from None

    def _maker(self, x: torch.Tensor) -> str | None:
        """Norm that returned this memory, perhaps in another shape."""
        for name, output in reversed(self._made):
            same = output.data_ptr() == x.data_ptr() and output.numel() == x.numel()
            if same and output.dtype == x.dtype:
                return name
        return None


@dataclass
class _Sums:
    """Sums per head, on the device."""

    __repr__ = one_line_repr

    values: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, **sums: torch.Tensor) -> None:
        for name, value in sums.items():
            value = value.double()
            self.values[name] = self.values[name] + value if name in self.values else value

    def ratio(self, above: str, below: str) -> list[float]:
        if below not in self.values:
            return []
        below_values = self.values[below]
        return (self.values[above] / below_values.clamp(min=1e-300)).cpu().tolist()


class AttentionObserver(AttentionHook):
    """Watches one attention module: sinks, what a softmax grid loses, and the cache's error.

    Parameters
    ----------
    name : str
        Of the module, for messages.
    bits : int
        Of the softmax, on [0, 1], and of keys and values: symmetric, a grid per token and head.
    """

    def __init__(self, name: str, bits: int = 8) -> None:
        self.name, self.bits = name, bits
        self._sums = _Sums()

    def key(self, x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Add up the error of the keys."""
        self.add_cache("key", x, call.rows)
        return x

    def value(self, x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Add up the error of the values."""
        self.add_cache("value", x, call.rows)
        return x

    def softmax(self, p: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Add up the attention to the first token and what rounding loses."""
        self.add_softmax(p, call.allowed, call.rows)
        return p

    def add_cache(self, kind: str, x: torch.Tensor, rows: torch.Tensor | None) -> None:
        """Add up the error of "key" or "value" (batch, heads, k, width); rows: which count."""
        top = 2 ** (self.bits - 1) - 1
        wide = x.detach().float()
        scale = wide.abs().amax(dim=-1, keepdim=True) / top
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        error = (wide - (wide / scale).round() * scale).square().sum(dim=-1, dtype=torch.float64)
        energy = wide.square().sum(dim=-1, dtype=torch.float64)
        if rows is not None:
            counted = rows[:, None].to(x.device)
            error, energy = error * counted, energy * counted
        self._finite(energy, kind)
        sums = {f"{kind} error": error.sum(dim=(0, 2)), f"{kind} energy": energy.sum(dim=(0, 2))}
        self._sums.add(**sums)

    def add_softmax(
        self, p: torch.Tensor, allowed: torch.Tensor | None, counted_rows: torch.Tensor | None
    ) -> None:
        """Add up probabilities (batch, heads, q, k) over the rows that count, bool (batch, q)."""
        batch, heads, queries, _ = p.shape
        wide = p.detach().float()
        grid = softmax_grid(self.bits)
        codes = (wide / grid.scale).round()
        lost = 1 - codes.sum(dim=-1, dtype=torch.float64) * grid.scale
        zero = codes == 0
        first = torch.zeros(batch, dtype=torch.int64, device=p.device)
        rows = torch.ones(batch, queries, dtype=torch.bool, device=p.device)
        if counted_rows is not None:
            rows = counted_rows.to(p.device)
            first = rows.int().argmax(dim=1)
        counted = rows[:, None, :, None].expand_as(zero)
        if allowed is not None:
            counted = counted & allowed.to(p.device)
        at_first = wide.gather(-1, first[:, None, None, None].expand(batch, heads, queries, 1))
        weight = rows[:, None].double()
        self._finite(at_first[..., 0] * weight, "softmax")
        self._sums.add(
            first=(at_first[..., 0].double() * weight).sum(dim=(0, 2)),
            lost=(lost * weight).sum(dim=(0, 2)),
            rows=weight.sum().expand(heads),
            zero=(zero & counted).sum(dim=(0, 2, 3)),
            entries=counted.sum(dim=(0, 2, 3)),
        )

    def _finite(self, x: torch.Tensor, kind: str) -> None:
        if not bool(torch.isfinite(x).all()):
            raise CalibrationError(f"the {kind} of {self.name} is not finite")

    def finish(self) -> dict[str, list[float]]:
        """Values per head: sink, mass_lost, zero_fraction, key_error and value_error."""
        ratio = self._sums.ratio
        errors = {
            f"{kind}_error": [v**0.5 for v in ratio(f"{kind} error", f"{kind} energy")]
            for kind in ("key", "value")
        }
        return {
            "sink": ratio("first", "rows"),
            "mass_lost": ratio("lost", "rows"),
            "zero_fraction": ratio("zero", "entries"),
            **errors,
        }
