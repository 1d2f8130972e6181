"""``ptqkit bench``: speed and memory of models, float and packed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ptqkit._files import check_file, write_atomically
from ptqkit.cli.options import add_common, check_positive, check_text, prefixed
from ptqkit.cli.output import check_json, quiet_transformers, say, write_json
from ptqkit.demo import DEMO, MODEL_DIR, text
from ptqkit.errors import UsageError

__all__ = ["add_parser"]

_DESCRIPTION = """\
Measure how fast models run on this CPU, and what memory they take: tokens per second of a prompt
and of a generation (greedy, one token at a time, after 16 others), peak memory, size of the files,
and, of a text, perplexity.

MODEL is a folder (a float model, or a checkpoint of any format), 'demo' for the embedded model, or
a name on the Hugging Face Hub. A float model runs in float32 and in bfloat16; a quantized one from
its packed codes (--compute says otherwise), in the dtype of its files. If every MODEL is quantized,
the float rows are the dequantized first. Every row runs in a process of its own, one after another;
rates are medians; peak memory is what lies above the libraries, loading included.

--random-1b needs no model: a LLaMA of 1.1 billion weights (the sizes of TinyLlama) with random
values, which do not matter for speed. They are made layer by layer; the largest, float32, takes
4.4 GB of memory. The head is packed too.
"""

_EPILOG = """\
examples:
  ptqkit bench demo ./model-w4                 the embedded model, and a checkpoint
  ptqkit bench ./model ./model-w4 --text test.txt --picture speed.png --csv speed.csv
  ptqkit bench ./model-w4 --compute packed int8
  ptqkit bench --random-1b                     float32, bfloat16, W8A8, W4, W3, W2
  ptqkit bench --random-1b --forms W4 --quick --threads 1
