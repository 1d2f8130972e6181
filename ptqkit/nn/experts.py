"""Experts whose weights one module holds in 3-D parameters, as one linear layer each.

transformers keeps the experts of a layer in two parameters, ``gate_up_proj`` and ``down_proj``,
(experts, out, in) or (experts, in, out), the gate and the up projection one after the other or in
turn. :class:`ExpertLinears` stands in for such a module: its linear layers ``0.gate_proj``,
``0.up_proj``, ``0.down_proj``, ``1.gate_proj``, ... share the memory of the parameters, so that
what is written into them is written into the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ptqkit._repr import one_line_repr
from ptqkit.errors import CalibrationError

__all__ = ["ExpertLinears", "ExpertShape", "RoutedRows", "expert_shape", "routed_rows"]

_MARK = "ptqkit_routed"
# Classes without the attributes that tell how the others store their weights: (in, out), halves.
_TRANSPOSED = ("Llama4TextExperts",)


@dataclass(frozen=True)
class ExpertShape:
    """How a module stores its experts.

    Attributes
    ----------
    experts, hidden, inner : int
        Number of experts; inputs of the first projections; outputs of each.
    transposed : bool
        Weights are (experts, in, out).
    interleaved : bool
        Gate and up projections take turns, output by output.
    gated : bool
        There is a gate: ``gate_up_proj``; otherwise ``up_proj``.
    biased : bool
    scores_first : bool
        The module is given the inputs of all experts, scaled by their scores, expert by expert, and
        zeros where a token was not routed (Llama 4).
    """

    __repr__ = one_line_repr

    experts: int
    hidden: int
    inner: int
    transposed: bool = False
    interleaved: bool = False
    gated: bool = True
    biased: bool = False
    scores_first: bool = False

    @property
    def first(self) -> str:
        """Name of the parameter with the first projections."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of an expert's linear layers, in order of execution."""
        return ("gate_proj", "up_proj", "down_proj") if self.gated else ("up_proj", "down_proj")


def expert_shape(module: nn.Module) -> ExpertShape | None:
    """Return how a module stores its experts; None if it is no such module, or of unknown kind."""
    parameters = module._parameters
    down, kind = parameters.get("down_proj"), type(module).__name__
    gated = parameters.get("gate_up_proj") is not None
    first = parameters.get("gate_up_proj" if gated else "up_proj")
    if first is None or down is None or first.dim() != 3 or down.dim() != 3:
        return None
    told = hasattr(module, "is_concatenated") and hasattr(module, "is_transposed")
    if not told and kind not in _TRANSPOSED:
        return None
    transposed = bool(getattr(module, "is_transposed", True))
    rows, columns = first.shape[1:]
    hidden, outputs = (rows, columns) if transposed else (columns, rows)
    inner = outputs // 2 if gated else outputs
    wanted = (inner, hidden) if transposed else (hidden, inner)
    if tuple(down.shape[1:]) != wanted or len(down) != len(first):
        return None
    biases = ("gate_up_proj_bias" if gated else "up_proj_bias", "down_proj_bias")
    biased = all(parameters.get(name) is not None for name in biases)
    return ExpertShape(
        len(first),
        hidden,
        inner,
        transposed,
        gated and not getattr(module, "is_concatenated", True),
        gated,
        biased,
        not told,
    )


