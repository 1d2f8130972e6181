"""Write a small checkpoint of each kind, with the log-probabilities of the fake-quantized model.

Usage: python write_checkpoints.py FOLDER [NAME ...]
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as t

import ptqkit

VOCABULARY = 96
# A head of 64 channels, which vLLM's attention on the CPU wants.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
OLMOE = {"num_experts": 4, "num_experts_per_tok": 2}
W4 = {"bits": 4, "group_size": 32, "symmetric": True}
CHANNEL = {**W4, "group_size": None}
FLOAT_EXPERTS = {"overrides": {"*.experts": "skip"}}


def tokens(rows: int, length: int, seed: int) -> torch.Tensor:
    """Return random token ids, (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def model(kind: str, **settings: Any) -> Any:
    """Return a random model in bfloat16 whose logits are not all alike."""
    torch.manual_seed(0)
    config = getattr(t, f"{kind}Config")(**{**SIZES, **settings})
    made = getattr(t, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3)
    return made.bfloat16().eval()


def llama(**settings: Any) -> Any:
    """Return a random Llama."""
    return model("Llama", head_dim=64, **settings)


# Written, and expected to fail: no kernel for the CPU, or layers that cannot be fused.
REFUSED = {
    "w3": "vLLM's CPU build has no kernel for 3 bits",
    "w8": "vLLM's CPU build has no kernel for 8-bit weights with float inputs",
    "gptq-v2-asymmetric": "vLLM's CPU build refuses asymmetric GPTQ",
    "siblings": "vLLM fuses q, k and v",
}


def cases() -> Iterator[tuple[str, Callable[[], Any], str, Any, dict[str, Any]]]:
    """Yield a name, the model, the format, the recipe and its changes."""
    auto, stock, quality = "auto", "compressed-tensors", "quality"
    yield "w4-groups", llama, auto, quality, W4
    yield "w4-channels", llama, auto, quality, CHANNEL
    yield "w4-act-order", llama, auto, quality, {**W4, "order": "act", "static_groups": True}
    yield "w4-head", llama, auto, quality, {**W4, "include": ("lm_head",)}
    yield "w4-tied", lambda: llama(tie_word_embeddings=True), auto, quality, W4
    sizes = {"overrides": {"*.down_proj": {"group_size": 64}}}
    yield "two-group-sizes", llama, auto, quality, {**W4, **sizes}
    yield "w8a8-dynamic", llama, auto, "vector-wise", {}
    static = {"preset": "aweq", "bias_correction": False}
    yield "w8a8-static-asymmetric", llama, auto, static, {}
    yield "gptq-symmetric", llama, "gptq", quality, W4
    yield "gptq-v2-symmetric", llama, "gptq_v2", quality, W4
    yield "qwen2-biases", lambda: model("Qwen2"), auto, quality, W4
    experts = {**W4, **FLOAT_EXPERTS}
    yield "qwen3-moe", lambda: model("Qwen3Moe", head_dim=64, **EXPERTS), stock, quality, experts
    shared = {**EXPERTS, "shared_expert_intermediate_size": 64}
    yield "qwen2-moe", lambda: model("Qwen2Moe", **shared), stock, quality, experts
    few = {"num_local_experts": 4, "num_experts_per_tok": 2}
    yield "mixtral", lambda: model("Mixtral", head_dim=64, **few), stock, quality, experts
    yield "qwen3-moe-packed", lambda: model("Qwen3Moe", head_dim=64, **EXPERTS), auto, quality, W4
    yield "qwen2-moe-packed", lambda: model("Qwen2Moe", **shared), auto, quality, W4
    yield "mixtral-packed", lambda: model("Mixtral", head_dim=64, **few), auto, quality, W4
    yield "olmoe-packed", lambda: model("Olmoe", **OLMOE), auto, quality, W4
    yield "qwen3-moe-gptq", lambda: model("Qwen3Moe", head_dim=64, **EXPERTS), "gptq", quality, W4
    yield "w3", llama, auto, quality, {**W4, "bits": 3}
    yield "w8", llama, auto, quality, {**CHANNEL, "bits": 8}
    yield "gptq-v2-asymmetric", llama, "gptq_v2", quality, {**W4, "symmetric": False}
    yield "siblings", llama, auto, quality, {**W4, "overrides": {"*.q_proj": {"group_size": 64}}}


def write(folder: Path, made: Any, save: Callable[[Path], Any], refused: str | None) -> None:
    """Save a checkpoint, and beside the weights what the model in memory says."""
    save(folder)
    ids = tokens(1, 24, 7)
    with torch.no_grad():
        logits = made(ids).logits
    expected = {
        "ids": ids[0].tolist(),
        "logprobs": logits[0].float().log_softmax(-1).tolist(),
        "refused": refused,
    }
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")


def main(root: Path, names: list[str]) -> None:
    """Write the float models and every case, or those named."""
    root.mkdir(parents=True, exist_ok=True)
    floats = (("float", llama), ("float-moe", lambda: model("Qwen3Moe", head_dim=64, **EXPERTS)))
    for name, make in floats:
        if not names or name in names:
            made = make()
            write(root / name, made, made.save_pretrained, None)
            print(name, flush=True)
    for name, make, checkpoint_format, recipe, changes in cases():
        if names and name not in names:
            continue
        made = make()
        result = ptqkit.quantize(
            made, recipe, tokens(8, 64, 0), checkpoint_format=checkpoint_format, **changes
        )

        def save(folder: Path, result: Any = result, form: str = checkpoint_format) -> Any:
            return result.save(folder, form, overwrite=True)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of siblings, which is what one case is about
            write(root / name, made, save, REFUSED.get(name))
        print(name, result.checkpoint.format, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
