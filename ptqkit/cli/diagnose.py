"""``ptqkit diagnose``: why, and where, a model is hard to quantize."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ptqkit.cli import diagnose_report
from ptqkit.cli.inputs import calibration_source, load_model, read_text
from ptqkit.cli.options import (
    add_batch_size,
    add_common,
    add_model_options,
    check_positive,
    check_text,
)
from ptqkit.cli.output import check_json, progress_of, quiet_transformers, say, write_json
from ptqkit.demo import DEMO
from ptqkit.errors import UsageError

__all__ = ["add_parser"]

_KINDS = ("query", "key", "value", "scores", "softmax", "weights", "inputs")

_DESCRIPTION = """\
Diagnostics of a model. Without a flag the full diagnosis: per layer the errors of its input on int8
grids, its spread, kurtosis and outliers, the gain of the norm before it, the spectral norm of its
weight; attention sinks, what an 8-bit softmax loses, the key-value cache's error; sensitivity.

--sensitivity quantizes one thing at a time, all else in float, and ranks by the signal-to-noise
ratio of the final logits, worst first (with --text also by perplexity). Things are the tensors
inside attention (query, key, value, scores: the input of the softmax, softmax: its output), the
weights and the inputs of the linear layers. Weights are rounded to nearest per output channel; all
others have one asymmetric grid per tensor, fixed by the calibration data (softmax: [0, 1]).
"""

_EPILOG = """\
examples:
  ptqkit diagnose demo --out diagnosis --recipe
  ptqkit diagnose ./one --compare ./other --calibration train.txt
  ptqkit diagnose demo --sensitivity
  ptqkit diagnose ./model --sensitivity --calibration train.txt --bits 6 --picture six.png
  ptqkit diagnose ./model --sensitivity --by module --kinds softmax --calibration train.txt
"""


class _Diagnostic(NamedTuple):
    """A flag: what it says in the help, and what runs; the result has table, to_dict and draw."""

    help: str
    run: Callable[[argparse.Namespace, Any, Any, Any], Any]


def _sensitivity(args: argparse.Namespace, model: Any, tokenizer: Any, source: Any) -> Any:
    from ptqkit.hf import sensitivity

    text, windows = None, {}
    if args.text is not None:
        text = read_text("--text", args.text, tokenizer, max_tokens=args.max_tokens)
        windows = {"max_tokens": args.max_tokens}
    return sensitivity(
        model,
        source,
        kinds=args.kinds,
        bits=args.bits,
        by=args.by,
        tokenizer=tokenizer,
        text=text,
        samples=args.samples,
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        progress=progress_of(args, pause=10.0),
        **windows,
    )


_DIAGNOSTICS = {
    "sensitivity": _Diagnostic("quantize one kind of tensor or layer at a time", _sensitivity)
}


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "diagnose",
        help="which tensors and layers suffer most from quantization",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder, 'demo', or a name on the Hub")
    for name, diagnostic in _DIAGNOSTICS.items():
        parser.add_argument(f"--{name}", action="store_true", help=diagnostic.help)
    parser.add_argument(
        "--picture", metavar="FILE", help="also draw the result (.png, .svg or .pdf)"
    )
    group = parser.add_argument_group("sensitivity")
    group.add_argument("--bits", type=int, default=8, metavar="N", help="2 to 16, weights to 8 (8)")
    group.add_argument(
        "--kinds",
        nargs="+",
        default=list(_KINDS),
        choices=_KINDS,
        metavar="KIND",
        help=f"any of {', '.join(_KINDS)}",
    )
    group.add_argument(
        "--by",
        default="kind",
        choices=("kind", "layer", "module"),
        help="one kind in all layers (default), all kinds in one block, or one kind of one module",
    )
    group.add_argument("--text", metavar="FILE", help="also measure the perplexity on a text")
    group.add_argument("--max-tokens", type=int, metavar="N", help="use N tokens of --text")
    data = parser.add_argument_group("data")
    data.add_argument("--calibration", metavar="FILE", help="text; 'demo' has its own")
    data.add_argument("--samples", type=int, default=8, metavar="N", help="windows (8)")
    data.add_argument("--sequence-length", type=int, default=256, metavar="N", help="tokens (256)")
    add_batch_size(data)
    diagnose_report.add_options(parser)
    add_model_options(parser)
    add_common(parser)
    parser.set_defaults(run=run)


def _check(args: argparse.Namespace) -> list[str]:
    check_json(args)
    asked = [name for name in _DIAGNOSTICS if getattr(args, name)]
    if args.picture is not None:
        path = Path(args.picture)
        if len(asked) > 1:
            raise UsageError("--picture shows one diagnostic: ask for one at a time")
        if path.suffix not in (".png", ".svg", ".pdf") or not path.absolute().parent.is_dir():
            raise UsageError(
                f"--picture {args.picture}: it must be a .png, .svg or .pdf file in a folder "
                "that exists"
            )
    if not 2 <= args.bits <= 16:
        raise UsageError(f"--bits must be from 2 to 16, not {args.bits}")
    if args.bits > 8 and "weights" in args.kinds:
        raise UsageError(f"--bits {args.bits}: weights take at most 8; leave them out of --kinds")
    check_positive(args, "samples", "sequence_length", "batch_size", "max_tokens")
    for option in ("text", "calibration"):
        if getattr(args, option) is not None:
            check_text(f"--{option}", getattr(args, option))
    if args.calibration is None and args.model != DEMO:
        raise UsageError("--calibration FILE is needed (only 'demo' brings a text of its own)")
    return asked


def run(args: argparse.Namespace) -> None:
    """Run the diagnostics asked for, or else the full diagnosis, and print."""
    if not any(getattr(args, name) for name in _DIAGNOSTICS):
        return diagnose_report.run(args)
    asked = _check(args)
    values: dict[str, Any] = {"model": args.model}
    with quiet_transformers():
        model, tokenizer, facts = load_model(args)
        values.update(facts)
        if args.calibration is None:
            source = read_text("--calibration", None, tokenizer, "calibration")
        else:
            source = calibration_source("--calibration", args.calibration, tokenizer)
        for name in asked:
            started = time.perf_counter()
            result = _DIAGNOSTICS[name].run(args, model, tokenizer, source)
            values[name] = {**result.to_dict(), "seconds": time.perf_counter() - started}
            say(args, result.table())
            if args.quiet and args.json != "-":
                print(result.rows[0].name)
            if args.picture is not None:
                result.draw(args.picture)
                say(args, f"\npicture {args.picture}")
    write_json(args, values)
