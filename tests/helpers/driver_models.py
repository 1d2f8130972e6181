"""Tiny models of many architectures, random tokens, and the driver's work done by hand."""

from __future__ import annotations

import torch
import transformers as T

import ptqkit

VOCABULARY = 64
_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    **_COMMON,
}
_BERT = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
_T5 = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8}

ARCHITECTURES = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**_LLAMA)),
    "mistral": lambda: T.MistralForCausalLM(T.MistralConfig(**_LLAMA, sliding_window=8)),
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**_LLAMA, tie_word_embeddings=True)),
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**_LLAMA, head_dim=8)),
    "gemma": lambda: T.GemmaForCausalLM(T.GemmaConfig(**_LLAMA, head_dim=8)),
    "gemma2": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**_LLAMA, head_dim=8, sliding_window=8)),
    "phi3": lambda: T.Phi3ForCausalLM(T.Phi3Config(**_LLAMA)),
    "opt": lambda: T.OPTForCausalLM(
        T.OPTConfig(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
            **_COMMON,
        )
    ),
    "gpt2": lambda: T.GPT2LMHeadModel(
        T.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, **_COMMON)
    ),
    "bloom": lambda: T.BloomForCausalLM(
        T.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **_COMMON)
    ),
    "gpt_neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**_BERT)),
    "falcon": lambda: T.FalconForCausalLM(
        T.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **_COMMON)
    ),
    "bert": lambda: T.BertForMaskedLM(T.BertConfig(**_BERT)),
    "roberta": lambda: T.RobertaForMaskedLM(
        T.RobertaConfig(**{**_BERT, "max_position_embeddings": 33})
    ),
    "t5": lambda: T.T5ForConditionalGeneration(
        T.T5Config(**_T5, **_COMMON, decoder_start_token_id=0)
    ),
}
LAYERS_PER_BLOCK = {
    "opt": 6,
    "gpt2": 4,
    "bloom": 4,
    "gpt_neox": 4,
    "falcon": 4,
    "phi3": 4,
    "bert": 6,
    "roberta": 6,
    "t5": 16,
}


def build(name: str = "llama", seed: int = 0) -> torch.nn.Module:
    """Make a random model, the same for the same seed; the global seed stays as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ARCHITECTURES[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                # Bigger than the default, so that quantized inputs differ from float ones.
                if parameter.dim() == 2:
                    parameter.mul_(3.0)
    return model.eval()


def tokens(rows: int = 6, length: int = 32, seed: int = 0) -> torch.Tensor:
    """Random token ids that are no special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def padded_batches(name: str = "llama", rows: int = 6) -> list[dict[str, torch.Tensor]]:
    """Batches of two rows, some padded on either side; T5 gets no padding but a decoder input."""
    ids = tokens(rows)
    if name == "t5":
        return [
            {"input_ids": ids[i : i + 2], "decoder_input_ids": ids[i : i + 2, :20]}
            for i in range(0, rows, 2)
        ]
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    mask[3, :7] = 0
    return [
        {"input_ids": ids[i : i + 2], "attention_mask": mask[i : i + 2]} for i in range(0, rows, 2)
    ]


def by_hand(model, groups, batches, recipe):
    """Quantize true-sequentially, in the plainest way: a whole forward per batch and group."""
    result = {}
    for group in groups:
        first = model.get_submodule(group[0])
        hessian = ptqkit.Hessian(_in_features(first))
        for batch in batches:
            seen = []
            handle = first.register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0]))
            with torch.no_grad():
                model(**batch)
            handle.remove()
            mask = batch.get("attention_mask")
            x = seen[0]
            hessian.update(x, None if mask is None else mask.bool().reshape(x.shape[:-1]))
        for name in group:
            module = model.get_submodule(name)
            transposed = type(module).__name__ == "Conv1D"
            weight = module.weight.detach().float()
            weight = (weight.T if transposed else weight).contiguous().numpy()
            matrix = ptqkit.gptq(weight, hessian, **recipe)
            values = torch.from_numpy(matrix.dequantize())
            with torch.no_grad():
                module.weight.copy_(values.T if transposed else values)
            result[name] = matrix
    return result


def _in_features(module) -> int:
    rows, columns = module.weight.shape
    return rows if type(module).__name__ == "Conv1D" else columns


class WordTokenizer:
    """Splits at white space; ids by a table that grows. Enough of a tokenizer for these tests."""

    def __init__(self, bos: bool = True) -> None:
        self.bos_token_id = 1 if bos else None
        self.calls = 0

    def __call__(self, text, add_special_tokens=True, verbose=True):
        self.calls += 1
        ids = [3 + int(w) % (VOCABULARY - 3) for w in text.split()]
        return {"input_ids": ids}

    def convert_ids_to_tokens(self, index):
        return f"<{index}>"


def numbers(count: int, start: int = 0) -> str:
    """Text of ``count`` words for :class:`WordTokenizer`, ten to a line."""
    words = [str((start + i) * 7919 % 1000) for i in range(count)]
    return "\n".join(" ".join(words[i : i + 10]) for i in range(0, count, 10)) + "\n"
