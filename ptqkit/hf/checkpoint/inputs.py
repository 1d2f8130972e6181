"""Checks of quantized activations against the model that is saved with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ptqkit.nn.activations import ActivationQuantizer, installed_quantizer
from ptqkit.nn.forward import calibration_mode, hooks

__all__ = ["check_activations", "find_flat_inputs"]


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


def find_flat_inputs(model: Any, activations: Mapping[str, ActivationQuantizer]) -> dict[str, bool]:
    """Tell of the layers with dynamic activations whether inputs lack the batch axis.

    Quantizers that have run know it. For the others the model runs once on two tokens; layers it
    does not reach, or all where it cannot run on them, are left out.
    """
    dynamic = {name: q for name, q in activations.items() if q.spec.dynamic}
    known = {name: q.saw_2d for name, q in dynamic.items() if q.saw_2d is not None}
    modules = {name: model.get_submodule(name) for name in dynamic.keys() - known.keys()}
    if not modules or any(p.device.type == "meta" for p in model.parameters()):
        return known

    def see(name: str, value: torch.Tensor) -> None:
        known[name] = value.dim() != 3 or known.get(name, False)

    with calibration_mode(model), hooks(modules, see):
        try:
            model(**{k: v.new_zeros(1, 2).to(model.device) for k, v in model.dummy_inputs.items()})
        except (RuntimeError, ValueError, TypeError, IndexError):
            # Not a model that runs on token ids alone: what has not been seen stays unknown,
            # which compressed-tensors is refused for.
            return known
    return known
