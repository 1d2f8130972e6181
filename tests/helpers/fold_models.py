"""Tiny random models for the tests of folds: every norm has a gain and bias that matter."""

from __future__ import annotations

import torch
import transformers as T

from helpers.driver_models import ARCHITECTURES, VOCABULARY, build, tokens

_SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_OPT = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 32,
    **_SMALL,
}
_MIXTRAL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    **_SMALL,
}

VARIANTS = {
    "opt-post": lambda: T.OPTForCausalLM(T.OPTConfig(**_OPT, do_layer_norm_before=False)),
    "opt-plain-norm": lambda: T.OPTForCausalLM(
        T.OPTConfig(**_OPT, layer_norm_elementwise_affine=False)
    ),
    "bloom-post": lambda: T.BloomForCausalLM(
        T.BloomConfig(
            hidden_size=32,
            n_layer=2,
            n_head=4,
            apply_residual_connection_post_layernorm=True,
            **_SMALL,
        )
    ),
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**_MIXTRAL)),
    "mpt": lambda: T.MptForCausalLM(
        T.MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=32, **_SMALL)
    ),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Build a random model whose norms have gains and biases of their own."""
    if name in VARIANTS and name not in ARCHITECTURES:
        ARCHITECTURES[name] = VARIANTS[name]
    model = build(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to(dtype)


def one_batch(name: str = "llama", length: int = 16) -> dict[str, torch.Tensor]:
    """A batch of two rows of random tokens."""
    batch = {"input_ids": tokens(2, length, seed=5)}
    if name == "t5":
        batch["decoder_input_ids"] = tokens(2, 10, seed=6)
    return batch


def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits without gradients, in float64."""
    with torch.no_grad():
        return model(**batch).logits.double()


def change(new: torch.Tensor, old: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((new - old).abs().max() / old.abs().max())
