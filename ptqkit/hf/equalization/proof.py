"""Find and prove the folds of one block by running it with scaled channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ptqkit.hf.equalization.fold import Fold, apply_fold, uninterrupted
from ptqkit.hf.equalization.layouts import channel_layouts, row_layouts
from ptqkit.hf.equalization.trace import (
    BlockCall,
    Call,
    changed_inputs,
    is_norm,
    relative_difference,
    run_block,
    scaled_output,
    trace_block,
)
from ptqkit.nn.linear import LinearView, is_linear

__all__ = ["TOLERANCE", "BlockProver", "random_scales"]

#: Largest relative difference of a proof. Its scales are powers of two, which the arithmetic
#: carries exactly: what is left is a few units in the last place.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
# Linear layers before a consumer that may produce what it reads.
_CANDIDATES = 8


def random_scales(channels: int, generator: np.random.Generator) -> np.ndarray:
    """Random powers of two from 1/4 to 4, float64 (channels,)."""
    return 2.0 ** generator.integers(-2, 3, channels)


@dataclass
class _Seen:
    """Effect of scaling a producer's outputs on its consumers' inputs.

    Attributes
    ----------
    exponents : ndarray of float64, shape (in,), or None
        Log2 of the factor of every input channel; NaN for channels that are all zero; None if
        the inputs are not the old ones times a factor per channel.
    reached : bool
        Whether the inputs changed at all.
    readers : list of str
        What else changed: other linear layers, or ``"the block's output"``.
    """

    exponents: np.ndarray | None
    reached: bool
    readers: list[str]


class BlockProver:
    """Looks for the folds of one block; the model is unchanged afterwards, bit for bit.

    Parameters
    ----------
    model : nn.Module
    name : str
        Of the block.
    call : BlockCall
        What it was given in a short forward pass.
    heads : sequence of int
        Head sizes to try first.
    taken : mapping of str to str
        Layers that must stay as they are, with the reason (shared modules and weights).
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        call: BlockCall,
        heads: Sequence[int],
        taken: Mapping[str, str],
    ) -> None:
        self.model, self.name, self.call, self.heads = model, name, call, heads
        self.block = model.get_submodule(name)
        self.taken = taken
        self.trace = trace_block(name, self.block, call)
        self.clean = {c.name: c.inputs for c in self.trace.linears}
        self.modules = {c.name: c.module for c in self.trace.linears}
        self.generator = np.random.default_rng(0)
        self.folds: list[Fold] = []
        self.left_alone: dict[str, str] = {}

    def run(self) -> None:
        """Fill ``folds`` and ``left_alone``."""
        for name, count in self.trace.counts.items():
            if count == 0:
                self.left_alone[name] = "the forward pass does not call it"
            elif count > 1:
                self.left_alone[name] = f"it runs {count} times in one forward pass"
        groups: dict[Any, list[Call]] = {}
        for made in self.trace.linears:
            groups.setdefault(made.source, []).append(made)
        for group in groups.values():
            found = self._find(group)
            if isinstance(found, Fold):
                self.folds.append(found)
            else:
                self.left_alone[", ".join(c.name for c in group)] = found
        self._prove_parameters()

    def tolerance(self, call: Call) -> float:
        """Return the stated tolerance of a layer's dtype."""
        return TOLERANCE.get(LinearView(call.module).weight.dtype, TOLERANCE[torch.float32])

    def _find(self, group: list[Call]) -> Fold | str:
        """Return the fold of a group of consumers, or the reason why there is none."""
        for made in group:
            if made.name in self.taken:
                return self.taken[made.name]
        reasons: list[str] = []
        through: list[Call] = []
        for producer in self._candidates(group[0]):
            if producer.name in self.taken:
                reasons.append(self.taken[producer.name])
                continue
            found = self._try(producer, group)
            if isinstance(found, Fold):
                return found
            if found == "not proportional":
                through.append(producer)
            elif found:
                reasons.append(found)
        if reasons:
            return reasons[0]
        return self._why_not(group[0], through)

    def _candidates(self, consumer: Call) -> Iterator[Call]:
        """Return the layers that may produce what a consumer reads, the likely ones first."""
        calls = self.trace.calls
        before = calls[: calls.index(consumer)]
        width = consumer.inputs.shape[-1]
        for made in reversed(before):
            if made.result == consumer.source and is_norm(made.module, width):
                if sum(c.name == made.name for c in calls) == 1:
                    yield made
                return
        linears = [c for c in reversed(before) if c.name in self.modules]
        yield from linears[:_CANDIDATES]

    def _try(self, producer: Call, group: list[Call]) -> Fold | str:
        """Prove that a layer produces what a group reads; else return why not ("" if unrelated)."""
        names = tuple(c.name for c in group)
        width, outputs = group[0].inputs.shape[-1], producer.outputs.shape[-1]
        reached = False
        for rows in row_layouts(outputs, width, self.heads):
            factors = np.ones(outputs)
            factors[rows] = random_scales(len(rows), self.generator)
            seen = self._scale(producer, factors, group)
            if not seen.reached:
                break
            reached = True
            if seen.exponents is None:
                continue
            channel_of = self._match(seen.exponents, factors[rows], width)
            if channel_of is None:
                continue
            if seen.readers:
                return f"what {producer.name} returns is also read by {' and '.join(seen.readers)}"
            kind = "norm" if not is_linear(producer.module) else self._kind(producer, rows, group)
            return Fold(kind, producer.name, names, channel_of, rows)
        return "not proportional" if reached else ""

    def _match(self, exponents: np.ndarray, factors: np.ndarray, width: int) -> np.ndarray | None:
        """Return the layout of channels that explains the factors found at the consumers."""
        known = np.isfinite(exponents)
        if not known.any():
            return None
        for channel_of in channel_layouts(len(factors), width, self.heads):
            if np.array_equal(np.log2(factors)[channel_of][known], exponents[known]):
                return channel_of
        return None

    def _scale(self, producer: Call, factors: np.ndarray, group: list[Call]) -> _Seen:
        """Scale a layer's outputs, and look at what every linear layer of the block reads.

        Each of them is then given what it reads in the unchanged model: so a change that is seen
        came from this layer directly, and one in the block's output came past all of them.
        """
        tolerance = self.tolerance(group[0])
        read: dict[str, torch.Tensor] = {}

        def change(name: str, value: torch.Tensor) -> torch.Tensor:
            read[name] = value
            return self.clean[name]

        scale = torch.from_numpy(factors)
        with scaled_output(producer.module, scale), changed_inputs(self.modules, change):
            outputs = run_block(self.block, self.call)
        names = [c.name for c in group]
        readers = [
            name
            for name, value in read.items()
            if name not in names and relative_difference([value], [self.clean[name]]) > tolerance
        ]
        if relative_difference(outputs, self.trace.outputs) > tolerance:
            readers.append("something outside its consumers (a residual, a router)")
        new, old = read[names[0]], group[0].inputs
        reached = new.shape != old.shape or not torch.equal(new, old)
        return _Seen(_exponents(new, old, tolerance), reached, readers)

    def _kind(self, producer: Call, rows: np.ndarray, group: list[Call]) -> str:
        """Tell by the signs: only a ReLU does not turn with them, only attention mixes tokens."""
        width = producer.outputs.shape[-1]
        tokens = producer.outputs.numel() // width
        signs = torch.ones(tokens, width, dtype=torch.float32)
        signs[0, torch.from_numpy(rows)] = -1.0
        read: list[torch.Tensor] = []

        def change(name: str, value: torch.Tensor) -> torch.Tensor:
            if name == group[0].name:
                read.append(value)
            return self.clean[name]

        with scaled_output(producer.module, signs), changed_inputs(self.modules, change):
            run_block(self.block, self.call)
        new = read[0].reshape(-1, read[0].shape[-1])
        old = group[0].inputs.reshape(new.shape)
        if not torch.equal(new[1:], old[1:]):
            return "value"
        turned = relative_difference([new[:1]], [-old[:1]]) <= self.tolerance(group[0])
        return "up" if turned else "relu"

    def _prove_parameters(self) -> None:
        """Scale the parameters themselves, and compare what the block returns."""
        if not self.folds or self._survives(self.folds):
            return
        proven = []
        for fold in self.folds:
            choices = [fold, replace(fold, offset=1.0)] if fold.kind == "norm" else [fold]
            good = next((c for c in choices if self._survives([c])), None)
            if good is not None:
                proven.append(good)
            else:
                self.left_alone[", ".join(fold.consumers)] = (
                    f"scaling the parameters of {fold.producer} does not scale what it returns "
                    "within the precision of its dtype"
                )
        self.folds = proven

    def _survives(self, folds: list[Fold]) -> bool:
        """Return whether the block returns the same with the folds applied; they are undone."""
        parameters = list(_parameters(self.model, folds))
        saved = [p.detach().clone() for p in parameters]
        tolerance = min(TOLERANCE.get(p.dtype, 1e-5) for p in parameters)
        with uninterrupted():
            try:
                for fold in folds:
                    apply_fold(self.model, fold, random_scales(fold.channels, self.generator))
                outputs = run_block(self.block, self.call)
            except ValueError:  # out of the range of the dtype
                return False
            finally:
                with torch.no_grad():
                    for parameter, values in zip(parameters, saved, strict=True):
                        parameter.copy_(values)
        return relative_difference(outputs, self.trace.outputs) <= tolerance

    def _why_not(self, consumer: Call, through: list[Call]) -> str:
        calls = self.trace.calls
        before = calls[: calls.index(consumer)]
        for made in reversed(before):
            if made.result == consumer.source and not is_linear(made.module):
                kind = type(made.module).__name__
                if is_norm(made.module, consumer.inputs.shape[-1]):
                    return f"{made.name} ({kind}) runs more than once in one forward pass"
                if "Norm" in kind:
                    return f"{made.name} ({kind}) has no gain to fold into"
        if through:
            start = min(calls.index(p) for p in through)
            between = {
                type(c.module).__name__
                for c in before[start:]
                if c.module is not consumer.module
                and next(c.module.parameters(), None) is None
                and not isinstance(c.module, nn.Dropout)
            }
            by = f" ({', '.join(sorted(between))})" if between else ""
            names = ", ".join(p.name for p in reversed(through))
            return f"between it and {names} stands something that no scale commutes with{by}"
        if consumer.source in self.trace.inputs:
            return "it reads the block's own input: no norm or linear layer of the block before it"
        return "no norm or linear layer of the block returns what it reads"


def _exponents(new: torch.Tensor, old: torch.Tensor, tolerance: float) -> np.ndarray | None:
    """Return log2 of new / old per channel if it is the same power of two for every token."""
    if new.shape != old.shape:
        return None
    new = new.detach().reshape(-1, new.shape[-1]).double().cpu()
    old = old.detach().reshape(-1, old.shape[-1]).double().cpu()
    size, where = old.abs().max(dim=0)
    ratio = new.gather(0, where[None])[0] / old.gather(0, where[None])[0]
    live = size > 0
    if not bool(torch.isfinite(new).all()) or bool((ratio[live] <= 0).any()):
        return None
    exponents = torch.where(live, torch.log2(ratio).round(), torch.nan)
    factors = torch.where(live, 2.0**exponents, 1.0)
    if bool(((new - old * factors).abs().amax(dim=0) > tolerance * size * factors).any()):
        return None
    return exponents.numpy()


def _parameters(model: nn.Module, folds: list[Fold]) -> Iterator[nn.Parameter]:
    names = {n: None for f in folds for n in (f.producer, *f.consumers)}
    for name in names:
        yield from model.get_submodule(name).parameters(recurse=False)
