"""What the tests of the command line work on."""

from __future__ import annotations

import numpy as np
import pytest

WORDS = "the quick brown fox jumps over the lazy dog while def read(path): return path\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny float16 LLaMA model, its tokenizer and texts."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from ptqkit.demo import MODEL_DIR

    path = tmp_path_factory.mktemp("cli")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.LlamaForCausalLM(config).half()
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    generator = np.random.default_rng(0)
    words = WORDS.split(" ")
    text = " ".join(generator.choice(words) for _ in range(2000))
    (path / "train.txt").write_text(text, encoding="utf-8")
    (path / "test.txt").write_text(text[:1500][::-1], encoding="utf-8")
    (path / "empty.txt").write_text("", encoding="utf-8")
    np.save(path / "tokens.npy", generator.integers(2, 4000, (6, 20)))
    np.save(path / "flat.npy", np.zeros(5))
    return path
