"""Make models with random weights layer by layer: for speed, values do not matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ptqkit.errors import check_choice
from ptqkit.hf.models.one_token import fuse_blocks
from ptqkit.hf.speed.shapes import ModelShape
from ptqkit.nn.packed_linear import PackedLinear
from ptqkit.recipe.options import ActivationQuantization

__all__ = ["VARIANTS", "random_model"]

_GROUP = 128
_BLOCK = 1 << 20
#: What the linear layers hold, the head among them: bits, group size, quantized inputs.
VARIANTS: dict[str, tuple[int, int | None, bool]] = {
    "W8A8": (8, None, True),
    "W8": (8, _GROUP, False),
    "W4": (4, _GROUP, False),
    "W3": (3, _GROUP, False),
    "W2": (2, _GROUP, False),
}


def random_model(
    shape: ModelShape,
    variant: str = "float",
    *,
    dtype: torch.dtype = torch.float32,
    compute: str = "packed",
    fused: bool = True,
    positions: int = 2048,
    seed: int = 0,
) -> Any:
    """Make a LLaMA with random weights.

    Parameters
    ----------
    shape : ModelShape
    variant : {"float", "W8A8", "W8", "W4", "W3", "W2"}
        Linear layers, the head among them: float, or packed in groups of 128, symmetric; W8A8 has
        a grid per output and dynamic inputs of 8 bits.
    dtype : torch.dtype
        Of what is not packed, and of the inputs.
    compute : {"packed", "int8", "dequantize"}
        Of packed layers.
    fused : bool
        As :func:`ptqkit.load` takes it.

    Returns
    -------
    transformers.LlamaForCausalLM, in eval mode
    """
    check_choice("variant", variant, ("float", *VARIANTS))
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=0,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
    )
    random = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        head = LlamaForCausalLM(config).lm_head
    # Without layers and head first, which are made one by one.
    config.vocab_size = 1
    model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    config.vocab_size = shape.vocabulary
    model.model.embed_tokens = _filled(
        nn.Embedding(shape.vocabulary, shape.hidden, dtype=dtype, device="meta"), dtype, random
    )
    model.lm_head = _filled(_packed(head, variant, dtype, compute), dtype, random)
    config.num_hidden_layers = shape.layers
    for index in range(shape.layers):
        with torch.device("meta"):
            layer = LlamaDecoderLayer(config, index)
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                layer.set_submodule(name, _packed(module, variant, dtype, compute))
        model.model.layers.append(_filled(layer, dtype, random).eval())
    if fused and variant != "float" and compute != "dequantize":
        fuse_blocks(model)
    return model.requires_grad_(False)


def _packed(linear: nn.Linear, variant: str, dtype: torch.dtype, compute: str) -> nn.Module:
    """Return the layer of a variant, on the meta device."""
    if variant == "float":
        return linear
    bits, group_size, inputs = VARIANTS[variant]
    with torch.device("meta"):
        return PackedLinear(
            linear.in_features,
            linear.out_features,
            bits=bits,
            group_size=group_size,
            symmetric=True,
            bias=False,
            dtype=dtype,
            scale_dtype="float16",
            activations=ActivationQuantization(8) if inputs else None,
            compute=compute,
        )


def _filled(module: nn.Module, dtype: torch.dtype, random: torch.Generator) -> nn.Module:
    """Give a module on the meta device memory and values."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=dtype)
            value = value.fill_(1) if value.dim() == 1 else _repeat(value, random)
            setattr(part, name, nn.Parameter(value, requires_grad=False))
        if not isinstance(part, PackedLinear):
            continue
        words = torch.empty(part._packed.shape, dtype=torch.int32)
        part._buffers["weight"] = words.random_(-(2**31), 2**31, generator=random)
        top = 2 ** int(part.bits)
        part.scales = torch.full(part.scales.shape, 0.08 / top, dtype=part.scales.dtype)
        part.zero_points = torch.full(part.zero_points.shape, top // 2, dtype=torch.uint8)
    return module


def _repeat(value: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Fill a tensor with a block of random values over and over: a billion take too long."""
    flat = value.view(-1)
    block = torch.empty(min(len(flat), _BLOCK), dtype=value.dtype).normal_(
        0, 0.02, generator=random
    )
    for part in flat.split(_BLOCK):
        part.copy_(block[: len(part)])
    return value
