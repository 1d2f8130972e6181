"""``ptqkit softmax`` for diffusion models: decibels of final samples in place of perplexities."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ptqkit.cli.inputs import pick_device
from ptqkit.cli.output import say, write_json
from ptqkit.errors import UsageError
from ptqkit.nn.softmax.variants import UNET_VARIANTS
from ptqkit.sweep.diffusion_files import read_prompts

__all__ = ["run_unet"]

_DEFAULT = ("bias", "bias/head", "bias/step_head", "row_sum", "before", "before/row_sum")


def run_unet(args: argparse.Namespace) -> None:
    """Measure and print."""
    corrections = args.correction or list(_DEFAULT)
    wrong = [c for c in corrections if c not in UNET_VARIANTS]
    if wrong:
        raise UsageError(f"--correction {wrong[0]} is for language models, MODEL is a UNet")
    given = [o for o in ("calibration", "window", "max_tokens") if getattr(args, o) is not None]
    if given:
        raise UsageError(f"--{given[0].replace('_', '-')} is for language models, MODEL is a UNet")
    pipeline = (Path(args.model) / "model_index.json").is_file()
    if pipeline and args.text is None:
        raise UsageError("--text FILE is needed: the prompts of the pipeline, one on each line")
    if args.text is not None and not pipeline:
        raise UsageError(f"--text: MODEL {args.model} has labels and takes no prompts")
    if args.out is not None and not Path(args.out).is_dir():
        raise UsageError(f"--out {args.out}: for a UNet, give the folder that holds its weights")
    started = time.perf_counter()
    model = _load(args)
    table = _measure(args, model, corrections)
    values = {"model": args.model, **table.to_dict()}
    if args.out is not None:
        values["saved"] = _save(args, model, corrections[0])
    values["seconds"] = time.perf_counter() - started
    if args.quiet and args.json != "-":
        print(f"{table.rows[-1].sqnr_db:.6f}")
    say(args, table.table())
    say(args)
    say(
        args,
        f"{args.images} samples of {args.steps} steps against those of the float model; "
        f"{args.latents} calibration latents; {values['seconds']:.1f} s",
    )
    if "saved" in values:
        say(args, f"saved {values['saved']}")
    write_json(args, values)


def _load(args: argparse.Namespace) -> Any:
    import torch

    try:
        from ptqkit.diffusion import load_text_to_image, load_unet
    except ModuleNotFoundError as error:
        raise UsageError(str(error)) from error
    dtype = torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype)
    device = pick_device(args)
    if args.text is None:
        return load_unet(args.model, device=device, dtype=dtype)
    prompts = read_prompts(args.text)
    if not prompts:
        raise UsageError(f"--text {args.text} holds no prompts")
    return load_text_to_image(args.model, prompts, device=device, dtype=dtype)


def _measure(args: argparse.Namespace, model: Any, corrections: list[str]) -> Any:
    from ptqkit.diffusion.table import softmax_table

    return softmax_table(
        model,
        bits=args.bits,
        corrections=corrections,
        grid_range=args.grid_range,
        images=args.images,
        steps=args.steps,
        latents=args.latents,
        guidance=args.guidance,
        batch_size=args.batch_size,
        rounded=None if args.weights is None else _rounded(model.unet, args.weights),
        rounded_name=f"W{args.weights}A16",
        progress=None if args.quiet else lambda name: print(name, file=sys.stderr, flush=True),
    )


def _rounded(unet: Any, bits: int) -> Any:
    """Return a copy of a UNet with rounded weights, one scale per output channel."""
    import copy

    from ptqkit.diffusion import quantize_weights

    found = copy.deepcopy(unet)
    quantize_weights(found, bits)
    return found


def _save(args: argparse.Namespace, model: Any, correction: str) -> str:
    from ptqkit.diffusion import SoftmaxCalibration, draw_calibration, save_softmax

    count = max(8, -(-args.latents // args.steps))
    calibration = draw_calibration(
        model.unet,
        model.scheduler,
        model.noise(count, seed=1),
        model.context(count),
        count=args.latents,
        steps=args.steps,
        seed=1,
        batch_size=args.batch_size,
        guidance=args.guidance,
        no_class=model.labels[-1],
    )
    study = SoftmaxCalibration(
        model.unet, calibration, bits=args.bits[0], grid_range=args.grid_range
    )
    quantizers = study.quantizers(*UNET_VARIANTS[correction])
    return str(save_softmax(model.unet, quantizers, calibration.steps, args.out))
