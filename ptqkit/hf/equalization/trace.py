"""Record what the layers of a block read and return, and run the block again with changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ptqkit.errors import CalibrationError
from ptqkit.hf.models.inputs import short_batch as first_tokens
from ptqkit.nn.forward import forward
from ptqkit.nn.linear import is_linear

__all__ = [
    "BlockCall",
    "Call",
    "Trace",
    "capture_blocks",
    "is_norm",
    "model_outputs",
    "relative_difference",
    "run_block",
    "short_batch",
    "trace_block",
]

Tensors = list[torch.Tensor]


def short_batch(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the first tokens of the first row, as if none of them were padding.

    Raises
    ------
    CalibrationError
        If the row has fewer than two tokens: one token shows no attention.
    """
    if "input_ids" in batch and batch["input_ids"].shape[1] < 2:
        raise CalibrationError(
            "the calibration's first sequence has one token; finding folds needs at least 2"
        )
    return first_tokens(batch)


def is_norm(module: nn.Module, width: int) -> bool:
    """Whether a module without children holds only vectors of one width, as norms do."""
    own = [p for p in module.parameters(recurse=False)]
    leaf = next(module.children(), None) is None
    return leaf and bool(own) and all(p.shape == (width,) and p.is_floating_point() for p in own)


@dataclass
class BlockCall:
    """Arguments and results of a block in one forward pass of the model.

    Attributes
    ----------
    args : tuple
    kwargs : dict
    outputs : list of Tensor
        Floating-point tensors of what it returned.
    count : int
        How often it ran; the rest is of the first time.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    outputs: Tensors = field(default_factory=list)
    count: int = 0


@dataclass
class Call:
    """One call of a layer: identities of its input and output, and copies of their values."""

    name: str
    module: nn.Module
    source: tuple[Any, ...]
    result: tuple[Any, ...]
    inputs: torch.Tensor
    outputs: torch.Tensor


@dataclass
class Trace:
    """What the layers of one block did.

    Attributes
    ----------
    calls : list of Call
        Modules without children, in order.
    inputs : set
        Identities of the tensors given to the block.
    counts : dict of str to int
        Calls of every linear layer, uncalled ones too.
    outputs : list of Tensor
        What the block returned.
    """

    calls: list[Call]
    inputs: set[tuple[Any, ...]]
    counts: dict[str, int]
    outputs: Tensors

    @property
    def linears(self) -> list[Call]:
        """Calls of the linear layers that ran exactly once."""
        return [c for c in self.calls if self.counts.get(c.name) == 1]


def model_outputs(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Tensors:
    """Run one batch through the model and return the floating-point tensors of its result."""
    results: list[Tensors] = []
    handle = model.register_forward_hook(lambda m, a, out: results.append(tensors(out)))
    try:
        forward(model, batch)
    finally:
        handle.remove()
    return results[-1]


def capture_blocks(
    model: nn.Module, names: Sequence[str], batch: Mapping[str, torch.Tensor]
) -> tuple[dict[str, BlockCall], Tensors]:
    """Run the model once and keep what every block was given and returned."""
    calls = {name: BlockCall() for name in names}
    with contextlib.ExitStack() as stack:
        for name, call in calls.items():
            module = model.get_submodule(name)
            before, after = _recorders(call)
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)
            stack.callback(module.register_forward_hook(after).remove)
        outputs = model_outputs(model, batch)
    return calls, outputs


def _recorders(call: BlockCall) -> tuple[Callable[..., None], Callable[..., None]]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.count += 1
        if call.count == 1:
            call.args, call.kwargs = copied(args), copied(kwargs)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if call.count == 1:
            call.outputs = [t.clone() for t in tensors(output)]

    return before, after


def run_block(block: nn.Module, call: BlockCall) -> Tensors:
    """Run a block on copies of what it was given (it may change them in place)."""
    return tensors(block(*copied(call.args), **copied(call.kwargs)))


def trace_block(name: str, block: nn.Module, call: BlockCall) -> Trace:
    """Run a block and record the calls of its layers."""
    calls: list[Call] = []
    # Kept until the end, so that no address is used twice.
    alive: list[Any] = []
    args, kwargs = copied(call.args), copied(call.kwargs)

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            source = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(source, torch.Tensor) or not isinstance(output, torch.Tensor):
                return
            alive.extend((source, output))
            values = (source.clone(), output.clone()) if keeps(module) else (source, output)
            calls.append(Call(name, module, identity(source), identity(output), *values))

        return hook

    def keeps(module: nn.Module) -> bool:
        return is_linear(module) or any(True for _ in module.parameters())

    counts = {}
    with contextlib.ExitStack() as stack:
        for path, module in block.named_modules(prefix=name):
            if is_linear(module):
                counts[path] = 0
            if next(module.children(), None) is None:
                handle = module.register_forward_hook(record(path), with_kwargs=True)
                stack.callback(handle.remove)
        outputs = tensors(block(*args, **kwargs))
    for made in calls:
        if made.name in counts:
            counts[made.name] += 1
    given = {identity(t) for t in tensors((args, kwargs))}
    return Trace(calls, given, counts, [t.clone() for t in outputs])


@contextlib.contextmanager
def scaled_output(module: nn.Module, factors: torch.Tensor) -> Iterator[None]:
    """Multiply what a module returns, per channel (R,) or per token and channel (T, R)."""

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        flat = output.reshape(-1, output.shape[-1])
        return (flat * factors.to(flat)).reshape(output.shape)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def changed_inputs(
    modules: Mapping[str, nn.Module], change: Callable[[str, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Give modules ``change(name, input)`` instead of their input."""
    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(_replacing(name, change), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _replacing(
    name: str, change: Callable[[str, torch.Tensor], torch.Tensor]
) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(name, args[0]), *args[1:]), kwargs
        key = next(iter(kwargs))
        return args, {**kwargs, key: change(name, kwargs[key])}

    return hook


def relative_difference(new: Tensors, old: Tensors) -> float:
    """Return the largest difference over the largest value; infinite if there is a NaN."""
    if [t.shape for t in new] != [t.shape for t in old]:
        return float("inf")
    worst = 0.0
    for a, b in zip(new, old, strict=True):
        if b.numel() == 0:
            continue
        scale = float(b.abs().max())
        difference = float((a.double() - b.double()).abs().max())
        if difference != 0.0:
            worst = max(worst, difference / scale if scale > 0 else float("inf"))
        if difference != difference:
            return float("inf")
    return worst


def identity(value: torch.Tensor) -> tuple[Any, ...]:
    """Identify a tensor's memory, whatever its view: the same for a flattened one."""
    return (value.data_ptr(), value.dtype, value.numel(), value.shape[-1] if value.dim() else 0)


def tensors(value: Any) -> Tensors:
    """Floating-point tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors(item)]
    return []


def copied(value: Any) -> Any:
    """Copy the tensors in nested tuples, lists and dicts; anything else is passed on."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple):
        items = [copied(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [copied(v) for v in value]
    if type(value) is dict:
        return {k: copied(v) for k, v in value.items()}
    return value
