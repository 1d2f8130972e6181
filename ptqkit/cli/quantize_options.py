"""Options of ``ptqkit quantize``."""

from __future__ import annotations

import argparse
from typing import Any

from ptqkit.cli.options import add_common, add_model_options

__all__ = ["GPTQ_RECIPES", "RTN_RECIPES", "add_options", "parse_override"]

# The presets of ptqkit.recipe.presets, by method, without its imports (a test compares them).
GPTQ_RECIPES = ("quality", "reference")
RTN_RECIPES = ("rtn", "aweq", "smoothquant", "vector-wise", "llm.int8", "zeroquant")

_DESCRIPTION = """\
Quantize the linear layers of a transformers model and write a checkpoint.

MODEL is a folder, 'demo' for the embedded model, or a name on the Hugging Face Hub. The weights
are quantized layer by layer while calibration text runs through the model once, so that every
layer is fitted to the inputs that the already quantized layers before it give.

Recipes:
  quality      (default) GPTQ: groups and their columns by decreasing activation power, grids
               searched under the Hessian, one coordinate-descent sweep
  reference    GPTQ as published: natural order, min-max grids
  rtn          rounding to nearest; needs no text
  aweq         W8A8: activation-weight equalization by the closed form, one scale a tensor, bias
               correction
  smoothquant  W8A8: SmoothQuant with alpha 0.5, one scale a tensor
  vector-wise  W8A8: scales per output and per token; needs no text
  llm.int8     the same, input columns with outliers left float; needs no text
  zeroquant    W8A8: groups of 128 weights, scales per token; needs no text
Other options change single settings of the recipe. Activations are quantized in simulation: exact
grids, float arithmetic.

Formats:
  compressed-tensors  symmetric grids, and W8A8; stock transformers loads it exactly
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
  ptqkit quantize ./model --recipe aweq --alpha search --equalize awe --calibration train.txt \\
      --out model-w8a8
  ptqkit quantize ./model --bits 4 --equalize awe --activations 8:token \\
      --calibration train.txt --out model-w4a8
"""


def add_options(commands: Any) -> argparse.ArgumentParser:
    """Add the command with all its options; returns its parser."""
    parser = commands.add_parser(
        "quantize",
        help="quantize a model and write a checkpoint",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder, 'demo', or a name on the Hub")
    group = parser.add_argument_group("what to do")
    group.add_argument("--method", choices=("gptq", "rtn"), help="default: gptq, or the recipe's")
    group.add_argument(
        "--bits", type=_bits, metavar="B", help="2 to 8, or 'ternary' (default: 4, or the recipe's)"
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
        choices=("auto", "compressed-tensors", "gptq", "gptq_v2", "ptqkit"),
    )
    group.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    add_common(parser)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recipe (default: as the recipe has it)")
    group.add_argument(
        "--recipe", choices=(*GPTQ_RECIPES, *RTN_RECIPES), metavar="NAME", help="one of those above"
    )
    group.add_argument(
        "--order", choices=("natural", "act", "group-act"), help="order of the columns"
    )
    group.add_argument(
        "--static-groups",
        action=argparse.BooleanOptionalAction,
        help="with order 'act': grids fixed beforehand on consecutive inputs; without, g_idx",
    )
    group.add_argument("--grid", choices=("minmax", "mse", "hessian"), help="how ranges are chosen")
    group.add_argument("--refine-passes", type=int, metavar="N", help="coordinate-descent passes")
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
        "(0.5 is a good value); the float model runs along, with twice the activations (0: off)",
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
    group.add_argument("--samples", type=int, default=128, metavar="N", help="windows (128)")
    group.add_argument(
        "--sequence-length",
        type=int,
        default=512,
        metavar="N",
        help="tokens a window, capped by what the model takes (512)",
    )
    group.add_argument("--batch-size", type=int, default=4, metavar="N", help="windows at once (4)")
    group.add_argument("--seed", type=int, default=0, help="of the choice of windows (0)")
    group.add_argument(
        "--start-token", default="auto", metavar="ID", help="before every window: id, auto, none"
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("resources")
    group.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="beyond the model, such as 4GiB; decides the schedule (default: what is free)",
    )
    group.add_argument(
        "--schedule",
        choices=("auto", "one-pass", "re-forward"),
        default="auto",
        help="results are equal; auto takes one pass where memory and model allow it",
    )
    group.add_argument(
        "--threads", type=int, default=0, metavar="N", help="of the solver (0: auto)"
    )
    group.add_argument(
        "--on-error",
        choices=("raise", "leave_float"),
        default="raise",
        help="keep: leave a layer that fails in float, and mark it in the report",
    )


def _bits(text: str) -> int | str:
    if text == "ternary":
        return text
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
            "':asymmetric' behind it where wanted, or none"
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
