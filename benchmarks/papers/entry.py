"""The command line of a paper: its entries, what each measures, and the file each writes."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.papers.published import read_published
from benchmarks.papers.table import Published, Table

__all__ = ["RESULTS", "Entry", "load", "main", "read_entry", "save"]

RESULTS = Path(__file__).resolve().parents[1] / "results" / "papers"
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One table or figure of a paper.

    Parameters
    ----------
    name, title : str
        As on the command line, and what is in it.
    measure : callable
        Takes the command's options and returns records, plain values.
    tables : callable
        Makes tables of the records.
    published : callable, optional
        Finds the paper's figures in the file of all of them.
    source : str
        The results files of other benchmarks that `measure` reads instead of measuring: these are
        read anew whenever the page is made.
    pictures : tuple of str
        Files below benchmarks/results that belong to it.
    draw : callable, optional
        Draws the records into a file: `draw(records, path)`.
    """

    name: str
    title: str
    measure: Callable[[argparse.Namespace], Records]
    tables: Callable[[Records], Sequence[Table]]
    published: Callable[[dict[str, Any]], Published | None] = lambda figures: None
    source: str = ""
    pictures: tuple[str, ...] = ()
    draw: Callable[[Records, Path], None] | None = None


def machine() -> dict[str, Any]:
    """Return what a result depends on besides the code."""
    from benchmarks.common import header

    known = header()
    return {k: known[k] for k in ("cpu", "cores", "cpu_level", "threads", "torch") if k in known}


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a results file, a record a line."""
    head = {k: v for k, v in content.items() if k != "records"}
    lines = [json.dumps(row, ensure_ascii=False) for row in content["records"]]
    text = json.dumps(head, indent=1, ensure_ascii=False)[:-2] + ',\n "records": [\n  '
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + ",\n  ".join(lines) + "\n ]\n}\n", encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    """Read what :func:`save` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_entry(entry: Entry, path: Path) -> tuple[dict[str, Any], Records, Published | None]:
    """Return a results file, its records (of others' files: read anew) and the paper's figures."""
    content = load(path)
    records = content["records"] or entry.measure(parse([], [entry]))
    published = content.get("published")
    return content, records, None if published is None else Published(**published)


def parse(argv: list[str], entries: Sequence[Entry], description: str = "") -> argparse.Namespace:
    """Read the command line of a paper."""
    names = [entry.name for entry in entries]
    p = argparse.ArgumentParser(description=description)
    add = p.add_argument
    add("entry", nargs="*", choices=[*names, []], metavar="NAME", help=", ".join(names))
    add("--list", action="store_true", help="what there is")
    add("--model", type=Path, action="append", default=[], metavar="DIR", help="instead of ours")
    add("--calibration", type=Path, metavar="FILE", help="text for --model")
    add("--test", type=Path, metavar="FILE", help="text to measure --model on")
    add("--models", type=Path, metavar="DIR", help="what benchmarks.papers.size_series wrote")
    add("--data", type=Path, metavar="DIR", help="folder of the texts and small models")
    add("--published", type=Path, metavar="DIR", help="TOML files (DATA/published)")
    add("--out", type=Path, nargs="?", const=RESULTS, metavar="DIR", help="write there")
    add("--draws", type=int, default=3, help="calibration draws (3)")
    add("--samples", type=int, default=32, help="calibration windows (32)")
    add("--windows", type=int, default=24, help="test windows (24)")
    add("--jobs", type=int, default=1, help="processes (1)")
    add("--quick", action="store_true", help="as small as it gets, to see that it runs")
    args = p.parse_args(argv)
    if args.published is None and args.data is not None:
        args.published = args.data / "published"
    if args.quick:
        vars(args).update(draws=min(args.draws, 2), samples=4, windows=3)
    return args


def command_of(module: str, name: str, argv: list[str], entries: Sequence[Entry]) -> str:
    """Return the command line of one entry, paths as they were given."""
    names = {entry.name for entry in entries}
    options = [word for word in argv if word not in names]
    return shlex.join(["python", "-m", module, name, *options])


def run(paper: str, entry: Entry, args: argparse.Namespace, command: str) -> str:
    """Measure one entry, write it where --out says, and return its tables as text."""
    figures = read_published(args.published, paper)
    published = entry.published(figures) if figures else None
    if not figures:
        print(f"no {paper}.toml: the paper's columns are left out", file=sys.stderr)
    records = entry.measure(args)
    read = bool(entry.source) and not args.model
    if args.out is not None:
        content = {
            "paper": paper,
            "name": entry.name,
            "command": command,
            "machine": None if read else machine(),
            "published": None if published is None else asdict(published),
            "records": [] if read else records,
        }
        save(args.out / f"{paper}_{entry.name}.json", content)
        if entry.draw is not None:
            entry.draw(records, args.out / f"{paper}_{entry.name}.png")
    first, *others = entry.tables(records)
    return "\n\n".join([first.text(published), *(table.text() for table in others)])


def main(paper: str, entries: Sequence[Entry], description: str, argv: list[str] | None) -> int:
    """Run the command line of a paper."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv, entries, description)
    if args.list or not args.entry:
        for entry in entries:
            where = f" (from {entry.source})" if entry.source else ""
            print(f"{entry.name:12} {entry.title}{where}")
        return 0
    for entry in (e for e in entries if e.name in args.entry):
        command = command_of(f"benchmarks.papers.{paper}", entry.name, argv, entries)
        print(run(paper, entry, args, command), end="\n\n")
    return 0
