"""Single tokens through fused blocks: as through the modules, and never where that is not so."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from helpers.checkpoint_models import build, fake_quantize, quantize_inputs

import ptqkit
from ptqkit.hf.checkpoint.running import set_compute
from ptqkit.hf.checkpoint.save import save_checkpoint
from ptqkit.hf.models import one_token
from ptqkit.hf.models.int8_cache import Int8Cache
from ptqkit.hf.models.one_token import OneToken, fuse_blocks, fused_blocks, unfuse_blocks
from ptqkit.nn.packed_linear import PackedLinear
from ptqkit.recipe.options import ActivationQuantization

PROMPT = torch.arange(3, 12)[None]
NEXT = torch.arange(40, 46)[None]


def qwen3(dtype):
    config = transformers.Qwen3Config(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=24,
    )  # fmt: skip
    torch.manual_seed(3)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def loaded(tmp_path, kind="llama", dtype=torch.float32, compute="packed", inputs=None, **options):
    model = qwen3(dtype) if kind == "qwen3" else build(kind, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases that do something
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_()
    options = {"bits": 4, "group_size": 32, **options}
    layers = fake_quantize(model, **options)
    given = {} if inputs is None else {"activations": quantize_inputs(model, layers, inputs)}
    out = tmp_path / "model"
    save_checkpoint(model, layers, None, out, checkpoint_format="ptqkit_v3", **given)
    return ptqkit.load(tmp_path / "model", compute=compute)


@torch.no_grad()
def steps(model, cache=None, prompt=PROMPT):
    """Logits of a prompt's last token and of single tokens after it."""
    given = {} if cache is None else {"past_key_values": cache}
    output = model(prompt, use_cache=True, **given)
    rows = [output.logits[:, -1]]
    for token in NEXT[0]:
        cache = output.past_key_values
        output = model(token.view(1, 1), past_key_values=cache, use_cache=True)
        rows.append(output.logits[:, -1])
    return torch.cat(rows).float()


@pytest.fixture
def calls(monkeypatch):
    """How often blocks were computed by the core; "all" where they all were in one call."""
    count = []
    begin, blocks = one_token.decoder.begin, one_token.decoder.blocks

    def all_of_them(*args):
        blocks(*args)
        count.extend(["all"] * len(args[3]))

    monkeypatch.setattr(
        one_token.decoder, "begin", lambda *args: (count.append("one"), begin(*args))[1]
    )
    monkeypatch.setattr(one_token.decoder, "blocks", all_of_them)
    return count


def both(model, calls, run=steps):
    """The results of a run through the modules, and fused; every single token was."""
    unfuse_blocks(model)
    want = run(model)
    assert not calls
    assert fuse_blocks(model) == len(model.model.layers)
    found = run(model)
    assert len(calls) == NEXT.numel() * len(model.model.layers)
    return found, want


def near(found, want, limit):
    assert (found - want).abs().max() <= limit * want.abs().max()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_families(kind, tmp_path, calls):
    model = loaded(tmp_path, kind, act_order=kind == "mistral")
    assert fused_blocks(model) == 2
    assert str(model.ptqkit_compute).endswith("2 blocks fused for single tokens")
    near(*both(model, calls), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("compute", "options"),
    [
        ("packed", {"bits": 3}),
        ("int8", {"bits": 2, "act_order": True}),
        ("packed", {"bits": 8, "group_size": None, "inputs": ActivationQuantization(8)}),
        (
            "packed",
            {
                "bits": 8,
                "group_size": None,
                "inputs": ActivationQuantization(8, symmetric=False, granularity="tensor"),
            },
        ),
    ],
)
def test_kinds_of_layers(dtype, compute, options, tmp_path, calls):
    model = loaded(tmp_path, dtype=dtype, compute=compute, **options)
    # A code of an input may fall to the other side; in bfloat16 every number may.
    near(*both(model, calls), 0.02 if dtype == torch.bfloat16 else 1e-4)


