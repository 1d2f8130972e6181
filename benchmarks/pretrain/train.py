"""Train one model of the ablation: same seed and data, one choice on each axis.

    python -m benchmarks.pretrain.train --data tokens.npz --out runs/base --weight-decay 0.1

Axes of Ahmadian et al. 2023 (arXiv:2305.19268, table 1): weight decay, gradient clipping, dropout,
half precision; their positions (section 4); and two that later work found decisive
(Outlier-Safe Pre-Training, arXiv:2506.19697): the optimizer and the norm gain.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.pretrain.model import GAINS, POSITIONS, AblationConfig, AblationForCausalLM

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = ("adam", "muon")


def batches(
    tokens: np.ndarray, steps: int, batch: int, length: int, seed: int, device: str
) -> Iterator[torch.Tensor]:
    """Yield (batch, length + 1) windows at random places; the same for every run of a seed."""
    generator = np.random.default_rng(seed)
    data = torch.from_numpy(tokens.astype(np.int32)).to(device)
    steps_of = torch.arange(length + 1, device=device)
    for _ in range(steps):
        starts = generator.integers(0, len(tokens) - length - 1, batch)
        yield data[torch.from_numpy(starts).to(device)[:, None] + steps_of].long()


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is made orthogonal (Jordan et al. 2024).

    Five Newton-Schulz steps in bfloat16; the update has the size of Adam's, so that weight decay
    and learning rate mean the same for both.
    """

    def __init__(self, parameters, lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @staticmethod
    def orthogonal(update: torch.Tensor) -> torch.Tensor:
        """Return the nearest semi-orthogonal matrix, roughly."""
        wide = update.shape[0] <= update.shape[1]
        x = (update if wide else update.T).bfloat16()
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x if wide else x.T

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Move every parameter once."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "average" not in state:
                    state["average"] = torch.zeros_like(p)
                average = state["average"].lerp_(p.grad, 1 - group["momentum"])
                update = self.orthogonal(p.grad.lerp(average, group["momentum"]))
                size = 0.2 * math.sqrt(max(p.shape))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.to(p.dtype), alpha=-group["lr"] * size)


def make_optimizers(model: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW on everything; with Muon, that on the matrices of the blocks and AdamW on the rest."""
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices} if args.optimizer == "muon" else set()
    decayed = [p for p in model.parameters() if p.dim() == 2 and id(p) not in chosen]
    plain = [p for p in model.parameters() if p.dim() != 2]
    groups = [
        {"params": decayed, "weight_decay": args.weight_decay},
        # the paper's recipe decays everything; so do we, or the axis could not move the gains
        {"params": plain, "weight_decay": args.weight_decay},
    ]
    adam = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=args.device == "cuda")
    if not chosen:
        return [adam]
    return [adam, Muon(matrices, args.lr, args.weight_decay)]


def rate(step: int, args: argparse.Namespace) -> float:
    """Warm-up, then a cosine to a tenth."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def validation_loss(model: nn.Module, tokens: np.ndarray, length: int, device: str) -> float:
    """Mean loss per token over 64 windows at equal distances, in float32."""
    model.eval()
    starts = np.linspace(0, len(tokens) - length - 1, 64).astype(int)
    rows = torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))
    losses = [
        nn.functional.cross_entropy(
            model(part[:, :-1].to(device)).logits.flatten(0, 1).float(),
            part[:, 1:].to(device).flatten(),
        ).item()
        for part in rows.split(16)
    ]
    model.train()
    return float(np.mean(losses))


def save(model: AblationForCausalLM, folder: Path, facts: dict) -> None:
    """Write a checkpoint in float16 and what is known of it."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def load(folder: str | Path) -> AblationForCausalLM:
    """Read a checkpoint in float32."""
    from safetensors.torch import load_file

    model = AblationForCausalLM(AblationConfig.from_pretrained(folder))
    model.load_state_dict(
        {k: v.float() for k, v in load_file(f"{folder}/model.safetensors").items()}
    )
    return model.eval()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help=".npz with token arrays train and valid")
    parser.add_argument("--out", required=True, help="folder of the checkpoints")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm; 0: none")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--positions", choices=POSITIONS, default="learned")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    parser.add_argument("--gain", choices=GAINS, default="channel")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--early", type=float, default=0.2, help="share of the steps kept early")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args(arguments)


def train(args: argparse.Namespace) -> dict:
    """Train, write the early and the late checkpoint, and return what is known of the run."""
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    data = np.load(args.data)
    config = AblationConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
        max_position_embeddings=args.length,
        dropout=args.dropout,
        positions=args.positions,
        gain=args.gain,
    )
    model = AblationForCausalLM(config).to(args.device).train()
    run = torch.compile(model) if args.compile else model
    optimizers = make_optimizers(model, args)
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    names = ("weight_decay", "clip", "dropout", "precision", "positions", "optimizer", "gain")
    facts = {n: getattr(args, n) for n in (*names, "seed", "lr", "steps", "batch", "length")}
    facts |= {n: getattr(args, n) for n in ("warmup", "hidden_size", "layers", "vocab_size")}
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    facts["device"] = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    early, skipped, started, curve = round(args.early * args.steps), 0, time.time(), []
    stream = batches(data["train"], args.steps, args.batch, args.length, args.seed, args.device)
    for step, rows in enumerate(stream, 1):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate(step - 1, args)
        with torch.autocast(args.device, dtype=PRECISIONS[args.precision]):
            logits = run(input_ids=rows[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        if args.clip:
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        before = scaler.get_scale()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            curve.append([step, float(loss.detach())])
        if step in (early, args.steps):
            facts |= {"step": step, "tokens": step * args.batch * args.length}
            facts |= {"skipped_steps": int(skipped), "seconds": round(time.time() - started, 1)}
            facts["validation_loss"] = validation_loss(
                model, data["valid"], args.length, args.device
            )
            facts["curve"] = curve
            save(model, Path(args.out, "early" if step == early else "late"), facts)
    return facts


if __name__ == "__main__":
    found = train(parse())
    print(json.dumps({k: v for k, v in found.items() if k != "curve"}))
