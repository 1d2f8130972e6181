"""Watch attention of models that call torch's fused attention function themselves."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ptqkit.hf.diagnostics.observe import AttentionObserver
from ptqkit.nn.attention import MASKED

__all__ = ["FusedAttention"]


class FusedAttention(TorchFunctionMode):
    """Observers of every call of ``scaled_dot_product_attention`` inside the blocks of a model.

    The probabilities are computed a second time beside the call, whose result stays the model's.

    Parameters
    ----------
    model : nn.Module
    blocks : sequence of str
    bits : int

    Attributes
    ----------
    observers : dict of str to AttentionObserver
        By block, with a number where a block has several calls.
    rows : Tensor or None
        Which tokens of the batch at hand count, bool (batch, sequence).
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], bits: int) -> None:
        super().__init__()
        self.observers: dict[str, AttentionObserver] = {}
        self.rows: torch.Tensor | None = None
        self._modules = {name: model.get_submodule(name) for name in blocks}
        self._bits = bits
        self._block: str | None = None
        self._calls = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for the time of a ``with`` block."""
        with contextlib.ExitStack() as stack:
            for name, module in self._modules.items():
                handles = (
                    module.register_forward_pre_hook(self._enter(name)),
                    module.register_forward_hook(self._enter(None)),
                )
                for handle in handles:
                    stack.callback(handle.remove)
            stack.enter_context(self)
            yield

    def _enter(self, name: str | None) -> Any:
        def hook(*_: Any) -> None:
            self._block, self._calls = name, 0

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self._block is not None:
            self._see(*args, **kwargs)
        return func(*args, **kwargs)

    def _see(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> None:
        self._calls += 1
        if query.dim() != 4 or query.shape[-2] != key.shape[-2]:
            return  # no self attention of whole sequences
        if self.rows is not None and self.rows.shape != (query.shape[0], query.shape[2]):
            return
        block = self._block or ""
        name = block if self._calls == 1 else f"{block} ({self._calls})"
        observer = self.observers.setdefault(name, AttentionObserver(name, self._bits))
        # models with grouped heads repeat them before the call, or in it: here always before
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        observer.add_cache("key", key, self.rows)
        observer.add_cache("value", value, self.rows)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = query.float() @ key.float().transpose(-1, -2) * scale
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        if is_causal:
            allowed = allowed.tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            allowed = allowed & attn_mask
        elif attn_mask is not None:
            scores = scores + attn_mask
            allowed = allowed & (attn_mask > MASKED)
        probabilities = scores.masked_fill(~allowed, -math.inf).softmax(dim=-1)
        # a row of padding may see nothing
        probabilities = probabilities.masked_fill(~allowed.any(dim=-1, keepdim=True), 0.0)
        observer.add_softmax(probabilities, allowed, self.rows)
