"""Tiny mixtures of experts of many architectures, and their experts taken apart by hand."""

from __future__ import annotations

import numpy as np
import torch
import transformers as t
from torch.nn import functional as F

TOKENS = torch.arange(3, 43)[None]
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}

MODELS = {
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**_SIZES, **_LOCAL)),
    "qwen2_moe": lambda: t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(**_SIZES, **_EXPERTS, shared_expert_intermediate_size=32)
    ),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**_SIZES, **_EXPERTS, head_dim=16)),
    "olmoe": lambda: t.OlmoeForCausalLM(
        t.OlmoeConfig(**_SIZES, num_experts=4, num_experts_per_tok=2)
    ),
    "deepseek_v3": lambda: t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**_SIZES, **_DEEPSEEK)),
    "gpt_oss": lambda: t.GptOssForCausalLM(
        t.GptOssConfig(**_SIZES, **_LOCAL, head_dim=16, sliding_window=32)
    ),
    "llama4": lambda: t.Llama4ForCausalLM(
        t.Llama4TextConfig(
            **_SIZES,
            num_local_experts=4,
            num_experts_per_tok=1,
            intermediate_size_mlp=48,
            head_dim=16,
            moe_layers=[0, 1],
            attention_chunk_size=64,
        )
    ),
}


def build(kind: str, implementation: str | None = None) -> torch.nn.Module:
    """Make a random model, always the same; every expert of it gets tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2)
    if implementation is not None:
        model.config._experts_implementation = implementation
    return model


def batches(count: int = 3, rows: int = 2, length: int = 32) -> list[dict[str, torch.Tensor]]:
    """Random tokens, always the same."""
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(3, 64, (rows, length), generator=generator)}
        for _ in range(count)
    ]


def mixtures(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules that hold the experts."""
    return {n: m for n, m in model.named_modules() if n.endswith(".experts")}


def starve(model: torch.nn.Module, name: str, expert: int) -> None:
    """Have the router of a mixture send no token to an expert."""
    router = model.get_submodule(name.removesuffix("experts") + "gate")

    def blind(module, args, output):
        chosen = output[-1]
        return (*output[:-1], torch.where(chosen == expert, (expert + 1) % 4, chosen))

    router.register_forward_hook(blind)


def seen_by(model, name, batch) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """What a mixture is given for a batch: inputs, rows of each expert, inputs of all tokens."""
    calls = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda m, args: calls.append(args))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    hidden, *rest = calls[0]
    if rest:
        rows = [(rest[0] == expert).any(-1).nonzero()[:, 0] for expert in range(4)]
        return hidden, [hidden[r] for r in rows], hidden
    scaled = hidden.view(4, -1, hidden.shape[-1])
    inputs = [part[part.ne(0).any(-1)] for part in scaled]
    return hidden, inputs, torch.cat(inputs)


def _view(module, expert: int, which: str) -> torch.Tensor:
    """An expert's weight (out, in), by hand, where the module holds it."""
    kind = type(module).__name__
    weight = module.down_proj[expert] if which == "down_proj" else module.gate_up_proj[expert]
    weight = (weight.T if kind in ("GptOssExperts", "Llama4TextExperts") else weight).detach()
    if which == "down_proj":
        return weight
    half, second = len(weight) // 2, which == "up_proj"
    if kind == "GptOssExperts":
        return weight[int(second) :: 2]
    return weight[half:] if second else weight[:half]


def projection(module, expert: int, which: str) -> np.ndarray:
    """An expert's weight as float32 (out, in), by hand."""
    return _view(module, expert, which).float().contiguous().numpy()


def inner(module, expert: int, x: torch.Tensor) -> torch.Tensor:
    """Inputs of an expert's last layer, from those of its first ones, by hand."""
    gate, up = (_view(module, expert, which) for which in ("gate_proj", "up_proj"))
    if type(module).__name__ == "GptOssExperts":
        bias = module.gate_up_proj_bias[expert].detach()
        gate, up = F.linear(x, gate, bias[::2]), F.linear(x, up, bias[1::2])
        gate = gate.clamp(max=module.limit)
        up = up.clamp(-module.limit, module.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * module.alpha))
    if type(module).__name__ == "Llama4TextExperts":
        return F.linear(x, up) * module.act_fn(F.linear(x, gate))
    # Strided, as the module has it: torch rounds an exponential otherwise at the end of a row.
    gate, up = torch.cat([F.linear(x, gate), F.linear(x, up)], -1).chunk(2, -1)
    return module.act_fn(gate) * up
