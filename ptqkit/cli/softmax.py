"""``ptqkit softmax``: what a quantized softmax costs, and what corrections give back.

Language models here; UNets in :mod:`ptqkit.cli.softmax_unet`.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from typing import Any

from ptqkit._folders import check_path, resolve
from ptqkit.cli.inputs import calibration_source, load_model, read_text
from ptqkit.cli.options import add_common, add_model_options, check_text
from ptqkit.cli.output import check_json, quiet_transformers, say, write_json
from ptqkit.cli.softmax_unet import run_unet
from ptqkit.demo import DEMO
from ptqkit.errors import NotFiniteError, UsageError
from ptqkit.nn.softmax.variants import (
    LANGUAGE_MODEL_VARIANTS,
    TABLE_VARIANTS,
    UNET_VARIANTS,
)
from ptqkit.sweep.diffusion_files import is_diffusion_model

__all__ = ["add_parser", "calibration_of"]

_LONGEST_DEFAULT = 2048
_DEMO_WINDOW, _DEMO_TOKENS = 512, 8176
_DEFAULT = ("bias", "bias/head", "row_length/head", "row_sum", "before", "before/row_sum")

_DESCRIPTION = """\
Measure how much a quantized softmax costs a causal language model, and how much of that each
correction gives back, in one table. Of a diffusion model (a text-to-image pipeline of diffusers
with a file of prompts as --text, or a folder of benchmarks/train_unet.py) the decibels of final
samples are measured in place of the perplexity.

Most attention probabilities are so small that they round to zero, and the rows of the quantized
softmax no longer sum to one. Corrections add a constant to the allowed entries, at no cost where
the offset of the quantizer absorbs it:

  bias            one constant per attention layer, from calibration data (Pandey et al. 2023)
  bias/head       one per head
  row_length      by the number of keys a row may look at, per layer; row_length/head per head
  row_sum         each row's own missing mass, spread over its keys: no calibration
  bias/step       of a diffusion model: one per time step; bias/step_head per step and head

The grid can also be that of exp(x - max), rounded before it is divided by its sum, so that every
row has all codes to itself (beyond the paper), and there are other papers' grids to compare with:

  before          rounded before normalising; before/row_sum with each row's own missing mass;
                  before/code_sum divided by the sum of the rounded ones
  squares         before normalising as well, with codes of the square root: fine steps next to 0;
                  squares/row_sum and squares/code_sum
  log2            powers of two (FQ-ViT); log2/row_sum
  twin            two uniform grids, a fine and a coarse one (PTQ4ViT); twin/row_sum

The excess over the float model has a standard error, paired window by window. --weights 8 adds the
same lines with the weights rounded to 8 bits, one scale per output (W8A16).

With --out, one correction at one bit width is saved with the model (ptqkit_softmax.json), and
ptqkit.load installs it.
"""

_EPILOG = """\
examples:
  ptqkit softmax demo
  ptqkit softmax ./model --text test.txt --bits 8 6 4 3 2 --weights 8
  ptqkit softmax ./model --calibration train.txt --text test.txt --correction bias/head --out ./m
  ptqkit softmax ./stable-diffusion --text prompts.txt --steps 20 --guidance 7.5 --weights 8
"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "softmax",
        help="cost of a quantized softmax in perplexity, with and without corrections",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder, 'demo', or a name on the Hub")
    parser.add_argument("--bits", type=int, nargs="+", default=[8], metavar="N", help="2 to 16 (8)")
    parser.add_argument(
        "--correction",
        nargs="+",
        metavar="NAME",
        choices=tuple(dict.fromkeys([*LANGUAGE_MODEL_VARIANTS, *UNET_VARIANTS])),
        help=f"any of {', '.join(LANGUAGE_MODEL_VARIANTS)}; of a UNet also bias/step, "
        "bias/step_head",
    )
    parser.add_argument(
        "--weights", type=int, metavar="N", help="again with weights of 2 to 8 bits (W8A16: 8)"
    )
    parser.add_argument(
        "--range",
        dest="grid_range",
        default="fixed",
        choices=("fixed", "calibrated", "search"),
        help="of the probabilities: [0, 1]; their smallest and largest; or the best of a few",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="save the model with the correction; a folder that holds it already only gains a file",
    )
    _add_data(parser)
    _add_diffusion(parser)
    add_model_options(parser)
    parser.add_argument(
        "--batch-size", type=int, default=4, metavar="N", help="windows at once (4)"
    )
    add_common(parser)
    parser.set_defaults(run=run)


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--text",
        metavar="FILE",
        help="text to measure on (.txt, .jsonl, .gz of both, .npy). 'demo' has its own",
    )
    group.add_argument(
        "--calibration",
        metavar="FILE",
        help="text to calibrate on; by default the beginning of --text, which is not measured",
    )
    group.add_argument("--samples", type=int, default=16, metavar="N", help="windows (16)")
    group.add_argument("--sequence-length", type=int, default=512, metavar="N", help="tokens (512)")
    group.add_argument("--window", type=int, metavar="N", help="longest input when measuring")
    group.add_argument(
        "--max-tokens", type=int, metavar="N", help="measure on N tokens ('demo': 8,176)"
    )


