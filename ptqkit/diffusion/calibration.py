"""Latents to calibrate a diffusion model on, drawn uniformly over its time steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ptqkit._repr import one_line_repr
from ptqkit.diffusion.attention import attention_hooks
from ptqkit.diffusion.checks import check_inputs, check_positive, device_and_dtype
from ptqkit.diffusion.sampling import ddim_schedule, sample
from ptqkit.nn.attention import AttentionHook
from ptqkit.nn.forward import calibration_mode
from ptqkit.nn.softmax.steps import check_steps

__all__ = ["CalibrationLatents", "draw_calibration", "run_calibration"]


@dataclass(frozen=True)
class CalibrationLatents:
    """Inputs of a UNet.

    Attributes
    ----------
    latents : Tensor, shape (n, channels, height, width)
    timesteps : Tensor of int64, shape (n,)
    context : Tensor, shape (n, tokens, width)
    batch_size : int
        Latents of one time step that run together.

    Raises
    ------
    ValueError
        For NaN, Inf, sizes that do not fit or negative time steps.
    """

    __repr__ = one_line_repr

    latents: torch.Tensor
    timesteps: torch.Tensor
    context: torch.Tensor
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_inputs(self.latents, self.context)
        check_positive(self.batch_size, "batch_size")
        if self.timesteps.shape != self.latents.shape[:1]:
            raise ValueError(
                f"timesteps must have shape ({len(self.latents)},) as the latents, "
                f"not {tuple(self.timesteps.shape)}"
            )
        check_steps(set(self.timesteps.tolist()), "timesteps")

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def steps(self) -> tuple[int, ...]:
        """The time steps that occur, in order of sampling: falling."""
        return tuple(sorted(set(self.timesteps.tolist()), reverse=True))

    def batches(self) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
        """Yield latents, their one time step, and their context."""
        for step in self.steps:
            chosen = torch.nonzero(self.timesteps == step).flatten()
            for part in chosen.split(self.batch_size):
                yield self.latents[part], step, self.context[part]


def draw_calibration(
    unet: nn.Module,
    scheduler: Any,
    noise: torch.Tensor,
    context: torch.Tensor,
    *,
    count: int = 400,
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 8,
    **options: Any,
) -> CalibrationLatents:
    """Draw latents uniformly over the time steps, from samples of the model.

    Every step of sampling gives ``count / steps`` latents (if that is not a whole number, as many
    steps as needed give one more), each from another of the samples that start at ``noise``.

    Parameters
    ----------
    unet, scheduler, noise, context, steps, batch_size, options
        See :func:`ptqkit.diffusion.sample`. At least ``count / steps`` samples are needed; more
        make the set more varied.
    count : int
        400 as in Pandey et al. 2023.
    seed : int
        Of the choice among the samples. With ``guidance`` other than 1, every other latent goes
        with the context of no class.

    Raises
    ------
    ValueError
        As for :func:`ptqkit.diffusion.sample`; if there are too few samples.
    """
    times = [int(t) for t in ddim_schedule(scheduler, steps).timesteps]
    samples = len(noise)
    least = -(-check_positive(count, "count") // len(times))
    if samples < least:
        raise ValueError(f"{count} latents over {steps} steps need {least} samples, not {samples}")
    draw = torch.Generator().manual_seed(seed)
    share = torch.full((len(times),), count // len(times), dtype=torch.long)
    share[torch.randperm(len(times), generator=draw)[: count % len(times)]] += 1
    wanted = {
        time: set(torch.randperm(samples, generator=draw)[: int(n)].tolist())
        for time, n in zip(times, share, strict=True)
    }
    kept: list[tuple[torch.Tensor, int, int]] = []

    def keep(time: int, part: torch.Tensor, latents: torch.Tensor) -> None:
        for number, latent in zip(part.tolist(), latents, strict=True):
            if number in wanted[time]:
                kept.append((latent.cpu().clone(), time, number))

    sample(
        unet, scheduler, noise, context, steps=steps, batch_size=batch_size, on_step=keep, **options
    )
    kept.sort(key=lambda item: (-item[1], item[2]))
    seen = context.cpu()[[number for _, _, number in kept]].clone()
    if options.get("guidance", 1.0) != 1:
        seen[1::2] = options["no_class"].to(seen)
    latents = torch.stack([latent for latent, _, _ in kept])
    timesteps = torch.tensor([time for _, time, _ in kept], dtype=torch.long)
    return CalibrationLatents(latents, timesteps, seen, batch_size)


def run_calibration(
    unet: nn.Module,
    calibration: CalibrationLatents,
    hooks: Mapping[str, AttentionHook] | None = None,
) -> torch.Tensor:
    """Run all latents through a UNet, with hooks on its attention; returns its outputs.

    Returns
    -------
    Tensor of float32, shape (n, channels, height, width)
        On the CPU, in the order of ``calibration.batches()``.
    """
    device, dtype = device_and_dtype(unet)
    outputs = []
    with (
        calibration_mode(unet),
        attention_hooks(unet, hooks) if hooks else contextlib.nullcontext(),
    ):
        for latents, step, context in calibration.batches():
            output = unet(latents.to(device, dtype), step, context.to(device, dtype)).sample
            outputs.append(output.float().cpu())
    return torch.cat(outputs)
