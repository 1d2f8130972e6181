"""What the commands print and write."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ptqkit._files import check_file, plain, write_atomically
from ptqkit._version import __version__
from ptqkit.errors import PreflightError, UsageError

__all__ = [
    "SCHEMA",
    "check_json",
    "no_bars",
    "one_line",
    "progress_of",
    "quiet_transformers",
    "say",
    "write_json",
]

SCHEMA = 1
"""Version of the ``--json`` files; raised when a field changes its meaning or goes away."""


def one_line(error: BaseException) -> str:
    """Return the message of an error; only a list of problems keeps its lines."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted; nothing was written"
    text = str(error) or type(error).__name__
    if isinstance(error, PreflightError):
        return text
    text = " ".join(text.split())
    if len(text) > 1000:
        text = text[:1000] + " ..."
    return text


def say(args: argparse.Namespace, text: str = "") -> None:
    """Print a line of the report, unless ``--quiet`` or ``--json -`` keep it back."""
    if not args.quiet and args.json != "-":
        print(text, flush=True)


def check_json(args: argparse.Namespace) -> None:
    """Refuse, before any work, a ``--json`` file that could not be written."""
    if args.json not in (None, "-"):
        check_file(Path(args.json), f"--json {args.json}")


def write_json(args: argparse.Namespace, values: dict[str, Any]) -> None:
    """Write the result of a command where ``--json`` says, all at once or not at all.

    Every file has ``schema`` (:data:`SCHEMA`), ``command`` and ``version`` (of ptqkit); numbers
    that are not finite are null.
    """
    if args.json is None:
        return
    head = {"schema": SCHEMA, "command": args.command, "version": __version__}
    text = json.dumps(plain({**head, **values}), indent=1, allow_nan=False) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
        return
    write_atomically(Path(args.json), text)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the progress bars and hints of transformers and its helpers off the screen.

    Raises
    ------
    UsageError
        If transformers is not installed.
    """
    try:
        from huggingface_hub.utils import (
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )
        from transformers.utils import logging
    except ModuleNotFoundError as error:
        raise UsageError(
            f"this command needs {error.name}; install it with: pip install 'ptqkit[hf]'"
        ) from error
    verbosity = logging.get_verbosity()
    bars, downloads = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if downloads:
            enable_progress_bars()


def progress_of(args: argparse.Namespace, pause: float = 0.0) -> bool | Callable[[Any], None]:
    """Return a bar on a terminal; elsewhere a line per event, at most one in ``pause`` seconds."""
    if args.quiet or sys.stderr.isatty():
        return not args.quiet
    shown = time.perf_counter() - pause

    def print_event(event: Any) -> None:
        nonlocal shown
        now = time.perf_counter()
        if event.index == event.total or now - shown >= pause:
            shown = now
            print(event, file=sys.stderr, flush=True)

    return print_event


def no_bars() -> contextlib.AbstractContextManager[Any]:
    """Drop what is written to standard error while a model is loaded.

    compressed-tensors has no switch for its progress bars.
    """
    return contextlib.redirect_stderr(io.StringIO())
