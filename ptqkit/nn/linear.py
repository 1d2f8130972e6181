"""Linear layers, however a model stores their weights."""

from __future__ import annotations

from torch import nn

__all__ = ["is_conv1d", "is_linear"]


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the ``Conv1D`` of transformers (GPT-2): a linear layer stored (in, out)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that can be quantized."""
    return isinstance(module, nn.Linear) or is_conv1d(module)