"""

_COMPUTE = ("auto", "packed", "int8", "dequantize")
_FORMS = ("float32", "bfloat16", "W8A8", "W8", "W4", "W3", "W2")
_DEFAULT_FORMS = ("float32", "bfloat16", "W8A8", "W4", "W3", "W2")
_PROMPT, _TOKENS, _REPEAT, _MAX_TOKENS = 512, 32, 3, 4000
_QUICK_TOKENS, _QUICK_MAX_TOKENS = 8, 1000


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="tokens per second and memory of float and quantized models",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", nargs="*", help="folder, 'demo' or a Hub name")
    group = parser.add_argument_group("what to run")
    group.add_argument("--random-1b", action="store_true", help="random weights, 1.1 billion")
    group.add_argument(
        "--forms",
        nargs="+",
        metavar="FORM",
        choices=_FORMS,
        help=f"of --random-1b: {', '.join(_FORMS)}; default: all but W8",
    )
    group.add_argument(
        "--compute",
        nargs="+",
        metavar="HOW",
        choices=_COMPUTE,
        default=["auto"],
        help=f"of quantized models: {', '.join(_COMPUTE)} (auto)",
    )
    group.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="inputs of packed random weights (float32)",
    )
    group.add_argument(
        "--float",
        nargs="*",
        metavar="DTYPE",
        dest="floats",
        choices=("float32", "bfloat16"),
        default=["float32", "bfloat16"],
        help="dtypes of float models (float32 bfloat16); nothing after it: none",
    )
    group.add_argument(
        "--int8-cache", action="store_true", help="generate with keys and values of 8 bits"
    )
    group = parser.add_argument_group("how long")
    group.add_argument(
        "--prompt", type=int, default=_PROMPT, metavar="N", help=f"tokens of a prompt ({_PROMPT})"
    )
    group.add_argument(
        "--tokens", type=int, default=_TOKENS, metavar="N", help=f"generated tokens ({_TOKENS})"
    )
    group.add_argument(
        "--repeat", type=int, default=_REPEAT, metavar="N", help=f"prompts; median ({_REPEAT})"
    )
    group.add_argument(
        "--quick", action="store_true", help="one prompt, fewer generated tokens, less text"
    )
    group.add_argument("--threads", type=int, default=0, metavar="N", help="0: as the environment")
    group = parser.add_argument_group("perplexity")
    group.add_argument("--text", metavar="FILE", help=".txt or .jsonl; 'demo' has its own")
    group.add_argument(
        "--max-tokens",
        type=int,
        default=_MAX_TOKENS,
        metavar="N",
        help=f"use the first N tokens only ({_MAX_TOKENS})",
    )
    group = parser.add_argument_group("files")
    group.add_argument("--csv", metavar="FILE", help="also write the rows as CSV")
    group.add_argument("--picture", metavar="FILE", help="also draw them (.png, .svg, .pdf)")
    add_common(parser)
    parser.set_defaults(run=run)


def _check(args: argparse.Namespace) -> None:
    check_json(args)
    check_positive(args, "prompt", "tokens", "repeat", "max_tokens")
    if args.threads < 0:
        raise UsageError(f"--threads must be at least 0, not {args.threads}")
    if not args.model and not args.random_1b:
        raise UsageError("give a MODEL, or --random-1b")
    if args.forms and not args.random_1b:
        raise UsageError("--forms names forms of --random-1b, which is not given")
    for option in ("csv", "picture"):
        name = getattr(args, option)
        if name is not None:
            check_file(Path(name), f"--{option} {name}")
    if args.text is not None:
        check_text("--text", args.text)
        if args.text.endswith(".npy"):
            raise UsageError(f"--text {args.text}: give text, each model has its own tokenizer")


def run(args: argparse.Namespace) -> None:
    """Measure, print each step as it begins, then the table."""
    _check(args)
    with quiet_transformers():
        report = _measure(args)
    if args.csv is not None:
        write_atomically(Path(args.csv), report.to_csv())
    if args.picture is not None:
        report.draw(args.picture)
    if args.quiet and args.json != "-":
        print(f"{report.rows[-1].generation_rate:.4g}")
    _report(args, report)
    write_json(args, report.to_dict())


def _measure(args: argparse.Namespace) -> Any:
    from ptqkit.hf.models.loading import model_folder
    from ptqkit.hf.speed.run import folder_cases, measure_speed, random_cases
    from ptqkit.hf.speed.shapes import ONE_B

    with prefixed("MODEL "):
        folders = {n: MODEL_DIR if n == DEMO else model_folder(n) for n in args.model}
    cases = folder_cases(folders, args.compute, args.floats)
    if args.random_1b:
        forms = args.forms or _DEFAULT_FORMS
        cases += random_cases(
            "random 1.1B",
            ONE_B,
            [form for form in forms if form in _FORMS[2:]],
            args.dtype,
            [form for form in forms if form in _FORMS[:2]],
            "int8" if args.compute == ["int8"] else "packed",
        )
    return measure_speed(
        cases,
        prompt=args.prompt,
        tokens=min(args.tokens, _QUICK_TOKENS) if args.quick else args.tokens,
        repeat=1 if args.quick else args.repeat,
        threads=args.threads,
        text=_text(args),
        max_tokens=min(args.max_tokens, _QUICK_MAX_TOKENS) if args.quick else args.max_tokens,
        int8_cache=args.int8_cache,
        tell=None if args.quiet else _tell,
    )


def _text(args: argparse.Namespace) -> list[str] | None:
    if args.text is not None:
        from ptqkit.hf.data.text import read_documents

        return list(read_documents(args.text))
    return [text("test")] if DEMO in args.model else None


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _report(args: argparse.Namespace, report: Any) -> None:
    say(args, report.table())
    say(args)
    first = report.rows[0]
    say(
        args,
        f"prompt of {first.prompt} tokens, {first.tokens} generated; {first.threads} thread(s), "
        f"kernels {report.cpu}; x: of the first row of the model",
    )
    for row in report.rows:
        if row.computed:
            say(args, f"{Path(row.model).name} {row.form}: {row.computed}")
    for name in (args.csv, args.picture):
        if name is not None:
            say(args, f"wrote {name}")
