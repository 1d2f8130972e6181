"""Options of ``ptqkit quantize``."""

from __future__ import annotations

import argparse
from typing import Any

from ptqkit.cli.common import add_common, add_model_options

__all__ = ["add_options", "parse_override"]

_DESCRIPTION = """\
Quantize the linear layers of a transformers model and write a checkpoint.

MODEL is a folder, 'demo' for the embedded model, or a name on the Hugging Face Hub. The weights
are quantized layer by layer while calibration text runs through the model once, so that every
layer is fitted to the inputs that the already quantized layers before it give.

Recipes for --method gptq:
  quality    (default) groups and their columns by decreasing activation power, grids searched
             under the Hessian, one coordinate-descent sweep
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
    return parser


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
        "--error-propagation", type=float, metavar="ALPHA",
        help="0 to 1: correct each weight by this share for the errors of the layers before it "
        "(0.5 is a good value); the float model runs along, with twice the activations (0: off)",
    )  # fmt: skip
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
