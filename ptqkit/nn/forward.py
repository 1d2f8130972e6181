"""Run calibration batches through a model and stop at its layers, by hooks.

Everything here leaves the model as it was found: hooks, ``training`` flags and configuration are
restored even when a forward pass raises.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["StopForwardError", "calibration_mode", "forward", "hooks", "tensor_key", "thread_state"]

# What it returns, if anything, replaces the module's input.
PreHook = Callable[[str, torch.Tensor], "torch.Tensor | None"]


class StopForwardError(BaseException):
    """Ends a forward pass on purpose; no ``except Exception`` of a model catches it."""


@contextlib.contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients or KV cache; restore everything on leaving."""
    training = [(module, module.training) for module in model.modules()]
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    unique = list({id(c): c for c in configs if getattr(c, "use_cache", False)}.values())
    try:
        for module, _ in training:
            module.training = False
        for config in unique:
            config.use_cache = False
        with torch.no_grad():
            yield
    finally:
        for config in unique:
            config.use_cache = True
        for module, mode in training:
            module.training = mode


@contextlib.contextmanager
def hooks(modules: Mapping[str, nn.Module], hook: PreHook) -> Iterator[dict[str, Any]]:
    """Call ``hook(name, input)`` before each module runs; yields the removable handles.

    A tensor that the hook returns replaces the input.
    """
    handles: dict[str, Any] = {}
    try:
        for name, module in modules.items():
            handles[name] = module.register_forward_pre_hook(_wrap(name, hook), with_kwargs=True)
        yield handles
    finally:
        for handle in handles.values():
            handle.remove()


def _wrap(name: str, hook: PreHook) -> Callable[..., Any]:
    def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = hook(name, args[0] if args else next(iter(kwargs.values())))
        if new is None:
            return None
        if args:
            return (new, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): new}

    return pre_hook


def forward(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> None:
    """Run one batch through the model's own forward; its result is dropped."""
    device = next(model.parameters()).device
    inputs = {k: v.to(device) for k, v in batch.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs.setdefault("use_cache", False)
    model(**inputs)


def tensor_key(value: torch.Tensor) -> tuple[Any, ...]:
    """Identify a tensor's contents: storage, view and version (while it is alive)."""
    version = 0 if value.is_inference() else value._version
    return (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), version)


def thread_state() -> tuple[Any, ...]:
    """Return the thread-local modes of torch, which a paused coroutine must not hold."""
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple(torch.is_autocast_enabled(d) for d in devices),
        tuple(torch.get_autocast_dtype(d) for d in devices),
        torch.is_autocast_cache_enabled(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
    )
