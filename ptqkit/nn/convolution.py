"""Convolutions as matrix products: their weights as matrices, their inputs as columns.

A convolution multiplies its weight, as a matrix, by the patch of the input at each output position;
with groups, each run of outputs by the patches of its own channels. So its Hessian is that of the
patches, one per group [OBQ, section on convolutions].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ptqkit._repr import one_line_repr
from ptqkit.nn.linear import LinearView

__all__ = [
    "CONVOLUTIONS",
    "ConvolutionView",
    "is_convolution",
    "pad_inputs",
    "unfold_inputs",
    "warn_transposed",
]

#: Kinds that can be quantized; transposed ones scatter their inputs and are not among them.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# Values of one piece of unfolded inputs: they take prod(kernel) times the memory of the inputs.
_PIECE = 1 << 24


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution that can be quantized."""
    return isinstance(module, CONVOLUTIONS)


def warn_transposed(model: nn.Module, left_out: Callable[[str], bool]) -> None:
    """Warn of transposed convolutions, which stay float, but for those that are left out by name.

    The warning points at the caller of the caller.
    """
    modules = model.named_modules()
    names = [n for n, m in modules if isinstance(m, _TRANSPOSED) and not left_out(n)]
    if names:
        warnings.warn(
            f"transposed convolutions are not quantized and stay float: {', '.join(names)}; "
            "leave them out by name to silence this",
            stacklevel=3,
        )


def pad_inputs(values: torch.Tensor, module: Any) -> torch.Tensor:
    """Pad inputs (samples, channels, *size) as the convolution does itself."""
    sides: list[tuple[int, int]] = []
    for k, d, p in zip(module.kernel_size, module.dilation, _padding(module), strict=True):
        total = d * (k - 1)
        sides.append((total // 2, total - total // 2) if p is None else (p, p))
    if not any(map(any, sides)):
        return values
    flat = [n for side in reversed(sides) for n in side]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return nn.functional.pad(values, flat, mode=mode)


def _padding(module: Any) -> list[int | None]:
    """Return the padding per dimension; None is as much as keeps the size."""
    if isinstance(module.padding, str):
        return [None if module.padding == "same" else 0] * len(module.kernel_size)
    return list(module.padding)


def unfold_inputs(values: torch.Tensor, module: Any) -> torch.Tensor:
    """Return the patches of a convolution's input that its weight is multiplied by.

    Parameters
    ----------
    values : Tensor, shape (samples, channels, size...), or (channels, size...)
    module : nn.Conv1d, nn.Conv2d or nn.Conv3d
        Strides, padding (of every mode), dilation and groups are read from it.

    Returns
    -------
    Tensor, shape (groups, samples * positions, channels / groups * prod(kernel))
        The last dimension has the order of ``module.weight.flatten(1)``, so that group g of the
        outputs is ``result[g] @ weight[g].T`` plus the bias.
    """
    kernel, groups = module.kernel_size, module.groups
    dims = len(kernel)
    if values.dim() == dims + 1:
        values = values[None]
    values = pad_inputs(values, module)
    for i, (k, s, d) in enumerate(zip(kernel, module.stride, module.dilation, strict=True)):
        values = values.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
    samples, channels, *rest = values.shape
    values = values.reshape(samples, groups, channels // groups, *rest)
    # (samples, groups, channels, *positions, *kernel) to (groups, samples, *positions, ...)
    positions, taps = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
    values = values.permute(1, 0, *positions, 2, *taps)
    width = channels // groups * math.prod(kernel)
    return values.reshape(groups, samples * math.prod(rest[:dims]), width)


@dataclass(frozen=True, eq=False)
class ConvolutionView(LinearView):
    """Read and write a convolution as a matrix (out, in / groups * prod(kernel)).

    Attributes
    ----------
    module : nn.Conv1d, nn.Conv2d or nn.Conv3d
    """

    __repr__ = one_line_repr

    @property
    def transposed(self) -> bool:
        """False: outputs come first."""
        return False

    @property
    def groups(self) -> int:
        """Runs of outputs that read channels, and so have a Hessian, of their own."""
        return self.module.groups

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in / groups * prod(kernel))."""
        weight = self.module.weight
        return weight.shape[0], math.prod(weight.shape[1:])

    def read(self) -> np.ndarray:
        """Return the weight as float32 (out, in / groups * prod(kernel))."""
        weight = self.weight.to(device="cpu", dtype=torch.float32).reshape(self.shape)
        return np.ascontiguousarray(weight.numpy())

    def write(self, values: np.ndarray) -> None:
        """Replace the weight in place by a matrix as :meth:`read` returns it."""
        self.weight.copy_(torch.from_numpy(values).reshape(self.weight.shape))

    def columns(self, values: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the unfolded inputs of a batch in pieces, each (groups, rows, columns)."""
        size = len(self.module.kernel_size)
        if values.dim() == size + 1:
            values = values[None]
        growth = math.prod(self.module.kernel_size)
        at_once = max(1, _PIECE // max(1, growth * values[0].numel())) if len(values) else 1
        for start in range(0, len(values), at_once):
            yield unfold_inputs(values[start : start + at_once], self.module)
