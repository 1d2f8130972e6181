"""``ptqkit quantize``: from a model to a checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ptqkit._defaults import SAMPLES, SEQUENCE_LENGTH, TUNE_CODES, TUNE_STEPS
from ptqkit._places import claim_place
from ptqkit._units import parse_bytes
from ptqkit.cli.inputs import calibration_source, load_model, read_text
from ptqkit.cli.options import (
    add_batch_size,
    add_common,
    add_model_options,
    add_threads,
    check_text,
    parse_start_token,
    prefixed,
)
from ptqkit.cli.output import check_json, quiet_transformers, say, write_json
from ptqkit.demo import DEMO, MODEL_DIR
from ptqkit.errors import PreflightError, Problem, Problems, UsageError
from ptqkit.recipe.options import ActivationQuantization
from ptqkit.recipe.parts import Equalize
from ptqkit.recipe.presets import PRESETS
from ptqkit.recipe.recipe import Recipe

__all__ = ["add_parser", "parse_override"]

_DESCRIPTION = """\
Quantize the linear layers of a transformers model and write a checkpoint.

MODEL is a folder, 'demo' for the embedded model, or a name on the Hugging Face Hub. The weights
are quantized layer by layer while calibration text runs through the model once, so that every
layer is fitted to the inputs that the already quantized layers before it give.

Recipes:
  quality      (default) GPTQ: groups and their columns by decreasing activation power, grids
               searched under the Hessian, one coordinate-descent pass
  best         quality, each weight corrected for the errors made before it, scales fitted again to
               their codes; twice the time, and twice the memory of the activations; with --tune
               its scales, norm gains and biases then learn from the float model
  reference    GPTQ as published: natural order, min-max grids
  rtn          rounding to nearest; needs no text
  obq          Optimal Brain Quantization, which GPTQ approximates: for small models
  aweq         W8A8: activation-weight equalization by the closed form, one scale per tensor, bias
               correction
  smoothquant  W8A8: SmoothQuant with alpha 0.5, one scale per tensor
  vector-wise  W8A8: scales per output and per token; needs no text
  llm.int8     the same, input columns with outliers left float; needs no text
  zeroquant    W8A8: groups of 128 weights, scales per token; needs no text
Other options change single settings of the recipe. Activations are quantized in simulation: exact
grids, float arithmetic.

Formats:
  compressed-tensors  symmetric grids, and W8A8; stock transformers loads it exactly
  ptqkit              everything; load it with ptqkit.load(DIR), or import ptqkit.hf first
  ptqkit_v3           the same as kernels read it: mapped into memory, runs packed on the CPU
  gptq, gptq_v2       for other tools that read the GPTQ format
  auto                (default) compressed-tensors if it fits exactly, otherwise ptqkit
"""

_EPILOG = """\
examples:
  ptqkit quantize demo --out demo-w4
  ptqkit quantize ./model --bits 4 --symmetric --calibration train.txt --out model-w4
  ptqkit quantize ./model --bits 3 --group-size 64 --calibration train.jsonl.gz \\
      --override '*.down_proj=bits:4,group_size:32' --override '*.0.*=skip' --out model-w3
  ptqkit quantize ./model --recipe best --tune --bits 3 --group-size 64 \\
      --calibration train.txt --out model-w3
  ptqkit quantize ./model --method rtn --bits 8 --group-size channel --out model-w8
  ptqkit quantize ./model --recipe aweq --alpha search --calibration train.txt --out model-w8a8
  torchrun --nproc-per-node 4 -m ptqkit quantize ./model --calibration train.txt --out model-w4
  ptqkit quantize ./model --bits 4 --equalize awe --activations 8:token \\
      --calibration train.txt --out model-w4a8
