"""Options that several commands have, and their checks."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from ptqkit._defaults import BATCH_SIZE
from ptqkit.errors import UsageError, did_you_mean

__all__ = [
    "LONGEST_WINDOW",
    "Parser",
    "add_batch_size",
    "add_common",
    "add_device",
    "add_model_options",
    "add_threads",
    "check_positive",
    "check_text",
    "parse_start_token",
    "prefixed",
]

LONGEST_WINDOW = 2048
"""Tokens of the longest input that is measured if ``--window`` does not say more."""


class Parser(argparse.ArgumentParser):
    """Report a mistake in one line, with the word that was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Print the message without the usage, which is longer than a screen; exit with 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        """Refuse unknown options where the known ones are at hand: in the command's parser."""
        found, unknown = super().parse_known_args(*args, **options)
        if unknown:
            near = did_you_mean(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = ", ".join(map(str, action.choices))
            near = did_you_mean(value, map(str, action.choices)) or f"; choose from {known}"
            raise argparse.ArgumentError(action, f"{value!r} is not a choice{near}")


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command has."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json", metavar="FILE", help="also write the result as JSON ('-': to standard output)"
    )
    group.add_argument("--quiet", action="store_true", help="print the result line alone")
    group.add_argument("--debug", action="store_true", help="show tracebacks (or PTQKIT_DEBUG=1)")


def add_device(group: argparse._ArgumentGroup) -> None:
    """Add where a model runs."""
    group.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if any"
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add where and in what precision a model runs."""
    group = parser.add_argument_group("running the model")
    add_device(group)
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="arithmetic of the model; auto: as stored, but on a CPU that has no instructions for "
        "it, float16 and bfloat16 run as float32 if the memory allows",
    )


def add_batch_size(group: argparse._ActionsContainer) -> None:
    """Add how many windows run at once."""
    group.add_argument(
        "--batch-size",
        type=int,
        default=BATCH_SIZE,
        metavar="N",
        help=f"windows at once ({BATCH_SIZE})",
    )


def add_threads(group: argparse._ActionsContainer) -> None:
    """Add the threads of the solver."""
    group.add_argument(
        "--threads", type=int, default=0, metavar="N", help="of the solver (0: auto)"
    )


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Refuse integers below 1; options that are not given are None."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


def check_text(option: str, name: str) -> None:
    """Refuse a text file that is not there before PyTorch is imported."""
    if not Path(name).is_file() and (name.endswith(".npy") or ":" not in name):
        raise UsageError(f"{option} {name}: there is no such file")


def parse_start_token(value: str) -> str | int | None:
    """Turn ``--start-token`` into what the library takes."""
    if value == "none":
        return None
    if value == "auto" or value.isdecimal():
        return value if value == "auto" else int(value)
    raise UsageError(f"--start-token {value}: give a token id, 'auto' or 'none'")


@contextlib.contextmanager
def prefixed(prefix: str = "") -> Iterator[None]:
    """Turn a wrong value that the library refuses into a UsageError that names the option."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{prefix}{error}") from error
