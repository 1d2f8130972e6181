"""The int8 key-value cache: its error and memory, and everything that ``generate`` does to it."""

from __future__ import annotations

import pytest
import torch
from helpers.checkpoint_models import TOKENS, build
from transformers import DynamicCache

from ptqkit.hf.models.int8_cache import Int8Cache, Int8Tokens


def states(tokens=5, seed=0, dtype=torch.float32):
    return torch.randn(2, 3, tokens, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_half_a_step_of_the_token_and_head(dtype):
    x = states(400, dtype=dtype)
    x[0, 0, 0] = 0
    x[0, 0, 1, 3] = 1000.0
    held = Int8Tokens()
    for part in x.split([1, 300, 99], dim=-2):
        held.append(part)
    assert held.length == 400 and held.nbytes == x.numel() + 4 * x[..., 0].numel()
    found = held.read(dtype)
    assert found.dtype == dtype and torch.equal(found[0, 0, 0], torch.zeros(8, dtype=dtype))
    step = x.float().abs().amax(-1, keepdim=True) / 127
    rounding = torch.finfo(dtype).eps * x.float().abs().amax(-1, keepdim=True)
    assert ((found.float() - x.float()).abs() <= step / 2 + rounding).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_generates_as_the_float_cache_does_nearly(kind):
    model = build(kind)
    cache, exact = Int8Cache(), DynamicCache(config=model.config)
    first = model(TOKENS, past_key_values=cache).logits
    expected = model(TOKENS, past_key_values=exact).logits
    assert 0 < (first - expected).abs().max() < 0.05 * expected.std()
    assert cache.get_seq_length() == TOKENS.shape[1]
    floats = sum(
        t.numel() * t.element_size() for layer in exact.layers for t in (layer.keys, layer.values)
    )
    heads = model.config.hidden_size // model.config.num_attention_heads
    assert cache.nbytes == floats * (heads + 4) // (4 * heads)
    out = model.generate(
        TOKENS, past_key_values=Int8Cache(), max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    assert out.shape == (1, TOKENS.shape[1] + 6)


@torch.no_grad()
def test_the_split_into_calls_changes_nothing():
    model = build("llama")
    whole, parts = Int8Cache(), Int8Cache()
    expected = model(TOKENS, past_key_values=whole).logits
    found = [model(piece, past_key_values=parts).logits for piece in TOKENS.split(7, dim=1)]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_beams_crops_and_repeats():
    model = build("llama")
    beams = model.generate(
        TOKENS, past_key_values=Int8Cache(), num_beams=3, max_new_tokens=5, do_sample=False
    )
    assert beams.shape[0] == 1
    cache = Int8Cache()
    cache.update(states(), states(seed=1), 0)
    before = cache.layers[0].stored[0].read(torch.float32)
    cache.batch_repeat_interleave(2)
    assert torch.equal(
        cache.layers[0].stored[0].read(torch.float32), before.repeat_interleave(2, 0)
    )
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert torch.equal(cache.layers[0].stored[0].read(torch.float32), before)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].stored[0].read(torch.float32), before.flip(0))
    cache.layers[0].crop(-2)
    assert cache.get_seq_length() == 3
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
