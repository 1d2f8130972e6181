"""DDIM sampling from fixed starting noise, and the folder of a class-conditional UNet."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from ptqkit._repr import one_line_repr
from ptqkit.diffusion.checks import check_inputs, check_positive, device_and_dtype
from ptqkit.nn.forward import calibration_mode

__all__ = ["ClassConditionalUNet", "load_unet", "sample", "starting_noise"]

OnStep = Callable[[int, torch.Tensor, torch.Tensor], None]


@dataclass
class ClassConditionalUNet:
    """A UNet with its noise schedule and the embeddings of its labels.

    Attributes
    ----------
    unet : diffusers.UNet2DConditionModel
    scheduler : diffusers.DDIMScheduler
    labels : Tensor, shape (classes + 1, tokens, width)
        The last is "no class", for classifier-free guidance.
    """

    __repr__ = one_line_repr

    unet: UNet2DConditionModel
    scheduler: DDIMScheduler
    labels: torch.Tensor

    def context(self, count: int) -> torch.Tensor:
        """Embeddings of ``count`` labels, the classes in turn: (count, tokens, width)."""
        return self.labels[torch.arange(count, dtype=torch.long) % (len(self.labels) - 1)]

    def noise(self, count: int, seed: int = 0) -> torch.Tensor:
        """Return starting noise for ``count`` samples of this UNet; see :func:`starting_noise`."""
        unet: Any = self.unet
        config = unet.config
        return starting_noise(count, (config.in_channels, *(2 * [config.sample_size])), seed=seed)


def load_unet(
    folder: str | os.PathLike[str], *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> ClassConditionalUNet:
    """Load what ``benchmarks/train_unet.py`` saves: unet/, scheduler/ and labels.safetensors.

    Raises
    ------
    FileNotFoundError
        If a part is missing.
    """
    folder = Path(folder)
    for part in ("unet", "scheduler", "labels.safetensors"):
        if not (folder / part).exists():
            raise FileNotFoundError(f"{folder} has no {part}: is it a folder of train_unet.py?")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
    labels = load_file(folder / "labels.safetensors")["embeddings"]
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    return ClassConditionalUNet(unet.to(device).eval(), scheduler, labels.to(device, dtype))


def starting_noise(count: int, shape: tuple[int, ...], *, seed: int = 0) -> torch.Tensor:
    """Draw standard normal noise of shape (count, shape...), float32, on the CPU.

    Sample i is the same whatever ``count``; the global seed is neither used nor changed.
    """
    draw = torch.Generator().manual_seed(seed)
    samples = range(check_positive(count, "count"))
    return torch.stack([torch.randn(shape, generator=draw, dtype=torch.float32) for _ in samples])


def sample(
    unet: nn.Module,
    scheduler: Any,
    noise: torch.Tensor,
    context: torch.Tensor,
    *,
    steps: int = 50,
    guidance: float = 1.0,
    no_class: torch.Tensor | None = None,
    batch_size: int = 8,
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Sample by deterministic DDIM (Song et al. 2021, eta = 0).

    Parameters
    ----------
    unet : diffusers.UNet2DConditionModel
    scheduler : diffusers scheduler
        Only its configuration is used; it stays as it is.
    noise : Tensor, shape (n, channels, height, width)
    context : Tensor, shape (n, tokens, width)
        What the UNet's cross-attention looks at.
    steps : int
    guidance : float
        Of classifier-free guidance; other than 1 needs ``no_class``, shape (tokens, width).
    batch_size : int
    on_step : callable, optional
        Called with the time step, the numbers of the samples and their latents before each step.

    Returns
    -------
    Tensor of float32, shape (n, channels, height, width), on the CPU

    Raises
    ------
    ValueError
        For NaN, Inf or sizes that do not fit; a number of steps the schedule cannot do.
    """
    schedule = ddim_schedule(scheduler, steps)
    check_inputs(noise, context)
    check_positive(batch_size, "batch_size")
    if guidance != 1 and no_class is None:
        raise ValueError("guidance other than 1 needs no_class, the embedding of no class")
    device, dtype = device_and_dtype(unet)
    done = []
    with calibration_mode(unet):
        for part in torch.arange(len(noise), dtype=torch.long).split(batch_size):
            latents = noise[part].to(device, torch.float32) * schedule.init_noise_sigma
            seen = context[part.to(context.device)].to(device, dtype)
            for step in schedule.timesteps:
                if on_step is not None:
                    on_step(int(step), part, latents)
                scaled = schedule.scale_model_input(latents, step).to(dtype)
                predicted = _predict(unet, scaled, step, seen, guidance, no_class)
                latents = schedule.step(predicted.float(), step, latents).prev_sample
            done.append(latents.cpu())
    return torch.cat(done)


def ddim_schedule(scheduler: Any, steps: int) -> Any:
    """Return a DDIM schedule of its own with these steps set."""
    total = int(scheduler.config.num_train_timesteps)
    if check_positive(steps, "steps") > total:
        raise ValueError(f"steps must be at most {total}, those of training, not {steps}")
    schedule: Any = DDIMScheduler.from_config(scheduler.config)
    schedule.set_timesteps(steps)
    return schedule


def _predict(
    unet: nn.Module,
    latents: torch.Tensor,
    step: torch.Tensor,
    context: torch.Tensor,
    guidance: float,
    no_class: torch.Tensor | None,
) -> torch.Tensor:
    """Output of the UNet, guided if asked for."""
    if guidance == 1 or no_class is None:
        return unet(latents, step, context).sample
    other = no_class.to(context).expand_as(context)
    both = unet(torch.cat([latents, latents]), step, torch.cat([context, other])).sample
    given, free = both.chunk(2)
    return free + guidance * (given - free)
