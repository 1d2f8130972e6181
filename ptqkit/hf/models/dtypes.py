"""Floating-point types of models: in which they compute, and in which they are written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["as_dtype", "dtype_name", "dtype_of", "slow_arithmetic", "stored_as"]


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the floating-point type of a model's parameters."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def as_dtype(value: str | torch.dtype) -> torch.dtype:
    """Accept a floating-point type or its name.

    Raises
    ------
    ValueError
        If there is no such type.
    """
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type of torch, not {value!r}")
    return dtype


def slow_arithmetic(model: nn.Module) -> list[str]:
    """Return a warning if a model computes in float16 on a CPU, which is slow; else nothing."""
    first = next(model.parameters(), None)
    if first is None or first.device.type != "cpu" or dtype_of(model) != torch.float16:
        return []
    return [
        "the model computes in float16 on a CPU, several times slower than in float32: load it "
        "with dtype=torch.float32 and quantize it with stored_dtype='float16'"
    ]


@contextlib.contextmanager
def stored_as(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Convert a model's floating-point parameters and saved buffers; back again on leaving.

    Values that are not exact in ``dtype`` are rounded: no second copy is kept.
    """
    before = dtype_of(model)
    if before == dtype:
        yield
        return
    tensors = [t for t in (*model.parameters(), *_saved_buffers(model)) if t.dtype == before]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(dtype)
        yield
    finally:
        for tensor in tensors:
            tensor.data = tensor.data.to(before)


def _saved_buffers(model: nn.Module) -> list[torch.Tensor]:
    state = model.state_dict(keep_vars=True)
    return [buffer for name, buffer in model.named_buffers() if name in state]
