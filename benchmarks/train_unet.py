"""Train the small diffusion model whose softmax ``benchmarks/softmax_unet.py`` quantizes.

A class-conditional UNet2DConditionModel on Fashion-MNIST, padded to 32 x 32: self-attention over
1,024 and 256 positions, cross-attention to a short sequence of learned embeddings of the label.

    python benchmarks/train_unet.py --data fashion-mnist --out unet --minutes 8
    # does it run at all? (half a minute on a CPU)
    python benchmarks/train_unet.py --smoke

DIR of --data holds the four idx files of Fashion-MNIST, gzipped. What is written to --out:

    unet/                   float16 weights of the moving average, as diffusers saves them
    scheduler/              the noise schedule, for DDIM sampling
    labels.safetensors      "embeddings": (classes + 1, tokens, width); the last is "no class"
    training.json           settings, losses
    samples.png             one row per class
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

CLASSES, SIZE = 10, 32


def read_images(path: Path) -> torch.Tensor:
    """Read an idx file of 28 x 28 images; returns (n, 1, 32, 32) uint8 with a black border."""
    raw = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16)
    pad = (SIZE - 28) // 2
    return nn.functional.pad(torch.tensor(raw).view(-1, 1, 28, 28), (pad,) * 4)


def read_labels(path: Path) -> torch.Tensor:
    """Read an idx file of labels; returns (n,) int64."""
    return torch.tensor(
        np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=8)
    ).long()


def read_split(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the images and labels of "train" or "t10k"."""
    images = read_images(folder / f"{split}-images-idx3-ubyte.gz")
    return images, read_labels(folder / f"{split}-labels-idx1-ubyte.gz")


def made_up_split(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise in the form of `read_split`, where --smoke is given no data."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 1, SIZE, SIZE), generator=draw).to(torch.uint8)
    return images, torch.arange(count) % CLASSES


class Model(nn.Module):
    """A UNet and the embeddings of its labels; the embedding after the classes' is "no class"."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=SIZE,
            in_channels=1,
            out_channels=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=tuple(args.channels),
            attention_head_dim=tuple(args.heads),  # what diffusers so names is the number of heads
            layers_per_block=args.layers,
            cross_attention_dim=args.width,
            norm_num_groups=16,
            dropout=args.dropout,
        )
        self.labels = nn.Parameter(torch.randn(CLASSES + 1, args.tokens, args.width))

    def forward(self, noisy, steps, classes):
        return self.unet(noisy, steps, self.labels[classes]).sample


def schedule_of(args: argparse.Namespace) -> DDIMScheduler:
    """Return the noise schedule; sampling clips to the range of the pixels."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule=args.schedule,
        prediction_type=args.prediction,
        timestep_spacing="trailing",
        clip_sample=True,
    )


class Loss:
    """Mean squared error of the prediction, at drawn time steps with drawn noise."""

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        self.scheduler = schedule_of(args)
        self.steps = self.scheduler.config.num_train_timesteps
        self.device = device
        self.drop = args.drop

    def __call__(self, model, images, classes, draw, drop: bool) -> torch.Tensor:
        pixels = images.to(torch.float32) / 127.5 - 1
        noise = torch.randn(pixels.shape, generator=draw, device=self.device)
        steps = torch.randint(self.steps, (len(pixels),), generator=draw, device=self.device)
        if drop:
            chance = torch.rand(len(pixels), generator=draw, device=self.device)
            classes = classes.masked_fill(chance < self.drop, CLASSES)
        noisy = self.scheduler.add_noise(pixels, noise, steps)
        target = noise
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(pixels, noise, steps)
        with torch.autocast(self.device, dtype=torch.bfloat16):
            predicted = model(noisy, steps, classes)
        return nn.functional.mse_loss(predicted.float(), target)


class Average:
    """Exponential moving average of the weights, short in the beginning."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.live = list(model.parameters())
        self.kept = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.kept, [p.detach() for p in self.live], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights with the average."""
        for live, kept in zip(self.live, self.kept, strict=True):
            held = live.detach().clone()
            live.copy_(kept)
            kept.copy_(held)


