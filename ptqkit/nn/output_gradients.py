"""What gradients the model's own predictions have at the outputs of its linear layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ptqkit.nn.forward import calibration_mode, device_of, model_inputs

__all__ = ["output_gradients"]

# Is given a layer's name, its inputs, and the gradients at its outputs.
Seen = Callable[[str, torch.Tensor, torch.Tensor], None]


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


def output_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    blocks: Sequence[nn.Module],
    batches: Sequence[Mapping[str, torch.Tensor]],
    masks: Sequence[torch.Tensor | None],
    seen: Seen,
    after: Callable[[], None] | None = None,
    seed: int = 0,
) -> int:
    """Hand over inputs and gradients of layers, whose mean square is the Fisher information.

    One forward and one backward pass per batch, without gradients of weights. Blocks are run again
    on the way back, so that memory holds the inputs of all blocks and what is inside of one.

    Parameters
    ----------
    model : nn.Module
        Returns ``logits``, of which tokens are drawn, or a tensor (or several) whose squared error
        then is the loss.
    layers : mapping of str to nn.Module
        Linear layers.
    blocks : sequence of nn.Module
        The model's repeated blocks.
    batches : sequence of mapping of str to Tensor
    masks : sequence of Tensor of bool, shape (batch, sequence), or None
        False where a batch holds padding.
    seen : callable
        Called in the backward pass with a layer's name, its inputs and the gradients at its
        outputs.
    after : callable, optional
        Called after each batch.
    seed : int
        Of the tokens drawn from the predictions.

    Returns
    -------
    int
        Number of tokens that were drawn.
    """

    def watch(name: str) -> Callable[..., torch.Tensor]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            x = args[0] if args else next(iter(kwargs.values()))
            return _Watch.apply(output, x.detach(), partial(seen, name))

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
        stack.enter_context(torch.inference_mode(False))  # a caller may be in it
        stack.enter_context(torch.enable_grad())
        for batch, mask in zip(batches, masks, strict=True):
            loss, count = _loss(model(**model_inputs(model, batch)), mask, generator)
            loss.backward()
            tokens += count
            if after is not None:
                after()
    return tokens


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
