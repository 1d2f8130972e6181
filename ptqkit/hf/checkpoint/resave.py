"""Write a model that was loaded from a checkpoint again, in the same format or another."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.hf.checkpoint.inputs import measure_flat_inputs
from ptqkit.hf.checkpoint.save import CheckpointInfo, save_checkpoint
from ptqkit.nn.activations import install_quantizer
from ptqkit.nn.qlinear import QLinear

__all__ = ["save_loaded"]


class _Matrices(Mapping[str, QuantizedMatrix]):
    """The matrices of layers, read when they are asked for."""

    def __init__(self, layers: dict[str, QLinear]) -> None:
        self._layers = layers

    def __getitem__(self, name: str) -> QuantizedMatrix:
        return self._layers[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def save_loaded(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    checkpoint_format: str = "auto",
    recipe: Any = None,
    **options: Any,
) -> CheckpointInfo:
    """Write the quantized layers of a loaded model from their codes, exactly as they are.

    ``model.save_pretrained`` writes ptqkit's own format; this writes any. No float weights are
    made. While files are written, the model has stand-ins without weights: do not run it then.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        As :func:`ptqkit.load` returns it, with layers that are not float.
    directory, checkpoint_format, recipe, **options
        As :func:`ptqkit.hf.save_checkpoint` takes them (``tokenizer``, ``overwrite``, ...).

    Raises
    ------
    ValueError
        If the model has no quantized layers, or as :func:`ptqkit.hf.save_checkpoint`.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QLinear)}
    if not layers:
        raise ValueError(
            "model has no quantized layers: load it with compute='packed' (or its own format)"
        )
    activations = {n: q for n, m in layers.items() if (q := m.input_quantizer()) is not None}
    dynamic = [n for n, q in activations.items() if q.spec.dynamic]
    flat_inputs = measure_flat_inputs(model, dynamic)
    with _stand_ins(model, layers):
        return save_checkpoint(
            model,
            _Matrices(layers),
            recipe,
            directory,
            checkpoint_format=checkpoint_format,
            activations=activations,
            flat_inputs=flat_inputs,
            **options,
        )


@contextlib.contextmanager
def _stand_ins(model: Any, layers: Mapping[str, QLinear]) -> Iterator[None]:
    """Put float layers without data in place of the quantized ones, and everything back."""
    settings = model.config.__dict__.pop("quantization_config", None)
    try:
        for name, layer in layers.items():
            model.set_submodule(name, _stand_in(layer))
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        if settings is not None:
            model.config.quantization_config = settings


def _stand_in(layer: QLinear) -> nn.Module:
    with torch.device("meta"):
        result: nn.Module
        if layer.kind == "conv1d":
            result = Conv1D(layer.out_features, layer.in_features).to(layer.dtype)
        else:
            result = nn.Linear(
                layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.dtype
            )
    if layer.bias is not None:
        result.bias = layer.bias
    quantizer = layer.input_quantizer()
    if quantizer is not None:
        install_quantizer(result, quantizer)
    return result.train(layer.training)