"""


def add_parser(commands: Any) -> None:
    """Add the command with all its options."""
    parser = commands.add_parser(
        "quantize",
        help="quantize a model and write a checkpoint",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder, 'demo', or a name on the Hub")
    group = parser.add_argument_group("what to do")
    group.add_argument(
        "--method", choices=("gptq", "rtn", "obq"), help="default: gptq, or the recipe's"
    )
    group.add_argument(
        "--bits",
        type=_bits,
        metavar="B",
        help="2 to 8, or 'ternary'; with a point, such as 3.2, the average over layers that get "
        "whole bits by what they cost the model (default: 4, or the recipe's)",
    )
    group.add_argument(
        "--group-size",
        type=_group_size,
        metavar="G",
        help="inputs that share a scale; 'channel': one scale per output; 'tensor': one for the "
        "whole matrix (with rtn) (default: 128, or the recipe's)",
    )
    group.add_argument(
        "--symmetric",
        action=argparse.BooleanOptionalAction,
        help="no zero-points: needed for compressed-tensors (default: off, or the recipe's)",
    )
    group.add_argument(
        "--override",
        action="append",
        default=[],
        type=parse_override,
        metavar="PATTERN=...",
        help="other settings for the layers that match a glob ('*.mlp.*') or a regular expression "
        "('re:...'): 'PATTERN=bits:8,group_size:64' or 'PATTERN=skip'; repeatable, the last match "
        "wins",
    )
    group.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="also quantize linears outside the repeated blocks, such as an untied lm_head",
    )
    _add_recipe(parser)
    _add_activations(parser)
    _add_data(parser)
    _add_run(parser)
    add_model_options(parser)
    group = parser.add_argument_group("checkpoint")
    group.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    group.add_argument(
        "--format",
        default="auto",
        choices=("auto", "compressed-tensors", "gptq", "gptq_v2", "ptqkit", "ptqkit_v3"),
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace a checkpoint if one is there"
    )
    add_common(parser)
    parser.set_defaults(run=run)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recipe (default: as the recipe has it)")
    group.add_argument(
        "--recipe", choices=tuple(PRESETS), metavar="NAME", help="one of those above"
    )
    group.add_argument(
        "--order", choices=("natural", "act", "group-act"), help="order of the columns"
    )
    group.add_argument(
        "--static-groups",
        action=argparse.BooleanOptionalAction,
        help="with order 'act': grids fixed beforehand on consecutive inputs; without, g_idx",
    )
    group.add_argument(
        "--grid",
        choices=("minmax", "mse", "hessian", "feedback"),
        help="how ranges are chosen",
    )
    group.add_argument("--refine-passes", type=int, metavar="N", help="coordinate-descent passes")
    group.add_argument(
        "--refit-rounds",
        type=int,
        metavar="N",
        help="then, so often: all scales of a row fitted anew to its codes, and one more pass",
    )
    group.add_argument(
        "--beam-width",
        type=int,
        metavar="N",
        help="then search each row's codes anew, keeping N partial roundings, at most 16 (1: off)",
    )
    group.add_argument(
        "--row-coupling",
        type=int,
        metavar="N",
        help="then N passes in which rows make up for each other's errors (0: off)",
    )
    group.add_argument(
        "--damping", type=float, metavar="X", help="share of the mean diagonal (0.01)"
    )
    group.add_argument(
        "--max-damping", type=float, metavar="X", help="how far it may be raised (1)"
    )
    group.add_argument(
        "--error-propagation",
        type=float,
        metavar="ALPHA",
        help="0 to 1: correct each weight by this share for the errors of the layers before it "
        "(0.75 is a good value); the float model runs along, with twice the activations (0: off)",
    )
    group.add_argument(
        "--residual-propagation",
        type=float,
        metavar="ALPHA",
        help="the same for layers that write into a residual stream (o_proj, down_proj): they "
        "answer for the errors of the stream too (0: off)",
    )
    group.add_argument(
        "--tune",
        nargs="?",
        type=_steps,
        const=TUNE_STEPS,
        metavar="STEPS",
        help="afterwards let scales, norm gains and biases learn from the float model's logits, so "
        f"many steps ({TUNE_STEPS} if no number follows; default: 0, or the recipe's)",
    )
    group.add_argument(
        "--tune-codes",
        nargs="?",
        type=float,
        const=TUNE_CODES,
        metavar="RATE",
        help=f"with --tune: codes learn too, at this rate ({TUNE_CODES} if no number follows); "
        "give 1000 steps or more, and --tune-own-text",
    )
    group.add_argument(
        "--tune-own-text",
        type=int,
        metavar="WINDOWS",
        help="with --tune: so many windows that the float model writes itself are learned from too",
    )
    group.add_argument(
        "--calibrate-on",
        choices=("quantized", "float"),
        help="inputs that each layer is fitted to: those after the quantized layers before it, or "
        "the float model's (default: quantized)",
    )
    group.add_argument(
        "--scale-dtype",
        choices=("float32", "float16", "bfloat16"),
        help="dtype that holds the scales; default: that of the stored model",
    )


def _add_activations(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("activations (default: as the recipe has it)")
    group.add_argument(
        "--equalize",
        choices=("awe", "smoothquant", "none"),
        help="fold per-channel scales between activations and weights first",
    )
    group.add_argument(
        "--alpha",
        type=_alpha,
        metavar="X",
        help="share of the activations, 0 to 1, or 'search' for the least output error (default: "
        "search with awe, 0.5 with smoothquant; 0.5 is the closed form of AWEQ)",
    )
    group.add_argument(
        "--activations",
        type=_activations,
        metavar="SPEC",
        help="quantize the layers' inputs: BITS:token (dynamic), BITS:tensor (static, asymmetric), "
        "BITS:tensor:symmetric, or none",
    )
    group.add_argument(
        "--outlier-threshold",
        type=float,
        metavar="X",
        help="with BITS:token: columns with a value this large stay float (LLM.int8() has 6)",
    )
    group.add_argument(
        "--bias-correction",
        action=argparse.BooleanOptionalAction,
        help="take the mean error of the quantized weights out of the bias",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        metavar="FILE",
        help=".txt or .jsonl, either as .gz too; .npy with token ids (samples, tokens); or "
        "'name:config:split' of the package datasets. 'demo' has its own",
    )
    group.add_argument(
        "--calibrate-all-experts",
        action=argparse.BooleanOptionalAction,
        help="calibrate every expert of a mixture on all tokens, not on those routed to it alone",
    )
    group.add_argument(
        "--samples", type=int, default=SAMPLES, metavar="N", help=f"windows ({SAMPLES})"
    )
    group.add_argument(
        "--sequence-length",
        type=int,
        default=SEQUENCE_LENGTH,
        metavar="N",
        help=f"tokens per window, capped by what the model takes ({SEQUENCE_LENGTH})",
    )
    add_batch_size(group)
    group.add_argument("--seed", type=int, default=0, help="of the choice of windows (0)")
    group.add_argument(
        "--start-token", default="auto", metavar="ID", help="before every window: id, auto, none"
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("resources")
    group.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="in addition to the model, such as 4GiB; decides the schedule (default: the free "
        "memory)",
    )
    group.add_argument(
        "--schedule",
        choices=("auto", "one-pass", "replay"),
        default="auto",
        help="results are equal; auto takes one pass if memory and model allow it",
    )
    group.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="read, quantize and drop the model block by block; the state of the run is kept in "
        "DIR.partial, so the same command goes on if it was killed. Results are equal; "
        "--memory-budget is then of everything (default: if the model does not fit into memory)",
    )
    add_threads(group)
    group.add_argument(
        "--on-error",
        choices=("raise", "leave_float"),
        default="raise",
        help="leave_float: leave a layer that fails in float, and mark it in the report",
    )


def _bits(text: str) -> int | float | str:
    if text == "ternary":
        return text
    if re.fullmatch(r"\d*\.\d+", text) and 2 <= float(text) <= 8:
        return float(text)
    if not text.isdecimal() or not 2 <= int(text) <= 8:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 2 to 8 nor 'ternary'")
    return int(text)


def _group_size(text: str) -> int | str:
    if text in ("channel", "none", "-1"):
        return "channel"
    if text == "tensor":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a positive number nor 'channel' nor 'tensor'"
        )
    return int(text)


def _steps(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps, 0 or more")
    return int(text)


def _alpha(text: str) -> float | str:
    if text == "search":
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 0 to 1 nor 'search'")
    return value


def _activations(text: str) -> dict[str, Any]:
    """Parse BITS:GRANULARITY[:symmetric|:asymmetric]; empty for 'none'."""
    if text == "none":
        return {}
    bits, _, rest = text.partition(":")
    granularity, _, symmetry = rest.partition(":")
    if (
        not bits.isdecimal()
        or not 2 <= int(bits) <= 16
        or granularity not in ("token", "tensor")
        or symmetry not in ("", "symmetric", "asymmetric")
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be BITS:token or BITS:tensor with 2 to 16 bits, with ':symmetric' or "
            "':asymmetric' behind it if wanted, or none"
        )
    spec: dict[str, Any] = {"bits": int(bits), "granularity": granularity}
    if symmetry:
        spec["symmetric"] = symmetry == "symmetric"
    return spec


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
    if found.get("group_size") is not None:
        found["per_tensor"] = found["group_size"] == "tensor"
    if found.get("group_size") == "tensor":
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


_PLAIN = (
    "bits",
    "group_size",
    "symmetric",
    "grid",
    "scale_dtype",
    "bias_correction",
    "calibrate_all_experts",
    "calibrate_on",
    "tune",
    "tune_codes",
    "tune_own_text",
)
_OF_GPTQ = (
    "order",
    "static_groups",
    "refine_passes",
    "refit_rounds",
    "beam_width",
    "row_coupling",
    "damping",
    "max_damping",
    "error_propagation",
    "residual_propagation",
)


def _recipe(args: argparse.Namespace) -> Recipe:
    """Build the recipe that the options describe."""
    preset = args.recipe or (args.method if args.method in ("rtn", "obq") else "quality")
    method = Recipe.preset(preset).method
    if args.method not in (None, method):
        raise UsageError(f"--recipe {preset} is for --method {method}")
    given = {n: getattr(args, n) for n in (*_PLAIN, *_OF_GPTQ) if getattr(args, n) is not None}
    for name in _OF_GPTQ:
        if method != "gptq" and name in given and (method, name) != ("obq", "damping"):
            raise UsageError(f"--{name.replace('_', '-')} has no meaning with --method {method}")
    if "group_size" in given:
        given["per_tensor"] = args.group_size == "tensor"
        if not isinstance(args.group_size, int):
            given["group_size"] = None
    with prefixed():
        given |= _other_parts(args, Recipe.preset(preset))
        overrides, include = dict(args.override), tuple(args.include)
        return Recipe.preset(preset, overrides=overrides, include=include, **given)


def _other_parts(args: argparse.Namespace, preset: Recipe) -> dict[str, Any]:
    """Build equalization and activations, if they are asked for, or change the preset's."""
    changes: dict[str, Any] = {}
    equalization = preset.equalization if args.equalize is None else None
    if args.equalize not in (None, "none"):
        changes["equalization"] = Equalize(args.equalize, args.alpha)
    elif args.alpha is not None:
        if equalization is None:
            raise UsageError(
                "--alpha needs --equalize awe or smoothquant, or --recipe aweq or smoothquant"
            )
        changes["equalization"] = replace(equalization, alpha=args.alpha)
    elif args.equalize == "none":
        changes["equalization"] = None
    activations, threshold = preset.activations, args.outlier_threshold
    if args.activations:
        changes["activations"] = ActivationQuantization(
            **args.activations, outlier_threshold=threshold
        )
    elif threshold is not None:
        if activations is None or args.activations is not None:
            raise UsageError("--outlier-threshold needs --activations 8:token or --recipe llm.int8")
        changes["activations"] = replace(activations, outlier_threshold=threshold)
    elif args.activations is not None:
        changes["activations"] = None
    return changes


