"""Tables of `windows.csv` and `runs.csv` in Markdown.

    python -m benchmarks.accuracy.tables benchmarks/results/accuracy

Excess is perplexity above the float model's, of the mean loss over draws and windows; its standard
deviation is over draws. The paired standard error is of the difference in loss to `quality`, window
by window, each window's mean over the draws.
"""

from __future__ import annotations

import csv
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

Losses = dict[str, dict[int, dict[int, float]]]  # recipe, draw, window: nats per token
BASE = "quality"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def losses(rows: list[dict[str, str]]) -> dict[tuple[str, str], Losses]:
    """Return the loss per token of every model and grid."""
    found: dict[tuple[str, str], Losses] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        into = found[row["model"], row["grid"]][row["recipe"]]
        into.setdefault(int(row["draw"]), {})[int(row["window"])] = float(row["nll"]) / float(
            row["tokens"]
        )
    return found


def whole(draws: dict[int, dict[int, float]], count: int) -> dict[int, dict[int, float]]:
    """Return the draws of which every window is there."""
    return {draw: windows for draw, windows in draws.items() if len(windows) == count}


def paired(first: dict[int, dict[int, float]], other: dict[int, dict[int, float]]) -> list[float]:
    """Return per window the mean difference over the draws that both have."""
    draws = first.keys() & other.keys()
    return [
        statistics.fmean(first[d][w] - other[d][w] for d in draws)
        for w in next(iter(first.values()))
    ]


def table(model: str, grid: str, cells: Losses, base: dict[int, float]) -> list[str]:
    """Return the lines of one model and grid."""
    whole_cells = {recipe: whole(draws, len(base)) for recipe, draws in cells.items()}
    floats = math.exp(statistics.fmean(base.values()))
    excess: dict[str, list[float]] = {
        recipe: [math.exp(statistics.fmean(w.values())) - floats for w in draws.values()]
        for recipe, draws in whole_cells.items()
        if draws
    }
    published = statistics.fmean(excess["reference"]) if "reference" in excess else math.nan
    lines = []
    for recipe, values in excess.items():
        mean = statistics.fmean(values)
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        against = ""
        if recipe != BASE and BASE in excess:
            d = paired(whole_cells[recipe], whole_cells[BASE])
            error = statistics.stdev(d) / math.sqrt(len(d))
            against = f"{1e3 * statistics.fmean(d):+.1f} ± {1e3 * error:.1f}"
        change = f"{100 * (mean / published - 1):+.0f} %"
        lines.append(
            f"| {model} | {grid} | {recipe} | {len(values)} | {mean:.4g} ± {spread:.2g} | {change} "
            f"| {against} |"
        )
    return lines


def main(folder: Path) -> None:
    found = losses(read(folder / "windows.csv"))
    print("| model | grid | recipe | draws | excess perplexity | to reference | mnats to quality |")
    print("|---|---|---|---|---|---|---|")
    for (model, grid), cells in found.items():
        if grid:
            base = found[model, ""]["float"][-1]
            print(*table(model, grid, cells, base), sep="\n")
    print()
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in read(folder / "runs.csv"):
        seconds[row["model"], row["recipe"]].append(float(row["seconds"]))
    print("| model | recipe | median seconds |\n|---|---|---|")
    for (model, recipe), values in seconds.items():
        print(f"| {model} | {recipe} | {statistics.median(values):.1f} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