def test_all_blocks_at_once(tmp_path, calls):
    """With the plain cache the first block computes all; what changes on the way is noticed."""
    model = loaded(tmp_path)
    near(*both(model, calls), 1e-5)
    assert set(calls) == {"all"}
    first, second = model.model.layers

    def same(how, run=steps):
        calls.clear()
        found = run(model)
        assert set(calls) == how
        unfuse_blocks(model)
        near(found, run(model), 1e-5)
        fuse_blocks(model)

    handle = first.register_forward_hook(lambda m, args, output: output * 1.5)
    same({"all", "one"})
    handle.remove()
    handle = first.register_forward_hook(lambda m, args, output: output.mul_(1.5))
    same({"all", "one"})
    handle.remove()

    def forget(module, args, kwargs):
        layer = kwargs["past_key_values"].layers[1]
        if layer.keys is not None:
            layer.keys = layer.keys * 0.5

    handle = second.register_forward_pre_hook(forget, with_kwargs=True)
    same({"all", "one"})
    handle.remove()
    handle = second.self_attn.register_forward_hook(lambda *args: None)
    same({"one"})
    handle.remove()
    model.config.num_hidden_layers = 1
    same({"one"})
    model.config.num_hidden_layers = 2
    with torch.inference_mode():
        same({"one"})
    same({"all"})


def test_caches(tmp_path, calls):
    model = loaded(tmp_path)
    for make in (
        Int8Cache,
        lambda: transformers.StaticCache(config=model.config, max_cache_len=40),
        lambda: transformers.DynamicCache(config=model.config),
    ):
        near(*both(model, calls, lambda m, make=make: steps(m, make())), 1e-5)
        calls.clear()


def test_masks_and_eager_attention(tmp_path, calls):
    model = loaded(tmp_path)
    model.set_attn_implementation("eager")
    near(*both(model, calls), 1e-5)

    @torch.no_grad()
    def padded(m):
        mask = torch.ones(1, 9, dtype=torch.long)
        mask[0, :3] = 0
        output = m(PROMPT, attention_mask=mask, use_cache=True)
        rows = []
        for token in NEXT[0]:
            mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], 1)
            output = m(
                token.view(1, 1), attention_mask=mask, past_key_values=output.past_key_values
            )
            rows.append(output.logits[:, -1])
        return torch.cat(rows)

    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        calls.clear()
        near(*both(model, calls, padded), 1e-5)


def test_generate_gives_the_same_text(tmp_path, calls):
    model = loaded(tmp_path)

    def generate(m):
        return m.generate(PROMPT, max_new_tokens=7, min_new_tokens=7, do_sample=False)

    assert torch.equal(*both(model, calls, generate))


def test_what_is_another_case_takes_the_modules(tmp_path, calls, monkeypatch):
    model = loaded(tmp_path)
    layer = model.model.layers[0]
    attention = layer.self_attn

    def fused(run=lambda: steps(model)):
        calls.clear()
        run()
        return len(calls) / NEXT.numel()

    assert fused() == 2
    assert fused(lambda: steps(model, prompt=PROMPT.expand(2, -1)[:1])) == 2
    with torch.no_grad():  # two sequences, two tokens, no cache
        output = model(PROMPT.expand(2, -1), use_cache=True)
        calls.clear()
        model(NEXT[:, :1].expand(2, -1), past_key_values=output.past_key_values)
        model(NEXT[:, :2], past_key_values=model(PROMPT, use_cache=True).past_key_values)
        model(NEXT[:, :1], use_cache=False)
        assert not calls
    seen = []
    for inner in (attention.q_proj, attention, layer.mlp, layer.post_attention_layernorm):
        handle = inner.register_forward_hook(lambda *args: seen.append(1))
        assert fused() == 1 and len(seen) == 1 + NEXT.numel()
        seen.clear()
        handle.remove()
    handle = layer.register_forward_hook(lambda *args: seen.append(1))
    assert fused() == 2 and len(seen) == 1 + NEXT.numel()
    handle.remove()
    layer.mlp.forward = layer.mlp.forward
    assert fused() == 1
    del layer.mlp.forward
    assert fused() == 2
    attention.o_proj.compute = "dequantize"
    assert fused() == 1
    attention.o_proj.compute = "packed"
    model.train()
    assert fused() == 0
    model.eval()
    assert fused() == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert fused() == 0
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", print)
    with pytest.raises(TypeError):
        steps(model)  # which PyTorch's would not
    monkeypatch.undo()
    float_layer = torch.nn.Linear(64, 64, bias=False)
    attention.o_proj = float_layer
    assert fused() == 0  # the fixture is undone too: no calls are counted
    assert unfuse_blocks(model) == 2 and fused_blocks(model) == 0