def _check(args: argparse.Namespace) -> Recipe:
    """Refuse at once everything that can be known to be wrong before PyTorch is imported."""
    problems, recipe = Problems(), None
    with problems.noting():
        recipe = _recipe(args)
    with problems.noting():
        check_json(args)
    with problems.noting():
        parse_start_token(args.start_token)
    with problems.noting(), prefixed("--"):
        parse_bytes(args.memory_budget)
    source = MODEL_DIR if args.model == DEMO else args.model
    with problems.noting():
        _check_out(args, source if os.path.isdir(source) else None)
    with problems.noting():
        if args.calibration is not None:
            check_text("--calibration", args.calibration)
        elif args.model != DEMO and recipe is not None and recipe.needs_calibration():
            raise UsageError(
                f"--calibration FILE is needed for {recipe.needs_calibration()}: some hundred "
                "kilobytes of text like what the model will be used on (--method rtn alone works "
                "without, at a loss of quality)"
            )
    problems.raise_if_any()
    assert recipe is not None  # or there had been a problem
    return recipe


def _check_out(args: argparse.Namespace, source: str | os.PathLike[str] | None) -> None:
    taken = "exists already; give --overwrite or another name"
    try:
        claim_place(args.out, args.overwrite, source, taken, f"--out {args.out}")
    except (OSError, ValueError) as error:
        raise PreflightError([Problem(str(error), type(error))]) from None


