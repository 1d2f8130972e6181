"""Values of a device on the host, through memory that is kept and that the device can reach."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["computes", "host_copy"]


def computes(device: torch.device) -> bool:
    """Whether the large products of solving are made on a device, and not by the host's core."""
    return device.type != "cpu"


def host_copy(values: torch.Tensor) -> np.ndarray:
    """Return a tensor's values on the host, in memory of their own.

    From a GPU they come through page-locked memory, which torch keeps for the next ones: pages that
    are new to the process, and copies by way of others, would take longer than all else about them.
    """
    pinned = values.device.type == "cuda"
    result = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
    return result.copy_(values).numpy()
