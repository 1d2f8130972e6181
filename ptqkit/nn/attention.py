"""Hooks inside the attention of transformers models, through their attention-function registry.

transformers looks the attention function of a model up by a name; here the name ``"ptqkit"`` stands
for the model's own eager function with a hook around its query, key, value, scores and softmax. No
forward code of a model is copied: softcaps, grouped queries, scalings and masks stay the model's.
The mask function has to be registered under the same name; without it a model silently gets no
causal mask.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ptqkit.errors import UnsupportedModuleError

__all__ = [
    "AttentionCall",
    "AttentionHook",
    "AttentionModule",
    "attention_hooks",
    "find_attention",
    "install_attention",
    "installed_attention",
    "remove_attention",
]

IMPLEMENTATION = "ptqkit"
"""Name of the attention function in transformers' registry."""

_SLOT, _PREVIOUS = "_ptqkit_attention", "_ptqkit_attention_before"
_SOFTMAX = (F.softmax, torch.softmax, torch.Tensor.softmax)


class AttentionHook:
    """What happens inside one attention module; as it stands, nothing.

    Shapes: query (batch, heads, q, width), key and value (batch, key heads, k, width), scores and
    probabilities (batch, heads, q, k). ``allowed`` is bool, broadcastable to the scores, and False
    where the mask forbids to look; None where everything is allowed.
    """

    def __call__(self, call: AttentionCall) -> Any:
        """Compute the attention; a subclass may run it several times with different hooks."""
        return call.run(self)

    def query(self, x: torch.Tensor) -> torch.Tensor:
        """Return the query to use, after position embeddings and before scaling."""
        return x

    def key(self, x: torch.Tensor) -> torch.Tensor:
        """Return the keys to use, those of the cache among them."""
        return x

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Return the values to use, those of the cache among them."""
        return x

    def scores(self, x: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """Return the input of the softmax to use; forbidden entries hold the mask's value."""
        return x

    def softmax(self, p: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """Return the probabilities to use, before dropout."""
        return p


@dataclass
class AttentionCall:
    """One call of an attention function.

    Attributes
    ----------
    name : str
        Of the module.
    module : nn.Module
    query, key, value : Tensor
    mask : Tensor or None
        Added to the scores, (batch, 1, q, k).
    """

    name: str
    module: nn.Module
    eager: Callable[..., Any]
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def allowed(self) -> torch.Tensor | None:
        """Entries of the scores that the mask allows; None where all are."""
        if self.mask is None:
            return None
        mask = self.mask[..., : self.key.shape[-2]]
        # Masks are written with -Inf, the dtype's lowest, -1e9 or -1e4; exp makes 0 of all of them.
        # An additive bias of position is never near.
        return mask if mask.dtype == torch.bool else mask > -9_000.0

    def run(self, hook: AttentionHook | None = None) -> Any:
        """Run the model's own eager function with a hook; returns what the function returns."""
        if hook is None:
            return self._eager(self.query, self.key, self.value)
        query, key, value = hook.query(self.query), hook.key(self.key), hook.value(self.value)
        with _SoftmaxTap(self, hook) as tap:
            output = self._eager(query, key, value)
        if tap.calls != 1:
            raise UnsupportedModuleError(
                f"{self.name} ({type(self.module).__name__}) ran {tap.calls} softmax functions in "
                "its attention where one was expected, so it cannot be hooked"
            )
        return output

    def _eager(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        return self.eager(self.module, query, key, value, self.mask, *self.args, **self.kwargs)


class _SoftmaxTap(TorchFunctionMode):
    """Passes the input and output of the softmax inside one attention function to a hook."""

    def __init__(self, call: AttentionCall, hook: AttentionHook) -> None:
        super().__init__()
        self.call, self.hook, self.calls = call, hook, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _SOFTMAX:
            return func(*args, **kwargs)
        self.calls += 1
        scores = args[0] if args else kwargs.pop("input")
        call = self.call
        batch, heads, rows = call.query.shape[:3]
        if tuple(scores.shape) != (batch, heads, rows, call.key.shape[-2]):
            raise UnsupportedModuleError(
                f"{call.name} ({type(call.module).__name__}) takes its softmax over scores of "
                f"shape {tuple(scores.shape)}, not over the {call.key.shape[-2]} keys of each of "
                f"{heads} heads (attention sinks do so), which is not supported"
            )
        allowed = call.allowed
        scores = self.hook.scores(scores, allowed)
        return self.hook.softmax(func(scores, *args[1:], **kwargs), allowed)


@dataclass(frozen=True)
class AttentionModule:
    """An attention module that can be hooked.

    Attributes
    ----------
    name : str
    module : nn.Module
    heads : int
        Of the query.
    """

    name: str
    module: nn.Module
    heads: int


@dataclass
class _Slot:
    name: str
    hook: AttentionHook


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
        raise UnsupportedModuleError(f"{kind} is no transformers model with an attention function")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModuleError(
            f"{kind} is an encoder-decoder; its cross attention is not supported"
        )
    found, other = {}, []
    for name, module in model.named_modules():
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal"):
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
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        # sdpa takes a mask of what is allowed; the eager functions would add it as a number.
        forbidden, lowest = ~attention_mask, torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(forbidden, dtype=query.dtype)
        attention_mask = attention_mask.masked_fill(forbidden, lowest)
    call = AttentionCall(slot.name, module, eager, query, key, value, attention_mask, args, kwargs)
    return slot.hook(call)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)


def _implementation(model: nn.Module) -> str:
    """Attention implementation of a model, where its parts agree on one."""
    configs = [m.config for m in model.modules() if hasattr(m, "set_attn_implementation")]
    names = sorted({str(c._attn_implementation) for c in configs})
    if len(names) > 1:
        raise UnsupportedModuleError(
            f"the parts of {type(model).__name__} use different attention implementations "
            f"({', '.join(names)}); give them one with set_attn_implementation first"
        )
    return names[0]


def install_attention(model: nn.Module, hooks: Mapping[str, AttentionHook]) -> None:
    """Put hooks on attention modules, until :func:`remove_attention`.

    The model computes its attention by the eager function from then on; modules without a hook do
    so unchanged. The hooks stay with copies of the model and are not part of its state dict.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    hooks : mapping of str to AttentionHook
        By module name as :func:`find_attention` gives it.

    Raises
    ------
    UnsupportedModuleError
        If the model cannot be hooked.
    ValueError
        If hooks are installed already, there are none, or a name is not an attention module's.
    """
    modules = find_attention(model)
    if installed_attention(model):
        raise ValueError(
            "the model has attention hooks already: call remove_attention(model) first"
        )
    if not hooks:
        raise ValueError("hooks is empty: name at least one attention module")
    for name, hook in hooks.items():
        if name not in modules:
            raise ValueError(
                f"{name!r} is not an attention module of {type(model).__name__}; "
                f"those are {', '.join(list(modules)[:3])}, ..."
            )
        if not isinstance(hook, AttentionHook):
            raise TypeError(f"the hook of {name} must be an AttentionHook, not {type(hook)}")
    previous = _implementation(model)
    _register()
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:
        raise UnsupportedModuleError(
            f"{type(model).__name__} does not let its attention implementation be chosen"
        )
    # Into __dict__: a hook is neither a parameter nor a part of the module.
    model.__dict__[_PREVIOUS] = previous
    for name, hook in hooks.items():
        modules[name].module.__dict__[_SLOT] = _Slot(name, hook)


def installed_attention(model: nn.Module) -> dict[str, AttentionHook]:
    """Return the hooks of a model by the name of their module; empty without any."""
    slots = [m.__dict__[_SLOT] for m in model.modules() if _SLOT in m.__dict__]
    return {slot.name: slot.hook for slot in slots}


def remove_attention(model: nn.Module) -> int:
    """Take all hooks off and restore the attention implementation; returns how many there were."""
    count = 0
    for module in model.modules():
        count += module.__dict__.pop(_SLOT, None) is not None
    previous = model.__dict__.pop(_PREVIOUS, None)
    # Whoever chose another implementation meanwhile keeps it.
    if previous is not None and model.config._attn_implementation == IMPLEMENTATION:
        model.set_attn_implementation(previous)
    return count


@contextlib.contextmanager
def attention_hooks(model: nn.Module, hooks: Mapping[str, AttentionHook]) -> Iterator[None]:
    """Hooks for the time of a ``with`` block; see :func:`install_attention`."""
    install_attention(model, hooks)
    try:
        yield
    finally:
        remove_attention(model)
