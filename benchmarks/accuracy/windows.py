"""Losses of a model on windows of text; needs PyTorch alone, so that any environment has it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["window_losses"]


@torch.no_grad()
def window_losses(model: Any, windows: torch.Tensor, batch: int = 8) -> list[float]:
    """Return the summed negative log-likelihood of each window."""
    losses = []
    for rows in windows.to(next(model.parameters()).device).split(batch):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        each = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        losses += each.reshape(len(rows), -1).double().sum(1).cpu().tolist()
    return losses