def _add_diffusion(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("diffusion models")
    group.add_argument("--images", type=int, default=8, metavar="N", help="final samples (8)")
    group.add_argument("--steps", type=int, default=20, metavar="N", help="of DDIM (20)")
    group.add_argument(
        "--latents", type=int, default=100, metavar="N", help="calibration latents (100)"
    )
    group.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        metavar="X",
        help="classifier-free guidance (1: none)",
    )


def calibration_of(
    args: argparse.Namespace, model: Any, tokenizer: Any, text: Any
) -> tuple[Any, Any]:
    """Calibration set of the arguments, and the text that is left to measure on."""
    from ptqkit.hf import prepare_calibration
    from ptqkit.hf.data.calibration import max_positions

    options = {
        "samples": args.samples,
        "sequence_length": args.sequence_length,
        "batch_size": args.batch_size,
        "max_length": max_positions(model),
    }
    source: Any
    if args.calibration is not None:
        source = calibration_source("--calibration", args.calibration, tokenizer)
    elif args.model == DEMO:
        from ptqkit.demo import text as demo_text

        source = [demo_text("calibration")]
    else:
        source, text = _split(text, tokenizer, args, options["max_length"])
    return prepare_calibration(source, tokenizer, **options), text


def _split(
    text: Any, tokenizer: Any, args: argparse.Namespace, limit: int | None
) -> tuple[Any, Any]:
    """Windows from the beginning of a text, or of tokens, and the tokens behind them."""
    import torch

    from ptqkit.hf.data.text import open_documents, tokenize

    bos = getattr(tokenizer, "bos_token_id", None)
    length = min(args.sequence_length, limit) if limit else args.sequence_length
    body = length - (bos is not None)
    used = args.samples * body
    if isinstance(text, torch.Tensor):
        ids = text.reshape(-1)
    else:
        needed = None if args.max_tokens is None else max(0, used) + args.max_tokens
        found = tokenize(tokenizer, open_documents(text), needed)
        ids = torch.tensor(found, dtype=torch.long)
    if body < 1 or len(ids) < used + 2:
        raise UsageError(
            f"--text {args.text} holds {len(ids)} tokens, but calibrating takes the first {used}: "
            "give --calibration FILE, or lower --samples or --sequence-length"
        )
    windows = ids[:used].view(-1, body)
    if bos is not None:
        windows = torch.cat([torch.full((len(windows), 1), bos, dtype=torch.long), windows], dim=1)
    return windows, ids[used:]


