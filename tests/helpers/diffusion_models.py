"""A random tiny UNet of diffusers, and inputs for it."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from ptqkit import diffusion

HEADS, SIZE, TOKENS, WIDTH, STEPS = 2, 16, 4, 8, 3


def tiny_unet(**changes):
    """16 x 16 images: self-attention over 256 and 64 positions, cross-attention over 4."""
    options = {
        "sample_size": SIZE,
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 16),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": HEADS,
        "norm_num_groups": 8,
        **changes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**options).eval()
        # Random weights attend evenly; larger queries give sharp and flat heads, as training does.
        for name, parameter in unet.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                parameter.data.mul_(torch.linspace(1, 6, len(parameter))[:, None])
    return unet


def tiny_scheduler(**changes):
    """Return the schedule of the training script."""
    options = {
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        **changes,
    }
    return DDIMScheduler(**options)


def tiny_model():
    """UNet, schedule and labels of three classes."""
    labels = torch.randn(4, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    return diffusion.ClassConditionalUNet(tiny_unet(), tiny_scheduler(), labels)


def inputs(model, count=4, seed=0):
    """Noise and context of ``count`` samples."""
    return model.noise(count, seed=seed), model.context(count)


def calibration(model, count=7, **options):
    """Latents of ``STEPS`` steps."""
    return diffusion.draw_calibration(
        model.unet, model.scheduler, *inputs(model, 4, seed=1), count=count, steps=STEPS, **options
    )


def forward(model, step=500, count=2, unet=None, **options):
    """Output of the UNet for fixed latents."""
    noise, context = inputs(model, count, seed=2)
    with torch.no_grad():
        return (unet or model.unet)(noise, step, context, **options).sample
