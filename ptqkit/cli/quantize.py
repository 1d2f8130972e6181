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
from ptqkit.cli.quantize_options import add_options
from ptqkit.errors import PreflightError

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    add_options(commands).set_defaults(run=run)


def _recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe that the options describe, in the form of ``Recipe.from_dict``."""
    if args.method == "rtn" and args.recipe is not None:
        raise UsageError(f"--recipe {args.recipe} is for --method gptq")
    changes = {
        name: getattr(args, name)
        for name in ("order", "static_groups", "grid", "sweeps", "damping", "max_damping",
                     "error_propagation", "scale_dtype")
        if getattr(args, name) is not None
    }  # fmt: skip
    for name in ("order", "static_groups", "sweeps", "damping", "max_damping",
                 "error_propagation"):  # fmt: skip
        if args.method == "rtn" and name in changes:
            raise UsageError(f"--{name.replace('_', '-')} has no meaning with --method rtn")
    return {
        "preset": "rtn" if args.method == "rtn" else args.recipe or "quality",
        "bits": args.bits,
        "group_size": args.group_size,
        "symmetric": args.symmetric,
        "overrides": dict(args.override),
        "include": tuple(args.include),
        **changes,
    }


def _check(args: argparse.Namespace) -> None:
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
    elif args.model != DEMO and args.method == "gptq":
        raise UsageError(
            "--calibration FILE is needed for --method gptq: some hundred kilobytes of text like "
            "what the model will be used on (--method rtn does without, at a loss of quality)"
        )


def _calibration(args: argparse.Namespace, tokenizer: Any) -> Any:
    """Texts or tokens for the driver; None where the method needs none."""
    if args.calibration is None:
        if args.model != DEMO or (args.method == "rtn" and args.grid != "hessian"):
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
        print(
            f"[{event.index}/{event.total}] {event.name}  loss {event.loss:.4g}  "
            f"{event.seconds_left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    return tell


def run(args: argparse.Namespace) -> None:
    """Quantize, write, print."""
    _check(args)
    recipe = _recipe(args)
    started = time.perf_counter()
    with quiet_transformers():
        from ptqkit.hf import Recipe

        checked = Recipe.from_dict(recipe)
        result, info, facts = _work(args, checked)
    seconds = time.perf_counter() - started
    load = _load_lines(result.model, info, facts)
    if args.quiet and args.json != "-":
        print(info.directory)
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


def _work(args: argparse.Namespace, recipe: Any) -> tuple[Any, Any, dict[str, str]]:
    """Load, quantize and write; returns the result, the checkpoint's description, the facts."""
    from dataclasses import replace

    from ptqkit.hf import quantize

    model, tokenizer, facts = load_model(args)
    if getattr(model.config, "quantization_config", None) is not None:
        raise PreflightError([f"MODEL {args.model} is quantized already; give the float model"])
    widened = facts["stored_dtype"] == "float16" and facts["dtype"] == "float32"
    widened = widened and args.dtype == "auto"
    if widened and recipe.scale_dtype is None:
        recipe = replace(recipe, scale_dtype="float16")
    check_place(args, model, recipe)
    result = quantize(
        model,
        recipe,
        _calibration(args, tokenizer),
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
        format=args.format,
    )
    if widened:
        # Every value came from float16, and the codes' scales are float16: nothing is lost.
        model.half()
    facts["written_dtype"] = str(model.dtype).removeprefix("torch.")
    return result, result.save(args.out, format=args.format, overwrite=args.overwrite), facts


def check_place(args: argparse.Namespace, model: Any, recipe: Any) -> None:
    """Refuse a place without room for the checkpoint before the work starts."""
    from ptqkit.hf.preflight import Problems, check_output
    from ptqkit.hf.structure import find_structure

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
