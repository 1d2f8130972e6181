"""The float model's logits on calibration windows, held in the smallest exact form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from ptqkit.errors import NotFiniteError, UnsupportedModuleError
from ptqkit.hf.data.calibration import padding_mask
from ptqkit.hf.models.inputs import match_mask
from ptqkit.nn.forward import calibration_mode, hooks, model_inputs

__all__ = [
    "FloatLogits",
    "counted_logits",
    "joined_windows",
    "model_call",
    "record_logits",
    "split_windows",
]

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


def joined_windows(
    windows: Sequence[Window], indices: Iterable[int], batch_size: int
) -> Iterator[tuple[Window, list[int]]]:
    """Join windows of equal shapes, in the order given; yields each batch with its indices.

    A batch that was not split stays alone.
    """
    waiting: dict[Any, list[int]] = {}
    for index in indices:
        window = windows[index]
        if any(value.dim() == 0 or len(value) != 1 for value in window.values()):
            yield window, [index]
            continue
        shape = tuple(sorted((key, tuple(value.shape)) for key, value in window.items()))
        members = waiting.setdefault(shape, [])
        members.append(index)
        if len(members) == batch_size:
            yield _join(windows, waiting.pop(shape))
    for members in waiting.values():
        yield _join(windows, members)


def _join(windows: Sequence[Window], indices: list[int]) -> tuple[Window, list[int]]:
    parts = [windows[i] for i in indices]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}, indices


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
    batch_size: int = 1,
    copy_head: bool = True,
) -> FloatLogits:
    """Run the float model on every window, several at a time.

    Parameters
    ----------
    model : nn.Module
    windows : sequence of dict
        As :func:`split_windows` returns them.
    parameters : mapping of str to Tensor, optional
        Values to run the model with instead of its own.
    batch_size : int
        Windows per forward pass.
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
    held: dict[int, torch.Tensor] = {}
    kept: tuple[torch.Tensor, torch.Tensor | None] | None = None
    batches = joined_windows(windows, range(len(windows)), batch_size)
    with calibration_mode(model), hooks(found, lambda name, value: seen.append(value)):
        for batch, indices in batches:
            seen.clear()
            logits = model_call(model, batch, values)
            if not held and len(seen) == 1:
                kept = _head(model, found["head"], values)
                if not torch.equal(F.linear(seen[0], *kept), logits):
                    kept = None
            if torch.isnan(logits).any():
                raise NotFiniteError(
                    f"the float model's logits of calibration window {indices[0]} are NaN: it is "
                    "damaged, or its arithmetic overflows"
                )
            value = logits if kept is None else seen[0]
            for row, index in enumerate(indices):
                own = value if len(indices) == 1 else value[row : row + 1]
                held[index] = counted_logits(own, windows[index]).clone()
    if kept is not None and copy_head:
        weight, bias = kept
        kept = weight.clone(), None if bias is None else bias.clone()
    return FloatLogits([held[i] for i in range(len(windows))], kept)


def _head(
    model: nn.Module, head: nn.Module, values: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weight and bias of the head as the model is run."""
    name = next(n for n, m in model.named_modules(remove_duplicate=False) if m is head)
    weight = values.get(f"{name}.weight", head.weight)
    own = getattr(head, "bias", None)
    bias = values.get(f"{name}.bias", own)
    return weight.detach(), None if bias is None else bias.detach()