def learning_rate(peak: float, done: float) -> float:
    """Return the rate at a fraction of the run: linear rise, cosine down to a fiftieth."""
    warm = 0.02
    if done < warm:
        return peak * max(done, 1e-4) / warm
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min((done - warm) / 0.98, 1.0))))


@torch.no_grad()
def held_out_loss(model, loss, images, classes, batch: int) -> float:
    """Mean loss on held-out images, with the same noise every time."""
    draw = torch.Generator(loss.device).manual_seed(1)
    model.eval()
    total = 0.0
    for start in range(0, len(images), batch):
        part = slice(start, start + batch)
        score = loss(model, images[part], classes[part], draw, drop=False)
        total += score.item() * len(images[part])
    model.train()
    return total / len(images)


def save(model: Model, args: argparse.Namespace, results: dict) -> None:
    """Write everything but the picture; weights in float16."""
    model.unet.eval()
    half = UNet2DConditionModel.from_config(model.unet.config)
    half.load_state_dict(model.unet.state_dict())
    half.half().save_pretrained(args.out / "unet")
    schedule_of(args).save_pretrained(args.out / "scheduler")
    labels = {"embeddings": model.labels.detach().to("cpu", torch.float16).contiguous()}
    save_file(labels, args.out / "labels.safetensors")
    options = {k: v if isinstance(v, (int, float, list)) else str(v) for k, v in vars(args).items()}
    options = {k: v for k, v in options.items() if k not in ("out", "data")}
    text = json.dumps({**results, "options": options, "torch": torch.__version__}, indent=1)
    (args.out / "training.json").write_text(text + "\n", encoding="utf-8")
    model.unet.train()


def fit(model: Model, train, held, args: argparse.Namespace, device: str, started: float) -> dict:
    """Train until the time or the steps are over; leave the average's weights in ``model``."""
    loss, average = Loss(args, device), Average(model, args.ema)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=device == "cuda"
    )
    draw = torch.Generator(device).manual_seed(args.seed)
    forward = torch.compile(model) if args.compile else model
    results: dict = {"parameters": sum(p.numel() for p in model.unet.parameters()), "losses": []}
    step, done, running = 0, 0.0, torch.zeros((), device=device)
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, done)
        pick = torch.randint(len(train[0]), (args.batch,), generator=draw, device=device)
        score = loss(forward, train[0][pick], train[1][pick], draw, drop=True)
        score.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
        running += score.detach()
        step += 1
        spent = (time.perf_counter() - started) / 60
        done = spent / args.minutes if args.minutes else step / args.steps
        if step % args.every and done < 1:
            continue
        average.swap()
        row = {"step": step, "minutes": round(spent, 2)}
        row["training"] = running.item() / (step % args.every or args.every)
        row["held_out"] = held_out_loss(model, loss, *held, args.batch)
        if not math.isfinite(row["training"]):
            raise FloatingPointError(f"the loss at step {step} is not finite: lower --lr")
        results["losses"].append(row)
        results["images"] = step * args.batch
        save(model, args, results)
        if done < 1:
            average.swap()
        running.zero_()
        print(json.dumps(row), flush=True)
    return results