@dataclass(frozen=True, eq=False)
class RoutedRows:
    """What the input of an expert's layer consists of.

    Attributes
    ----------
    experts : str
        Name of the module that routed them.
    rows : Tensor of int64, shape (rows,)
        Token of the batch that each row belongs to, of all positions in order.
    tokens : int
        Positions of the batch.
    pool : Tensor, shape (pool, in)
        What the layer would be given if every token came to this expert; of a second layer only if
        its expert was found to have too few tokens.
    pool_rows : Tensor of int64, shape (pool,)
        As ``rows``, of the pool.
    everything : bool
        ``rows`` are those of the pool: all tokens calibrate every expert.
    in_order : bool
        Every token of the batch comes once, in order.
    """

    __repr__ = one_line_repr

    experts: str
    rows: torch.Tensor
    tokens: int
    pool: torch.Tensor | None
    pool_rows: torch.Tensor
    everything: bool = False
    in_order: bool = False

    def of_pool(self) -> torch.Tensor:
        """Return the pool, marked with its own rows."""
        assert self.pool is not None
        pool = self.pool.view_as(self.pool)
        said = RoutedRows(self.experts, self.pool_rows, self.tokens, None, self.pool_rows)
        setattr(pool, _MARK, said)
        return pool


def routed_rows(value: torch.Tensor) -> RoutedRows | None:
    """Return what :class:`ExpertLinears` says of an input of its layers; None of any other."""
    return getattr(value, _MARK, None)


@dataclass(frozen=True, eq=False)
class _Routed:
    """The tokens of one expert: its inputs, their tokens, and their places in the pool."""

    __repr__ = one_line_repr

    inputs: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor


class _Expert(nn.Module):
    """The linear layers of one expert."""


