"""Train language models alike but for their size: OPT's architecture, prose, a few CPU minutes.

    python -m benchmarks.papers.size_series --data ../shared/data/gutenberg --out models

Writes `models/opt-0.05M`, `opt-0.10M` and `opt-0.39M` (weights of the blocks; the embedding of 512
pieces comes on top), which share a tokenizer, and `training.json` beside them. Models that are
there already are left alone. Each reads the head of the same
order of windows; `--times 10` reads ten times as much of it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_demo_model import learning_rate, save_tokenizer, train_tokenizer

__all__ = ["SIZES", "Size", "build", "train"]

PIECES = 512
POSITIONS = 128
TEXT = 2_000_000  # characters to learn from; the tokenizer learns from a quarter of them


@dataclass(frozen=True)
class Size:
    """A model's shape and how long it learns."""

    hidden: int
    layers: int
    heads: int
    steps: int
    rate: float
    batch: int = 8

    @property
    def weights(self) -> int:
        """Weights of the linear layers of the blocks."""
        return 12 * self.hidden**2 * self.layers


SIZES = {
    "opt-0.05M": Size(64, 1, 4, 500, 8e-3),
    "opt-0.10M": Size(64, 2, 4, 500, 6e-3),
    "opt-0.39M": Size(128, 2, 4, 400, 4e-3),
}


def build(size: Size, vocabulary: int, positions: int = POSITIONS) -> Any:
    """Return an OPT with random weights, its output head tied to the embedding."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        word_embed_proj_dim=size.hidden,
        ffn_dim=4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=positions,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return OPTForCausalLM(config)


def windows(stream: torch.Tensor, size: Size, length: int) -> Iterator[torch.Tensor]:
    """Yield (batch, length) windows at random places, the start token before each."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(size.steps):
        starts = torch.randint(len(stream) - length, (size.batch, 1), generator=draw)
        window = stream[starts + torch.arange(length - 1)]
        yield torch.cat([torch.zeros_like(window[:, :1]), window], dim=1)


def train(size: Size, stream: torch.Tensor, length: int = POSITIONS, seed: int = 0) -> Any:
    """Train a model on a stream of tokens; return it and the mean loss of its last 50 steps."""
    torch.manual_seed(seed)
    model = build(size, PIECES, length)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=size.rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    losses = []
    for step, ids in enumerate(windows(stream, size, length)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(size.rate, step / size.steps)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"step {step + 1} of {size.steps}: {sum(losses[-50:]) / 50:.3f}", flush=True)
    last = losses[-50:]
    return model.eval(), sum(last) / len(last)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True, help="folder of train.txt.gz")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--size", action="append", choices=SIZES)
    p.add_argument("--times", type=int, default=1, help="this many times the steps (1)")
    args = p.parse_args(argv)
    with gzip.open(args.data / "train.txt.gz", "rt", encoding="utf-8") as file:
        text = file.read(TEXT)
    paragraphs = text.split("\n")
    kept = [line for line in paragraphs if line]
    tokenizer = train_tokenizer(kept[: len(kept) // 4], PIECES)
    each = tokenizer.backend_tokenizer.encode_batch(kept, add_special_tokens=False)
    newline = tokenizer.backend_tokenizer.encode("\n", add_special_tokens=False).ids
    stream = torch.tensor([t for item in each for t in (*item.ids, *newline)])
    args.out.mkdir(parents=True, exist_ok=True)
    notes = args.out / "training.json"
    facts = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {}
    for name in args.size or SIZES:
        size, folder = SIZES[name], args.out / name
        size = replace(size, steps=size.steps * args.times)
        if (folder / "config.json").exists():
            continue
        started = time.process_time()
        model, loss = train(size, stream)
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        facts[name] = {
            **asdict(size),
            "weights": size.weights,
            "tokens": size.steps * size.batch * POSITIONS,
            "loss": loss,
            "cpu_seconds": time.process_time() - started,
        }
        notes.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        print(name, facts[name], flush=True)


if __name__ == "__main__":
    main()
