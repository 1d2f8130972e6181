"""Prove on the meta device that a model class loads a file whose layers have no float weight."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ptqkit.hf.checkpoint.names import SavedNames
from ptqkit.hf.models.experts import expert_modules, replace_experts

__all__ = ["absent_modules", "memory_names", "skeleton_problems"]


def absent_modules(model: Any, layers: Iterable[str]) -> list[str]:
    """Return what is wrong with layers that the class of ``model`` does not build.

    Whatever loads a file builds the class first: modules that were renamed or added by hand would
    be missed. A class that its configuration does not suffice for is not judged.
    """
    try:
        known = {name for name, _ in _build(model).named_modules()}
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return []
    kind = type(model).__name__
    return [
        f"{n}: {kind} does not build this module, so nothing would load it"
        for n in layers
        if n not in known
    ]


def skeleton_problems(model: Any, layers: Iterable[str], names: SavedNames) -> list[str]:
    """Return the reasons why the class of ``model`` cannot load packed layers; empty if it can.

    :func:`absent_modules` has been asked before.

    The class is built on the meta device, the named layers lose their weights as a loader that
    knows the format takes them away, and the class initializes the rest; the names of the file are
    then followed to the names in memory. The biases that a format adds are not looked at.

    Parameters
    ----------
    layers : iterable of str
        Names in memory of the linear modules to pack.
    names : SavedNames
    """
    layers = list(layers)
    found = names.problems(layers)
    if found:
        return found
    kind = type(model).__name__
    skeleton = _build(model)
    expected = {}
    for name in layers:
        module = skeleton.get_submodule(name)
        del module.weight
        module.register_buffer("weight_packed", torch.empty(0, dtype=torch.int32, device="meta"))
        expected[f"{names.module(name)}.weight_packed"] = f"{name}.weight_packed"
    failure = _initialize(skeleton)
    # What fails with float weights too says nothing about packed ones.
    if failure and not _initialize(_build(model)):
        return [f"{kind}: it does not load layers without a float weight ({failure})"]
    # What loads a file unpacks experts while it joins them.
    experts = {n.rsplit(".", 2)[0] for n in layers} & expert_modules(skeleton).keys()
    expected = {s: w for s, w in expected.items() if w.rsplit(".", 3)[0] not in experts}
    read = memory_names(skeleton, expected)
    return [
        f"{want}: it is saved as {saved}, which {kind} reads as {read[saved]}"
        for saved, want in expected.items()
        if read[saved] != want
    ]


def _build(model: Any) -> Any:
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
        replace_experts(skeleton, expert_modules(model).__contains__, share=False)
    return skeleton


def _initialize(skeleton: Any) -> str:
    """Run the initialization of a class after a load; return what it raises, on one line."""
    for tensor in (*skeleton.parameters(), *skeleton.buffers()):
        # As a loader marks what it has read: the class leaves it alone.
        tensor._is_hf_initialized = True
    try:
        skeleton.initialize_weights()
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return ""


def memory_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return what ``from_pretrained`` calls these tensors of a file, for the class of ``model``."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    prefix, state = getattr(model, "base_model_prefix", ""), model.state_dict()

    def read(name: str) -> str:
        renamed = rename_source_key(name, renamings, converters, prefix, state)[0]
        if renamed not in state and name in state:
            return rename_source_key(name, [], [], prefix, state)[0]
        return renamed

    return {name: read(name) for name in names}
