"""Rotate the residual stream of a LLaMA-type model, folded into its weights (QuaRot, SpinQuant)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def hadamard(size: int, seed: int) -> torch.Tensor:
    """Return a random block Hadamard matrix, orthogonal, float64; blocks are powers of two."""
    block = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    whole = torch.block_diag(*[matrix / block**0.5] * (size // block))
    return signs[:, None].double() * whole


def _gain(norm: Any, layers: list[nn.Linear]) -> None:
    """Move a norm's gain into the layers that it feeds."""
    for layer in layers:
        layer.weight.data = (layer.weight.double() * norm.weight.double()).to(layer.weight)
    norm.weight.data.fill_(1.0)


def _right(layer: nn.Linear, rotation: torch.Tensor) -> None:
    layer.weight.data = (layer.weight.double() @ rotation).to(layer.weight)


def _left(layer: nn.Linear, rotation: torch.Tensor) -> None:
    layer.weight.data = (rotation.T @ layer.weight.double()).to(layer.weight)


@contextlib.contextmanager
@torch.no_grad()
def rotated(model: Any) -> Iterator[None]:
    """Rotate in place: stream, and values within each head; the head is untied. Not undone."""
    ids = torch.arange(32)[None] % model.config.vocab_size
    before = model(ids).logits
    if model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    stream = hadamard(model.config.hidden_size, 1)
    embeddings = model.model.embed_tokens
    embeddings.weight.data = (embeddings.weight.double() @ stream).to(embeddings.weight)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        _gain(block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj])
        _gain(block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
        width = attention.head_dim
        value = hadamard(width, 2)
        count, kv = (p.weight.shape[i] // width for p, i in (
            (attention.o_proj, 1), (attention.v_proj, 0)))  # fmt: skip
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj,
                      mlp.up_proj):  # fmt: skip
            _right(layer, stream)
        for layer in (attention.o_proj, mlp.down_proj):
            _left(layer, stream)
        _left(attention.v_proj, torch.block_diag(*[value] * kv))
        _right(attention.o_proj, torch.block_diag(*[value] * count))
    _gain(model.model.norm, [model.lm_head])
    _right(model.lm_head, stream)
    after = model(ids).logits
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    yield
