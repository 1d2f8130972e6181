"""Seconds of recipes in turn on one machine, and how many times the first one's each takes.

    python -m benchmarks.accuracy.times --data ../shared/data --out times.csv --threads 4

Rows are appended, one per model, recipe and round; what is compared runs in turn, after one round
that is not counted. For figures that mean something nothing else may run on these cores.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks.accuracy.models import MODELS, TRAINED, load_case
from benchmarks.accuracy.run import GRIDS, RECIPES, Table, measure, recipe_options
from ptqkit.hf import FloatWeights
from ptqkit.hf.quantization.float_logits import split_windows

COLUMNS = ("model", "grid", "recipe", "round", "windows", "threads", "seconds", "seconds_solve")


def summary(path: Path) -> list[str]:
    """Return the table: median seconds, and the median of the ratios within a round."""
    found: dict[tuple[str, str, str, str], dict[str, dict[str, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = (row["model"], row["grid"], row["windows"], row["threads"])
            found[key][row["recipe"]][row["round"]] = float(row["seconds"])
    lines = ["| model | grid | windows | threads | recipe | rounds | seconds | times the first |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for key, recipes in found.items():
        first = next(iter(recipes.values()))
        for recipe, rounds in recipes.items():
            both = rounds.keys() & first.keys()
            ratio = statistics.median(rounds[r] / first[r] for r in both) if both else float("nan")
            median = statistics.median(rounds.values())
            cells = (*key, recipe, len(rounds), f"{median:.2f}", f"{ratio:.2f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True, help="folder of the models and texts")
    p.add_argument("--models", type=Path, help="folder of the model that was trained here")
    p.add_argument("--out", type=Path, required=True, help="CSV file")
    p.add_argument("--model", action="append", choices=MODELS)
    p.add_argument("--recipe", action="append", choices=RECIPES, help="the first is the measure")
    p.add_argument("--grid", choices=GRIDS, default="3 g64")
    p.add_argument("--samples", type=int, default=128, help="calibration windows, if there are")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    table = Table(args.out, COLUMNS)
    cases = {}
    for name in args.model or [m for m in MODELS if m != TRAINED or args.models]:
        case = load_case(name, args.data, 1, models=args.models)
        cases[name] = case, FloatWeights(case.model), case.batches(args.samples, 0)
    for turn in range(-1, args.rounds):
        for name, (case, floats, batches) in cases.items():
            for recipe in args.recipe or ["quality", "best"]:
                preset = RECIPES[recipe][0]
                options = recipe_options(case.model, recipe, GRIDS[args.grid])
                (seconds, solve, *_), *_ = measure(case, floats, batches, preset, options)
                row = (name, args.grid, recipe, turn, len(split_windows(batches)), args.threads)
                if turn >= 0:
                    table.add([(*row, seconds, solve)])
    print(*summary(args.out), sep="\n")


if __name__ == "__main__":
    main()
