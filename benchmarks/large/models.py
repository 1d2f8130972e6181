"""Random models of a given size, their tokens, and the command line that asks for them."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import dataclass, fields
from typing import Any

import torch

__all__ = ["Size", "add_size", "build", "draw_tokens", "size_of"]


@dataclass(frozen=True)
class Size:
    """Sizes of a decoder: a LLaMA, or with experts a Qwen3 mixture. By default LLaMA-7B's.

    Attributes
    ----------
    hidden, intermediate, layers, heads, kv_heads, vocabulary : int
        ``intermediate`` is that of a layer without experts, or of one expert.
    experts, chosen : int
        Experts of each layer, and those that a token is sent to.
    """

    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    vocabulary: int = 32000
    experts: int = 0
    chosen: int = 2


_HELP = {
    "intermediate": "of the MLP, or of one expert",
    "experts": "per layer; 0: a plain MLP",
    "chosen": "experts that a token is sent to",
}


def add_size(parser: argparse.ArgumentParser) -> None:
    """Add the options of a size, and of the tokens that it is calibrated on."""
    group = parser.add_argument_group("model (LLaMA-7B by default)")
    for field in fields(Size):
        flag = f"--{field.name.replace('_', '-')}"
        group.add_argument(flag, type=int, default=field.default, help=_HELP.get(field.name))
    group.add_argument("--samples", type=int, default=128)
    group.add_argument("--length", type=int, default=2048, help="tokens of a sample")
    group.add_argument("--batch-size", type=int, default=4)
    group.add_argument("--dtype", default="bfloat16")


def size_of(args: argparse.Namespace) -> Size:
    """Return the size that was asked for."""
    return Size(**{f.name: getattr(args, f.name) for f in fields(Size)})


def build(size: Size, length: int, dtype: str, device: str = "cpu", seed: int = 0) -> Any:
    """Make a random model, always the same on one kind of device, in eval mode."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

    common: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": length,
        "tie_word_embeddings": False,
    }
    if size.experts:
        config: Any = Qwen3MoeConfig(
            **common,
            head_dim=size.hidden // size.heads,
            num_experts=size.experts,
            num_experts_per_tok=size.chosen,
            moe_intermediate_size=size.intermediate,
        )
    else:
        config = LlamaConfig(**common)
    quiet = torch.device(device) if device != "cpu" else contextlib.nullcontext()
    torch.manual_seed(seed)
    with quiet:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False)


def draw_tokens(size: Size, samples: int, length: int, seed: int = 1) -> torch.Tensor:
    """Return tokens with the frequencies of text (Zipf), so that inputs are correlated."""
    generator = torch.Generator().manual_seed(seed)
    chances = 1.0 / torch.arange(1.0, size.vocabulary + 1.0)
    return torch.multinomial(chances, samples * length, True, generator=generator).view(-1, length)
