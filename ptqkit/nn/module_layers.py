"""The layers of any torch module that can be quantized, and when they run on what."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ptqkit._repr import one_line_repr
from ptqkit.errors import Problems, UnsupportedModuleError
from ptqkit.nn.activations import installed_quantizer
from ptqkit.nn.convolution import CONVOLUTIONS, ConvolutionView, is_convolution
from ptqkit.nn.forward import hooks, tensor_key
from ptqkit.nn.linear import LinearView, is_linear
from ptqkit.nn.matrix_solver import obq_problem
from ptqkit.nn.quantized_mark import is_quantized
from ptqkit.recipe.groups import group_size_problem
from ptqkit.recipe.recipe import Recipe

__all__ = ["ModuleLayer", "Order", "find_layers", "left_float", "probe_order"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Subclasses with a forward of their own may do something else with their weight.
_FORWARDS = {kind.forward for kind in (nn.Linear, *CONVOLUTIONS)}


@dataclass(frozen=True, eq=False)
class ModuleLayer:
    """One layer to quantize.

    Attributes
    ----------
    name : str
    view : LinearView or ConvolutionView
    options : Recipe
        The recipe with the overrides for this layer applied.
    """

    __repr__ = one_line_repr

    name: str
    view: LinearView
    options: Recipe

    @property
    def module(self) -> nn.Module:
        """The module itself, for hooks."""
        return self.view.module

    @property
    def groups(self) -> int:
        """Runs of outputs with a Hessian of their own."""
        return self.view.groups if isinstance(self.view, ConvolutionView) else 1

    @property
    def geometry(self) -> tuple[Any, ...]:
        """What its Hessian depends on, other than its input."""
        if not isinstance(self.view, ConvolutionView):
            return ()
        m = self.view.module
        return (m.kernel_size, m.stride, m.padding, m.dilation, m.groups, m.padding_mode)


@dataclass
class Order:
    """When layers run.

    Attributes
    ----------
    groups : list of list of str
        In order of the first call; layers together that have one tensor as input in every batch.
    calls : list of dict of str to int
        Per batch, how often each layer runs.
    """

    __repr__ = one_line_repr

    groups: list[list[str]] = field(default_factory=list)
    calls: list[dict[str, int]] = field(default_factory=list)


def find_layers(
    model: nn.Module, recipe: Recipe, calibrated: bool, threads: int = 0
) -> dict[str, ModuleLayer]:
    """Find linear layers and convolutions, and refuse at once what cannot be quantized.

    Raises
    ------
    PreflightError
        With all problems.
    """
    problems = Problems()
    found: dict[str, ModuleLayer] = {}
    names = dict(model.named_modules())
    owners: dict[int, list[str]] = {}
    for name, module in names.items():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    for name, module in names.items():
        options = recipe.for_layer(name) if is_linear(module) or is_convolution(module) else None
        if options is None:
            continue
        text = _obstacle(name, module, owners)
        if text:
            problems.add(f"{name}: {text}; add an override 'skip'", UnsupportedModuleError)
            continue
        view = ConvolutionView(module) if is_convolution(module) else LinearView(module)
        found[name] = ModuleLayer(name, view, options)
    for pattern in recipe.unmatched(names):
        problems.add(f"pattern {pattern!r} of the recipe matches no module of the model")
    for layer in found.values():
        _check_layer(problems, layer, calibrated)
    slow = {
        n: (x.view.shape[0], x.view.shape[1]) for n, x in found.items() if x.options.method == "obq"
    }
    if text := obq_problem(slow, threads):
        problems.add(text, UnsupportedModuleError)
    if not found and not problems.found:
        problems.add(
            f"{type(model).__name__} has no linear layer or convolution to quantize",
            UnsupportedModuleError,
        )
    problems.raise_if_any(found)
    return found


def left_float(model: nn.Module, layers: Container[str]) -> dict[str, str]:
    """Return what holds matrices, or kernels, and is none of these layers: names and kinds."""
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if name not in layers and any(p.dim() > 1 for p in module.parameters(recurse=False))
    }


def _obstacle(name: str, module: nn.Module, owners: dict[int, list[str]]) -> str:
    """Return why a layer cannot be quantized; empty if nothing shows."""
    kind = type(module).__name__
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return f"the weight of this {kind} is computed from others (a parametrization)"
    weight: Any = module._parameters["weight"]
    if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
        return f"this {kind} has no weight yet"
    if weight.device.type == "meta":
        return f"the weight of this {kind} is on the meta device: load the weights first"
    if weight.dtype not in _FLOATS:
        return f"this {kind} holds a weight of {weight.dtype}"
    if type(module).forward not in _FORWARDS and kind != "Conv1D":
        return f"{kind} has a forward of its own, which may change its weight or input"
    others = [o for o in owners[id(weight)] if o != name]
    if others:
        return f"this {kind} shares its weight with {', '.join(others)}"
    return ""


def _check_layer(problems: Problems, layer: ModuleLayer, calibrated: bool) -> None:
    options, columns = layer.options, layer.view.shape[1]
    if text := group_size_problem(layer.name, columns, options.group_size):
        problems.add(text)
    permuted = options.method == "gptq" and options.order == "act" and not options.static_groups
    if permuted and options.group_size is not None and layer.groups > 1:
        problems.add(
            f"{layer.name}: order 'act' permutes the inputs of each of its {layer.groups} groups "
            "in another way; use static_groups=True or order 'group-act'"
        )
    if options.needs_calibration() and not calibrated:
        problems.add(f"{layer.name}: {options.needs_calibration()} needs batches")
    if is_quantized(layer.module) or installed_quantizer(layer.module) is not None:
        problems.add(
            f"{layer.name}: this layer is quantized already; load the float model again",
            UnsupportedModuleError,
        )
    weight = layer.view.weight
    # A sum is finite only if every term is; it may overflow, so look twice before complaining.
    if not math.isfinite(float(weight.sum(dtype=torch.float32))):
        count = int((~torch.isfinite(weight)).sum())
        if count:
            problems.add(f"{layer.name}: {count} of its {weight.numel()} weights are not finite")


def probe_order(
    layers: dict[str, ModuleLayer], batches: Sequence[Any], run: Callable[[Any], None]
) -> Order:
    """Run all batches through the float model and note which layers run when, and on what.

    Raises
    ------
    PreflightError
        If a layer is never called.
    """
    order = Order()
    first: dict[str, int] = {}
    inputs: dict[str, list[Any]] = {name: [] for name in layers}
    for index, batch in enumerate(batches):
        calls = dict.fromkeys(layers, 0)
        # Kept until the batch ends, so that no address is used twice.
        alive: list[torch.Tensor] = []

        def record(
            name: str,
            value: torch.Tensor,
            calls: dict[str, int] = calls,
            alive: list[torch.Tensor] = alive,
            index: int = index,
        ) -> None:
            calls[name] += 1
            first.setdefault(name, len(first))
            alive.append(value)
            inputs[name].append((index, tensor_key(value)))

        with hooks({n: x.module for n, x in layers.items()}, record):
            run(batch)
        order.calls.append(calls)
    problems = Problems()
    for name in layers:
        if name not in first:
            problems.add(
                f"{name}: never called by the model's forward on these batches (its weight may be "
                "used directly); add an override 'skip'",
                UnsupportedModuleError,
            )
    problems.raise_if_any(layers)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in sorted(first, key=first.__getitem__):
        groups.setdefault(tuple(inputs[name]), []).append(name)
    order.groups = list(groups.values())
    return order
