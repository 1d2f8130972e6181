"""Whether a model's weights are the float ones, and a way back to them.

The mark of a quantized layer is a sample of its new weight, kept on the module: it holds for copies
of the model too, and stops holding once other weights are loaded, by whatever way.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import nn

from ptqkit.errors import UnsupportedModuleError
from ptqkit.hf.equalization.run import owner_of_mark
from ptqkit.nn.activations import installed_quantizer, remove_quantizers
from ptqkit.nn.linear import is_linear

__all__ = ["FloatWeights", "is_quantized", "mark_quantized"]

_MARK = "_ptqkit_quantized"
_SAMPLE = 64


def _sample(linear: nn.Module) -> torch.Tensor:
    """Return evenly spread entries of a weight, on the CPU."""
    weight = linear.get_parameter("weight").detach()
    count = weight.numel()
    places = torch.arange(_SAMPLE, dtype=torch.long, device=weight.device) * (count - 1)
    places = places.div(_SAMPLE - 1, rounding_mode="floor")
    rows, columns = places.div(weight.shape[1], rounding_mode="floor"), places % weight.shape[1]
    return weight[rows, columns].cpu()


def mark_quantized(linear: nn.Module) -> None:
    """Note that a layer's weight is a quantized one from now on."""
    linear.__dict__[_MARK] = _sample(linear)


def is_quantized(linear: nn.Module) -> bool:
    """Whether the weight that :func:`mark_quantized` noted is still there, in whatever dtype."""
    noted = linear.__dict__.get(_MARK)
    if noted is None or linear.get_parameter("weight").device.type == "meta":
        return False
    found = _sample(linear)
    # A conversion of the model rounds its weights; another one back leaves them rounded.
    kinds = (noted.dtype, found.dtype, torch.bfloat16, torch.float16)
    return any(torch.equal(found, noted.to(kind).to(found.dtype)) for kind in kinds)


class FloatWeights:
    """A copy of a float model's weights, to go back to after each of several quantizations.

    The copy is as large as the model without its embeddings, and on the same device. Going back
    undoes what :func:`ptqkit.quantize` and :func:`ptqkit.equalize` changed: weights, biases
    (gained ones too), folded scales, and quantizers of activations. In a ``with`` block the weights
    are put back at its end.

    Parameters
    ----------
    model : nn.Module
        Still in float.

    Raises
    ------
    UnsupportedModuleError
        If layers of the model are quantized already.

    Examples
    --------
    >>> floats = ptqkit.hf.FloatWeights(model)
    >>> for bits in (2, 3, 4):
    ...     floats.restore()
    ...     result = ptqkit.quantize(model, "quality", "train.txt", tokenizer=tokenizer, bits=bits)
    """

    def __init__(self, model: nn.Module) -> None:
        linears = [(n, m) for n, m in model.named_modules() if is_linear(m)]
        _refuse(n for n, m in linears if is_quantized(m) or installed_quantizer(m) is not None)
        self.model = model
        self._kept: list[tuple[nn.Module, str, torch.Tensor | None]] = []
        copies: dict[int, torch.Tensor] = {}
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                continue
            for name, parameter in module._parameters.items():
                value = None
                if parameter is not None:
                    value = copies.setdefault(id(parameter), parameter.detach().clone())
                self._kept.append((module, name, value))
        self._equalized = getattr(owner_of_mark(model), "ptqkit_equalized", None)

    @property
    def bytes(self) -> int:
        """Size of the copy."""
        values = {id(v): v for _, _, v in self._kept if v is not None}
        return sum(v.numel() * v.element_size() for v in values.values())

    def restore(self) -> None:
        """Put the float weights back into the model."""
        for module, name, value in self._kept:
            parameter = module._parameters.get(name)
            if value is None:
                module._parameters[name] = None
            elif parameter is None:
                module._parameters[name] = nn.Parameter(value.clone(), requires_grad=False)
            else:
                parameter.detach().copy_(value)
            module.__dict__.pop(_MARK, None)
        remove_quantizers(self.model)
        owner = owner_of_mark(self.model)
        if self._equalized is None and hasattr(owner, "ptqkit_equalized"):
            del owner.ptqkit_equalized

    def __enter__(self) -> FloatWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()


def _refuse(names: Iterable[str]) -> None:
    found = list(names)
    if found:
        raise UnsupportedModuleError(
            f"{len(found)} layers (the first is {found[0]}) are quantized already; load the float "
            "model again"
        )
