"""Hooks inside the attention of transformers models, through their attention-function registry.

transformers looks the attention function of a model up by a name; here the name ``"ptqkit"`` stands
for the model's own eager function with a hook around its query, key, value, scores and softmax. No
forward code of a model is copied: softcaps, grouped queries, scalings and masks stay the model's.
The mask function has to be registered under the same name; without it a model silently gets no
causal mask.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ptqkit.errors import UnsupportedModuleError
from ptqkit.hf.data.calibration import CalibrationSet
from ptqkit.nn.attention import (
    AttentionCall,
    AttentionHook,
    AttentionModule,
    BatchFacts,
    allowed_entries,
    check_hooks,
)
from ptqkit.nn.attention_quantizer import AttentionRanges
from ptqkit.nn.forward import calibration_mode, forward

__all__ = [
    "attention_hooks",
    "find_attention",
    "install_attention",
    "installed_attention",
    "measure_ranges",
    "remove_attention",
    "run_calibration",
]

IMPLEMENTATION = "ptqkit"
"""Name of the attention function in transformers' registry."""

_SLOT, _PREVIOUS = "_ptqkit_attention", "_ptqkit_attention_before"


@dataclass
class _Slot:
    name: str
    hook: AttentionHook
    facts: BatchFacts


def _eager_function(module: nn.Module) -> Callable[..., Any] | None:
    """Eager attention function of the file that defines a module's class or a base of it."""
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    return None


def _heads(model: nn.Module, module: nn.Module) -> int:
    for name in ("num_attention_heads", "num_heads"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    config: Any = getattr(module, "config", None) or model.config
    return int(getattr(config, "num_attention_heads", 0))


def _looks_up(module: nn.Module) -> bool:
    """Whether a module without the number of a layer, as CLIP's, asks the registry by its code."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def find_attention(model: nn.Module) -> dict[str, AttentionModule]:
    """Find the attention modules of a transformers model by name.

    Raises
    ------
    UnsupportedModuleError
        If the model does not take its attention function from the registry (BLOOM and Falcon
        compute attention inside their own forward), or is an encoder-decoder.
    """
    kind = type(model).__name__
    if not hasattr(model, "set_attn_implementation"):
        raise UnsupportedModuleError(
            f"{kind} is not a transformers model with an attention function"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModuleError(
            f"{kind} is an encoder-decoder; its cross attention is not supported"
        )
    found, other = {}, []
    for name, module in model.named_modules():
        if hasattr(module, "is_causal") and (hasattr(module, "layer_idx") or _looks_up(module)):
            if _eager_function(module) is None:
                other.append(name)
            else:
                found[name] = AttentionModule(name, module, _heads(model, module))
    if other or not found:
        where = f" ({other[0]})" if other else ""
        raise UnsupportedModuleError(
            f"{kind} computes attention inside its own forward{where}, not through the "
            "attention-function registry of transformers, so there is no place for a hook"
        )
    return found


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Attention function of the registry: the model's eager one, with the module's hook."""
    eager = _eager_function(module)
    if eager is None:
        raise UnsupportedModuleError(f"{type(module).__name__} has no eager attention function")
    slot = module.__dict__.get(_SLOT)
    if slot is None:
        return eager(module, query, key, value, attention_mask, *args, **kwargs)
    mask = attention_mask
    if mask is not None and mask.dtype == torch.bool:
        # sdpa takes a mask of what is allowed; the eager functions would add it as a number.
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return eager(module, q, k, v, mask, *args, **kwargs)

    allowed = None if mask is None else allowed_entries(mask[..., : key.shape[-2]])
    rows, steps = slot.facts.rows, slot.facts.steps
    if rows is not None and rows.shape != (len(query), query.shape[-2]):
        rows = None  # an image beside a padded text: none of its positions is padding
    return slot.hook(
        AttentionCall(slot.name, module, query, key, value, allowed, rows, steps, attend)
    )


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)


