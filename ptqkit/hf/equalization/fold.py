"""A fold: where a scale per channel moves between layers without changing the float model."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ptqkit._repr import one_line_repr
from ptqkit._tables import join_names, text_table, wrap_line
from ptqkit.errors import UnsupportedModuleError
from ptqkit.nn.linear import LinearView

__all__ = ["Fold", "FoldPlan", "apply_fold"]


@dataclass(frozen=True, eq=False)
class Fold:
    """Layers that read one tensor, and the layer whose outputs that tensor is.

    For scales s > 0, one per producer channel, the consumers' input columns may be multiplied by
    ``s[channel_of]`` and the producer's outputs divided by s: the float model stays as it is.

    Attributes
    ----------
    kind : {"norm", "value", "up", "relu"}
        Gain and bias of a norm; values of an attention and its output projection; two linear
        layers with only a product between them; two with a ReLU between them.
    producer : str
        Name of the norm or linear layer.
    consumers : tuple of str
        Names of all layers that read the tensor, in order of execution.
    channel_of : ndarray of int64, shape (in,)
        Producer channel behind every input of the consumers; with grouped-query attention several
        inputs have the same.
    rows : ndarray of int64, shape (channels,)
        Output of the producer that is each producer channel.
    offset : float
        A norm multiplies by ``weight + offset``: 1 for norms that store their gain so, else 0.
    """

    __repr__ = one_line_repr

    kind: str
    producer: str
    consumers: tuple[str, ...]
    channel_of: np.ndarray
    rows: np.ndarray
    offset: float = 0.0

    @property
    def channels(self) -> int:
        """Number of producer channels, and of scales."""
        return len(self.rows)

    def spread(self, scales: np.ndarray) -> np.ndarray:
        """Turn scales of the producer's channels (channels,) into those of the inputs (in,)."""
        return np.asarray(scales)[self.channel_of]

    def gather(self, scales: np.ndarray) -> np.ndarray:
        """Turn scales of the inputs (in,), equal if inputs share a channel, into (channels,)."""
        gathered = np.ones(self.channels, dtype=np.asarray(scales).dtype)
        gathered[self.channel_of] = scales
        return gathered


@dataclass
class FoldPlan:
    """Every fold of a model, and what has none.

    Attributes
    ----------
    folds : list of Fold
        In order of execution of their consumers.
    left_alone : dict of str to str
        Layers that read a tensor no scale can be folded into (names joined by ", "), and why.
    """

    __repr__ = one_line_repr

    folds: list[Fold] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)

    def table(self) -> str:
        """Return plain text: a line per fold, then one per group of layers that is left alone."""
        rows = [
            (f.kind, f.producer, join_names(f.consumers, f.producer), str(f.channels))
            for f in self.folds
        ]
        header = ("kind", "producer", "consumers", "channels")
        lines = [wrap_line(f"left alone: {k}: {v}") for k, v in self.left_alone.items()]
        return "\n".join([text_table(header, rows, left=(0, 1, 2)), *lines])

    def __str__(self) -> str:
        return self.table()


def apply_fold(model: nn.Module, fold: Fold, scales: Any) -> None:
    """Multiply the consumers' columns by the scales and divide the producer's outputs by them.

    In place: of a norm its gain and bias, of a linear layer its rows and bias. All new values are
    computed (in float32, or float64 for float64 weights) and checked before the first is written,
    and Ctrl-C waits until the last is: the model always holds the whole fold or nothing of it. A
    gain of exactly 0 stays 0.

    Parameters
    ----------
    model : nn.Module
    fold : Fold
        From :func:`ptqkit.hf.equalization.find.find_folds` on this model.
    scales : array_like, shape (fold.channels,)
        Finite and above 0.

    Raises
    ------
    ValueError
        If the scales do not fit, or a scaled weight leaves the range of its dtype.
    UnsupportedModuleError
        If weights are on the meta device.
    """
    scales = np.asarray(scales, dtype=np.float64)
    if scales.shape != (fold.channels,):
        raise ValueError(
            f"scales must have shape ({fold.channels},), one per channel of {fold.producer}, not "
            f"{scales.shape}"
        )
    if not (np.isfinite(scales).all() and (scales > 0).all()):
        raise ValueError(f"scales of {fold.producer} must be finite and above 0")
    new: list[tuple[nn.Parameter, torch.Tensor]] = []
    with torch.no_grad():
        for name, parameter, values in _folded(model, fold, scales):
            if not _finite(values):
                raise ValueError(
                    f"{name}: scaled by {scales.min():.3g} to {scales.max():.3g}, its values leave "
                    f"the range of {parameter.dtype}; use a float32 model"
                )
            new.append((parameter, values))
        with uninterrupted():
            for parameter, values in new:
                parameter.copy_(values)


def _folded(
    model: nn.Module, fold: Fold, scales: np.ndarray
) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
    """Yield the parameters that a fold changes, with their owner's name and their new values."""
    producer: Any = model.get_submodule(fold.producer)
    if fold.kind == "norm":
        for name, parameter in producer.named_parameters(recurse=False):
            shift = fold.offset if name == "weight" else 0.0
            gain = _on_host(fold.producer, parameter).double() + shift
            yield (
                fold.producer,
                parameter,
                _like(parameter, gain / torch.from_numpy(scales), -shift),
            )
    else:
        view = LinearView(producer)
        axis = 1 if view.transposed else 0
        inverse = np.ones(view.shape[0])
        inverse[fold.rows] = 1.0 / scales
        yield fold.producer, producer.weight, _scaled(fold.producer, producer.weight, inverse, axis)
        if producer.bias is not None:
            yield fold.producer, producer.bias, _scaled(fold.producer, producer.bias, inverse, 0)
    for name in fold.consumers:
        view = LinearView(model.get_submodule(name))
        axis, weight = 0 if view.transposed else 1, view.module.weight
        yield name, weight, _scaled(name, weight, fold.spread(scales), axis)


def _finite(values: torch.Tensor) -> bool:
    """Whether every value is finite; a sum shows it fast, unless it overflows itself."""
    wide = torch.promote_types(values.dtype, torch.float32)
    return math.isfinite(float(values.sum(dtype=wide))) or bool(torch.isfinite(values).all())


def _on_host(name: str, parameter: nn.Parameter) -> torch.Tensor:
    if parameter.device.type == "meta":
        raise UnsupportedModuleError(f"{name} is on the meta device; load the weights first")
    return parameter.detach().cpu()


def _like(parameter: nn.Parameter, values: torch.Tensor, shift: float) -> torch.Tensor:
    return (values + shift).to(dtype=parameter.dtype, device=parameter.device)


def _scaled(name: str, parameter: nn.Parameter, factors: np.ndarray, axis: int) -> torch.Tensor:
    """Multiply along an axis, on the parameter's device."""
    if parameter.device.type == "meta":
        raise UnsupportedModuleError(f"{name} is on the meta device; load the weights first")
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    shape = [-1 if i == axis else 1 for i in range(parameter.dim())]
    factor = torch.from_numpy(np.asarray(factors)).to(device=parameter.device, dtype=wide)
    return (parameter.detach().to(wide) * factor.reshape(shape)).to(parameter.dtype)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the body has run; it is raised on leaving."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *args: held.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            before(*held[0])
