"""Linear layers, however a model stores their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["LinearView", "is_conv1d", "is_linear"]


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the ``Conv1D`` of transformers (GPT-2): a linear layer stored (in, out)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that can be quantized."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


@dataclass(frozen=True, eq=False)
class LinearView:
    """Read and write a linear layer as a matrix (out, in), whichever way its module stores it.

    Attributes
    ----------
    module : nn.Linear or Conv1D
    """

    module: Any

    @property
    def transposed(self) -> bool:
        """True if the module stores (in, out)."""
        return is_conv1d(self.module)

    @property
    def weight(self) -> torch.Tensor:
        """The weight as the module stores it, detached."""
        return self.module.weight.detach()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.module.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as (out, in), where it is: a view, detached."""
        return self.weight.T if self.transposed else self.weight

    def read(self) -> np.ndarray:
        """Return the weight as float32 (out, in); a view of the module's memory if possible."""
        return np.ascontiguousarray(self.matrix.to(device="cpu", dtype=torch.float32).numpy())

    def write(self, values: np.ndarray | torch.Tensor) -> None:
        """Replace the weight in place by values (out, in), cast to the weight's dtype."""
        self.matrix.copy_(torch.as_tensor(values))

    def shifted_bias(self, values: np.ndarray) -> torch.Tensor:
        """Return the bias less values (out,), in the weight's dtype and where it is."""
        weight, bias = self.weight, self.module.bias
        new = torch.from_numpy(-values)
        if bias is not None:
            new = new + bias.detach().to(device="cpu", dtype=torch.float64)
        return new.to(device=weight.device, dtype=weight.dtype)

    def subtract_bias(self, values: np.ndarray) -> None:
        """Subtract values (out,) from the bias; a layer without one gains it."""
        new, bias = self.shifted_bias(values), self.module.bias
        if bias is None:
            gained = nn.Parameter(new, requires_grad=self.module.weight.requires_grad)
            self.module.bias = gained
        else:
            bias.detach().copy_(new)
