"""Describe what a checkpoint format has to carry per layer, from a recipe or from results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ptqkit.arrays.matrix import QuantizedMatrix, WeightGrid
from ptqkit.hf.models.structure import Target
from ptqkit.nn.activations import ActivationQuantizer
from ptqkit.nn.linear import is_conv1d
from ptqkit.recipe.options import ActivationQuantization

__all__ = ["LayerSpec", "describe_layers", "describe_targets"]


@dataclass(frozen=True)
class LayerSpec:
    """Describe what a checkpoint format has to carry for one layer; no data, so a recipe suffices.

    Attributes
    ----------
    name : str
        In the files, which may differ from the name in memory.
    out_features, in_features : int
    grid : WeightGrid
    kind : str
        "linear" (nn.Linear), "conv1d" (GPT-2's Conv1D), or the class name of anything else.
    weight_dtype : str
        "float32", "float16", "bfloat16" (or another torch name, which no format carries).
    permuted : bool
        Groups are not runs of consecutive inputs (act-order without static groups).
    tied : bool
        The weight is shared with another module, such as the embeddings.
    activations : ActivationQuantization or None
        How the inputs are quantized.
    flat_input : bool or None
        Inputs come without the shape (batch, tokens, channels); None if that is not known.
    module : str
        Name of the module in memory, if it is another; empty if not.
    """

    name: str
    out_features: int
    in_features: int
    grid: WeightGrid
    kind: str = "linear"
    weight_dtype: str = "float32"
    permuted: bool = False
    tied: bool = False
    activations: ActivationQuantization | None = None
    flat_input: bool | None = False
    module: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Every name of the layer: readers look for the one in the files or the one in memory."""
        return (self.name, self.module) if self.module else (self.name,)


def describe_layers(
    model: Any,
    layers: Mapping[str, QuantizedMatrix],
    activations: Mapping[str, ActivationQuantizer] | None = None,
    flat_inputs: Mapping[str, bool] | None = None,
) -> list[LayerSpec]:
    """Return one :class:`LayerSpec` per quantized layer of the model.

    Parameters
    ----------
    flat_inputs : mapping of str to bool, optional
        ``LayerSpec.flat_input`` of every layer with dynamic activations; if one is missing it is
        not known.

    Raises
    ------
    ValueError
        If a name is not a module of the model, or its shape differs from that of the codes.
    """
    if not layers:
        raise ValueError("layers is empty: there is nothing quantized to save")
    modules = dict(model.named_modules())
    tied = _tied_names(model)
    activations, flat_inputs = activations or {}, flat_inputs or {}
    specs = []
    for name, q in layers.items():
        if name not in modules:
            raise ValueError(f"layers names {name!r}, which is not a module of the model")
        module = modules[name]
        kind = _kind(module)
        weight = getattr(module, "weight", None)
        shape = None if weight is None else tuple(weight.shape)
        if kind == "conv1d" and shape is not None:
            shape = shape[::-1]
        if kind in ("linear", "conv1d") and shape != q.shape:
            raise ValueError(f"{name}: codes have shape {q.shape}, the module (out, in) = {shape}")
        quantizer = activations.get(name)
        dtype = "none" if weight is None else _dtype_name(weight)
        specs.append(
            LayerSpec(
                name,
                *q.shape,
                grid=q.grid,
                kind=kind,
                weight_dtype=dtype,
                permuted=not _natural_groups(q),
                tied=f"{name}.weight" in tied,
                activations=None if quantizer is None else quantizer.spec,
                flat_input=flat_inputs.get(name),
            )
        )
    return specs


def describe_targets(
    targets: Mapping[str, Target], flat_inputs: Mapping[str, bool] | None = None
) -> list[LayerSpec]:
    """Return one :class:`LayerSpec` per layer that a run is about to quantize.

    They are what :func:`describe_layers` will say of the results, so a format can refuse them
    before the run. Act-order is taken to permute the groups, as it does unless the diagonal of H
    happens to be sorted.

    Parameters
    ----------
    targets : mapping of str to Target
    flat_inputs : mapping of str to bool, optional
        As in :func:`describe_layers`.
    """
    specs = []
    for name, target in targets.items():
        options, (out, inputs) = target.options, target.view.shape
        grouped = options.group_size is not None and options.group_size < inputs
        act_order = options.method == "gptq" and options.order == "act"
        dtype = _dtype_name(target.view.weight)
        specs.append(
            LayerSpec(
                name,
                out,
                inputs,
                grid=WeightGrid(
                    options.whole_bits,
                    options.group_size,
                    options.symmetric or options.bits == "ternary",
                    options.per_tensor,
                    options.scale_dtype or ("float32" if dtype == "float64" else dtype),
                ),
                kind=_kind(target.module),
                weight_dtype=dtype,
                permuted=act_order and grouped and not options.static_groups,
                activations=options.activations,
                flat_input=(flat_inputs or {}).get(name),
            )
        )
    return specs


def _kind(module: Any) -> str:
    if isinstance(module, nn.Linear):
        return "linear"
    return "conv1d" if is_conv1d(module) else type(module).__name__


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _natural_groups(q: QuantizedMatrix) -> bool:
    inputs = q.shape[1]
    return bool(np.array_equal(q.g_idx, np.arange(inputs) // (q.group_size or max(inputs, 1))))


def _tied_names(model: Any) -> set[str]:
    """Return the names of parameters that live under more than one name."""
    seen: dict[int, str] = {}
    tied: set[str] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(parameter), name)
        if first != name:
            tied.update((first, name))
    return tied
