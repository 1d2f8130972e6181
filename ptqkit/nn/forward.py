"""Run calibration batches through a model and stop at its layers, by hooks.

Everything here leaves the model as it was found: hooks, ``training`` flags and configuration are
restored even when a forward pass raises.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = [
    "StopForwardError",
    "calibration_mode",
    "device_of",
    "eager",
    "eager_attributes",
    "forget_compiled",
    "forward",
    "hooks",
    "model_inputs",
    "tensor_key",
    "thread_state",
]

# What it returns, if anything, replaces the module's input.
PreHook = Callable[[str, torch.Tensor], "torch.Tensor | None"]


class StopForwardError(BaseException):
    """Ends a forward pass on purpose; no ``except Exception`` of a model catches it."""


@contextlib.contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients or KV cache; restore everything on leaving.

    What :func:`torch.compile` has compiled runs eagerly.
    """
    training = [(module, module.training) for module in model.modules()]
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    unique = list({id(c): c for c in configs if getattr(c, "use_cache", False)}.values())
    try:
        for module, _ in training:
            module.training = False
        for config in unique:
            config.use_cache = False
        with torch.no_grad(), eager(model):
            yield
    finally:
        for config in unique:
            config.use_cache = True
        for module, mode in training:
            module.training = mode


@contextlib.contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Run modules and functions eagerly that :func:`torch.compile` has compiled.

    Compiled code would see neither hooks nor new weights; and while it runs, the thread is
    Dynamo's, which a forward pass that pauses in the middle would leave so.
    """
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        yield
        return
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in model.modules():
            for key, value in eager_attributes(module).items():
                kept.append((module.__dict__, key, module.__dict__.get(key)))
                module.__dict__[key] = value
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for attributes, key, value in kept:
            if value is None:
                del attributes[key]
            else:
                attributes[key] = value


def eager_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that make a compiled module run eagerly; none if it does."""
    changes: dict[str, Any] = {}
    if module._compiled_call_impl is not None:
        changes["_compiled_call_impl"] = None
    own = module.__dict__.get("forward")
    found = type(module).forward if own is None else own
    plain = found
    # The second attribute tells a compiled function from one that wraps it and copied the first.
    while getattr(plain, "_torchdynamo_wrapper_id", None) == id(plain):
        plain = plain._torchdynamo_orig_callable
    if plain is not found and not hasattr(module, "_orig_mod"):
        changes["forward"] = plain if own is not None else types.MethodType(plain, module)
    return changes


def forget_compiled() -> None:
    """Drop what :func:`torch.compile` has compiled: it does not notice hooks that come later."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


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
    inputs = model_inputs(model, batch)
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs.setdefault("use_cache", False)
    model(**inputs)


def model_inputs(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch on the model's device, its features in the model's dtype.

    Features are floating-point tensors other than masks, such as ``pixel_values``; processors make
    them float32, and a model in half precision takes its own dtype alone. They stay as they are if
    the parts of the model have different ones.
    """
    device = device_of(model)
    inputs = {key: value.to(device) for key, value in batch.items()}
    features = [k for k, v in inputs.items() if v.is_floating_point() and not k.endswith("mask")]
    if features:
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        if len(dtypes) == 1:
            (dtype,) = dtypes
            inputs |= {key: inputs[key].to(dtype) for key in features}
    return inputs


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter, those without data aside; "cpu" if none."""
    devices = (p.device for p in model.parameters())
    return next((d for d in devices if d.type != "meta"), torch.device("cpu"))


def tensor_key(value: torch.Tensor) -> tuple[Any, ...]:
    """Identify a tensor's contents: storage, view and version (while it is alive)."""
    version = 0 if value.is_inference() else value._version
    if value.numel() == 0:  # which have no place in memory, such as inputs of an expert left out
        return (id(value), value.dtype, tuple(value.shape), value.stride(), version)
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
        _dynamo_callback(),
    )


def _dynamo_callback() -> Any:
    """Return what Dynamo has put in the way of this thread's frames; None as a rule."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback()