def _implementation(model: nn.Module) -> str:
    """Attention implementation of a model, if its parts agree on one."""
    configs: list[Any] = [
        m.config for m in model.modules() if hasattr(m, "set_attn_implementation")
    ]
    names = sorted({str(c._attn_implementation) for c in configs})
    if len(names) > 1:
        raise UnsupportedModuleError(
            f"the parts of {type(model).__name__} use different attention implementations "
            f"({', '.join(names)}); give them one with set_attn_implementation first"
        )
    return names[0]


def install_attention(model: nn.Module, hooks: Mapping[str, AttentionHook]) -> BatchFacts:
    """Put hooks on attention modules, until :func:`remove_attention`.

    The model computes its attention by the eager function from then on; modules without a hook do
    so unchanged. The hooks stay with copies of the model and are not part of its state dict.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    hooks : mapping of str to AttentionHook
        By module name as :func:`find_attention` gives it.

    Returns
    -------
    BatchFacts
        What the hooks see; whoever runs padded batches may set ``rows`` before each.

    Raises
    ------
    UnsupportedModuleError
        If the model cannot be hooked.
    ValueError
        If hooks are installed already, there are none, or a name is not an attention module's.
    """
    modules = find_attention(model)
    check_hooks(model, modules, installed_attention(model), hooks)
    previous = _implementation(model)
    _register()
    changed: Any = model
    changed.set_attn_implementation(IMPLEMENTATION)
    if changed.config._attn_implementation != IMPLEMENTATION:
        raise UnsupportedModuleError(
            f"{type(model).__name__} does not let its attention implementation be chosen"
        )
    # Into __dict__: a hook is neither a parameter nor a part of the module.
    model.__dict__[_PREVIOUS] = previous
    facts = BatchFacts()
    for name, hook in hooks.items():
        modules[name].module.__dict__[_SLOT] = _Slot(name, hook, facts)
    return facts


def installed_attention(model: nn.Module) -> dict[str, AttentionHook]:
    """Return the hooks of a model by the name of their module; empty without any."""
    slots = [m.__dict__[_SLOT] for m in model.modules() if _SLOT in m.__dict__]
    return {slot.name: slot.hook for slot in slots}


def remove_attention(model: nn.Module) -> int:
    """Take all hooks off and restore the attention implementation; returns how many there were."""
    count = sum(m.__dict__.pop(_SLOT, None) is not None for m in model.modules())
    previous = model.__dict__.pop(_PREVIOUS, None)
    restored: Any = model
    # If somebody has chosen another implementation meanwhile, it stays.
    if previous is not None and restored.config._attn_implementation == IMPLEMENTATION:
        restored.set_attn_implementation(previous)
    return count


@contextlib.contextmanager
def attention_hooks(model: nn.Module, hooks: Mapping[str, AttentionHook]) -> Iterator[BatchFacts]:
    """Install hooks for the time of a ``with`` block; see :func:`install_attention`."""
    facts = install_attention(model, hooks)
    try:
        yield facts
    finally:
        remove_attention(model)


def run_calibration(
    model: nn.Module, calibration: CalibrationSet, hooks: Mapping[str, AttentionHook]
) -> None:
    """Run calibration data through a model with hooks on its attention; its outputs are dropped."""
    with attention_hooks(model, hooks) as facts, calibration_mode(model):
        for batch, rows in zip(calibration.batches, calibration.masks(), strict=True):
            facts.rows = rows
            forward(model, batch)


def measure_ranges(model: nn.Module, calibration: CalibrationSet) -> dict[str, AttentionRanges]:
    """Measure ranges of every kind in every attention module, in one pass over calibration data.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    calibration : CalibrationSet
        See :func:`ptqkit.hf.prepare_calibration`.
    """
    hooks = {name: AttentionRanges(name) for name in find_attention(model)}
    run_calibration(model, calibration, hooks)
    return hooks
