"""Read the layers of any format into the tensors of ptqkit's own, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.hf.checkpoint.base import CheckpointFormat, Fetch
from ptqkit.hf.checkpoint.formats import NATIVE, PANELS
from ptqkit.hf.checkpoint.spec import LayerSpec
from ptqkit.nn.panels import even_groups

__all__ = ["converted_state"]


def converted_state(
    stored: CheckpointFormat,
    layers: Mapping[str, Mapping[str, Any]],
    tensors: Iterable[str],
    fetch: Fetch,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the configuration and all tensors of a checkpoint as version 3 holds them.

    Only the layer at hand is there twice. What is not a quantized layer's stays as it is read.

    Parameters
    ----------
    stored : CheckpointFormat
        The format of the files.
    layers : mapping of str to mapping
        As :meth:`CheckpointFormat.layers` returns them.
    tensors : iterable of str
        Names of all tensors.
    fetch : callable
        Returns the tensor of a given name.
    """
    gone = {f"{name}.{part}" for name, options in layers.items() for part in stored.parts(options)}
    state = {name: fetch(name) for name in tensors if name not in gone}
    specs = []
    for name, options in layers.items():
        matrix = stored.read(name, fetch, options)
        spec = _spec(name, matrix, options.get("activations"))
        # Groups of uneven size, which other tools write, have no panels in a file.
        chosen = PANELS if even_groups(matrix.g_idx, matrix.group_size) else NATIVE
        specs.append((spec, chosen))
        for plan in chosen.plans(spec, matrix):
            state[plan.name] = plan.make()
        _convert_inputs(spec, state)
    settings = PANELS.config([spec for spec, _ in specs], linears=[])
    for spec, chosen in specs:
        if chosen is NATIVE:
            settings["layers"][spec.name]["layout"] = "rows"
    return settings, state


def _spec(name: str, matrix: QuantizedMatrix, activations: Any) -> LayerSpec:
    natural = bool((matrix.g_idx[1:] >= matrix.g_idx[:-1]).all()) and even_groups(
        matrix.g_idx, matrix.group_size
    )
    return LayerSpec(
        name, *matrix.shape, grid=matrix.grid, permuted=not natural, activations=activations
    )


def _convert_inputs(spec: LayerSpec, state: dict[str, torch.Tensor]) -> None:
    """Give a static grid of the inputs the types that ptqkit's own format has."""
    if spec.activations is None or spec.activations.dynamic:
        return
    zero = torch.int8 if spec.activations.bits <= 8 else torch.int16
    for part, dtype in (("input_scale", torch.float32), ("input_zero_point", zero)):
        name = f"{spec.name}.{part}"
        if name in state:
            state[name] = state[name].reshape(1).to(dtype)
