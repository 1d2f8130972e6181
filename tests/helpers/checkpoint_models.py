"""Tiny models for the checkpoint tests, and a stand-in for the driver that fake-quantizes them."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from transformers.pytorch_utils import Conv1D

import ptqkit
from ptqkit.nn.activations import ActivationQuantizer, install_quantizer
from ptqkit.nn.forward import hooks

TOKENS = torch.arange(3, 23)[None]

_LLAMA = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_PLAIN = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}


def _config(kind: str):
    t = transformers
    if kind == "llama":
        return t.LlamaConfig(**_LLAMA)
    if kind == "mistral":
        return t.MistralConfig(**_LLAMA)
    if kind == "qwen2":
        return t.Qwen2Config(**_LLAMA, tie_word_embeddings=True)
    if kind == "opt":
        small = {k: v for k, v in _PLAIN.items() if k != "intermediate_size"}
        return t.OPTConfig(**small, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64)
    if kind == "gpt2":
        return t.GPT2Config(
            vocab_size=96,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        )
    if kind == "bloom":
        return t.BloomConfig(
            vocab_size=96,
            hidden_size=64,
            n_layer=2,
            n_head=4,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    if kind == "gpt_neox":
        return t.GPTNeoXConfig(**_PLAIN)
    if kind == "bert":
        return t.BertConfig(**{k: v for k, v in _PLAIN.items() if "token_id" not in k})
    raise KeyError(kind)


def build(kind: str, dtype: torch.dtype = torch.float32):
    """A random model in eval mode, built as from_pretrained builds it (rotary tables in fp32)."""
    config = _config(kind)
    auto = (
        transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    )
    state = torch.get_rng_state()
    torch.manual_seed(7)
    try:
        model = auto.from_config(config, dtype=dtype)
    finally:
        torch.set_rng_state(state)
    return model.eval()


def targets(model) -> dict[str, torch.nn.Module]:
    """Linears inside the repeated blocks."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
        and any(part.isdigit() for part in name.split("."))
    }


def matrix(module) -> np.ndarray:
    """Weight as float32 (out, in)."""
    weight = module.weight.detach().float()
    return (weight.t() if isinstance(module, Conv1D) else weight).contiguous().numpy()


def assign(module, q) -> None:
    """Write the dequantized weight into the module."""
    weight = torch.from_numpy(q.dequantize())
    module.weight.data.copy_(weight.t() if isinstance(module, Conv1D) else weight)


def fake_quantize(model, *, overrides=None, act_order=False, **options):
    """Quantize every target in place; return the matrices by name.

    ``overrides`` maps a name ending to other options, or to None for a layer left float;
    ``act_order`` gives permuted groups (a g_idx that is not in order).
    """
    layers = {}
    options.setdefault("scale_dtype", str(model.dtype).removeprefix("torch."))
    for name, module in targets(model).items():
        chosen = dict(options)
        changes = [v for end, v in (overrides or {}).items() if name.endswith(end)]
        if None in changes:
            continue
        for change in changes:
            chosen.update(change)
        weight = matrix(module)
        if act_order:
            rng = np.random.default_rng(len(name))
            x = rng.normal(size=(128, weight.shape[1])) * rng.uniform(0.2, 3, weight.shape[1])
            hessian = (x.T @ x / len(x)).astype(np.float32)
            q = ptqkit.gptq(weight, hessian, order="act", **chosen)
            assert q.permuted_groups
        else:
            q = ptqkit.rtn(weight, **chosen)
        assign(module, q)
        layers[name] = q
    return layers


@torch.no_grad()
def quantize_inputs(model, names, spec, tokens: torch.Tensor = TOKENS) -> dict:
    """Install a quantizer on every named layer, static ones calibrated on ``tokens``.

    ``spec`` is one ActivationQuantization, or a mapping of name endings to them ("" for the rest).
    """
    specs = spec if isinstance(spec, dict) else {"": spec}
    ranges, installed = {}, {}

    def see(name, value):
        flat = value.detach().float().reshape(-1, value.shape[-1])
        ranges.setdefault(name, ptqkit.ChannelRanges(flat.shape[1])).update(flat.numpy())

    with hooks({name: model.get_submodule(name) for name in names}, see):
        model(tokens)
    for name in names:
        chosen = specs[max((end for end in specs if name.endswith(end)), key=len)]
        if chosen is None:
            continue
        q = ActivationQuantizer.calibrate(chosen, ranges[name], model.dtype)
        install_quantizer(model.get_submodule(name), q)
        installed[name] = q
    return installed


@torch.no_grad()
def logits(model, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model(tokens).logits


def assert_same_matrices(found, expected) -> None:
    """Every field that a file carries is equal."""
    assert found.keys() == expected.keys()
    for name, q in expected.items():
        r = found[name]
        for field in ("codes", "scales", "zero_points", "g_idx"):
            a, b = getattr(r, field), getattr(q, field)
            assert a.dtype == b.dtype, (name, field)
            np.testing.assert_array_equal(a, b, err_msg=f"{name}.{field}")
        for field in ("bits", "group_size", "symmetric", "per_tensor"):
            assert getattr(r, field) == getattr(q, field), (name, field)
