"""Train the fourth model of the comparison: an OPT shape with biases, on books, in CPU minutes.

    python -m benchmarks.accuracy.train_opt --data ../shared/data --out models/gutenberg-opt

Two blocks of 128 channels, a byte-level BPE of 512 tokens, contexts of 256: 0.49 million
parameters. Trained on the training books of `gutenberg`; its last megabyte is left for calibration.
Training stops after `--steps` or `--minutes`, whichever comes first, at a rate that falls with
either. The model is written in float16, as `benchmarks.accuracy.run --models models` reads it.
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

CONTEXT, VOCABULARY = 256, 512
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
        hidden_size=128,
        word_embed_proj_dim=128,
        num_hidden_layers=2,
        ffn_dim=512,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return OPTForCausalLM(config)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--minutes", type=float, default=6.0)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--rate", type=float, default=3e-3)
    p.add_argument("--characters", type=int, default=4_000_000, help="of the text, at most")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    text = text_of(args.data, "train")[:-LEFT_OUT][: args.characters]
    tokenizer = make_tokenizer(text[:1_000_000])
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    model = make_model(args.seed).train()
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
            args.rate * min(1.0, (step + 1) / 50) * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(ids) - CONTEXT, (args.batch,), generator=generator)
        rows = torch.stack([ids[s : s + CONTEXT - 1] for s in starts.tolist()])
        rows = torch.nn.functional.pad(rows, (1, 0), value=1)
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            seconds = time.perf_counter() - begin
            print(f"step {step}: loss {float(loss):.3f}, {seconds:.0f} s", flush=True)
    model.eval().half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    count = sum(q.numel() for q in model.parameters())
    print(f"{count:,} parameters, {step + 1} steps, loss {float(loss):.3f}: {args.out}")


if __name__ == "__main__":
    main()