def _check(args: argparse.Namespace) -> None:
    check_json(args)
    counts = ("samples", "sequence_length", "window", "max_tokens", "batch_size")
    for option in (*counts, "images", "steps", "latents"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UsageError(f"--{option.replace('_', '-')} must be at least 1, not {value}")
    wrong = [b for b in args.bits if not 2 <= b <= 16]
    if wrong:
        raise UsageError(f"--bits must be from 2 to 16, not {wrong[0]}")
    if args.weights is not None and not 2 <= args.weights <= 8:
        raise UsageError(f"--weights must be from 2 to 8, not {args.weights}")
    for option in ("text", "calibration"):
        name = getattr(args, option)
        if name is not None:
            check_text(f"--{option}", name)
    unet = is_diffusion_model(args.model)
    if args.text is None and args.model != DEMO and not unet:
        raise UsageError("--text FILE is needed (only the model 'demo' brings a text of its own)")
    wrong = [c for c in args.correction or () if c not in LANGUAGE_MODEL_VARIANTS]
    if wrong and not unet:
        raise UsageError(
            f"--correction {wrong[0]} is for diffusion models: MODEL has no time steps"
        )
    if args.out is not None:
        if len(args.bits) != 1 or len(args.correction or ()) != 1:
            raise UsageError("--out saves one variant: give one --bits and one --correction")
        if args.correction[0] in TABLE_VARIANTS:
            raise UsageError(f"--correction {args.correction[0]} has no place in a file")
        if args.weights is not None:
            raise UsageError(
                "--weights is for the table: quantize the weights with ptqkit quantize"
            )
        if not os.path.isdir(args.out):
            check_path(resolve(args.out, f"--out {args.out}"), f"--out {args.out}")


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    _check(args)
    if is_diffusion_model(args.model):
        with quiet_transformers():
            run_unet(args)
        return
    with quiet_transformers():
        table, values = measure(args)
    if args.quiet and args.json != "-":
        print(f"{table.rows[-1].perplexity:.6f}")
    say(args, table.table())
    say(args)
    shown = values["conventions"]
    say(
        args,
        f"{shown['tokens']:,} tokens scored, window {shown['window']}; calibration "
        f"{values['calibration']['samples']} x {values['calibration']['sequence_length']} tokens; "
        f"{values['dtype']} arithmetic on {values['device']}, {values['seconds']:.1f} s",
    )
    if "saved" in values:
        say(args, f"saved {values['saved']}")
    write_json(args, values)
    wrong = [row.name for row in table.rows if not math.isfinite(row.perplexity)]
    if wrong:
        raise NotFiniteError(
            f"MODEL {args.model}: the perplexity is not finite: {', '.join(wrong)}"
        )


def measure(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Load, measure, and return the table and what is written to ``--json``."""
    model, tokenizer, facts = load_model(args)
    from ptqkit.hf.data.calibration import max_positions
    from ptqkit.hf.softmax.table import softmax_table

    if args.text is not None and args.calibration is None:
        # The calibration takes the beginning of it.
        text = calibration_source("--text", args.text, tokenizer)
    elif args.text is not None:
        text = read_text("--text", args.text, tokenizer, max_tokens=args.max_tokens)
    else:
        text = _demo_windows(tokenizer, args.window or _DEMO_WINDOW, args.max_tokens)
    started = time.perf_counter()
    data, text = calibration_of(args, model, tokenizer, text)
    window = args.window or (_DEMO_WINDOW if args.model == DEMO else None)
    table = softmax_table(
        model,
        tokenizer,
        text,
        data,
        bits=args.bits,
        corrections=args.correction or _DEFAULT,
        grid_range=args.grid_range,
        rounded=None if args.weights is None else _rounded(model, args.weights),
        rounded_name=f"W{args.weights}A16",
        progress=None if args.quiet else lambda name: print(name, file=sys.stderr, flush=True),
        window=window or min(max_positions(model) or _LONGEST_DEFAULT, _LONGEST_DEFAULT),
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
    )
    values = {"model": args.model, **facts, "text": args.text or "demo, test split"}
    values.update(table.to_dict())
    if args.out is not None:
        values["saved"] = _save(args, model, tokenizer, data)
    values["seconds"] = time.perf_counter() - started
    return table, values


def _rounded(model: Any, bits: int) -> Any:
    """Return a copy of a model with rounded weights, one scale per output."""
    import copy

    from ptqkit.hf.quantization.driver import quantize

    found = copy.deepcopy(model)
    quantize(found, "rtn", bits=bits, group_size=None, progress=False, diagnostics=False)
    return found


def _demo_windows(tokenizer: Any, window: int, max_tokens: int | None) -> Any:
    """Windows at equal distances from the demo's test text, so that few speak for all of it."""
    import torch

    from ptqkit.demo import text

    ids = tokenizer(text("test"), add_special_tokens=False, verbose=False)["input_ids"]
    body = max(1, window - (tokenizer.bos_token_id is not None))
    rows = torch.tensor(ids[: len(ids) // body * body], dtype=torch.long).view(-1, body)
    count = min(len(rows), max(1, (max_tokens or _DEMO_TOKENS) // body))
    return rows[torch.linspace(0, len(rows) - 1, count, dtype=torch.float32).round().long()]


def _save(args: argparse.Namespace, model: Any, tokenizer: Any, data: Any) -> str:
    from ptqkit.hf import SoftmaxCalibration, save_softmax

    study = SoftmaxCalibration(model, data, bits=args.bits[0], grid_range=args.grid_range)
    # What the table measured, without the guard of quantize_softmax.
    quantizers = study.quantizers(*LANGUAGE_MODEL_VARIANTS[args.correction[0]])
    return str(save_softmax(model, quantizers, args.out, tokenizer=tokenizer))
