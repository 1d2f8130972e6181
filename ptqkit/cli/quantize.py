"""``ptqkit quantize``: from a model to a checkpoint."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptqkit.cli.common import (
    DEMO,
    UsageError,
    check_json,
    check_text,
    load_model,
    quiet_transformers,
    read_text,
    say,
    write_json,
)
from ptqkit.cli.evaluate import parse_start_token
from ptqkit.cli.quantize_options import GPTQ_RECIPES, add_options
from ptqkit.errors import PreflightError

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    add_options(commands).set_defaults(run=run)


_PLAIN = ("bits", "group_size", "symmetric", "grid", "scale_dtype", "bias_correction")
_OF_GPTQ = (
    "order",
    "static_groups",
    "refine_passes",
    "damping",
    "max_damping",
    "error_propagation",
)


def _recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe that the options describe, in the form of ``Recipe.from_dict``."""
    preset = args.recipe or ("rtn" if args.method == "rtn" else "quality")
    method = "gptq" if preset in GPTQ_RECIPES else "rtn"
    if args.method not in (None, method):
        raise UsageError(f"--recipe {preset} is for --method {method}")
    args.method = method
    for name in _OF_GPTQ:
        if method == "rtn" and getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} has no meaning with --method rtn")
    changes: dict[str, Any] = {
        name: getattr(args, name)
        for name in (*_PLAIN, *_OF_GPTQ)
        if getattr(args, name) is not None
    }
    if args.group_size == "channel":
        changes["group_size"] = None
        changes["per_tensor"] = False
    elif args.group_size == "tensor":
        changes["group_size"] = None
        changes["per_tensor"] = True
    elif args.group_size is not None:
        changes["per_tensor"] = False
    changes.update(_other_parts(args))
    overrides, include = dict(args.override), tuple(args.include)
    return {"preset": preset, "overrides": overrides, "include": include, **changes}


def _other_parts(args: argparse.Namespace) -> dict[str, Any]:
    """Equalization and activations."""
    changes: dict[str, Any] = {}
    if args.equalize is not None:
        changes["equalization"] = None
        if args.equalize != "none":
            alpha = "search" if args.equalize == "awe" else 0.5
            alpha = alpha if args.alpha is None else args.alpha
            changes["equalization"] = {"method": args.equalize, "alpha": alpha}
    elif args.alpha is not None:
        raise UsageError("--alpha needs --equalize awe or smoothquant")
    if args.activations is not None:
        changes["activations"] = args.activations or None
    if args.outlier_threshold is not None:
        if not args.activations:
            raise UsageError("--outlier-threshold needs --activations 8:token")
        args.activations["outlier_threshold"] = args.outlier_threshold
    return changes


def _check(args: argparse.Namespace, recipe: dict[str, Any]) -> None:
    """Everything that can be known before PyTorch is imported."""
    check_json(args)
    parse_start_token(args.start_token)
    out = Path(args.out)
    if out.exists() and not args.overwrite and not (out.is_dir() and not any(out.iterdir())):
        raise PreflightError([f"--out {args.out} exists already; give --overwrite or another name"])
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PreflightError([f"--out {args.out} cannot be created in {parent}"])
    if args.calibration is not None:
        check_text("--calibration", args.calibration)
    elif args.model != DEMO and _needs_text(args, recipe):
        raise UsageError(
            f"--calibration FILE is needed for {_needs_text(args, recipe)}: some hundred kilobytes "
            "of text like what the model will be used on (--method rtn alone does without, at a "
            "loss of quality)"
        )


def _needs_text(args: argparse.Namespace, recipe: dict[str, Any]) -> str:
    """What in the recipe needs calibration text; empty where nothing does."""
    activations = recipe.get("activations") or {}
    static, preset = args.recipe in ("aweq", "smoothquant"), f"--recipe {args.recipe}"
    found = {
        "--method gptq": args.method == "gptq",
        preset: (static and not {"equalization", "activations"} <= recipe.keys())
        or (args.recipe == "aweq" and "bias_correction" not in recipe),
        "--grid hessian": args.grid == "hessian",
        "--equalize": bool(recipe.get("equalization")),
        "static --activations": activations.get("granularity") == "tensor",
        "--bias-correction": bool(args.bias_correction),
    }
    return next((what for what, needed in found.items() if needed), "")


def _calibration(args: argparse.Namespace, tokenizer: Any, needed: bool) -> Any:
    """Texts or tokens for the driver; None where there are none and none are needed."""
    if args.calibration is None:
        if args.model != DEMO or not needed:
            return None
        from ptqkit.demo import text

        return [text("calibration")]
    if ":" in args.calibration and not os.path.exists(args.calibration):
        return args.calibration
    return read_text("--calibration", args.calibration, tokenizer)