def _calibration(args: argparse.Namespace, tokenizer: Any, recipe: Recipe) -> Any:
    """Return texts or tokens for the driver; None if there are none and none are needed."""
    name = args.calibration
    if name is None:
        needed = args.model == DEMO and recipe.needs_calibration()
        return read_text("--calibration", None, tokenizer, "calibration") if needed else None
    if ":" in name and not os.path.exists(name):
        return name
    return calibration_source("--calibration", name, tokenizer)


def _progress(args: argparse.Namespace) -> bool | Callable[[Any], None]:
    """Return a bar on a terminal, a line per layer elsewhere."""
    if args.quiet or sys.stderr.isatty():
        return not args.quiet
    return lambda event: print(event, file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> None:
    """Quantize, write, print."""
    recipe = _check(args)
    began = time.perf_counter()
    with quiet_transformers(), _joined(args):
        result, facts = _quantize(args, recipe)
    seconds, info = time.perf_counter() - began, result.checkpoint
    if info is None:
        return  # one of several processes, of which the first writes and tells
    load = _load_lines(result.model, info, facts)
    if args.quiet and args.json != "-":
        print(info.directory)
    for text in info.warnings:
        print(f"ptqkit quantize: warning: {text}", file=sys.stderr)
    if (args.quiet or args.json == "-") and args.format == "auto" and info.format == "ptqkit":
        # What makes from_pretrained fail is never quiet.
        print(
            f"ptqkit quantize: {info.directory} has format {info.format}: {info.reason}; load it "
            "with ptqkit.load, since transformers alone cannot",
            file=sys.stderr,
        )
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
                "warnings": list(info.warnings),
                "files": list(info.files),
                "bytes": info.bytes,
                "load": load,
            },
            "report": result.report.to_dict(),
            "seconds": seconds,
        },
    )


