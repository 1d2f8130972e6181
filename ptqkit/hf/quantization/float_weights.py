"""A way back to the float weights of a model that was quantized in place."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import nn

from ptqkit.errors import UnsupportedModuleError
from ptqkit.hf.equalization.run import owner_of_mark
from ptqkit.hf.models.experts import ExpertSwap
from ptqkit.nn.activations import installed_quantizer, remove_quantizers
from ptqkit.nn.linear import is_linear
from ptqkit.nn.quantized_mark import is_quantized, unmark_quantized

__all__ = ["FloatWeights"]


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
        with ExpertSwap(model, lambda name: True):
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

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return the float values of the model's parameters as it has them now, by name.

        A bias that was gained since is 0. Embeddings are left out.
        """
        names = {id(module): name for name, module in self.model.named_modules()}
        found = {}
        for module, name, value in self._kept:
            parameter = module._parameters.get(name)
            if parameter is not None:
                full = f"{names[id(module)]}.{name}".lstrip(".")
                found[full] = torch.zeros_like(parameter) if value is None else value
        return found

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
            unmark_quantized(module)
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
