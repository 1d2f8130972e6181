"""How the inputs of linear layers are quantized, and the hook that simulates it.

The arithmetic is in :mod:`ptqkit.nn.activation_grids`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ptqkit.nn.activation_grids import (
    dynamic_grid,
    fake_quantize,
    grid_codes,
    limits,
    static_grid,
)
from ptqkit.nn.linear import is_linear
from ptqkit.recipe.options import ActivationQuantization

__all__ = [
    "ActivationQuantizer",
    "input_codes",
    "install_quantizer",
    "installed_quantizer",
    "quantize_input",
    "remove_quantizers",
]


@torch.no_grad()
def quantize_input(
    x: torch.Tensor,
    spec: ActivationQuantization,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x`` (..., channels) on its grid, same shape and dtype.

    Parameters
    ----------
    scale, zero_point : tensor of shape (1,), on the device of x
        Of a static grid; the zero-point only of an asymmetric one.
    """
    if x.numel() == 0:
        return x
    wide = spec.bits > 8 and x.element_size() < 4
    value = x.float() if wide else x
    if scale is not None:
        return fake_quantize(value, scale.to(value.dtype), zero_point, spec.bits).to(x.dtype)
    outlier = None
    if spec.outlier_threshold is not None:
        outlier = value.abs().reshape(-1, x.shape[-1]).amax(0) >= spec.outlier_threshold
        value = value.masked_fill(outlier, 0)
    grid = dynamic_grid(value, spec.bits, bool(spec.symmetric))
    y = fake_quantize(value, *grid, spec.bits).to(x.dtype)
    return y if outlier is None else torch.where(outlier, x, y)


