"""Train language models alike but for their size: OPT's architecture, on prose.

    python -m benchmarks.papers.size_series --data ../shared/data/gutenberg --out models

Writes `models/opt-0.2M`, `opt-0.8M`, `opt-3.1M` and `opt-12.6M` (weights of the blocks; the
embedding of 2,048 pieces comes on top) in float16, which share a tokenizer, and `training.json` in
each. Models that are there already are left alone. All read the same windows in the same order,
seven times the text: minutes on a GPU, where the four may run at a time (`--size`). `--times 0.01`
reads a hundredth of them, for a CPU.
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

PIECES = 2048
POSITIONS = 256
LEARNS = 10_000_000  # characters that the tokenizer learns from


@dataclass(frozen=True)
class Size:
    """A model's shape and how it learns."""

    hidden: int
    layers: int
    heads: int
    rate: float
    dropout: float = 0.0
    steps: int = 6000
    batch: int = 64

    @property
    def weights(self) -> int:
        """Weights of the linear layers of the blocks."""
        return 12 * self.hidden**2 * self.layers


SIZES = {
    "opt-0.2M": Size(128, 1, 4, 4e-3),
    "opt-0.8M": Size(128, 4, 4, 3e-3),
    "opt-3.1M": Size(256, 4, 4, 2e-3),
    "opt-12.6M": Size(512, 4, 8, 1e-3, dropout=0.1),
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
        dropout=size.dropout,
        attention_dropout=0.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        use_cache=False,
    )
    return OPTForCausalLM(config)


def windows(stream: torch.Tensor, size: Size, length: int) -> Iterator[torch.Tensor]:
    """Yield (batch, length) windows at random places, the start token before each."""
    draw = torch.Generator().manual_seed(0)
    reach = torch.arange(length - 1, device=stream.device)
    for _ in range(size.steps):
        starts = torch.randint(len(stream) - length, (size.batch, 1), generator=draw)
        window = stream[starts.to(stream.device) + reach]
        yield torch.cat([torch.zeros_like(window[:, :1]), window], dim=1)


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of predicting each token from those before it; bfloat16 on a GPU."""
    device = ids.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        logits = model(input_ids=ids[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_of(model: Any, stream: torch.Tensor, length: int = POSITIONS) -> float:
    """Return the mean loss over the whole of a text, in windows side by side."""
    rows = stream[: len(stream) // (length - 1) * (length - 1)].view(-1, length - 1)
    rows = torch.cat([torch.zeros_like(rows[:, :1]), rows], dim=1)
    parts = [float(loss_of(model, ids)) * len(ids) for ids in rows.split(64)]
    return sum(parts) / len(rows)


def train(size: Size, stream: torch.Tensor, length: int = POSITIONS, seed: int = 0) -> Any:
    """Train a model on a stream of tokens, where these are; return it and its last mean loss."""
    torch.manual_seed(seed)
    device = stream.device.type
    model = build(size, PIECES, length).to(device).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device == "cuda")
    kept = max(1, size.steps // 20)
    total = torch.zeros((), device=device)
    for step, ids in enumerate(windows(stream, size, length)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(size.rate, step / size.steps)
        loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.detach()
        if (step + 1) % kept == 0:
            last, total = float(total) / kept, torch.zeros_like(total)
            print(f"step {step + 1} of {size.steps}: {last:.3f}", flush=True)
    model.config.dropout = 0.0
    model.config.use_cache = True
    return model.eval(), last


def read(path: Path) -> list[str]:
    """Return the lines of a packed text that are not empty."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [line for line in file.read().split("\n") if line]


def encode(tokenizer: Any, lines: list[str]) -> torch.Tensor:
    """Return one stream of tokens, a newline after each line."""
    each = tokenizer.backend_tokenizer.encode_batch(lines, add_special_tokens=False)
    newline = tokenizer.backend_tokenizer.encode("\n", add_special_tokens=False).ids
    return torch.tensor([t for item in each for t in (*item.ids, *newline)])


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True, help="folder of train.txt.gz, test.txt.gz")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--size", action="append", choices=SIZES)
    p.add_argument("--times", type=float, default=1.0, help="this many times the steps (1)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(argv)
    wanted = [n for n in args.size or SIZES if not (args.out / n / "config.json").exists()]
    lines = read(args.data / "train.txt.gz")
    learnt = sum(map(len, lines)) // LEARNS + 1
    tokenizer = train_tokenizer(lines[::learnt], PIECES)
    stream = encode(tokenizer, lines).to(args.device)
    held_out = encode(tokenizer, read(args.data / "test.txt.gz")).to(args.device)
    print(f"{len(stream):,} tokens to learn, {len(held_out):,} held out", flush=True)
    for name in wanted:
        size, folder = SIZES[name], args.out / name
        size = replace(size, steps=max(1, round(size.steps * args.times)))
        started = time.perf_counter()
        model, loss = train(size, stream)
        seconds = time.perf_counter() - started
        facts = {
            **asdict(size),
            "weights": size.weights,
            "text": len(stream),
            "tokens": size.steps * size.batch * POSITIONS,
            "loss": loss,
            "held_out_loss": held_out_of(model, held_out),
            "device": args.device,
            "seconds": seconds,
        }
        model.half().save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        print(name, facts, flush=True)


if __name__ == "__main__":
    main()
