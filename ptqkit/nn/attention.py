"""Hooks inside attention: what they see of one call, and how they reach its softmax.

Where a model's attention can be hooked, and how, is known to :mod:`ptqkit.hf.models.attention` and
:mod:`ptqkit.diffusion.attention`; everything here works on any PyTorch module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ptqkit._repr import one_line_repr
from ptqkit.errors import UnsupportedModuleError, prefix_error

__all__ = [
    "AttentionCall",
    "AttentionHook",
    "AttentionModule",
    "BatchFacts",
    "SoftmaxTap",
    "allowed_entries",
    "check_hooks",
]

MASKED = -9_000.0
"""An additive mask forbids what is not above this.

Masks are written with -Inf, the lowest number of the dtype, -1e9 or -1e4 (-9984 in bfloat16); exp
turns all of them into 0. Additive biases of positions do not come near.
"""

_SOFTMAX = (F.softmax, torch.softmax, torch.Tensor.softmax)


class AttentionHook:
    """Base class of hooks on one attention module; every method returns its input.

    Shapes: query (batch, heads, q, width), key and value (batch, key heads, k, width), scores and
    probabilities (batch, heads, q, k). The call says which entries of the scores are allowed,
    which rows count, and at which time steps a diffusion model is.
    """

    def __call__(self, call: AttentionCall) -> Any:
        """Compute the attention; a subclass may run it several times with different hooks."""
        return call.run(self)

    def query(self, x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Return the query to use, after position embeddings and before scaling."""
        return x

    def key(self, x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Return the keys to use, including those of the cache."""
        return x

    def value(self, x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Return the values to use, including those of the cache."""
        return x

    def scores(self, x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Return the input of the softmax to use; forbidden entries hold the mask's value."""
        return x

    def fused(self, scores: torch.Tensor, call: AttentionCall) -> torch.Tensor | None:
        """Return what replaces both the softmax and :meth:`softmax`, or None to run these.

        The scores may be overwritten, and returned.
        """
        return None

    def softmax(self, p: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Return the probabilities to use, before dropout."""
        return p


@dataclass
class AttentionCall:
    """One call of an attention module.

    Attributes
    ----------
    name : str
        Name of the module in the model.
    module : nn.Module
    query, key, value : Tensor or None
        As the model made them. Query and key are None while the values of a UNet are computed,
        which come first there.
    allowed : Tensor of bool or None
        Broadcastable to the scores; False if the mask forbids to look. None if all is allowed.
    rows : Tensor of bool, shape (batch, q), or None
        False at padding; None if all tokens count, or nothing is known.
    steps : tuple of float
        Time steps of a diffusion model, one or one per sample; empty if there are none.
    attend : callable or None
        The model's own attention, called with query, key and value.
    """

    __repr__ = one_line_repr

    name: str
    module: nn.Module
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    allowed: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    steps: tuple[float, ...] = ()
    attend: Callable[..., Any] | None = None

    def run(self, hook: AttentionHook | None = None) -> Any:
        """Run the model's own attention with a hook; returns what it returns."""
        assert self.attend is not None
        if hook is None:
            return self.attend(self.query, self.key, self.value)
        assert self.query is not None and self.key is not None and self.value is not None
        query, key = hook.query(self.query, self), hook.key(self.key, self)
        value = hook.value(self.value, self)
        with SoftmaxTap(self, hook):
            return self.attend(query, key, value)

    @property
    def scores_shape(self) -> tuple[int, int, int, int]:
        """Batch, heads, queries and keys."""
        assert self.query is not None and self.key is not None
        batch, heads, rows = self.query.shape[:3]
        return batch, heads, rows, self.key.shape[-2]

    @cached_property
    def counted(self) -> torch.Tensor | None:
        """Allowed entries in the rows that count: bool, broadcastable to the scores, or None."""
        if self.rows is None:
            return self.allowed
        rows = self.rows[:, None, :, None]
        return rows if self.allowed is None else self.allowed & rows.to(self.allowed.device)


def allowed_entries(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return where a mask, boolean or added to the scores, allows to look; None if everywhere."""
    return mask if mask is None or mask.dtype == torch.bool else mask > MASKED


class SoftmaxTap(TorchFunctionMode):
    """Pass the input and the output of the softmax inside one attention call to a hook.

    Scores of shape (batch * heads, q, k) are shown to the hook with heads on an axis of their own.

    Raises
    ------
    UnsupportedModuleError
        If the ``with`` block ran another number of softmax functions than one, or one over
        something other than the keys.
    """

    def __init__(self, call: AttentionCall, hook: AttentionHook) -> None:
        super().__init__()
        self.call, self.hook, self.calls = call, hook, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _SOFTMAX:
            return func(*args, **kwargs)
        self.calls += 1
        scores, args = (args[0], args[1:]) if args else (kwargs.pop("input"), ())
        found, full = tuple(scores.shape), self.call.scores_shape
        axis = args[0] if args else kwargs.get("dim")
        if found not in (full, (full[0] * full[1], *full[2:])) or axis not in (-1, len(found) - 1):
            raise UnsupportedModuleError(
                f"{self._module} takes its softmax along axis {axis} of scores of shape {found}, "
                f"not over the {full[3]} keys of each of {full[1]} heads (attention sinks do so), "
                "which is not supported"
            )
        call, hook = self.call, self.hook
        scores = hook.scores(scores.reshape(full), call)
        p = None
        if len(args) < 2 and kwargs.get("dtype") in (None, scores.dtype):
            try:
                p = hook.fused(scores, call)
            except ValueError as error:
                raise prefix_error(error, call.name) from None
        if p is None:
            p = func(scores.reshape(found), *args, **kwargs)
            p = hook.softmax(p.reshape(full), call)
        return p.reshape(found)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Check that there was one softmax."""
        super().__exit__(kind, error, trace)
        if kind is None and self.calls != 1:
            raise UnsupportedModuleError(
                f"{self._module} ran {self.calls} softmax functions in its attention where one "
                "was expected, so it cannot be hooked"
            )

    @property
    def _module(self) -> str:
        return f"{self.call.name} ({type(self.call.module).__name__})"


@dataclass(frozen=True)
class AttentionModule:
    """An attention module that can be hooked.

    Attributes
    ----------
    name : str
    module : nn.Module
    heads : int
        Heads of the query.
    kind : str or None
        "self" or "cross" in a UNet: whether the keys come from the image or from the condition.
    """

    __repr__ = one_line_repr

    name: str
    module: nn.Module
    heads: int
    kind: str | None = None


@dataclass
class BatchFacts:
    """What the hooks of one model are to know of the batch in a forward pass.

    All hooks of a model share it, and every :class:`AttentionCall` carries its values; see there.
    """

    __repr__ = one_line_repr

    rows: torch.Tensor | None = None
    steps: tuple[float, ...] = ()


def check_hooks(
    model: nn.Module,
    modules: Mapping[str, AttentionModule],
    installed: Mapping[str, AttentionHook],
    hooks: Mapping[str, AttentionHook],
) -> None:
    """Raise ValueError or TypeError unless these hooks can be installed on a model."""
    if installed:
        raise ValueError(
            "the model has attention hooks already: call remove_attention(model) first"
        )
    if not hooks:
        raise ValueError("hooks is empty: name at least one attention module")
    for name, hook in hooks.items():
        if name not in modules:
            raise ValueError(
                f"{name!r} is not an attention module of {type(model).__name__}; "
                f"those are {', '.join([*modules][:3])}, ..."
            )
        if not isinstance(hook, AttentionHook):
            kind = type(hook).__name__
            raise TypeError(f"the hook of {name} must be an AttentionHook, not {kind}")
