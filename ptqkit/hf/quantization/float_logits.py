"""The float model's logits on calibration windows, held in the smallest exact form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from ptqkit.errors import NotFiniteError, UnsupportedModuleError
from ptqkit.hf.data.calibration import padding_mask
from ptqkit.hf.models.inputs import match_mask
from ptqkit.nn.forward import calibration_mode, hooks, model_inputs

__all__ = ["FloatLogits", "counted_logits", "model_call", "record_logits", "split_windows"]

Window = dict[str, torch.Tensor]


class FloatLogits:
    """Logits of the positions that count, window by window.

    Where a short test proves that a model's logits are the outputs of its linear head, as they are,
    the head's inputs are held (hidden size instead of vocabulary), otherwise the logits themselves.

    Parameters
    ----------
    held : list of Tensor, shape (tokens, hidden) or (tokens, vocabulary)
    head : tuple of Tensor or None
        Weight and bias of the head in the float model.
    """

    def __init__(
        self, held: list[torch.Tensor], head: tuple[torch.Tensor, torch.Tensor | None] | None
    ) -> None:
        self.held, self.head = held, head

    @property
    def bytes(self) -> int:
        """Size of what is held for the windows."""
        return sum(t.numel() * t.element_size() for t in self.held)

    def rows(self, window: int, rows: slice) -> torch.Tensor:
        """Return the logits of some positions of a window, (tokens, vocabulary)."""
        part = self.held[window][rows]
        return part if self.head is None else F.linear(part, *self.head)


def split_windows(batches: Sequence[Mapping[str, torch.Tensor]]) -> list[Window]:
    """Split batches into their samples; a batch whose tensors are not (batch, ...) stays whole."""
    windows = []
    for batch in batches:
        counts = {len(value) if value.dim() else 0 for value in batch.values()}
        if len(counts) > 1 or counts == {0}:
            windows.append(dict(batch))
            continue
        for row in range(counts.pop()):
            windows.append({key: value[row : row + 1] for key, value in batch.items()})
    return windows


def model_call(
    model: nn.Module, window: Window, parameters: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Run the model with other values of its parameters; returns its logits.

    Raises
    ------
    UnsupportedModuleError
        If it returns none.
    """
    output: Any = functional_call(model, dict(parameters), (), model_inputs(model, window))
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise UnsupportedModuleError(
            f"{type(model).__name__} returns no logits, which tuning learns from; quantize it with "
            "tune=0"
        )
    return logits


def counted_logits(logits: torch.Tensor, window: Window) -> torch.Tensor:
    """Return the rows of logits, or of what they are made of, that belong to no padding."""
    rows = match_mask(logits, window, padding_mask(window))
    flat = logits.reshape(-1, logits.shape[-1])
    return flat if rows is None else flat[rows.reshape(-1).to(flat.device)]


def record_logits(
    model: nn.Module,
    windows: Sequence[Window],
    parameters: Mapping[str, torch.Tensor] | None = None,
    *,
    copy_head: bool = True,
) -> FloatLogits:
    """Run the float model on every window.

    Parameters
    ----------
    model : nn.Module
    windows : sequence of dict
        As :func:`split_windows` returns them.
    parameters : mapping of str to Tensor, optional
        Values to run the model with instead of its own.
    copy_head : bool
        Copy the head's weight; False if nothing is going to change it.

    Raises
    ------
    NotFiniteError
        If a logit is NaN.
    """
    values = dict(parameters or {})
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    seen: list[torch.Tensor] = []
    found = {"head": head} if isinstance(head, nn.Linear) else {}
    held: list[torch.Tensor] = []
    kept: tuple[torch.Tensor, torch.Tensor | None] | None = None
    with calibration_mode(model), hooks(found, lambda name, value: seen.append(value)):
        for index, window in enumerate(windows):
            seen.clear()
            logits = model_call(model, window, values)
            if index == 0 and len(seen) == 1:
                kept = _head(model, found["head"], values)
                if not torch.equal(F.linear(seen[0], *kept), logits):
                    kept = None
            value = counted_logits(logits if kept is None else seen[0], window)
            if torch.isnan(logits).any():
                raise NotFiniteError(
                    f"the float model's logits of calibration window {index} are NaN: it is "
                    "damaged, or its arithmetic overflows"
                )
            held.append(value.clone())
    if kept is not None and copy_head:
        weight, bias = kept
        kept = weight.clone(), None if bias is None else bias.clone()
    return FloatLogits(held, kept)


def _head(
    model: nn.Module, head: nn.Module, values: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weight and bias of the head as the model is run."""
    name = next(n for n, m in model.named_modules(remove_duplicate=False) if m is head)
    weight = values.get(f"{name}.weight", head.weight)
    own = getattr(head, "bias", None)
    bias = values.get(f"{name}.bias", own)
    return weight.detach(), None if bias is None else bias.detach()
