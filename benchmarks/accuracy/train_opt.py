"""Train the fourth model of the comparison: an OPT shape with biases, on books.

    python -m benchmarks.accuracy.train_opt --data ../shared/data --out models/gutenberg-opt \\
        --device cuda

Four blocks of 192 channels, a byte-level BPE of 1,024 tokens, contexts of 256: 2.0 million
parameters. Trained on the first `--characters` of the training books of `gutenberg`, a minute or
two on a GPU; the last million is left for calibration. Training stops after `--steps` or
`--minutes`, whichever comes first, at a rate that falls with either; then the loss on books of
`valid.txt.gz`, if they are there, is told. The model is written in float16, as
`benchmarks.accuracy.run --models models` reads it.
"""

from __future__ import annotations

import argparse
import gzip
import math
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from benchmarks.accuracy.models import LEFT_OUT

CONTEXT, VOCABULARY = 256, 1024
START = "</s>"  # OPT starts with the token that ends texts


def text_of(data: Path, name: str) -> str:
    """Return a text of the folder `gutenberg`."""
    with gzip.open(data / "gutenberg" / f"{name}.txt.gz", "rt", encoding="utf-8") as file:
        return file.read()


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Train the tokenizer; token 0 is padding, 1 the start."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        text.split("\n\n"), VOCABULARY, special_tokens=["<pad>", START], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=START,
        eos_token=START,
        pad_token="<pad>",
        model_max_length=CONTEXT,
    )


def make_model(seed: int) -> OPTForCausalLM:
    """Return the untrained model."""
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        word_embed_proj_dim=192,
        num_hidden_layers=4,
        ffn_dim=768,
        num_attention_heads=6,
        max_position_embeddings=CONTEXT,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return OPTForCausalLM(config)


def tokens_of(text: str, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return the tokens of a text, paragraph by paragraph: a batch has all processors."""
    parts = tokenizer(text.split("\n\n"), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for part in parts for token in part])


def windows_of(ids: torch.Tensor, starts: torch.Tensor, device: str) -> torch.Tensor:
    """Return windows, the start token first."""
    rows = ids[starts[:, None] + torch.arange(CONTEXT - 1)]
    return torch.nn.functional.pad(rows, (1, 0), value=1).to(device)


@torch.no_grad()
def unseen(
    model: OPTForCausalLM, data: Path, tokenizer: PreTrainedTokenizerFast, device: str
) -> float:
    """Return the loss on 256 windows of the validation books."""
    ids = tokens_of(text_of(data, "valid"), tokenizer)
    rows = windows_of(ids, torch.linspace(0, len(ids) - CONTEXT, 256).long(), device)
    losses = [model(input_ids=r, labels=r, use_cache=False).loss for r in rows.split(32)]
    return float(torch.stack(losses).mean())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--steps", type=int, default=5000)
    p.add_argument("--minutes", type=float, default=6.0)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--rate", type=float, default=2e-3)
    p.add_argument("--characters", type=int, default=16_000_000, help="of the text, at most")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    text = text_of(args.data, "train")[:-LEFT_OUT][: args.characters]
    tokenizer = make_tokenizer(text[:1_000_000])
    ids = tokens_of(text, tokenizer)
    print(f"{len(ids):,} tokens of {len(text):,} characters", flush=True)
    model = make_model(args.seed).train().to(args.device)
    decayed = [q for q in model.parameters() if q.dim() > 1]
    others = [q for q in model.parameters() if q.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(args.seed)
    begin = time.perf_counter()
    for step in range(args.steps):
        done = max(step / args.steps, (time.perf_counter() - begin) / (60 * args.minutes))
        if done >= 1:
            break
        rate = (
            args.rate * min(1.0, (step + 1) / 200) * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(ids) - CONTEXT, (args.batch,), generator=generator)
        rows = windows_of(ids, starts, args.device)
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            seconds = time.perf_counter() - begin
            print(f"step {step}: loss {float(loss.detach()):.3f}, {seconds:.0f} s", flush=True)
    told = f"{float(loss.detach()):.3f}"
    if (args.data / "gutenberg" / "valid.txt.gz").exists():
        told += f", on other books {unseen(model.eval(), args.data, tokenizer, args.device):.3f}"
    model.eval().half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    count = sum(q.numel() for q in model.parameters())
    print(f"{count:,} parameters, {step + 1} steps, loss {told}: {args.out}")


if __name__ == "__main__":
    main()
