"""``ptqkit demo``: the embedded model, quantized in nine ways and measured."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptqkit._folders import check_path, has_content, new_parents, resolve
from ptqkit.cli.options import add_common
from ptqkit.cli.output import check_json, no_bars, quiet_transformers, say, write_json
from ptqkit.errors import PreflightError, UsageError

__all__ = ["add_parser"]

_DESCRIPTION = """\
Quantize the embedded language model (7 million parameters, Python source code) at 4, 3 and 2 bits
with round-to-nearest, GPTQ as published and GPTQ with the 'quality' recipe, and measure each on
text that the model never saw. Then write one of them as a checkpoint, load it with plain
transformers, and let it write a line. Needs no network, and up to three minutes on two cores.

The text is that of the standard library of the Python that runs, split by file; so the numbers
differ a little between versions of Python.
"""

_EPILOG = """\
examples:
  ptqkit demo
  ptqkit demo --quick                         a smaller table, in some twenty seconds
  ptqkit demo --out demo --json demo.json     keep checkpoint, picture and numbers
"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "demo",
        help="quantize the embedded model at 4, 3 and 2 bits and compare, in a minute or two",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="new folder for checkpoint and picture; default: a temporary one",
    )
    parser.add_argument("--picture", metavar="FILE", help="picture (.png, .svg, .pdf) elsewhere")
    parser.add_argument("--quick", action="store_true", help="less text and 3 bits alone")
    add_common(parser)
    parser.set_defaults(run=run)


def _check_out(out: str) -> Path:
    """Refuse, before any work, a folder that could not be made."""
    try:
        target = resolve(out, f"--out {out}")
        if has_content(target):
            raise FileExistsError(f"--out {out} exists already; give another name")
        if not os.path.isdir(target):
            check_path(target, f"--out {out}")
    except (OSError, ValueError) as error:
        raise PreflightError([str(error)]) from None
    return target


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Give a folder, new or empty; if the demo ends early, it is gone unless it holds something."""
    if out is not None:
        with new_parents(out):
            yield out
        return
    path = Path(tempfile.mkdtemp(prefix="ptqkit-demo-"))
    try:
        yield path
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def run(args: argparse.Namespace) -> None:
    """Run the demo, printing each row as soon as it is measured."""
    check_json(args)
    if args.picture is not None and not Path(args.picture).absolute().parent.is_dir():
        raise UsageError(f"--picture {args.picture}: its folder does not exist")
    out = None if args.out is None else _check_out(args.out)
    with quiet_transformers():
        from ptqkit.demo.run import run_demo

        with _folder(out) as folder, no_bars():
            result = run_demo(
                folder, quick=args.quick, picture=args.picture, log=lambda line: say(args, line)
            )
    if args.quiet and args.json != "-":
        print(folder)
    elif sys.stdout.isatty() and args.json != "-":
        say(args, "Next: ptqkit quantize --help")
    write_json(args, result.to_dict())
