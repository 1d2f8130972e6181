"""The command line: ``ptqkit quantize``, ``eval``, ``sweep``, ``softmax`` and so on.

Nothing here computes: each command reads its arguments, calls the functions that Python users
call, and prints. PyTorch and transformers are imported by the commands that need them, after the
arguments have been checked, so that ``--help`` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from ptqkit._version import __version__
from ptqkit.cli import bench, demo, diagnose, evaluate, info, quantize, softmax, sweep
from ptqkit.cli.completion import SHELLS, PrintCompletion
from ptqkit.cli.options import Parser
from ptqkit.cli.output import one_line
from ptqkit.errors import NotPositiveDefiniteError, PreflightError, PtqkitError
from ptqkit.study.cells import CellsFailed

__all__ = ["build_parser", "main"]

_DESCRIPTION = """\
Post-training quantization of models: GPTQ, AWEQ and softmax correction, and what they need
around it. The first thing to try, without a download and in a minute or two:

  ptqkit demo
"""

_EPILOG = """\
exit codes:
  0    done
  1    failed for a reason of its own (a full disk, a bug); --debug shows where
  2    a wrong argument, a missing file or package, data that cannot be used
  3    the checks before the run found problems: all of them are listed, nothing was computed
  4    a Hessian could not be factorized: raise --damping or give more calibration text; of
       sweep: some cells failed
  130  interrupted by Ctrl-C, or ended by SIGTERM; nothing half-written is left under the final name

environment:
  PTQKIT_DEBUG=1   show tracebacks, as --debug does
  ptqkit info      lists the other variables

'ptqkit COMMAND --help' explains a command, with examples.
"""


# Faults of files and environment; any other error that is not raised on purpose is a bug.
_OUTSIDE = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ModuleNotFoundError,
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="ptqkit",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ptqkit {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        help="print a script that completes commands and options in this shell",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (quantize, evaluate, bench, softmax, diagnose, sweep, demo, info):
        module.add_parser(commands)
    return parser


def exit_code(error: BaseException) -> int:
    """Return the exit code for an exception."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, PreflightError):
        return 3
    if isinstance(error, (NotPositiveDefiniteError, CellsFailed)):
        return 4
    return 2 if isinstance(error, (PtqkitError, *_OUTSIDE)) else 1


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM, and a terminal that goes, end a command as Ctrl-C does, if they would end it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [n for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n)]
    numbers = [getattr(signal, name) for name in names]
    changed = [n for n in numbers if signal.getsignal(n) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; by default those of the process.

    Returns
    -------
    int
        The exit code.

    Raises
    ------
    SystemExit
        From argparse, for ``--help`` and for arguments it does not understand (code 2).
    """
    args = build_parser().parse_args(argv)
    debug = args.debug or os.environ.get("PTQKIT_DEBUG", "") not in ("", "0")
    try:
        with _ended_by_signals():
            args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone (``| head``); keep the interpreter from flushing into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, Exception) as error:
        if debug:
            raise
        code = exit_code(error)
        print(f"ptqkit {args.command}: {one_line(error)}", file=sys.stderr)
        if code == 1:
            print("(run again with --debug to see where)", file=sys.stderr)
        return code
    return 0
