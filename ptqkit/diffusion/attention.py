"""Hooks inside the attention of diffusers' UNets, through attention processors.

A hooked module computes its attention by diffusers' own eager processor, with a hook around query,
key, value, scores and softmax; no forward code is copied. On removal every module gets back the
very processor that it had.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn

from ptqkit.diffusion.clock import StepClock
from ptqkit.errors import UnsupportedModuleError
from ptqkit.nn.attention import (
    AttentionCall,
    AttentionHook,
    AttentionModule,
    BatchFacts,
    SoftmaxTap,
    allowed_entries,
    check_hooks,
)

__all__ = [
    "attention_hooks",
    "find_attention",
    "install_attention",
    "installed_attention",
    "remove_attention",
]

_CLOCK = "_ptqkit_clock"


class HookedProcessor(AttnProcessor):
    """Eager attention with a hook; ``previous`` is the processor that it stands for."""

    def __init__(self, name: str, hook: AttentionHook, previous: Any, facts: BatchFacts) -> None:
        super().__init__()
        self.name, self.hook, self.previous, self.facts = name, hook, previous, facts

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run the attention; arguments and result are those of diffusers' processor."""
        call = AttentionCall(self.name, attn, steps=self.facts.steps)
        value = attn.to_v.register_forward_hook(_ValueHook(self.hook, call, attn.heads))
        # Instance attributes hide the methods for the time of this call only.
        attn.__dict__["get_attention_scores"] = _Scores(self.hook, call, attn)
        try:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
        finally:
            del attn.__dict__["get_attention_scores"]
            value.remove()


class _ValueHook:
    """Forward hook of ``to_v``: passes (batch, k, heads * width) to a hook in its shape."""

    def __init__(self, hook: AttentionHook, call: AttentionCall, heads: int) -> None:
        self.hook, self.call, self.heads = hook, call, heads

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        self.call.value = output.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.hook.value(self.call.value, self.call).transpose(1, 2).flatten(2)


class _Scores:
    """Stands for ``Attention.get_attention_scores`` while a hooked processor runs."""

    def __init__(self, hook: AttentionHook, call: AttentionCall, attn: Attention) -> None:
        self.hook, self.call, self.heads = hook, call, attn.heads
        self.plain = attn.get_attention_scores

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        call, hook = self.call, self.hook
        call.query, call.key = (x.unflatten(0, (-1, self.heads)) for x in (query, key))
        allowed = allowed_entries(attention_mask)
        if allowed is not None:
            allowed = allowed.unflatten(0, (-1, self.heads))
            # diffusers adds -10,000; on every key of a row it cancels, and masks nothing.
            call.allowed = allowed | ~allowed.any(-1, keepdim=True)
        query, key = hook.query(call.query, call), hook.key(call.key, call)
        with SoftmaxTap(call, hook):
            return self.plain(query.flatten(0, 1), key.flatten(0, 1), attention_mask)


def find_attention(unet: nn.Module) -> dict[str, AttentionModule]:
    """Find the attention modules of a diffusers model by name.

    Raises
    ------
    UnsupportedModuleError
        If there are none, or one has a processor other than diffusers' two plain ones: its
        attention could differ from the eager one that hooks need.
    """
    if not hasattr(unet, "attn_processors"):
        raise UnsupportedModuleError(
            f"{type(unet).__name__} is not a diffusers model with attention"
        )
    found = {}
    model: Any = unet
    for key, processor in model.attn_processors.items():
        name = key.removesuffix(".processor")
        if type(processor) not in (AttnProcessor, AttnProcessor2_0, HookedProcessor):
            raise UnsupportedModuleError(
                f"{name} has the attention processor {type(processor).__name__}; call "
                "unet.set_default_attn_processor() first if the plain one will do"
            )
        module: Any = unet.get_submodule(name)
        kind = "cross" if getattr(module, "is_cross_attention", False) else "self"
        found[name] = AttentionModule(name, module, int(module.heads), kind)
    if not found:
        raise UnsupportedModuleError(f"{type(unet).__name__} has no attention modules")
    return found


def install_attention(unet: nn.Module, hooks: Mapping[str, AttentionHook]) -> None:
    """Put hooks on attention modules, until :func:`remove_attention`.

    Modules without a hook keep the processor that they have. Hooks see the time steps that the
    model is called with. Copies of the model have hooks of their own; hooks are not part of the
    state dict.

    Parameters
    ----------
    unet : diffusers.UNet2DConditionModel, or another model of diffusers with the same processors
    hooks : mapping of str to AttentionHook
        By module name as :func:`find_attention` gives it.

    Raises
    ------
    UnsupportedModuleError
        If the model cannot be hooked.
    ValueError
        If hooks are installed already, there are none, or a name is not an attention module's.
    """
    modules = find_attention(unet)
    check_hooks(unet, modules, installed_attention(unet), hooks)
    facts = BatchFacts()
    for name, hook in hooks.items():
        module: Any = modules[name].module
        module.set_processor(HookedProcessor(name, hook, module.processor, facts))
    # Into __dict__: a clock is neither a parameter nor a part of the model.
    unet.__dict__[_CLOCK] = unet.register_forward_pre_hook(StepClock(facts), with_kwargs=True)


def installed_attention(unet: nn.Module) -> dict[str, AttentionHook]:
    """Return the hooks of a model by the name of their module; empty without any."""
    processors = getattr(unet, "attn_processors", {}).values()
    return {p.name: p.hook for p in processors if isinstance(p, HookedProcessor)}


def remove_attention(unet: nn.Module) -> int:
    """Take all hooks off and restore the processors; returns how many there were."""
    count = 0
    for name in installed_attention(unet):
        module: Any = unet.get_submodule(name)
        module.set_processor(module.processor.previous)
        count += 1
    handle = unet.__dict__.pop(_CLOCK, None)
    if handle is not None:
        handle.remove()
    return count


@contextlib.contextmanager
def attention_hooks(unet: nn.Module, hooks: Mapping[str, AttentionHook]) -> Iterator[None]:
    """Install hooks for the time of a ``with`` block; see :func:`install_attention`."""
    install_attention(unet, hooks)
    try:
        yield
    finally:
        remove_attention(unet)
