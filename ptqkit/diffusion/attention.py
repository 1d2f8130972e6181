"""Hooks inside the attention of diffusers' UNets, through attention processors.

A hooked module computes its attention by diffusers' own eager processor, with a hook around query,
key, value, scores and softmax; no forward code is copied. On removal every module gets back the
very processor that it had.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn
from torch.overrides import TorchFunctionMode

from ptqkit.diffusion.clock import StepClock
from ptqkit.diffusion.fused import SoftmaxHook
from ptqkit.errors import UnsupportedModuleError
from ptqkit.nn.attention import AttentionHook

__all__ = [
    "UNetAttention",
    "attention_hooks",
    "find_attention",
    "install_attention",
    "installed_attention",
    "remove_attention",
]

_CLOCK = "_ptqkit_clock"
_SOFTMAX = (F.softmax, torch.softmax, torch.Tensor.softmax)
# diffusers adds -10,000 to masked scores; an additive bias of a model is never near it.
_MASKED = -5_000.0


@dataclass(frozen=True)
class UNetAttention:
    """An attention module of a UNet that can be hooked.

    Attributes
    ----------
    name : str
    module : diffusers.models.attention_processor.Attention
    heads : int
    cross : bool
        True where the keys come from the condition, False for self-attention.
    """

    name: str
    module: Attention
    heads: int
    cross: bool


class HookedProcessor(AttnProcessor):
    """Eager attention with a hook; ``previous`` is the processor that it stands for."""

    def __init__(self, name: str, hook: AttentionHook, previous: Any) -> None:
        super().__init__()
        self.name, self.hook, self.previous = name, hook, previous

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
        value = attn.to_v.register_forward_hook(_ValueHook(self.hook, attn.heads))
        # Instance attributes hide the methods for the time of this call only.
        attn.get_attention_scores = _Scores(self, attn)
        try:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
        finally:
            del attn.get_attention_scores
            value.remove()


class _ValueHook:
    """Forward hook of ``to_v``: passes (batch, k, heads * width) to a hook in its shape."""

    def __init__(self, hook: AttentionHook, heads: int) -> None:
        self.hook, self.heads = hook, heads

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        value = output.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.hook.value(value).transpose(1, 2).flatten(2)


class _Scores:
    """Stands for ``Attention.get_attention_scores`` while a hooked processor runs."""

    def __init__(self, processor: HookedProcessor, attn: Attention) -> None:
        self.processor, self.attn = processor, attn
        self.plain = attn.get_attention_scores

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        hook, heads = self.processor.hook, self.attn.heads
        query = hook.query(query.unflatten(0, (-1, heads))).flatten(0, 1)
        key = hook.key(key.unflatten(0, (-1, heads))).flatten(0, 1)
        allowed = None
        if attention_mask is not None:
            allowed = (attention_mask > _MASKED).unflatten(0, (-1, heads))
            # The same -10,000 on every key of a row cancels in the softmax: it masks nothing.
            allowed |= ~allowed.any(-1, keepdim=True)
        with _SoftmaxTap(hook, heads, allowed) as tap:
            probabilities = self.plain(query, key, attention_mask)
        if tap.calls != 1:
            raise UnsupportedModuleError(
                f"{self.processor.name} ran {tap.calls} softmax functions where one was expected, "
                "so it cannot be hooked"
            )
        return probabilities


class _SoftmaxTap(TorchFunctionMode):
    """Passes the input and the output of the softmax to a hook, heads on an axis of their own."""

    def __init__(self, hook: AttentionHook, heads: int, allowed: torch.Tensor | None) -> None:
        super().__init__()
        self.hook, self.heads, self.allowed, self.calls = hook, heads, allowed, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _SOFTMAX:
            return func(*args, **kwargs)
        self.calls += 1
        scores = args[0].unflatten(0, (-1, self.heads))
        scores = self.hook.scores(scores, self.allowed)
        if isinstance(self.hook, SoftmaxHook):
            found = self.hook.fused(scores, self.allowed)
            if found is not None:
                return found.flatten(0, 1)
        probabilities = func(scores, *args[1:], **kwargs)
        return self.hook.softmax(probabilities, self.allowed).flatten(0, 1)


def find_attention(unet: nn.Module) -> dict[str, UNetAttention]:
    """Find the attention modules of a diffusers model by name.

    Raises
    ------
    UnsupportedModuleError
        If there are none, or one has a processor other than diffusers' two plain ones: its
        attention could differ from the eager one that hooks need.
    """
    if not hasattr(unet, "attn_processors"):
        raise UnsupportedModuleError(f"{type(unet).__name__} is no diffusers model with attention")
    found = {}
    for key, processor in unet.attn_processors.items():
        name = key.removesuffix(".processor")
        if type(processor) not in (AttnProcessor, AttnProcessor2_0, HookedProcessor):
            raise UnsupportedModuleError(
                f"{name} has the attention processor {type(processor).__name__}; call "
                "unet.set_default_attn_processor() first if the plain one will do"
            )
        module = unet.get_submodule(name)
        cross = bool(getattr(module, "is_cross_attention", False))
        found[name] = UNetAttention(name, module, int(module.heads), cross)
    if not found:
        raise UnsupportedModuleError(f"{type(unet).__name__} has no attention modules")
    return found


def install_attention(
    unet: nn.Module, hooks: Mapping[str, AttentionHook], clock: StepClock | None = None
) -> None:
    """Put hooks on attention modules, until :func:`remove_attention`.

    Modules without a hook keep the processor that they have. Copies of the model have hooks of
    their own; hooks are not part of the state dict.

    Parameters
    ----------
    unet : diffusers.UNet2DConditionModel, or another model of diffusers with the same processors
    hooks : mapping of str to AttentionHook
        By module name as :func:`find_attention` gives it.
    clock : StepClock, optional
        Told the time step before every forward pass.

    Raises
    ------
    UnsupportedModuleError
        If the model cannot be hooked.
    ValueError
        If hooks are installed already, there are none, or a name is not an attention module's.
    """
    modules = find_attention(unet)
    if installed_attention(unet):
        raise ValueError("the model has attention hooks already: call remove_attention(unet) first")
    if not hooks:
        raise ValueError("hooks is empty: name at least one attention module")
    for name, hook in hooks.items():
        if name not in modules:
            raise ValueError(
                f"{name!r} is not an attention module of {type(unet).__name__}; "
                f"those are {', '.join([*modules][:3])}, ..."
            )
        if not isinstance(hook, AttentionHook):
            kind = type(hook).__name__
            raise TypeError(f"the hook of {name} must be an AttentionHook, not {kind}")
    for name, hook in hooks.items():
        module = modules[name].module
        module.set_processor(HookedProcessor(name, hook, module.processor))
    if clock is not None:
        # Into __dict__: a clock is neither a parameter nor a part of the model.
        unet.__dict__[_CLOCK] = unet.register_forward_pre_hook(clock, with_kwargs=True)


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
def attention_hooks(
    unet: nn.Module, hooks: Mapping[str, AttentionHook], clock: StepClock | None = None
) -> Iterator[None]:
    """Hooks for the time of a ``with`` block; see :func:`install_attention`."""
    install_attention(unet, hooks, clock)
    try:
        yield
    finally:
        remove_attention(unet)
