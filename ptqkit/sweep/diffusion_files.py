"""What a sweep file says of diffusion models: their folders, prompts and measure."""

from __future__ import annotations

from pathlib import Path

__all__ = ["SAMPLES_METRIC", "is_diffusion_model", "read_prompts"]

SAMPLES_METRIC = "noise/signal"
"""What is measured: the mean over the samples of ``||x_q - x||^2 / ||x||^2``."""


def is_diffusion_model(name: str) -> bool:
    """Whether a folder holds a pipeline of diffusers, or a UNet with its labels."""
    folder = Path(name)
    return (folder / "model_index.json").is_file() or (folder / "labels.safetensors").is_file()


def read_prompts(path: str) -> list[str]:
    """Return the lines of a file that are not empty."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]
