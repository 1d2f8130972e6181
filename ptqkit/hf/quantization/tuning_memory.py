"""How much memory tuning needs, measured on one window before anything else runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ptqkit._units import show_bytes
from ptqkit.errors import PreflightError
from ptqkit.hf.quantization.float_logits import Window, model_call, record_logits
from ptqkit.hf.quantization.memory import available_memory
from ptqkit.nn.forward import calibration_mode, device_of, hooks, model_inputs
from ptqkit.nn.tunable import tokens_at_once

__all__ = ["TuningMemory", "check_memory", "measure_memory"]

# Allocators keep more than is alive, and gradients pass through temporaries of the model's own.
_SLACK = 1.3
# Of each learned value in float32: itself, its gradient twice, two moments, rounded, best, floor;
# of a code, what the gradients of a step need of it twice.
_COPIES = 10
# Windows of own text that are written at once, if memory allows: a GPU would wait otherwise.
_TEXTS, _TEXTS_ON_GPU = 64, 1024


@dataclass(frozen=True)
class TuningMemory:
    """Bytes that tuning needs in addition to the model.

    Attributes
    ----------
    window : int
        What the gradients of one window need: activations, logits and their gradient.
    step : int
        All of a forward and backward pass over one batch.
    fixed : int
        The float model's logits of all windows in the form in which they are held, the learned
        values and the optimizer's state; on a GPU the codes too.
    text : int
        What writing the model's own text needs, before any step: what the model keeps of the tokens
        that it has read, of ``texts`` windows.
    texts : int
        Windows of own text that are written at once.
    """

    window: int
    step: int
    fixed: int
    text: int = 0
    texts: int = 1

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return max(self.step, self.text) + self.fixed


def measure_memory(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    windows: Sequence[Window],
    batch_size: int,
    learned: int,
    limit: int,
    own_text: int = 0,
    written: bool = False,
) -> TuningMemory:
    """Run the longest window forward as a training step would, and add up what it keeps.

    Parameters
    ----------
    model : nn.Module
    modules : mapping of str to nn.Module
        The quantized layers, or those that are going to be.
    windows : sequence of dict
    batch_size : int
        Windows per forward and backward pass.
    learned : int
        Number of values that are learned.
    limit : int
        Bytes; one window that keeps more ends the measurement.
    own_text : int
        Windows of the model's own text besides.
    written : bool
        They are there already.
    """
    window = max(windows, key=_size)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    parameters = {n: p.requires_grad_() if _learns(p) else p for n, p in parameters.items()}
    own = {t.untyped_storage().data_ptr() for t in (*parameters.values(), *model.buffers())}
    kept: dict[int, Any] = {}
    total = 0

    def count(value: torch.Tensor) -> torch.Tensor:
        nonlocal total
        storage = value.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = storage  # alive, or its address would be another's
            total += storage.nbytes()
            if total > limit:
                raise PreflightError(
                    [
                        f"tuning: the activations of one window alone exceed {show_bytes(limit)} "
                        "of memory; give shorter windows (sequence_length), or quantize with tune=0"
                    ]
                )
        return value

    def count_input(name: str, value: torch.Tensor) -> None:
        if value.requires_grad or torch.is_grad_enabled():
            count(value)

    with calibration_mode(model), torch.enable_grad(), hooks(modules, count_input):
        with saved_tensors_hooks(count, lambda value: value):
            logits = model_call(model, window, parameters)
    vocabulary = logits.shape[-1]
    # Logits, their gradient, and some tokens' probabilities in float32.
    size = total + 2 * logits.numel() * logits.element_size()
    chunk = 5 * 4 * tokens_at_once(vocabulary, device_of(model)) * vocabulary
    del logits
    kept.clear()
    shapes = [m.weight.shape for m in modules.values()]
    layer = max((12 * rows * columns for rows, columns in shapes), default=0)
    one = record_logits(model, [window], copy_head=False).bytes
    fixed = one * (len(windows) + own_text) + 4 * _COPIES * learned
    if device_of(model).type != "cpu":
        fixed += sum(rows * columns for rows, columns in shapes)
    step = int(_SLACK * (size * batch_size + chunk + layer))
    if not own_text or written:
        return TuningMemory(size, step, fixed)
    each = _of_text(model, window, vocabulary)
    most = _TEXTS if device_of(model).type == "cpu" else _TEXTS_ON_GPU
    texts = max(1, min(most, own_text, (limit - fixed) // each))
    return TuningMemory(size, step, fixed, texts * each, texts)


def _of_text(model: nn.Module, window: Window, vocabulary: int) -> int:
    """Return what writing a window of own text as long as this one needs, at its peak.

    What a model keeps of the tokens before grows by copies: of one of its parts there are two at a
    time, and an allocator may keep more.
    """
    inputs = {k: v for k, v in model_inputs(model, window).items() if k == "input_ids"}
    with calibration_mode(model):
        output: Any = model(**inputs, use_cache=True) if inputs else None
    kept = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in _tensors(getattr(output, "past_key_values", None))
    }
    # Besides logits, three sets of a token's probabilities in float64.
    return 2 * sum(kept.values()) + 4 * 8 * vocabulary


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors within lists, mappings and objects of a cache."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
        yield from _tensors(vars(value))


def check_memory(needed: TuningMemory, model: nn.Module, budget: int | None) -> int:
    """Return the available memory in bytes.

    Raises
    ------
    PreflightError
        If tuning needs more than it, or than the budget.
    """
    free = available_memory(device_of(model))
    limit, whose = (free, "free memory") if budget is None else (budget, "memory budget")
    if needed.total > limit:
        raise PreflightError(
            [
                f"tuning needs about {show_bytes(needed.total)} ({show_bytes(needed.step)} for a "
                f"training step, {show_bytes(needed.window)} per window of it), the {whose} is "
                f"{show_bytes(limit)}; lower batch_size, samples, sequence_length or own_text, or "
                "quantize with tune=0"
            ]
        )
    return free


def _size(window: Window) -> int:
    return sum(value.numel() for value in window.values())


def _learns(parameter: torch.Tensor) -> bool:
    return parameter.dim() == 1 and parameter.is_floating_point()
