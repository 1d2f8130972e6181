"""Sizes of models, against models and against what papers say."""

from __future__ import annotations

import pytest
import torch
import transformers

from ptqkit.hf.models.int8_cache import Int8Cache
from ptqkit.hf.speed.random_model import VARIANTS, random_model
from ptqkit.hf.speed.shapes import ONE_B, SHAPES, ModelShape
from ptqkit.hf.speed.worker import tensor_bytes
from ptqkit.nn.packed_linear import PackedLinear

TINY = ModelShape(128, 256, 2, 4, 2, 64)
TOKENS = torch.arange(3, 13)[None]


def test_counts_are_those_of_the_classes():
    t = transformers
    for shape, config in (
        (
            TINY,
            t.LlamaConfig(
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=64,
            ),
        ),
        (
            ModelShape(64, 128, 2, 4, 4, 96, False, True, 66),
            t.OPTConfig(
                hidden_size=64,
                ffn_dim=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=96,
                max_position_embeddings=64,
                word_embed_proj_dim=64,
                enable_bias=False,
            ),
        ),
    ):
        with torch.device("meta"):
            model = t.AutoModelForCausalLM.from_config(config)
        weights = {id(p): p.numel() for n, p in model.named_parameters() if "norm.bias" not in n}
        assert shape.linear_weights + shape.other_weights == sum(weights.values())


def test_published_sizes_come_out():
    opt = SHAPES["OPT-175B"]
    assert opt.linear_weights + opt.other_weights == pytest.approx(175e9, rel=0.01)
    # GPTQ, section 6.1: 63 GB of weights at 3 bits (GiB here), 9 GB of keys and values.
    assert opt.weight_bytes(3) / 2**30 == pytest.approx(63, rel=0.05)
    assert opt.cache_bytes(2048) / 2**30 == pytest.approx(9, rel=0.01)
    assert ONE_B.linear_weights + ONE_B.other_weights == pytest.approx(1.1e9, rel=0.01)
    half = ONE_B.weight_bytes(4, 128) - ONE_B.weight_bytes(4)
    assert half == ONE_B.linear_weights * 24 / 128 / 8


@pytest.mark.parametrize("variant", ["float", *VARIANTS])
@torch.no_grad()
def test_random_models_run_and_have_the_size_of_the_arithmetic(variant):
    model = random_model(TINY, variant, positions=64)
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == (0 if variant == "float" else 15)
    cache = Int8Cache()
    assert torch.isfinite(model(TOKENS, past_key_values=cache).logits).all()
    assert cache.nbytes == TINY.cache_bytes(TOKENS.shape[1], bits=8, scale_bits=32)
    out = model.generate(TOKENS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (1, 13)
    bits, group, _ = VARIANTS.get(variant, (32, None, False))
    head = TINY.vocabulary * TINY.hidden
    expected = TINY.weight_bytes(bits, group, other_bits=32) + (bits / 8 - 4) * head
    assert tensor_bytes(model) == pytest.approx(expected, rel=0.05)


def test_the_same_seed_gives_the_same_model():
    first, second = (random_model(TINY, "W4", positions=64).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match="variant"):
        random_model(TINY, "W5")
