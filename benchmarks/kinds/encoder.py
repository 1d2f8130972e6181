"""A BERT encoder trained to tell who wrote a passage: data, training, and its accuracy.

Text is cut into windows of 64 tokens; of each author the last tenth of every work is held out.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

__all__ = ["AUTHORS", "LENGTH", "correct", "load", "make_windows", "train"]

AUTHORS, LENGTH, VOCABULARY = 24, 64, 4096
START, END = 0, 1
HELD_OUT = 0.1


def works(texts: Path) -> list[tuple[str, str]]:
    """Return author and text of each training work."""
    raw = gzip.decompress((texts / "train.txt.gz").read_bytes())
    with (texts / "index.tsv").open(encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file, delimiter="\t") if r["split"] == "train"]
    return [
        (r["author"], raw[int(r["offset"]) : int(r["offset"]) + int(r["bytes"])].decode())
        for r in rows
    ]


def make_windows(texts: Path, out: Path) -> None:
    """Train a tokenizer and write windows of the authors with most text, and their labels."""
    import tokenizers

    found = works(texts)
    size = Counter[str]()
    for author, text in found:
        size[author] += len(text)
    names = [name for name, _ in size.most_common(AUTHORS)]
    chosen = [(names.index(a), t) for a, t in found if a in names]
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        (t[:200_000] for _, t in chosen),
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    parts: dict[str, list[tuple[int, np.ndarray]]] = defaultdict(list)
    body = LENGTH - 2
    for (label, _), encoded in zip(
        chosen, tokenizer.encode_batch([t for _, t in chosen]), strict=True
    ):
        ids = np.array(encoded.ids, np.uint16)
        rows = ids[: len(ids) // body * body].reshape(-1, body)
        rows = np.pad(rows, ((0, 0), (1, 1)), constant_values=((0, 0), (START, END)))
        cut = round(len(rows) * (1 - HELD_OUT))
        parts["train"].append((label, rows[:cut]))
        parts["test"].append((label, rows[cut:]))
    arrays = {}
    for split, pieces in parts.items():
        arrays[f"{split}_ids"] = np.concatenate([rows for _, rows in pieces])
        arrays[f"{split}_labels"] = np.repeat([k for k, _ in pieces], [len(r) for _, r in pieces])
    draw = np.random.default_rng(0)  # as many test passages of each author as of the least
    labels = arrays["test_labels"]
    least = min(Counter(labels.tolist()).values())
    picked = np.concatenate(
        [
            draw.choice(np.flatnonzero(labels == k), min(least, 200), False)
            for k in sorted({*labels})
        ]
    )
    arrays["test_ids"], arrays["test_labels"] = arrays["test_ids"][picked], labels[picked]
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "windows.npz", **arrays)
    (out / "authors.json").write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")


def build() -> nn.Module:
    """Make the model: 4 blocks of width 128."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=LENGTH,
            num_labels=AUTHORS,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
        )
    )


@torch.no_grad()
def correct(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Return which passages a model attributes correctly, bool (n,)."""
    device = next(model.parameters()).device
    found = [model(input_ids=x.to(device)).logits.argmax(1).cpu() for x in ids.split(250)]
    return (torch.cat(found) == labels).numpy()


def train(texts: Path, out: Path, device: str, epochs: int = 12, limit: int | None = None) -> dict:
    """Train with AdamW and a cosine schedule, save float16 weights, and return facts."""
    if not (out / "windows.npz").exists():
        make_windows(texts, out)
    data = np.load(out / "windows.npz")
    ids, labels = (
        torch.from_numpy(data[f"train_{k}"][:limit].astype(np.int64)).to(device)
        for k in ("ids", "labels")
    )
    torch.manual_seed(0)
    model, batch, start = build().to(device), 512, time.time()
    counts = torch.bincount(labels, minlength=AUTHORS).float().clamp(min=1)
    weights = (1 / counts.sqrt()) * AUTHORS / (1 / counts.sqrt()).sum()
    steps = epochs * -(-len(ids) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1, (s + 1) / 200) * 0.5 * (1 + math.cos(math.pi * min(1, s / steps))),
    )
    for _ in range(epochs):
        for rows in torch.randperm(len(ids), device=device).split(batch):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                logits = model(input_ids=ids[rows]).logits
            loss = F.cross_entropy(logits.float(), labels[rows], weights)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({k: v.cpu().contiguous() for k, v in state.items()}, out / "encoder.safetensors")
    test = (torch.from_numpy(data[f"test_{k}"].astype(np.int64)) for k in ("ids", "labels"))
    accuracy = float(correct(load(out).to(device), *test).mean())
    return {
        "epochs": epochs,
        "windows": len(ids),
        "accuracy": accuracy,
        "seconds": round(time.time() - start),
    }


def load(folder: Path) -> nn.Module:
    """Load the weights, which are float16, as float32."""
    model = build()
    model.load_state_dict(load_file(folder / "encoder.safetensors"))
    return model.float().eval()
