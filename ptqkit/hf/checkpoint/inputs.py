"""Check quantized activations against the model that is saved with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ptqkit.nn.activations import ActivationQuantizer, installed_quantizer
from ptqkit.nn.forward import calibration_mode, hooks

__all__ = ["check_activations", "measure_flat_inputs"]


def check_activations(
    model: nn.Module, layers: Mapping[str, Any], activations: Mapping[str, ActivationQuantizer]
) -> None:
    """Refuse quantizers that are not those of the model: the file would be another model.

    Raises
    ------
    ValueError
        If ``activations`` names a layer that is not quantized, or the model quantizes inputs
        otherwise than it says; names every layer.
    """
    unknown = sorted(activations.keys() - layers.keys())
    if unknown:
        raise ValueError(
            f"activations names layer(s) without quantized weights: {', '.join(unknown)}; "
            "quantize their weights too, or leave them out"
        )
    for name, quantizer in activations.items():
        if not isinstance(quantizer, ActivationQuantizer):
            raise TypeError(
                f"activations[{name!r}] must be an ActivationQuantizer, "
                f"not {type(quantizer).__name__}"
            )
    different = []
    for name, module in model.named_modules():
        found = installed_quantizer(module)
        if found is not None and not _same(found, activations.get(name)):
            different.append(name)
    if different:
        raise ValueError(
            "the model quantizes the inputs of layer(s) otherwise than `activations` says: "
            f"{', '.join(different)}; pass the installed quantizers, or remove_quantizers(model)"
        )


def _same(a: ActivationQuantizer, b: ActivationQuantizer | None) -> bool:
    if b is None or a.spec != b.spec:
        return False
    pairs = ((a.scale, b.scale), (a.zero_point, b.zero_point))
    return all(
        x is y or (x is not None and y is not None and float(x) == float(y)) for x, y in pairs
    )


def measure_flat_inputs(model: Any, names: Iterable[str]) -> dict[str, bool]:
    """Run the model on two tokens and tell which layers get inputs without a batch axis.

    OPT, for one, flattens the inputs of ``fc1`` to (tokens, channels). compressed-tensors then
    takes one dynamic scale for the whole tensor.

    Returns
    -------
    dict of str to bool
        Layers that the model does not reach are missing; all are if it cannot run on token ids
        alone.
    """
    modules = {name: model.get_submodule(name) for name in names}
    found: dict[str, bool] = {}
    example = getattr(model, "dummy_inputs", None)
    if not modules or not example or any(p.device.type == "meta" for p in model.parameters()):
        return found

    def record(name: str, value: torch.Tensor) -> None:
        found[name] = value.dim() != 3 or found.get(name, False)

    with calibration_mode(model), hooks(modules, record):
        try:
            model(**{k: v.new_zeros(1, 2).to(model.device) for k, v in example.items()})
        except (IndexError, RuntimeError, TypeError, ValueError):
            # What has not been seen stays unknown, and compressed-tensors refuses it.
            return found
    return found
