"""Completion of commands, options and file names in shells."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

__all__ = ["SHELLS", "PrintCompletion"]

SHELLS = ("bash", "zsh", "tcsh")
# What an argument is if it is called so in the help.
_FILES, _FOLDERS = ("FILE", "MODEL"), ("DIR",)


class PrintCompletion(argparse.Action):
    """Print a script that completes the whole command line in a shell, and exit."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        """Print the script for the shell ``values``."""
        try:
            import shtab
        except ModuleNotFoundError:
            parser.error("this needs shtab; install it with: pip install 'ptqkit[completion]'")
        for action in _actions(parser):
            if action.metavar in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.metavar in _FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell=values))
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the actions of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