@contextlib.contextmanager
def _joined(args: argparse.Namespace) -> Iterator[None]:
    """Join the other processes, if torchrun started this one."""
    from ptqkit.hf.quantization.processes import launched, own_device, started

    args.distributed = launched()
    if not args.distributed:
        yield
        return
    if args.stream:
        raise UsageError("--stream is for one process: leave it out, or start without torchrun")
    args.stream = False
    if args.device in ("auto", "cuda"):
        args.device = own_device()
    with started():
        yield


def _quantize(args: argparse.Namespace, recipe: Recipe) -> tuple[Any, dict[str, str]]:
    """Load, quantize and write; returns the result and what is known about the model."""
    from ptqkit.hf import quantize
    from ptqkit.hf.checkpoint.siblings import CheckpointWarning

    model, tokenizer, facts = load_model(args, args.stream)
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise PreflightError([f"MODEL {args.model} is quantized already; give the float model"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)  # told when all is done
        result = quantize(
            model,
            recipe,
            _calibration(args, tokenizer, recipe),
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
            out_dir=args.out,
            checkpoint_format=args.format,
            overwrite=args.overwrite,
            stored_dtype=facts["stored_dtype"] if args.dtype == "auto" else None,
            distributed=args.distributed,
        )
    return result, {**facts, "written_dtype": result.stored_dtype}


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