def _progress(args: argparse.Namespace) -> bool | Callable[[Any], None]:
    """A bar on a terminal, a line per layer elsewhere."""
    if args.quiet:
        return False
    if sys.stderr.isatty():
        return True

    def tell(event: Any) -> None:
        stage = "" if event.stage == "quantizing" else f"{event.stage} "
        print(
            f"{stage}[{event.index}/{event.total}] {event.name}  loss {event.loss:.4g}  "
            f"{event.seconds_left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    return tell


def run(args: argparse.Namespace) -> None:
    """Quantize, write, print."""
    recipe = _recipe(args)
    _check(args, recipe)
    started = time.perf_counter()
    with quiet_transformers():
        from ptqkit import Recipe

        checked = Recipe.from_dict(recipe)
        needs_text = bool(_needs_text(args, recipe) or recipe["overrides"])
        result, info, facts = _work(args, checked, needs_text)
    seconds = time.perf_counter() - started
    load = _load_lines(result.model, info, facts)
    if args.quiet and args.json != "-":
        print(info.directory)
    if result.equalization is not None:
        say(args, result.equalization.table() + "\n")
    say(args, result.report.table())
    say(args)
    say(args, f"wrote {info.directory} ({info.bytes / 1e6:,.1f} MB, {seconds:.1f} s in all)")
    say(args, f"format {info.format}: {info.reason}")
    say(
        args,
        f"arithmetic {facts['dtype']} on {facts['device']}, stored as {facts['written_dtype']}",
    )
    say(args, "load it with:")
    say(args, "\n".join(f"  {line}" for line in load))
    if "asymmetric" in info.reason:
        say(args, "(with --symmetric the checkpoint loads without ptqkit, at some loss of quality)")
    write_json(
        args,
        {
            "model": args.model,
            **facts,
            "recipe": result.recipe.to_dict(),
            "checkpoint": {
                "directory": str(info.directory),
                "format": info.format,
                "reason": info.reason,
                "files": list(info.files),
                "bytes": info.bytes,
                "load": load,
            },
            "report": result.report.to_dict(),
            "seconds": seconds,
        },
    )


def _work(
    args: argparse.Namespace, recipe: Any, needs_text: bool
) -> tuple[Any, Any, dict[str, str]]:
    """Load, quantize and write; returns the result, the checkpoint's description, the facts."""
    from dataclasses import replace

    from ptqkit.hf import quantize

    model, tokenizer, facts = load_model(args)
    if getattr(model.config, "quantization_config", None) is not None:
        raise PreflightError([f"MODEL {args.model} is quantized already; give the float model"])
    widened = facts["stored_dtype"] == "float16" and facts["dtype"] == "float32"
    # Folded scales, corrected biases and activation grids are no float16 values.
    exact = recipe.equalization is None and recipe.activations is None
    widened = widened and args.dtype == "auto" and exact and not recipe.bias_correction
    if widened and recipe.scale_dtype is None:
        recipe = replace(recipe, scale_dtype="float16")
    check_place(args, model, recipe)
    result = quantize(
        model,
        recipe,
        _calibration(args, tokenizer, needs_text),
        tokenizer=tokenizer,
        samples=args.samples,
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        seed=args.seed,
        start_token=parse_start_token(args.start_token),
        schedule=args.schedule,
        memory_budget=args.memory_budget,
        threads=args.threads,
        on_error=args.on_error,
        progress=_progress(args),
        checkpoint_format=args.format,
    )
    if widened:
        # Every value came from float16, and the codes' scales are float16: nothing is lost.
        model.half()
    facts["written_dtype"] = str(model.dtype).removeprefix("torch.")
    info = result.save(args.out, checkpoint_format=args.format, overwrite=args.overwrite)
    return result, info, facts


def check_place(args: argparse.Namespace, model: Any, recipe: Any) -> None:
    """Refuse a place without room for the checkpoint before the work starts."""
    from ptqkit.hf.models.structure import find_structure
    from ptqkit.hf.quantization.preflight import Problems, check_output

    problems = Problems()
    targets = find_structure(model, recipe).targets
    check_output(problems, model, targets, args.out, args.overwrite)
    problems.raise_if_any()


def _load_lines(model: Any, info: Any, facts: dict[str, str]) -> list[str]:
    """Python lines that load the checkpoint, ready to copy."""
    where = repr(str(info.directory))
    dtype = ", dtype='float32'" if facts["dtype"] != facts["written_dtype"] else ""
    if info.format != "compressed-tensors":
        return ["import ptqkit", f"model = ptqkit.load({where}{dtype})"]
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        name = "AutoModelForCausalLM"
    return [
        f"from transformers import {name}",
        f"model = {name}.from_pretrained({where}{dtype})",
    ]
