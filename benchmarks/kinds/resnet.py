"""A small ResNet on Fashion-MNIST: data, model, training, and its accuracy image by image."""

from __future__ import annotations

import gzip
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

__all__ = ["ResNet", "correct", "load", "read_split", "train"]

MEAN, DEVIATION = 0.2860, 0.3530  # of the training images


def read_split(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Read "train" or "t10k": images float32 (n, 1, 28, 28), standardized, and labels (n,)."""
    images, labels = (
        np.frombuffer(gzip.decompress((folder / f"{split}-{what}-ubyte.gz").read_bytes()), np.uint8)
        for what in ("images-idx3", "labels-idx1")
    )
    pixels = torch.from_numpy(images[16:].copy()).view(-1, 1, 28, 28).float() / 255
    return (pixels - MEAN) / DEVIATION, torch.from_numpy(labels[8:].copy()).long()


class Block(nn.Module):
    """Two 3x3 convolutions around which the input goes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.around: nn.Module = nn.Identity()
        if inputs != outputs:
            self.around = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.around(x))


class ResNet(nn.Module):
    """ResNet-20 (He et al. 2015, section 4.2), for one channel: 272 thousand weights."""

    def __init__(self, width: int = 16, depth: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for stage in range(3):
            for index in range(depth):
                outputs = width << stage
                blocks.append(Block(inputs, outputs, 2 if stage and not index else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


@torch.no_grad()
def correct(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Return which images a model classifies correctly, bool (n,)."""
    device = next(model.parameters()).device
    found = [model(x.to(device)).argmax(1).cpu() for x in images.split(500)]
    return (torch.cat(found) == labels).numpy()


def augment(images: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Shift by up to 2 pixels and flip half of the images."""
    n, device = len(images), images.device
    padded = F.pad(images, (2,) * 4, value=-MEAN / DEVIATION)
    at = torch.randint(0, 5, (2, n), generator=draw, device=device)
    rows = at[0][:, None] + torch.arange(28, device=device)
    columns = at[1][:, None] + torch.arange(28, device=device)
    flip = torch.rand(n, generator=draw, device=device) < 0.5
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    return padded[torch.arange(n, device=device)[:, None, None], 0, rows[:, :, None],
                  columns[:, None, :]][:, None]  # fmt: skip


def train(data: Path, out: Path, device: str, epochs: int = 40, limit: int | None = None) -> dict:
    """Train with SGD and a cosine schedule, save float16 weights, and return facts."""
    torch.manual_seed(0)
    images, labels = (t[:limit].to(device) for t in read_split(data, "train"))
    model = ResNet().to(device)
    batch, start = 256, time.time()
    steps = epochs * -(-len(images) // batch)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.2, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1, (s + 1) / 400) * 0.5 * (1 + math.cos(math.pi * min(1, s / steps))),
    )
    draw = torch.Generator(device).manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=draw, device=device).split(batch):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                logits = model(augment(images[rows], draw))
            loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.cpu().contiguous() for k, v in state.items()}, out / "resnet.safetensors")
    test = read_split(data, "t10k")
    accuracy = float(correct(load(out).to(device), *test).mean())
    return {"epochs": epochs, "accuracy": accuracy, "seconds": round(time.time() - start)}


def load(folder: Path) -> ResNet:
    """Load the weights, which are float16, as float32."""
    model = ResNet()
    model.load_state_dict(load_file(folder / "resnet.safetensors"))
    return model.float().eval()
