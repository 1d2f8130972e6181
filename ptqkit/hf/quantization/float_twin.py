"""The float model next to one that is being quantized in memory: all but a few weights are shared.

Each module has a second one of its own, with hooks and attributes of its own, that holds the same
parameters. A layer's second one gets a copy of the float weight before the layer is quantized, and
lets go of it when its block is finished. So the memory is that of one block's weights.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ptqkit.hf.models.structure import Target

__all__ = ["FloatTwin", "twin_bytes"]

# Tables of every module: of parameters, buffers, modules and hooks.
_TABLES = frozenset(key for key, value in nn.Module().__dict__.items() if isinstance(value, dict))


class FloatTwin:
    """A model that computes what the float model would, while that is quantized.

    Parameters
    ----------
    model : nn.Module
        Still in float, as far as it is to be run.
    targets : mapping of str to Target
        The layers of the model whose weights will change.

    Attributes
    ----------
    model : nn.Module
        Of the same classes and names. What is no module, parameter or table of those is the very
        object that the first model has: settings, buffers, caches.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, Target]) -> None:
        self.model = _second(model)
        self._targets = targets
        # Per layer with a float weight of its own: the parameter that it shared.
        self._shared: dict[str, nn.Parameter] = {}

    def keep(self, names: Iterable[str]) -> None:
        """Give layers that are about to be quantized their float weights as a copy."""
        for name in names:
            layer = self.model.get_submodule(name)
            if name not in self._shared:
                shared = self._shared[name] = layer.get_parameter("weight")
                own = nn.Parameter(shared.detach().clone(), requires_grad=False)
                layer._parameters["weight"] = own

    def let_go(self, block: str | None = None) -> None:
        """Drop the copies of a finished block, or all: the layers share their weights again."""
        for name in list(self._shared):
            if block is None or self._targets[name].block == block:
                layer = self.model.get_submodule(name)
                layer._parameters["weight"] = self._shared.pop(name)


def twin_bytes(targets: Mapping[str, Target], groups: Sequence[Sequence[str]]) -> int:
    """Return the most bytes that a twin's copies take at once; groups are in order of execution."""
    held: Counter[str | None] = Counter()
    most, current = 0, None
    for group in groups:
        block = targets[group[0]].block
        if block not in (None, current):  # those of the block before are gone
            if current is not None:
                held.pop(current, None)
            current = block
        for name in group:
            weight = targets[name].view.weight
            held[targets[name].block] += weight.numel() * weight.element_size()
        most = max(most, held.total())
    return most


def _second(model: nn.Module) -> nn.Module:
    """Return a second tree of modules with the parameters and buffers of the first."""
    pairs: dict[int, nn.Module] = {}
    for module in model.modules():
        kind = type(module)
        # What TorchScript has compiled has no attributes to be copied, and no layers of ours.
        scripted = isinstance(module, torch.jit.ScriptModule)
        pairs[id(module)] = module if scripted else object.__new__(kind)
    for module in model.modules():
        other = pairs[id(module)]
        if other is module:
            continue
        for key, value in module.__dict__.items():
            found = _mapped(value, pairs)
            other.__dict__[key] = copy.copy(found) if key in _TABLES else found
    return pairs[id(model)]


def _mapped(value: Any, pairs: Mapping[int, nn.Module]) -> Any:
    """Return what a second module has in the place of an attribute of the first.

    That is the attribute itself, unless it is a module of the tree, a method of one, or a table or
    partial function with such.
    """
    if isinstance(value, nn.Module):
        return pairs.get(id(value), value)
    if isinstance(value, types.MethodType):
        owner = _mapped(value.__self__, pairs)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if type(value) is functools.partial:
        own = (value.func, value.args, value.keywords)
        function, arguments, named = found = tuple(_mapped(v, pairs) for v in own)
        if all(a is b for a, b in zip(found, own, strict=True)):
            return value
        partial = functools.partial(function, *arguments, **named)
        partial.__dict__.update(value.__dict__)
        return partial
    if type(value) in (dict, OrderedDict):
        items = {k: _mapped(v, pairs) for k, v in value.items()}
        same = all(items[k] is v for k, v in value.items())
        return value if same else type(value)(items)
    if type(value) in (list, tuple):
        parts = [_mapped(v, pairs) for v in value]
        same = all(a is b for a, b in zip(parts, value, strict=True))
        return value if same else type(value)(parts)
    return value
