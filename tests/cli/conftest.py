"""What the tests of the command line work on."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.sweep_cases import tiny_model

WORDS = "the quick brown fox jumps over the lazy dog while def read(path): return path\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny float16 LLaMA model, its tokenizer and texts."""
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("cli")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 128}
    tiny_model(path / "model", **sizes)
    generator = np.random.default_rng(0)
    words = WORDS.split(" ")
    text = " ".join(generator.choice(words) for _ in range(2000))
    (path / "train.txt").write_text(text, encoding="utf-8")
    (path / "test.txt").write_text(text[:1500][::-1], encoding="utf-8")
    (path / "empty.txt").write_text("", encoding="utf-8")
    np.save(path / "tokens.npy", generator.integers(2, 4000, (6, 20)))
    np.save(path / "flat.npy", np.zeros(5))
    return path
