"""What small changes of linear layers' weights cost in the loss of the whole model.

A change E of one weight moves the layer's outputs by E x, and the model's loss, at its minimum
over what the model itself predicts, by half of E x in the Fisher information of those outputs. Of
that the diagonal is kept: with g the gradient of a token sampled from the model's own prediction,

    loss(E) = 1/2 mean over tokens of sum over outputs i of g_i^2 (E x)_i^2

in nats per token. All layers are on one scale, unlike with tr(E H E^T).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ptqkit.nn.forward import calibration_mode, device_of, model_inputs

__all__ = ["rounding_losses"]

# Returns the changes of a layer's weight that are to be compared, by their names.
Changes = Callable[[str], Mapping[int, torch.Tensor]]


class _Watch(torch.autograd.Function):
    """Pass the output on; on the way back hand the input and the output's gradient over."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, x: torch.Tensor, seen: Any) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.seen = seen
        return output.clone()  # a model may add to it in place

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.seen(*ctx.saved_tensors, gradients[0])
        return gradients[0], None, None


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

    def watch(name: str) -> Callable[..., torch.Tensor]:
        def seen(x: torch.Tensor, gradient: torch.Tensor) -> None:
            rows = x.reshape(-1, x.shape[-1]).float()
            weights = gradient.reshape(-1, gradient.shape[-1]).float().square()
            found = sums.setdefault(name, {})
            for key, change in changes(name).items():
                moved = (rows @ change.to(rows).T).square_().mul_(weights)
                found[key] = found.get(key, 0.0) + 0.5 * float(moved.sum(dtype=torch.float64))

        def hook(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            x = args[0] if args else next(iter(kwargs.values()))
            return _Watch.apply(output, x.detach(), seen)

        return hook

    device = device_of(model)
    generator = torch.Generator(device).manual_seed(seed)
    tokens = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(calibration_mode(model))
        stack.enter_context(_fixed_parameters(model))
        stack.enter_context(_run_again(blocks))
        for name, layer in layers.items():
            handle = layer.register_forward_hook(watch(name), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(torch.enable_grad())
        for batch, mask in zip(batches, masks, strict=True):
            loss, count = _loss(model(**model_inputs(model, batch)), mask, generator)
            loss.backward()
            tokens += count
    return {n: {k: v / max(1, tokens) for k, v in found.items()} for n, found in sums.items()}


def _loss(
    output: Any, mask: torch.Tensor | None, generator: torch.Generator
) -> tuple[torch.Tensor, int]:
    """Return a sum whose gradients have the Fisher information as their mean square."""
    values = getattr(output, "logits", None)
    predicts = values is not None
    if values is None:
        values = output if isinstance(output, torch.Tensor) else next(iter(output.values()))
    values = values.float()
    if mask is not None and values.shape[:2] == mask.shape:
        values = values[mask.to(values.device)]
    values = values.reshape(-1, values.shape[-1])
    if predicts:
        drawn = torch.multinomial(values.detach().softmax(-1), 1, generator=generator)[:, 0]
        return F.cross_entropy(values, drawn, reduction="sum"), len(values)
    signs = torch.randint(0, 2, values.shape, generator=generator, device=values.device)
    return (values * (2 * signs - 1)).sum(), len(values)


@contextlib.contextmanager
def _fixed_parameters(model: nn.Module) -> Iterator[None]:
    """Take no gradients of parameters."""
    learning = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _run_again(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let each block keep its input alone, and run again on the way back."""
    own = {block: block.__dict__.get("forward") for block in blocks}

    def again(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        return run

    try:
        for block in blocks:
            block.__dict__["forward"] = again(block.forward)
        yield
    finally:
        for block, kept in own.items():
            if kept is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = kept