def test_changes_are_noticed(tmp_path, calls):
    model = loaded(tmp_path)
    steps(model)
    calls.clear()
    with torch.no_grad():  # in place, by new tensors, and by new modules
        layer = model.model.layers[0]
        layer.input_layernorm.weight.mul_(1.5)
        near(*both(model, calls), 1e-5)
        calls.clear()
        scales = layer.mlp.up_proj.scales
        layer.mlp.up_proj.scales = scales * 2
        near(*both(model, calls), 1e-5)
        calls.clear()
        norm = layer.post_attention_layernorm.weight
        norm.data = norm.data * 0.5
        near(*both(model, calls), 1e-5)
        calls.clear()
        other = copy.deepcopy(layer.mlp.up_proj)
        other.scales.mul_(0.25)
        layer.mlp.up_proj = other
        near(*both(model, calls), 1e-5)
        calls.clear()
        model.to(torch.bfloat16)
        near(*both(model, calls), 0.02)


def test_copies_have_memory_of_their_own(tmp_path, calls):
    model = loaded(tmp_path)
    want = steps(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        block = again.model.layers[1].forward
        assert isinstance(block, OneToken) and block.layer is again.model.layers[1]
        assert again.model.layers[0].forward._step is block._step
        assert torch.equal(steps(again), want)
        with torch.no_grad():
            again.model.layers[0].input_layernorm.weight.mul_(2)
            again.model.layers[0].mlp.up_proj.scales.mul_(2)
        assert torch.equal(steps(model), want) and not torch.equal(steps(again), want)
    assert set(model.state_dict()) == set(copy.deepcopy(model).state_dict())


def test_the_switch(tmp_path, calls):
    model = loaded(tmp_path)
    names = list(model.state_dict())
    shown = repr(model)
    assert fused_blocks(ptqkit.load(tmp_path / "model", compute="packed", fused=False)) == 0
    assert set_compute(model, "packed", fused=False).fused_blocks == 0
    assert list(model.state_dict()) == names and repr(model) == shown
    assert set_compute(model, "dequantize").fused_blocks == 0
    assert set_compute(model, "int8").fused_blocks == 2
    steps(model)
    assert len(calls) == 2 * NEXT.numel()


def test_some_float_layer_keeps_a_block_out(tmp_path):
    model = loaded(tmp_path, overrides={"layers.0.mlp.down_proj": None})
    assert fused_blocks(model) == 1
    linears = [m for m in model.model.layers[0].modules() if isinstance(m, PackedLinear)]
    assert len(linears) == 6


def test_a_cache_with_tensors_of_its_own_kind(tmp_path, calls):
    class Wide(transformers.DynamicCache):
        def update(self, *args, **kwargs):
            return tuple(t.double() for t in super().update(*args, **kwargs))

    model = loaded(tmp_path)
    with torch.no_grad():
        want = steps(model)
        output = model(PROMPT, use_cache=True)
        cache = Wide()
        for index, part in enumerate(output.past_key_values.layers):
            transformers.DynamicCache.update(cache, part.keys, part.values, index)
        found = model(NEXT[:, :1], past_key_values=cache).logits[:, -1]
    near(found, want[1:2], 1e-5)


def test_nan_is_said(tmp_path):
    model = loaded(tmp_path, compute="int8")
    with torch.no_grad():
        cache = model(PROMPT, use_cache=True).past_key_values
        model.model.embed_tokens.weight[41] = float("nan")
        with pytest.raises(ValueError, match="NaN or Inf"):
            model(NEXT[:, 1:2], past_key_values=cache)
