"""What small changes of linear layers' weights cost in the loss of the whole model.

A change E of one weight moves the layer's outputs by E x, and the model's loss, at its minimum
over what the model itself predicts, by half of E x in the Fisher information of those outputs. Of
that the diagonal is kept: with g the gradient of a token sampled from the model's own prediction,

    loss(E) = 1/2 mean over tokens of sum over outputs i of g_i^2 (E x)_i^2

in nats per token. All layers are on one scale, unlike with tr(E H E^T).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ptqkit.nn.output_gradients import output_gradients

__all__ = ["rounding_losses"]

# Returns the changes of a layer's weight that are to be compared, by their names.
Changes = Callable[[str], Mapping[int, torch.Tensor]]


def rounding_losses(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    blocks: Sequence[nn.Module],
    batches: Sequence[Mapping[str, torch.Tensor]],
    masks: Sequence[torch.Tensor | None],
    changes: Changes,
    seed: int = 0,
) -> dict[str, dict[int, float]]:
    """Return what each change of each layer's weight costs alone, in nats per token.

    One forward and one backward pass per batch, without gradients of weights. Blocks are run again
    on the way back, so that memory holds the inputs of all blocks and what is inside of one.

    Parameters
    ----------
    model : nn.Module
        Returns ``logits``, or a tensor (or several) whose squared error then is the loss.
    layers : mapping of str to nn.Module
        Linear layers.
    blocks : sequence of nn.Module
        The model's repeated blocks.
    batches : sequence of mapping of str to Tensor
    masks : sequence of Tensor of bool, shape (batch, sequence), or None
        False where a batch holds padding.
    changes : callable
        Returns the changes (out, in) of a layer's weight; asked once per batch and layer.
    seed : int
        Of the tokens drawn from the predictions.

    Returns
    -------
    dict of str to dict of int to float
        Layers that no gradient reached are missing.
    """
    sums: dict[str, dict[int, float]] = {}

    def seen(name: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        weights = gradient.reshape(-1, gradient.shape[-1]).float().square()
        found = sums.setdefault(name, {})
        for key, change in changes(name).items():
            moved = (rows @ change.to(rows).T).square_().mul_(weights)
            found[key] = found.get(key, 0.0) + 0.5 * float(moved.sum(dtype=torch.float64))

    tokens = output_gradients(model, layers, blocks, batches, masks, seen, seed=seed)
    return {n: {k: v / max(1, tokens) for k, v in found.items()} for n, found in sums.items()}