class ExpertLinears(nn.Module):
    """One linear layer per expert and projection, in the place of a module with 3-D parameters.

    While it is calibrated, each expert's layers are run one after the other on the tokens routed to
    the expert, and all experts in turn, also those that get none: so every batch meets the same
    layers. Otherwise the module computes what the one it stands for computes, by the same
    operations, from the weights that its layers have.

    Parameters
    ----------
    fused : nn.Module
        What it stands for; it is kept, but not as a submodule.
    name : str
        For messages.
    share : bool
        The layers share the memory of ``fused``'s parameters; otherwise they are on the meta
        device, to be filled, and the parameters of ``fused`` are given up.

    Attributes
    ----------
    shape : ExpertShape
    calibrating : bool
        See above.
    every_token : bool
        While it is calibrated, every expert's layers see all tokens; the outputs stay those of the
        routed ones.
    short : set of int
        Experts with too few tokens: their last layer is given the pool along.
    """

    def __init__(self, fused: nn.Module, name: str, share: bool = True) -> None:
        super().__init__()
        shape = expert_shape(fused)
        if shape is None:
            raise ValueError(f"{name}: {type(fused).__name__} has no experts of a known form")
        self.shape, self.name = shape, name
        self.calibrating = self.every_token = False
        self.short: set[int] = set()
        self.__dict__["fused"] = fused
        self._stacks: dict[str, torch.Tensor] = {}
        for index in range(shape.experts):
            expert = _Expert()
            for projection in shape.projections:
                weight, bias = self._parts(fused, index, projection)
                expert.add_module(projection, _linear(weight, bias, share))
            self.add_module(str(index), expert)
        if not share:
            for parameter in [*fused._parameters]:
                fused._parameters.pop(parameter)
        self.train(fused.training)

    def _parts(
        self, fused: nn.Module, index: int, projection: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return views of an expert's weight (out, in) and bias."""

        def part(what: str) -> torch.Tensor:
            values = fused.get_parameter(self.joined_name(projection, what)).detach()
            return self.part(values, index, projection)

        return part("weight"), part("bias") if self.shape.biased else None

    def joined_name(self, projection: str, what: str) -> str:
        """Return the parameter of the module that holds a projection's weights, or its biases."""
        parameter = "down_proj" if projection == "down_proj" else self.shape.first
        return parameter if what == "weight" else f"{parameter}_bias"

    def part(self, values: torch.Tensor, index: int, projection: str) -> torch.Tensor:
        """Return an expert's weight (out, in), or bias (out,), as a view of such a parameter."""
        own = values[index]
        own = own.T if self.shape.transposed and own.dim() == 2 else own
        return own[self._rows(projection)]

    def _rows(self, projection: str) -> slice:
        """Return the outputs of a projection among those of the joined ones."""
        if projection == "down_proj" or not self.shape.gated:
            return slice(None)
        second = projection == "up_proj"
        if self.shape.interleaved:
            return slice(int(second), None, 2)
        return slice(self.shape.inner, None) if second else slice(0, self.shape.inner)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            fused = self.__dict__.get("fused")
            if fused is None or name.startswith("__"):
                raise
            if name in (self.shape.first, "down_proj"):
                return self._stack(name)
            if self.shape.biased and name in (f"{self.shape.first}_bias", "down_proj_bias"):
                return torch.stack([self._joined(name, i) for i in range(self.shape.experts)])
            return getattr(fused, name)

    def linears(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the layers with their names within this module."""
        for index in range(self.shape.experts):
            for projection in self.shape.projections:
                yield f"{index}.{projection}", self.get_submodule(f"{index}.{projection}")

    def _stack(self, parameter: str) -> Any:
        """Return the 3-D parameter: expert by expert if the module reads it so."""
        settings = getattr(self.__dict__["fused"], "config", None)
        if not self.shape.scores_first and (
            getattr(settings, "_experts_implementation", None) == "eager"
        ):
            return _ByExpert(lambda index: self._joined(parameter, index), self.shape.experts)
        if parameter not in self._stacks:
            first = self._joined(parameter, 0)
            stack = first.new_empty((self.shape.experts, *first.shape))
            stack[0] = first
            for index in range(1, self.shape.experts):
                stack[index] = self._joined(parameter, index)
            self._stacks[parameter] = stack
        return self._stacks[parameter]

    def _joined(self, parameter: str, index: int) -> torch.Tensor:
        """Return one expert's part of a parameter, as it is stored."""
        what = "bias" if parameter.endswith("_bias") else "weight"
        last = parameter.startswith("down_proj")
        projections = self.shape.projections[-1:] if last else self.shape.projections[:-1]
        parts = [getattr(self.get_submodule(f"{index}.{p}"), what) for p in projections]
        if len(parts) == 1:
            joined = parts[0]
        elif self.shape.interleaved:
            joined = torch.stack(parts, 1).flatten(0, 1)
        else:
            joined = torch.cat(parts)
        # A transposed one is laid out as it was stored: the products then round alike.
        return joined.T.contiguous() if self.shape.transposed and joined.dim() == 2 else joined

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute what the module with 3-D parameters computes."""
        given = [*args, *kwargs.values()]
        if self.calibrating or self._runs_by_itself():
            if self.shape.scores_first:
                return self._scored(hidden_states)
            return self._routed(hidden_states, *given)
        try:
            return type(self.__dict__["fused"]).forward(self, hidden_states, *args, **kwargs)
        finally:
            self._stacks.clear()

    def _runs_by_itself(self) -> bool:
        """Whether a layer computes otherwise than by its weight."""
        return any(getattr(m, "compute", "dequantize") != "dequantize" for _, m in self.linears())

    def _scored(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run all experts on inputs that come expert by expert, with zeros for other tokens."""
        flat = hidden.reshape(self.shape.experts, -1, self.shape.hidden)
        reached = flat.ne(0).any(-1)
        pool_rows = reached.nonzero()[:, 1]
        pool = flat[reached]
        self._check(pool, "inputs")
        result, start = torch.zeros_like(flat), 0
        for index in range(self.shape.experts):
            rows = reached[index].nonzero()[:, 0]
            places = torch.arange(start, start + len(rows), dtype=torch.int64, device=rows.device)
            routed = _Routed(flat[index, rows], rows, places)
            start += len(rows)
            result[index, rows] = self._expert(index, routed, flat.shape[1], pool, pool_rows)
        return result.view(hidden.shape)

    def _routed(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Run all experts on the tokens that ``chosen`` (tokens, k) sends to them."""
        self._check(weights, "routing weights")
        tokens, experts = len(hidden), self.shape.experts
        flat, k = chosen.reshape(-1), chosen.shape[-1]
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=experts).tolist()
        every = torch.arange(tokens, dtype=torch.int64, device=hidden.device)
        result, start = torch.zeros_like(hidden), 0
        for index in range(experts):
            pairs = order[start : start + counts[index]]
            start += counts[index]
            rows = pairs.div(k, rounding_mode="floor")
            out = self._expert(index, _Routed(hidden[rows], rows, rows), tokens, hidden, every)
            out = out * weights.reshape(-1)[pairs, None]
            result.index_add_(0, rows, out.to(result.dtype))
        return result

    def _check(self, values: torch.Tensor, what: str) -> None:
        if self.calibrating and not bool(torch.isfinite(values).all()):
            raise CalibrationError(
                f"{self.name}: the {what} hold values that are not finite; is the router, or the "
                "model before it, damaged, or its dtype too narrow?"
            )

    def _expert(
        self,
        index: int,
        routed: _Routed,
        tokens: int,
        pool: torch.Tensor,
        pool_rows: torch.Tensor,
    ) -> torch.Tensor:
        """Run one expert's layers, with marks on their inputs while they are calibrated."""
        layers = [self.get_submodule(f"{index}.{p}") for p in self.shape.projections]
        if not self.calibrating:
            inner = self._activate([layer(routed.inputs) for layer in layers[:-1]])
            return self._last(inner, layers[-1])

        def mark(value: torch.Tensor, beyond: torch.Tensor | None, all_rows: bool) -> torch.Tensor:
            found = pool_rows if all_rows else routed.rows
            in_order = all_rows and not self.shape.scores_first
            said = RoutedRows(self.name, found, tokens, beyond, pool_rows, all_rows, in_order)
            setattr(value, _MARK, said)
            return value

        if self.every_token:
            # The very tensor: layers that are fed by it share its moments.
            seen = mark(pool.view_as(pool), None, True)
            inner = self._activate([layer(seen) for layer in layers[:-1]])
            out = self._last(mark(inner, None, True), layers[-1])
            return out[routed.places]
        seen = mark(routed.inputs, pool, False)
        inner = self._activate([layer(seen) for layer in layers[:-1]])
        beyond = None
        if index in self.short:
            # Not by calling the layers, whose hooks would take it for their own input.
            beyond = self._activate([F.linear(pool, m.weight, m.bias) for m in layers[:-1]])
        return self._last(mark(inner, beyond, False), layers[-1])

    def _activate(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        if not self.shape.gated:
            return self.act_fn(outputs[0])
        if self.shape.scores_first:
            return outputs[1] * self.act_fn(outputs[0])
        if self.shape.interleaved:
            return self._apply_gate(torch.stack(list(outputs), -1).flatten(-2))
        return self._apply_gate(torch.cat(list(outputs), -1))

    def _last(self, inner: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        out = layer(inner)
        if getattr(self, "has_post_expert_norm", False):
            out = self.post_expert_norm(out)
        return out

    def extra_repr(self) -> str:
        """Return what it stands for, for ``print(model)``."""
        return f"{type(self.__dict__['fused']).__name__}, {self.shape.experts} experts"


class _ByExpert:
    """A 3-D parameter of which one expert at a time is made."""

    def __init__(self, make: Callable[[int], torch.Tensor], experts: int) -> None:
        self._make, self._experts = make, experts

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._make(int(index))

    def __len__(self) -> int:
        return self._experts


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, share: bool) -> nn.Linear:
    """Return a linear layer with these very tensors, or one like it without data."""
    # As nn.Linear makes it, but for random numbers, which take long for thousands of experts.
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape

    def parameter(value: torch.Tensor) -> nn.Parameter:
        if not share:
            value = torch.empty(value.shape, dtype=value.dtype, device="meta")
        return nn.Parameter(value, requires_grad=False)

    layer.weight = parameter(weight)
    layer.register_parameter("bias", None if bias is None else parameter(bias))
    return layer