@torch.no_grad()
def input_codes(
    x: torch.Tensor,
    spec: ActivationQuantization,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the integers that :func:`quantize_input` multiplies by the scale, and their grids.

    Parameters
    ----------
    x : tensor, shape (tokens, channels), at least one token
    spec : ActivationQuantization
        At most 8 bits, without an outlier threshold.
    scale, zero_point : tensor of shape (1,)
        Of a static grid.

    Returns
    -------
    codes : int8 tensor, shape (tokens, channels)
    scales : tensor of the dtype of x, shape (tokens, 1) or (1,)
    zero_points : like scales, whole numbers, or None
        ``x`` is ``scale * (code - zero_point)``.
    """
    if scale is not None:
        scale = scale.to(x.dtype)
    else:
        scale, zero_point = dynamic_grid(x, spec.bits, bool(spec.symmetric))
    return grid_codes(x, scale, zero_point, spec.bits).to(torch.int8), scale, zero_point


class ActivationQuantizer:
    """Fake-quantizes the inputs of one linear layer.

    Parameters
    ----------
    spec : ActivationQuantization
    scale : float or tensor of one element, optional
        Of a static grid (granularity "tensor"), and only there.
    zero_point : int, optional
        Of an asymmetric static grid, as a signed code; 0 if not given.

    Attributes
    ----------
    spec : ActivationQuantization
    scale : tensor of shape (1,), or None where dynamic
    zero_point : int8 or int16 tensor of shape (1,), or None where dynamic or symmetric

    Raises
    ------
    ValueError
        If scale or zero_point do not fit the spec.
    """

    def __init__(
        self, spec: ActivationQuantization, scale: Any = None, zero_point: Any = None
    ) -> None:
        if not isinstance(spec, ActivationQuantization):
            raise TypeError(f"spec must be ActivationQuantization, not {type(spec).__name__}")
        self.spec = spec
        self.scale: torch.Tensor | None = None
        self.zero_point: torch.Tensor | None = None
        if spec.dynamic:
            if scale is not None or zero_point is not None:
                raise ValueError("scale and zero_point are found per token while the model runs")
            return
        self.scale = _one_scale(scale)
        zero_point = _one_zero_point(zero_point, spec)
        if not spec.symmetric:
            width = torch.int8 if spec.bits <= 8 else torch.int16
            self.zero_point = torch.tensor([zero_point], dtype=width, device=self.scale.device)

    @classmethod
    def calibrate(
        cls, spec: ActivationQuantization, ranges: Any = None, dtype: torch.dtype = torch.float32
    ) -> ActivationQuantizer:
        """Return the quantizer for inputs with these ranges.

        Parameters
        ----------
        spec : ActivationQuantization
        ranges : ChannelRanges, optional
            Anything with arrays ``minimum`` and ``maximum`` and a count ``tokens``; only a static
            grid needs it.
        dtype : torch.dtype
            Of the inputs.

        Raises
        ------
        ValueError
            If a static grid lacks calibration data, or its range does not fit ``dtype``.
        """
        if spec.dynamic:
            return cls(spec)
        if ranges is None or not ranges.tokens:
            raise ValueError(
                "static activations (granularity 'tensor') need the ranges of calibration data; "
                "give some, or use granularity 'token'"
            )
        scale, zero_point = static_grid(
            float(ranges.minimum.min()),
            float(ranges.maximum.max()),
            bits=spec.bits,
            symmetric=bool(spec.symmetric),
            dtype=dtype,
        )
        return cls(spec, torch.tensor([scale], dtype=dtype), zero_point)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` on its grid, same shape and dtype; ``x`` is (..., channels)."""
        self._follow(x.device)
        return quantize_input(x, self.spec, self.scale, self.zero_point)

    def _follow(self, device: torch.device) -> None:
        """Keep the grid where the inputs are, so that only the first call copies it."""
        if self.scale is not None and self.scale.device != device:
            self.scale = self.scale.to(device)
            if self.zero_point is not None:
                self.zero_point = self.zero_point.to(device)

    def __repr__(self) -> str:
        """Spec and grid."""
        grid = "" if self.scale is None else f", scale={self.scale.item():.6g}"
        grid += "" if self.zero_point is None else f", zero_point={self.zero_point.item()}"
        return f"ActivationQuantizer({self.spec}{grid})"


def _one_scale(value: Any) -> torch.Tensor:
    if value is None:
        raise ValueError("static activations (granularity 'tensor') need a scale")
    given = isinstance(value, torch.Tensor)
    scale = value.detach() if given else torch.tensor(float(value), dtype=torch.float32)
    if scale.numel() != 1 or not scale.is_floating_point():
        raise ValueError(
            f"the activation scale must be one floating-point number, not {scale.dtype} of shape "
            f"{tuple(scale.shape)}"
        )
    if not torch.isfinite(scale).item() or scale.item() <= 0:
        raise ValueError(f"the activation scale must be positive and finite, not {scale.item()}")
    return scale.reshape(1).clone()


def _one_zero_point(value: Any, spec: ActivationQuantization) -> int:
    if value is None:
        return 0
    number = float(value)
    low, high = limits(spec.bits)
    if not number.is_integer() or not low <= number <= high:
        raise ValueError(
            f"the activation zero_point must be an integer from {low} to {high} for {spec.bits} "
            f"bits, not {value!r}"
        )
    if spec.symmetric and number != 0:
        raise ValueError(f"symmetric activations have the zero_point 0, not {value!r}")
    return int(number)


class _InputHook:
    """The forward pre-hook; an object, so that a copied model has a quantizer of its own."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        self.quantizer = quantizer

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self.quantizer(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: self.quantizer(kwargs[first])}


def _input_hooks(module: nn.Module) -> Iterator[tuple[int, _InputHook]]:
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, _InputHook):
            yield key, hook


def install_quantizer(linear: nn.Module, quantizer: ActivationQuantizer) -> None:
    """Quantize every input of ``linear`` from now on; its class and state dict stay the same.

    Hooks registered earlier see the input as it comes, those registered later the quantized one.

    Raises
    ------
    TypeError
        If ``linear`` is neither nn.Linear nor transformers' Conv1D.
    ValueError
        If it has a quantizer already.
    """
    if not is_linear(linear):
        raise TypeError(f"linear must be nn.Linear or Conv1D, not {type(linear).__name__}")
    if not isinstance(quantizer, ActivationQuantizer):
        raise TypeError(f"quantizer must be an ActivationQuantizer, not {type(quantizer).__name__}")
    if installed_quantizer(linear) is not None:
        raise ValueError(
            "the layer quantizes its inputs already: call remove_quantizers(layer) first"
        )
    linear.register_forward_pre_hook(_InputHook(quantizer), with_kwargs=True)


def installed_quantizer(linear: nn.Module) -> ActivationQuantizer | None:
    """Return the quantizer that :func:`install_quantizer` put there, or None."""
    return next((hook.quantizer for _, hook in _input_hooks(linear)), None)


def remove_quantizers(model: nn.Module) -> int:
    """Take the quantizers off ``model`` and everything in it; returns how many there were."""
    count = 0
    for module in model.modules():
        for key, _ in list(_input_hooks(module)):
            # A copied model has the hook but no handle to remove it by.
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            count += 1
    return count
