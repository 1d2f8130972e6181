"""Floating-point types of models: in which they compute, and in which they are written."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator

import torch
from torch import nn

from ptqkit._config import show_config

__all__ = ["as_dtype", "dtype_name", "dtype_of", "slow_arithmetic", "slow_on_cpu", "stored_as"]


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


def slow_on_cpu(dtype: torch.dtype | None) -> bool:
    """Return whether PyTorch computes in this type several times slower than in float32 here.

    float16 is, and bfloat16 on an x86 processor without instructions for it (AVX512_BF16, AMX):
    PyTorch converts every operand.
    """
    if dtype == torch.bfloat16:
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        levels = show_config()["cpu_levels"]
        assert isinstance(levels, list)
        return x86 and not any("bf16" in level for level in levels)
    return dtype == torch.float16


def slow_arithmetic(model: nn.Module) -> list[str]:
    """Return a warning if a model computes on a CPU in a type that is slow there; else nothing."""
    first = next(model.parameters(), None)
    dtype = dtype_of(model)
    if first is None or first.device.type != "cpu" or not slow_on_cpu(dtype):
        return []
    name = dtype_name(dtype)
    return [
        f"the model computes in {name} on a CPU, several times slower than in float32: load it "
        f"with dtype=torch.float32 and quantize it with stored_dtype={name!r}"
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
