"""The experts of a model, one linear layer each, while they are quantized or written."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from ptqkit.nn.experts import ExpertLinears, ExpertShape, expert_shape
from ptqkit.nn.quantized_mark import marks_of, put_marks
from ptqkit.recipe.recipe import Recipe

__all__ = [
    "ExpertSwap",
    "expert_modules",
    "replace_experts",
    "saved_expert_names",
    "wanted_by",
    "wanted_for",
]

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def expert_modules(model: nn.Module) -> dict[str, ExpertLinears]:
    """Return the modules of ``model`` that hold one linear layer per expert, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ExpertLinears)}


def replace_experts(
    model: nn.Module, wanted: Callable[[str], bool], share: bool = True
) -> dict[str, ExpertLinears]:
    """Put :class:`ExpertLinears` in the place of modules with fused experts.

    Parameters
    ----------
    model : nn.Module
    wanted : callable
        Whether to replace the module of this name.
    share : bool
        As for :class:`ExpertLinears`.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if name and expert_shape(module) is not None and wanted(name)
    ]
    replaced = {name: ExpertLinears(module, name, share) for name, module in found}
    for name, module in replaced.items():
        model.set_submodule(name, module)
    return replaced


class ExpertSwap:
    """Experts as linear layers for a while, sharing the memory of the model's own parameters.

    Parameters
    ----------
    model : nn.Module
    wanted : callable
        Whether the module of this name is meant.

    Attributes
    ----------
    modules : dict of str to ExpertLinears
    """

    def __init__(self, model: nn.Module, wanted: Callable[[str], bool]) -> None:
        self._model, self._wanted = model, wanted
        self.modules: dict[str, ExpertLinears] = {}

    def __enter__(self) -> ExpertSwap:
        self.modules = replace_experts(self._model, self._wanted)
        for module in self.modules.values():
            put_marks(module.fused, module)
        return self

    def __exit__(self, *_: Any) -> None:
        for name, module in self.modules.items():
            self._model.set_submodule(name, module.fused)
            module.fused.train(module.training)
            marks_of(module, module.fused)
        self.modules = {}

    @contextlib.contextmanager
    def calibrating(self, every_token: bool) -> Iterator[None]:
        """Run each expert by its layers, on the tokens routed to it or (but for its use) on all."""
        for module in self.modules.values():
            module.calibrating, module.every_token = True, every_token
            module.short.clear()
        try:
            yield
        finally:
            for module in self.modules.values():
                module.calibrating = False

    @contextlib.contextmanager
    def fused(self) -> Iterator[None]:
        """Put the model's own modules back meanwhile."""
        for name, module in self.modules.items():
            self._model.set_submodule(name, module.fused)
        try:
            yield
        finally:
            for name, module in self.modules.items():
                self._model.set_submodule(name, module)


def wanted_by(recipe: Recipe | None) -> Callable[[str], bool]:
    """Return whether a recipe quantizes the experts of a module: each needs linear layers then."""
    return lambda name: recipe is not None and recipe.for_layer(name) is not None


def wanted_for(layers: Iterable[str]) -> Callable[[str], bool]:
    """Return whether a module holds one of the layers of these names."""
    holders = {name.rsplit(".", 2)[0] for name in layers}
    return holders.__contains__


def saved_expert_names(model: Any, shapes: Mapping[str, ExpertShape]) -> dict[str, dict[str, str]]:
    """Return what files call the linear layers of experts, which transformers saves one by one.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    shapes : mapping of str to ExpertShape
        Of the modules in question, by name.

    Returns
    -------
    dict of str to dict of str to str
        Saved names by names in memory, per module; empty for a module that is saved as it is:
        of such experts other software calls the layers what they are called in memory.
    """
    result: dict[str, dict[str, str]] = {}
    patterns: dict[str, dict[str, str]] = {}
    with _class_conversions(model):
        for name, shape in shapes.items():
            pattern = _NUMBER.sub("#", name)
            if pattern not in patterns:
                patterns[pattern] = _split_names(model, name, shape)
    for name in shapes:
        pattern = _NUMBER.sub("#", name)
        numbers = _NUMBER.findall(name)
        result[name] = {
            f"{name}.{inside}": _with_numbers(saved, numbers)
            for inside, saved in patterns[pattern].items()
        }
    return result


@contextlib.contextmanager
def _class_conversions(model: Any) -> Iterator[None]:
    """Have a model whose experts were loaded one by one forget that nothing was joined then."""
    hidden = None
    if any(not module.fused._parameters for module in expert_modules(model).values()):
        hidden = model.__dict__.pop("_weight_conversions", None)
    try:
        yield
    finally:
        if hidden is not None:
            model._weight_conversions = hidden


def _split_names(model: Any, name: str, shape: ExpertShape) -> dict[str, str]:
    """Return saved names of one module's layers; the module's own numbers are ``#`` in them."""
    # Of parameters as small as can be, whose values tell what they are.
    count = len(shape.projections)
    with torch.device("cpu"):
        numbers = torch.arange(shape.experts * count, dtype=torch.int64).view(-1, count, 1)
        first = numbers[:, :-1].transpose(1, 2) if shape.transposed else numbers[:, :-1]
        held = {f"{name}.{shape.first}": first, f"{name}.down_proj": numbers[:, -1:]}
        try:
            split = revert_weight_conversion(model, held)
        except (RuntimeError, ValueError, IndexError):
            return {}
        saved = {int(t): n.removesuffix(".weight") for n, t in split.items() if t.numel() == 1}
    if len(saved) != shape.experts * count:
        return {}
    own = _NUMBER.findall(name)
    return {
        f"{number // count}.{shape.projections[number % count]}": _without_numbers(found, own)
        for number, found in saved.items()
    }


def _without_numbers(name: str, numbers: list[str]) -> str:
    parts, left = name.split("."), list(numbers)
    for at, part in enumerate(parts):
        if left and part == left[0]:
            parts[at] = "#"
            left.pop(0)
    return ".".join(parts)


def _with_numbers(name: str, numbers: list[str]) -> str:
    for number in numbers:
        name = name.replace("#", number, 1)
    return name
