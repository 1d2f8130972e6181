"""``ptqkit eval``: perplexity of a float or quantized model."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

from ptqkit.cli.inputs import load_model, read_text
from ptqkit.cli.options import (
    LONGEST_WINDOW,
    add_batch_size,
    add_common,
    add_model_options,
    check_positive,
    check_text,
    parse_start_token,
)
from ptqkit.cli.output import check_json, progress_of, quiet_transformers, say, write_json
from ptqkit.demo import DEMO
from ptqkit.errors import UsageError

__all__ = ["add_parser"]

_DESCRIPTION = """\
Measure the perplexity per token of a causal language model on a text.

MODEL is a folder (a float model, or a checkpoint in the compressed-tensors, GPTQ or ptqkit
format), 'demo' for the embedded model, or a name on the Hugging Face Hub.

A number means nothing without its conventions, so they are printed with it. The text is cut into
windows that advance by --stride tokens; the start token, if the tokenizer has one, stands
before every window and is not scored; with a stride below the window each token is scored once,
by the first window that holds it. Perplexities compare only between models with one tokenizer.
"""

_EPILOG = """\
examples:
  ptqkit eval demo
  ptqkit eval ./model --text test.txt
  ptqkit eval ./model-w4 --text test.txt --window 1024 --stride 512 --json w4.json
"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "eval",
        help="perplexity per token of a float or quantized model on a text",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder, 'demo', or a name on the Hub")
    parser.add_argument(
        "--text",
        metavar="FILE",
        help=".txt (one text) or .jsonl (one per line), either as .gz too; or .npy with token ids "
        "(texts, tokens). 'demo' has its own",
    )
    group = parser.add_argument_group("conventions")
    group.add_argument(
        "--window",
        type=int,
        metavar="N",
        help=f"longest input; default: what the model takes, at most {LONGEST_WINDOW}",
    )
    group.add_argument(
        "--stride", type=int, metavar="N", help="new tokens per window; default: no overlap"
    )
    group.add_argument(
        "--start-token",
        default="auto",
        metavar="ID",
        help="token before every window: an id, 'none', or 'auto', the tokenizer's bos",
    )
    group.add_argument("--max-tokens", type=int, metavar="N", help="use the first N tokens only")
    add_model_options(parser)
    add_batch_size(parser)
    add_common(parser)
    parser.set_defaults(run=run)


def _check(args: argparse.Namespace) -> None:
    check_json(args)
    parse_start_token(args.start_token)
    check_positive(args, "window", "stride", "max_tokens", "batch_size")
    if args.text is not None:
        check_text("--text", args.text)
    elif args.model != DEMO:
        raise UsageError("--text FILE is needed (only the model 'demo' brings a text of its own)")


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    _check(args)
    with quiet_transformers():
        values = measure(args)
    if args.quiet and args.json != "-":
        print(f"{values['perplexity']:.6f}")
    for line in _lines(values):
        say(args, line)
    write_json(args, values)


def _lines(v: dict[str, Any]) -> list[str]:
    start = v["start_token"]
    shown = "none" if start is None else f"{v['start_token_text']!r} (id {start})"
    return [
        f"perplexity {v['perplexity']:.4f} per token ({v['nll_per_token']:.5f} nats, "
        f"{v['bits_per_token']:.5f} bits)",
        f"tokens {v['tokens']:,} scored in {v['texts']} text(s), window {v['window']}, "
        f"stride {v['stride']}, start token {shown}",
        f"model {v['model']}: {v['class']}, {v['quantization']}, {v['dtype']} arithmetic on "
        f"{v['device']}, {v['seconds']:.1f} s",
    ]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Load, measure, and return what is written to ``--json``."""
    model, tokenizer, facts = load_model(args)
    from ptqkit.hf import perplexity
    from ptqkit.hf.data.calibration import max_positions

    text = read_text("--text", args.text, tokenizer, max_tokens=args.max_tokens)
    limit = max_positions(model) or LONGEST_WINDOW
    started = time.perf_counter()
    result = perplexity(
        model,
        tokenizer,
        text,
        window=args.window or min(limit, LONGEST_WINDOW),
        stride=args.stride,
        start_token=parse_start_token(args.start_token),
        batch_size=args.batch_size,
        max_tokens=args.max_tokens,
        check=False,
        progress=progress_of(args, pause=10.0),
    )
    result.check_finite(f"MODEL {args.model}")
    start = result.start_token
    named = start is not None and tokenizer is not None
    return {
        "model": args.model,
        **facts,
        "quantization": _quantization(facts["folder"]),
        "text": args.text or "demo, test split",
        **result.to_dict(),
        "bits_per_token": result.nll_per_token / math.log(2),
        "start_token_text": str(tokenizer.convert_ids_to_tokens(start)) if named else None,
        "seconds": time.perf_counter() - started,
    }


def _quantization(folder: str) -> str:
    """Name the method of a checkpoint as its configuration file does."""
    from ptqkit.hf.models.loading import read_config

    settings = read_config(Path(folder)).get("quantization_config")
    return str(settings.get("quant_method", "quantized")) if settings else "float"
