"""Run calibration batches through a model and pause them at its linear layers.

Everything here leaves the model as it was found: hooks, ``training`` flags and configuration are
restored even when a forward pass raises.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = [
    "Coroutine",
    "Probe",
    "StopForwardError",
    "calibration_mode",
    "forward",
    "hooks",
    "probe",
    "tensor_key",
    "thread_state",
]

_PROBE_TOKENS = 16

# What it returns, if anything, replaces the module's input.
PreHook = Callable[[str, torch.Tensor], "torch.Tensor | None"]


class StopForwardError(BaseException):
    """Ends a forward pass on purpose; no ``except Exception`` of a model catches it."""


@contextlib.contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """No gradients, evaluation mode and no KV cache; everything as before on leaving."""
    training = [(module, module.training) for module in model.modules()]
    configs = [
        m.config for m in model.modules() if getattr(getattr(m, "config", None), "use_cache", False)
    ]
    unique = list({id(c): c for c in configs}.values())
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
        inputs.setdefault("use_cache", False)  # type: ignore[arg-type]
    model(**inputs)


def tensor_key(value: torch.Tensor) -> tuple[Any, ...]:
    """Identity of a tensor's contents: storage, view and version (while it is alive)."""
    version = 0 if value.is_inference() else value._version
    return (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), version)


def thread_state() -> tuple[Any, ...]:
    """Thread-local modes of torch that a paused coroutine must not hold."""
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


class Coroutine:
    """A forward pass that can be paused in a hook with :func:`pause` and resumed later.

    Attributes
    ----------
    name : str or None
        Layer it waits at; None once it has ended.
    value : Tensor or None
        Input of that layer.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        import greenlet

        self._greenlet = greenlet.greenlet(run)
        # A greenlet starts with an empty context; the model must see the caller's.
        self._greenlet.gr_context = contextvars.copy_context()
        self.name: str | None = None
        self.value: torch.Tensor | None = None
        self.keys: dict[int, tuple[Any, ...]] = {}

    def step(self) -> None:
        """Run to the next pause, or to the end."""
        self.name = self.value = None
        paused = self._greenlet.switch()
        if not self._greenlet.dead:
            self.name, self.value = paused

    def close(self) -> None:
        """Unwind the forward pass if it is still paused."""
        self.name = self.value = None
        if self._greenlet and not self._greenlet.dead:
            self._greenlet.throw()


def pause(name: str, value: torch.Tensor) -> None:
    """Hand control back to the caller of :meth:`Coroutine.step`."""
    import greenlet

    greenlet.getcurrent().parent.switch((name, value))


@dataclass
class Probe:
    """What one short forward pass shows.

    Attributes
    ----------
    groups : list of list of str
        Layers in order of execution, those fed by the same tensor together.
    repeated : dict of str to int
        Layers called more than once, with the count.
    uncalled : list of str
    straddling : str or None
        A layer that runs inside a thread-local mode the caller had not entered.
    blocks : list of str
        Blocks in order of execution.
    """

    groups: list[list[str]] = field(default_factory=list)
    repeated: dict[str, int] = field(default_factory=dict)
    uncalled: list[str] = field(default_factory=list)
    straddling: str | None = None
    blocks: list[str] = field(default_factory=list)


def probe(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batch: Mapping[str, torch.Tensor],
    blocks: Mapping[str, nn.Module],
    share: bool = True,
) -> Probe:
    """Run a few tokens through the model and see which layers run when, and on what."""
    result = Probe()
    baseline: tuple[Any, ...] = ()
    inputs: dict[tuple[Any, ...], list[str]] = {}
    # The inputs are kept until the end, so that no address is used twice.
    alive: list[torch.Tensor] = []
    counts = dict.fromkeys(modules, 0)

    def see(name: str, value: torch.Tensor) -> None:
        counts[name] += 1
        if counts[name] > 1:
            return
        if result.straddling is None and thread_state() != baseline:
            result.straddling = name
        alive.append(value)
        key = tensor_key(value) if share else (name,)
        if key not in inputs:
            inputs[key] = []
            result.groups.append(inputs[key])
        inputs[key].append(name)

    def see_block(name: str, value: torch.Tensor) -> None:
        if name not in result.blocks:
            result.blocks.append(name)

    with calibration_mode(model), hooks(modules, see), hooks(blocks, see_block):
        baseline = thread_state()
        forward(model, _short(batch))
    result.repeated = {k: n for k, n in counts.items() if n > 1}
    result.uncalled = [k for k, n in counts.items() if n == 0]
    return result


def _short(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """First tokens of the first row; every position counts."""
    length = batch["input_ids"].shape[1]
    short = {}
    for key, value in batch.items():
        value = value[:1]
        if value.dim() >= 2 and value.shape[1] == length:
            value = value[:, :_PROBE_TOKENS]
        short[key] = torch.ones_like(value) if key == "attention_mask" else value
    return short
