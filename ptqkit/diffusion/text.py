"""Text-to-image pipelines of diffusers, as a UNet with the embeddings of prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from ptqkit.diffusion.sampling import ClassConditionalUNet
from ptqkit.errors import UnsupportedModuleError, UsageError

__all__ = ["is_pipeline", "load_text_to_image", "with_prompts"]


def is_pipeline(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a pipeline of diffusers."""
    return (Path(folder) / "model_index.json").is_file()


def load_text_to_image(
    folder: str | os.PathLike[str],
    prompts: Sequence[str],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ClassConditionalUNet:
    """Load a saved text-to-image pipeline; see :func:`with_prompts`.

    Raises
    ------
    FileNotFoundError
        If the folder holds no pipeline.
    """
    if not is_pipeline(folder):
        raise FileNotFoundError(f"{folder} has no model_index.json: is it a pipeline of diffusers?")
    loaded: Any = DiffusionPipeline
    # Not torch_dtype= or dtype=: releases of diffusers differ in the name, and warn.
    pipeline = loaded.from_pretrained(folder, safety_checker=None)
    return with_prompts(pipeline.to(device, dtype), prompts)


def with_prompts(pipeline: Any, prompts: Sequence[str]) -> ClassConditionalUNet:
    """Return the UNet of a pipeline with prompts in the place of classes.

    The pipeline itself embeds the prompts, so that tokenizer, padding and text encoder are its own;
    the last "class" is the empty prompt, for classifier-free guidance. Samples are latents: what
    the decoder makes of them is not looked at.

    Parameters
    ----------
    pipeline : diffusers.StableDiffusionPipeline, or another whose UNet takes nothing but the
        embeddings of a text
    prompts : sequence of str

    Raises
    ------
    UnsupportedModuleError
        If the pipeline has no UNet with a text encoder, or its UNet takes more than the text.
    UsageError
        If there are no prompts.
    """
    kind = type(pipeline).__name__
    unet = getattr(pipeline, "unet", None)
    if unet is None or not hasattr(pipeline, "encode_prompt"):
        raise UnsupportedModuleError(f"{kind} is not a text-to-image pipeline with a UNet")
    if getattr(unet.config, "addition_embed_type", None) is not None:
        raise UnsupportedModuleError(
            f"the UNet of {kind} takes more than the embeddings of a text, as that of Stable "
            "Diffusion XL does, which is not supported"
        )
    texts = [*prompts]
    if not texts:
        raise UsageError("prompts is empty: give at least one")
    with torch.no_grad():
        found = pipeline.encode_prompt([*texts, ""], unet.device, 1, False)[0]
    scheduler: Any = DDIMScheduler.from_config(pipeline.scheduler.config)
    return ClassConditionalUNet(unet.eval(), scheduler, found)
