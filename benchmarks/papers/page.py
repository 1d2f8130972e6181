"""Write docs/results.md from the results files.

python -m benchmarks.papers.page            # write it
python -m benchmarks.papers.page --check    # say whether it is what the files make
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.papers import aweq, gptq, ipqs, sbc
from benchmarks.papers.entry import RESULTS, Entry, read_entry

__all__ = ["PAGE", "PAPERS", "page"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results.md"
PAPERS: dict[str, tuple[str, Sequence[Entry]]] = {
    "gptq": ("GPTQ (Frantar et al. 2022, arXiv:2210.17323)", gptq.ENTRIES),
    "aweq": ("AWEQ (Li et al. 2023, arXiv:2311.01305)", aweq.ENTRIES),
    "sbc": ("Softmax bias correction (Pandey et al. 2023, arXiv:2309.01729)", sbc.ENTRIES),
    "ipqs": (
        "Intriguing properties of quantization at scale (Ahmadian et al. 2023, arXiv:2305.19268)",
        ipqs.ENTRIES,
    ),
}
HEAD = """# Results: four papers, table by table

This page is written by `python -m benchmarks.papers.page` from the files in
`benchmarks/results/papers`, never by hand. Each part is one command; `python -m
benchmarks.papers.gptq --list` (`aweq`, `sbc`, `ipqs`) says which there are. Columns that name a
model beside a colon are what the paper prints, of that much larger model: they show an effect's
direction, not a value to reach. Perplexities compare within one model and text only. What was
measured for this page ran on two cores of an AMD EPYC of the first generation (Zen 1), shared with
other work; what it reads from other files says where that was measured in
[benchmarks/README.md](../benchmarks/README.md)."""


def section(entry: Entry, path: Path) -> str:
    """Return one table or figure in Markdown."""
    content, records, published = read_entry(entry, path)
    first, *others = entry.tables(records)
    parts = [f"### {entry.name}: {entry.title}", f"```sh\n{content['command']}\n```"]
    if "remark" in content:  # of a file that is not just what the command wrote
        parts.append(content["remark"])
    if content["machine"] is not None:
        parts.append(f"Measured on {described(content['machine'])}.")
    only_a_file = list(first.columns) == ["file"]
    parts.append(first.note if only_a_file else first.markdown(published))
    parts += [table.markdown() for table in others]
    pictures = [f"../benchmarks/results/{file}" for file in entry.pictures]
    beside = sorted(path.parent.glob(f"{path.stem}.png")) + sorted(
        path.parent.glob(f"{path.stem}_*.png")
    )
    pictures += [f"../benchmarks/results/papers/{file.name}" for file in beside]
    parts += [f"![{entry.title}]({file})" for file in pictures]
    return "\n\n".join(parts)


def described(machine: dict[str, Any]) -> str:
    """Return a machine in words."""
    cpu = " ".join(machine["cpu"].split())
    text = f"{machine['cores']} cores of {cpu} ({machine['cpu_level']})"
    return f"{text}, PyTorch {machine['torch']}" if "torch" in machine else text


def page(folder: Path = RESULTS) -> str:
    """Return the page of all results files of a folder."""
    parts = [HEAD]
    for paper, (title, entries) in PAPERS.items():
        paths = {entry: folder / f"{paper}_{entry.name}.json" for entry in entries}
        measured = [entry for entry in entries if paths[entry].exists()]
        if not measured:
            continue
        parts.append(f"## {title}")
        parts += [section(entry, paths[entry]) for entry in measured]
        missing = [f"`{entry.name}` ({entry.title})" for entry in entries if entry not in measured]
        if missing:
            parts.append(f"Not measured yet: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--check", action="store_true", help="do not write; fail if the page differs")
    args = p.parse_args(argv)
    text = page()
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(
        "docs/results.md is not what the results files make: run python -m benchmarks.papers.page"
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