def load(folder: Path, device: str) -> tuple[UNet2DConditionModel, torch.Tensor, DDIMScheduler]:
    """Read back what `save` wrote, by diffusers alone, in float32."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").float().eval().to(device)
    labels = load_file(folder / "labels.safetensors")["embeddings"].float().to(device)
    return unet, labels, DDIMScheduler.from_pretrained(folder / "scheduler")


@torch.no_grad()
def sample(folder: Path, device: str, per_class: int, steps: int) -> np.ndarray:
    """Draw images of every class by DDIM; returns (10, per_class, 32, 32) in [0, 1]."""
    unet, labels, scheduler = load(folder, device)
    draw = torch.Generator().manual_seed(0)
    count = CLASSES * per_class
    state = torch.randn((count, 1, SIZE, SIZE), generator=draw).to(device)
    context = labels[torch.arange(CLASSES, device=device).repeat_interleave(per_class)]
    scheduler.set_timesteps(steps)
    for time_step in scheduler.timesteps:
        predicted = unet(state, time_step, context).sample
        state = scheduler.step(predicted, time_step, state).prev_sample
    pixels = state.clamp(-1, 1).add(1).div(2)
    if not torch.isfinite(pixels).all():
        raise FloatingPointError("samples hold NaN or Inf")
    return pixels.view(CLASSES, per_class, SIZE, SIZE).cpu().numpy()


def write_picture(path: Path, images: np.ndarray) -> None:
    """Write a grid of gray images, one row per class."""
    rows, columns, height, width = images.shape
    gray = np.rint(images * 255).astype(np.uint8).transpose(0, 2, 1, 3)
    Image.fromarray(gray.reshape(rows * height, columns * width)).save(path, optimize=True)


def run(args: argparse.Namespace) -> None:
    """Read the data, train, save, load again and draw the picture."""
    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() and not args.smoke else "cpu"
    torch.manual_seed(args.seed)
    if args.data:
        train, held = read_split(args.data, "train"), read_split(args.data, "t10k")
    else:
        train, held = made_up_split(64), made_up_split(16)
    if args.smoke:
        held = tuple(part[:4] for part in held)
    train, held = ([part.to(device) for part in split] for split in (train, held))
    model = Model(args).to(device).train()
    results = fit(model, train, held, args, device, started)
    del model
    images = sample(args.out, device, args.samples, args.sample_steps)
    write_picture(args.out / "samples.png", images)
    print(f"{results['parameters']:,} parameters, saved in {args.out}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; ``--smoke`` shrinks everything."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="folder of the four idx files")
    add("--out", type=Path, metavar="DIR", help="where to save (default: a temporary folder)")
    add("--minutes", type=float, help="train for this long; the schedule follows the clock")
    add("--steps", type=int, default=8000, help="steps, where --minutes is not given (8000)")
    add("--every", type=int, default=500, help="steps between checkpoints (500)")
    add("--batch", type=int, default=256, help="images in a step (256)")
    add("--lr", type=float, default=6e-4, help="highest learning rate (6e-4)")
    add("--weight-decay", type=float, default=0.01, help="of AdamW (0.01)")
    add("--ema", type=float, default=0.999, help="decay of the moving average (0.999)")
    add("--drop", type=float, default=0.1, help="share of labels replaced by no class (0.1)")
    add("--dropout", type=float, default=0.0, help="inside the UNet (0)")
    add("--channels", type=int, nargs=3, default=[64, 96, 128], help="at 32, 16, 8 (64 96 128)")
    add("--heads", type=int, nargs=3, default=[4, 6, 8], help="attention heads (4 6 8)")
    add("--layers", type=int, default=1, help="layers of a block (1)")
    add("--tokens", type=int, default=8, help="length of a label's sequence (8)")
    add("--width", type=int, default=64, help="width of a label's embeddings (64)")
    add("--schedule", default="squaredcos_cap_v2", help="beta schedule of diffusers (cosine)")
    add("--prediction", default="v_prediction", help="v_prediction or epsilon (v_prediction)")
    add("--samples", type=int, default=12, help="images per class in the picture (12)")
    add("--sample-steps", type=int, default=50, help="DDIM steps of the picture (50)")
    add("--compile", action="store_true", help="compile with torch.compile")
    add("--seed", type=int, default=0, help="of weights, noise and batches (0)")
    add("--smoke", action="store_true", help="a few steps of a tiny model, on the CPU")
    args = parser.parse_args(argv)
    if args.smoke:
        small = {"channels": [16, 32, 32], "heads": [2, 2, 2], "samples": 1, "sample_steps": 2}
        vars(args).update(small, steps=2, every=1, batch=2, minutes=None)
    elif not (args.data and args.data.is_dir() and args.out):
        parser.error("--data must be a folder and --out must be given (or --smoke)")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the script."""
    args = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        args.out = args.out or Path(folder)
        args.out.mkdir(parents=True, exist_ok=True)
        run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
