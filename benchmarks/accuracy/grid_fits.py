"""Errors of grids before any solver: d H_gg d^T over all groups of a model, and what fits cost.

    python -m benchmarks.accuracy.grid_fits --data ../shared/data --out grid_fits.csv

Fits are those of `prototypes.fits`, on the float model's weights and inputs. Their seconds compare
the core ("search", "256 steps") with NumPy. `--summary` prints errors as parts of the search's.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.accuracy.levers import COSTS, GRIDS
from benchmarks.accuracy.models import load_case
from benchmarks.accuracy.prototypes.fits import FITS, fit_errors
from benchmarks.accuracy.run import Table, grid_options
from ptqkit.arrays.matrix import WeightGrid
from ptqkit.recipe.recipe import Recipe

COLUMNS = ("model", "grid", "fit", "draw", "seconds", "error")
GRIDS_HERE = [name for name, grid in GRIDS.items() if isinstance(grid["bits"], int)]


@torch.no_grad()
def hessians(model: nn.Module, batches: list[Any]) -> dict[str, np.ndarray]:
    """Return (2/N) sum x x^T in float64 of each linear layer but the head."""
    sums: dict[str, torch.Tensor] = {}
    tokens = 0

    def hook(name: str) -> Any:
        def add(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)
            sums[name] = sums.get(name, 0) + (x.T @ x).double()

        return add

    hooks = [
        layer.register_forward_pre_hook(hook(name))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not name.endswith("lm_head")
    ]
    for batch in batches:
        model(input_ids=batch["input_ids"], use_cache=False)
        tokens += batch["input_ids"].numel()
    for each in hooks:
        each.remove()
    return {name: (2 / tokens * value).numpy() for name, value in sums.items()}


def measure(
    model: nn.Module, found: dict[str, np.ndarray], grid: str, fit: str, scale_dtype: str
) -> tuple[float, float]:
    """Return the seconds of all fits and the sum of their errors."""
    recipe, seconds, error = Recipe(**grid_options(model, GRIDS[grid])), 0.0, 0.0
    for name, H in found.items():
        w = model.get_submodule(name).weight.detach().double().numpy()
        options = recipe.for_layer(name)
        size = options.group_size or w.shape[1]
        one = WeightGrid(options.bits, options.group_size, options.symmetric, False, scale_dtype)
        for start in range(0, w.shape[1], size):
            part = slice(start, start + size)
            begin = time.perf_counter()
            fitted = FITS[fit](w[:, part], H[part, part], one)
            seconds += time.perf_counter() - begin
            error += fit_errors(w[:, part], H[part, part], one, *fitted).sum()
    return seconds, error


def summary(path: Path) -> list[str]:
    """Return the table: errors as parts of the search's, geometric means over the models."""
    cells: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            value = float(row["error"]), float(row["seconds"])
            cells[row["grid"]][row["fit"]][row["model"]].append(value)
    lines = [
        "| grid | fit | d H_gg d^T of the search's | by model | seconds |",
        "|---|---|---|---|---|",
    ]
    for grid, fits in cells.items():
        for fit, models in fits.items():
            parts = {
                model: statistics.fmean(
                    error / base
                    for (error, _), (base, _) in zip(each, fits["search"][model], strict=True)
                )
                for model, each in models.items()
            }
            mean = math.exp(statistics.fmean(map(math.log, parts.values())))
            seconds = sum(statistics.fmean(s for _, s in each) for each in models.values())
            by_model = ", ".join(f"{model} {part:.3f}" for model, part in parts.items())
            lines.append(f"| {grid} | {fit} | {mean:.3f} | {by_model} | {seconds:.1f} |")
    return lines


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, help="folder of the models and texts")
    p.add_argument("--out", type=Path, required=True, help="CSV file")
    p.add_argument("--model", action="append", choices=COSTS)
    p.add_argument("--grid", action="append", choices=GRIDS_HERE)
    p.add_argument("--draws", type=int, default=3, help="calibration seeds")
    p.add_argument("--samples", type=int, default=32, help="calibration windows")
    p.add_argument("--summary", action="store_true", help="print the table and do nothing else")
    args = p.parse_args()
    if args.summary:
        print(*summary(args.out), sep="\n")
        return
    torch.set_num_threads(1)
    table = Table(args.out, COLUMNS)
    for name in args.model or COSTS:
        case = load_case(name, args.data, 1)
        for draw in range(args.draws):
            found = hessians(case.model, case.batches(args.samples, draw))
            for grid in args.grid or GRIDS_HERE:
                for fit in FITS:
                    if (name, grid, fit, str(draw)) in table.seen or (
                        fit.startswith("zeros") and GRIDS[grid].get("symmetric")
                    ):
                        continue
                    seconds, error = measure(case.model, found, grid, fit, case.stored_dtype)
                    table.add([(name, grid, fit, draw, f"{seconds:.3f}", f"{error:.6g}")])
                    print(name, grid, fit, draw, f"{seconds:.2f}", f"{error:.6g}", flush=True)


if __name__ == "__main__":
    main()
