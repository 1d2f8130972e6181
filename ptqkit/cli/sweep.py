"""``ptqkit sweep``: recipes x models x tasks from one file, with resume."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ptqkit.cli.inputs import pick_device
from ptqkit.cli.options import add_common, add_device, add_threads
from ptqkit.cli.output import check_json, quiet_transformers, say, write_json
from ptqkit.errors import UsageError
from ptqkit.study.cells import FAILED, OK, CellsFailed
from ptqkit.sweep.grid import SweepInterrupted, SweepResult
from ptqkit.sweep.plan_reader import read_plan
from ptqkit.sweep.results import table, to_dict, write_results

__all__ = ["add_parser"]

_DESCRIPTION = """\
Measure a grid of recipes, models and tasks that a TOML file describes, and write one tidy table.

Every model runs as it is (row 'float') and with every recipe; a list among the options of a recipe
is an axis of a product. Tasks are perplexities on texts and zero-shot accuracies on local files of
items (these through lm-eval: pip install 'ptqkit[eval]').
The file is checked as a whole before anything runs.

Each finished cell - one model, one recipe, one task - is kept at once under OUT/cells, so a sweep
that was interrupted or changed runs only what is missing. A cell depends on the recipe, the
calibration, the model's files, the task and the version of ptqkit, not on names: a changed recipe
runs anew alone, a renamed one not at all. A cell that fails is recorded with its reason and the
sweep goes on; the next run tries it again.

OUT gets results.csv (a row per cell), results.json, results.png, and published.csv if the file
has figures of papers: those have a table of their own and are never among the measured ones.
Degradation is 100 (quantized - float) / float, with its standard error over the windows of a text
and the draws of calibration windows: above 0 is worse for a perplexity, below 0 is worse for an
accuracy. An accuracy near chance says nothing, however far it moves in percent.
"""

_EPILOG = """\
a file to begin with (paths are relative to it; 'demo' is the embedded model and its text):

  name = "first"

  [calibration]
  text = "demo"
  samples = 8
  sequence_length = 256

  [[models]]
  name = "demo"
  path = "demo"

  [[tasks]]
  name = "python"
  kind = "perplexity"
  text = "demo"
  max_tokens = 4000

  [[recipes]]
  name = "RTN INT3"
  preset = "rtn"
  bits = 3
  group_size = 64

  [[recipes]]
  name = "GPTQ INT3"
  preset = "quality"
  bits = 3
  group_size = 64

All keys: python -c 'import ptqkit.sweep; help(ptqkit.sweep)'

examples:
  ptqkit sweep first.toml
  ptqkit sweep first.toml --list              what would run, and what is there already
  ptqkit sweep first.toml --only '*/GPTQ*/*'  these alone, with the float cells they need
  ptqkit sweep first.toml --out elsewhere --json -

exit codes: 3 the file has problems (all are listed, nothing ran), 4 some cells failed (the others
are there), 130 interrupted (finished cells are kept; the same command goes on).
"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "sweep",
        help="measure recipes x models x tasks from one file, resuming where it stopped",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="sweep file (.toml)")
    parser.add_argument("--out", metavar="DIR", help="folder of the results (default: the file's)")
    group = parser.add_argument_group("what to run")
    group.add_argument("--list", action="store_true", help="only say which cells would run")
    group.add_argument(
        "--only", metavar="PATTERN", help="glob on MODEL/RECIPE/TASK, such as 'demo/*/python'"
    )
    group.add_argument("--rerun", action="store_true", help="measure again what is there already")
    group.add_argument("--fail-fast", action="store_true", help="stop at the first cell that fails")
    add_device(group)
    add_threads(group)
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check the file, measure what is missing, write and print."""
    check_json(args)
    if not Path(args.file).is_file():
        raise UsageError(f"FILE {args.file}: there is no such file")
    if args.threads < 0:
        raise UsageError(f"--threads must be at least 0, not {args.threads}")
    with quiet_transformers():
        from ptqkit.sweep.run import run_sweep

        plan = read_plan(args.file)
        options = {"only": args.only, "rerun": args.rerun, "device": pick_device(args)}
        if args.list:
            _list(args, run_sweep(plan, args.out, dry=True, **options))
            return
        try:
            result = run_sweep(
                plan,
                args.out,
                fail_fast=args.fail_fast,
                threads=args.threads,
                log=None if args.quiet else _log,
                **options,
            )
        except SweepInterrupted as stop:
            write_results(stop.result)
            raise
        _report(args, result)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _list(args: argparse.Namespace, result: SweepResult) -> None:
    """Say what is there and what would run."""
    for line in result.skipped:
        say(args, f"skipped: {line}")
    for cell in result.cells:
        known = "would run" if cell.key in result.todo else "left out"
        if cell.status == OK:
            known = f"there    {cell.value:.4f}"
        say(args, f"{known:<20} {cell.label}")
    say(args, f"{len(result.cells)} cells, {len(result.todo)} to measure")
    if args.quiet and args.json != "-":
        print(len(result.todo))
    write_json(args, {**to_dict(result), "to_measure": sorted(result.todo)})


def _report(args: argparse.Namespace, result: SweepResult) -> None:
    """Write the files, print the table, and fail if cells failed."""
    written = write_results(result)
    if result.count(OK):
        from ptqkit.sweep.picture import draw

        written.append(draw(result))
    if args.quiet and args.json != "-":
        print(result.out)
    say(args, table(result))
    say(args)
    reused = sum(c.reused for c in result.cells)
    say(
        args,
        f"{result.count(OK)} of {len(result.cells)} cells measured, {reused} of them before; "
        f"{result.seconds:.0f} s",
    )
    for path in written:
        say(args, f"wrote {path}")
    write_json(args, to_dict(result))
    failed = result.count(FAILED)
    if failed:
        raise CellsFailed(
            f"{failed} of {len(result.cells)} cells failed (reasons in {result.out}/results.csv); "
            "the next run tries them again"
        )
