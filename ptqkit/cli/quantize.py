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
    add_common,
    add_model_options,
    check_json,
    check_text,
    load_model,
    quiet_transformers,
    read_text,
    say,
    write_json,
)
from ptqkit.cli.evaluate import parse_start_token
from ptqkit.errors import PreflightError

__all__ = ["add_parser", "parse_override"]

_DESCRIPTION = """\
Quantize the linear layers of a transformers model and write a checkpoint.

MODEL is a folder, 'demo' for the embedded model, or a name on the Hugging Face Hub. The weights
are quantized layer by layer while calibration text runs through the model once, so that every
layer is fitted to the inputs that the already quantized layers before it give.

Recipes for --method gptq:
  quality    (default) columns by decreasing activation power, groups fixed beforehand, grids
             searched under the Hessian, one coordinate-descent sweep
  reference  GPTQ as published: natural order, min-max grids
The options under 'recipe' change single settings of it. --method rtn rounds to nearest and needs
no text.

Formats:
  compressed-tensors  symmetric grids; stock transformers loads it exactly
  ptqkit              everything; load it with ptqkit.load(DIR), or import ptqkit.hf first
  gptq, gptq_v2       for other tools that read the GPTQ format
  auto                (default) compressed-tensors where it fits exactly, else ptqkit
"""

_EPILOG = """\
examples:
  ptqkit quantize demo --out demo-w4
  ptqkit quantize ./model --bits 4 --symmetric --calibration train.txt --out model-w4
  ptqkit quantize ./model --bits 3 --group-size 64 --calibration train.jsonl.gz \\
      --override '*.down_proj=bits:4,group_size:32' --override '*.0.*=skip' --out model-w3
  ptqkit quantize ./model --method rtn --bits 8 --group-size channel --out model-w8
"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "quantize",
        help="quantize a model and write a checkpoint",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder, 'demo', or a name on the Hub")
    group = parser.add_argument_group("what to do")
    group.add_argument("--method", choices=("gptq", "rtn"), default="gptq")
    group.add_argument(
        "--bits", type=_bits, default=4, metavar="B", help="2 to 8, or 'ternary' (default: 4)"
    )
    group.add_argument(
        "--group-size", type=_group_size, default=128, metavar="G",
        help="inputs that share a scale, or 'channel' for one scale per output (default: 128)",
    )  # fmt: skip
    group.add_argument(
        "--symmetric", action="store_true", help="no zero-points: needed for compressed-tensors"
    )
    group.add_argument(
        "--override", action="append", default=[], type=parse_override, metavar="PATTERN=...",
        help="other settings for the layers that match a glob ('*.mlp.*') or a regular expression "
        "('re:...'): 'PATTERN=bits:8,group_size:64' or 'PATTERN=skip'; repeatable, the last match "
        "wins",
    )  # fmt: skip
    group.add_argument(
        "--include", action="append", default=[], metavar="PATTERN",
        help="also quantize linears outside the repeated blocks, such as an untied lm_head",
    )  # fmt: skip
    _add_recipe(parser)
    _add_data(parser)
    _add_run(parser)
    add_model_options(parser)
    group = parser.add_argument_group("checkpoint")
    group.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    group.add_argument(
        "--format", default="auto",
        choices=("auto", "compressed-tensors", "gptq", "gptq_v2", "ptqkit"),
    )  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    add_common(parser)
    parser.set_defaults(run=run)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recipe (default: as the recipe has it)")
    group.add_argument("--recipe", choices=("quality", "reference"))
    group.add_argument("--order", choices=("natural", "act", "group"), help="order of the columns")
    group.add_argument(
        "--static-groups", action=argparse.BooleanOptionalAction,
        help="with order 'act': grids fixed beforehand on consecutive inputs; without, g_idx",
    )  # fmt: skip
    group.add_argument("--grid", choices=("minmax", "mse", "hessian"), help="how ranges are chosen")
    group.add_argument("--sweeps", type=int, metavar="N", help="coordinate-descent passes")
    group.add_argument(
        "--damping", type=float, metavar="X", help="share of the mean diagonal (0.01)"
    )
    group.add_argument(
        "--max-damping", type=float, metavar="X", help="how far it may be raised (1)"
    )
    group.add_argument(
        "--scale-dtype", choices=("float32", "float16", "bfloat16"),
        help="dtype that holds the scales; default: that of the stored model",
    )  # fmt: skip


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration", metavar="FILE",
        help=".txt or .jsonl, either as .gz too; .npy with token ids (samples, tokens); or "
        "'name:config:split' of the package datasets. 'demo' has its own",
    )  # fmt: skip
    group.add_argument("--samples", type=int, default=128, metavar="N", help="windows (128)")
    group.add_argument(
        "--sequence-length", type=int, default=512, metavar="N",
        help="tokens a window, capped by what the model takes (512)",
    )  # fmt: skip
    group.add_argument("--batch-size", type=int, default=4, metavar="N", help="windows at once (4)")
    group.add_argument("--seed", type=int, default=0, help="of the choice of windows (0)")
    group.add_argument(
        "--start-token", default="auto", metavar="ID", help="before every window: id, auto, none"
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("resources")
    group.add_argument(
        "--memory-budget", metavar="SIZE",
        help="beyond the model, such as 4GiB; decides the schedule (default: what is free)",
    )  # fmt: skip
    group.add_argument(
        "--schedule", choices=("auto", "one-pass", "re-forward"), default="auto",
        help="results are equal; auto takes one pass where memory and model allow it",
    )  # fmt: skip
    group.add_argument(
        "--threads", type=int, default=0, metavar="N", help="of the solver (0: auto)"
    )
    group.add_argument(
        "--on-error", choices=("raise", "keep"), default="raise",
        help="keep: leave a layer that fails in float, and mark it in the report",
    )  # fmt: skip


def _bits(text: str) -> int | str:
    if text == "ternary":
        return text
    if not text.isdecimal() or not 2 <= int(text) <= 8:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 2 to 8 nor 'ternary'")
    return int(text)


def _group_size(text: str) -> int | None:
    if text in ("channel", "none", "-1"):
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor 'channel'")
    return int(text)


def parse_override(text: str) -> tuple[str, dict[str, Any] | str]:
    """Parse ``PATTERN=skip`` or ``PATTERN=name:value,name:value``.

    Raises
    ------
    argparse.ArgumentTypeError
        If the text has another form. Names and ranges are checked by the recipe.
    """
    pattern, _, changes = text.rpartition("=")
    if not pattern or not changes:
        raise argparse.ArgumentTypeError(f"{text!r} must be PATTERN=skip or PATTERN=bits:8,...")
    if changes == "skip":
        return pattern, "skip"
    found: dict[str, Any] = {}
    for part in changes.split(","):
        name, colon, value = part.partition(":")
        if not colon or not name.strip() or not value.strip():
            raise argparse.ArgumentTypeError(f"{part!r} in {text!r} must be name:value")
        name = name.strip().replace("-", "_")
        found[name] = _value(value.strip())
    if found.get("group_size") == "channel":
        found["group_size"] = None
    return pattern, found


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe that the options describe, in the form of ``Recipe.from_dict``."""
    if args.method == "rtn" and args.recipe is not None:
        raise UsageError(f"--recipe {args.recipe} is for --method gptq")
    changes = {
        name: getattr(args, name)
        for name in ("order", "static_groups", "grid", "sweeps", "damping", "max_damping",
                     "scale_dtype")
        if getattr(args, name) is not None
    }  # fmt: skip
    for name in ("order", "static_groups", "sweeps", "damping", "max_damping"):
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
    if info.format == "ptqkit" and not args.symmetric:
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
