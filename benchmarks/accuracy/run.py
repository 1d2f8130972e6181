"""Perplexity of recipes on small models, window by window, over several calibration draws.

    python -m benchmarks.accuracy.run --data ../shared/data --out benchmarks/results/accuracy

Writes `windows.csv`, a row per model, grid, recipe, draw and test window with the summed negative
log-likelihood (draw -1: the float model), and `runs.csv` with times and objectives. Cells that are
in both files already are left alone. `benchmarks.accuracy.tables` makes the tables.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.accuracy.models import MODELS, Case, load_case
from ptqkit.hf import FloatWeights, prepare_calibration, quantize

GRIDS: dict[str, dict[str, Any]] = {
    "4 channel": {"bits": 4, "group_size": None},
    "3 g64": {"bits": 3, "group_size": 64},
    "2 g64": {"bits": 2, "group_size": 64},
}
#: Groups of the layers whose inputs 64 does not divide: the divisor nearest to it.
NEAREST = {"stories260k": {"*.down_proj": 43}, "babyllama105": {"*.down_proj": 44}}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "reference": ("reference", {}),
    "quality": ("quality", {}),
    "quality, QEP 0.5": ("quality", {"error_propagation": 0.5}),
    "quality, refit": ("quality", {"refit_rounds": 2}),
    "best": ("best", {}),
    "best, alpha 0.75": ("best", {"error_propagation": 0.75, "residual_propagation": 0.75}),
    "qronos": ("reference", {"error_propagation": 1.0, "target": "qronos", "order": "act",
                             "static_groups": True}),
    "gptaq": ("reference", {"error_propagation": 0.25, "target": "gptaq", "order": "act",
                            "static_groups": True}),
}  # fmt: skip
WINDOWS = ("model", "grid", "recipe", "draw", "window", "nll", "tokens")
RUNS = ("model", "grid", "recipe", "draw", "seconds", "seconds_solve", "objective", "bits")


@torch.no_grad()
def window_losses(model: Any, windows: torch.Tensor, batch: int = 8) -> list[float]:
    """Return the summed negative log-likelihood of each window."""
    losses = []
    for rows in windows.split(batch):
        logits = model(rows, use_cache=False).logits[:, :-1].float()
        each = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        losses += each.reshape(len(rows), -1).double().sum(1).tolist()
    return losses


class Table:
    """A CSV file that grows row by row."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path, self.columns = path, columns
        self.seen: set[tuple[str, ...]] = set()
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.seen = {tuple(row[c] for c in columns[:4]) for row in csv.DictReader(file)}
        else:
            self.add([columns])

    def add(self, rows: Any) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def measure(
    case: Case, floats: FloatWeights, batches: Any, recipe: str, options: dict[str, Any]
) -> tuple[list[Any], list[float]]:
    """Quantize the model, and return what the run took and each window's loss."""
    floats.restore()
    start = time.perf_counter()
    result = quantize(
        case.model,
        recipe,
        batches,
        tokenizer=case.tokenizer,
        progress=False,
        diagnostics=False,
        requantize=True,
        stored_dtype=case.stored_dtype,
        **options,
    )
    seconds = time.perf_counter() - start
    totals = result.report.totals()
    facts = [
        f"{seconds:.3f}",
        f"{result.report.seconds['solve']:.3f}",
        f"{totals['objective']:.6g}",
        f"{totals['bits_per_weight']:.4f}",
    ]
    return facts, window_losses(case.model, case.windows)


def study(name: str, args: argparse.Namespace, windows: Table, runs: Table) -> None:
    """Measure all cells of a model that are not there yet."""
    case = load_case(name, args.data, args.windows)
    if (name, "", "float", "-1") not in windows.seen:
        losses = window_losses(case.model, case.windows)
        windows.add(
            (name, "", "float", -1, i, f"{v:.4f}", case.scored) for i, v in enumerate(losses)
        )
    floats = FloatWeights(case.model)
    for draw in range(args.draws):
        batches = None
        for grid in args.grid or GRIDS:
            for recipe in args.recipe or RECIPES:
                key = (name, grid, recipe, str(draw))
                if key in windows.seen and key in runs.seen:
                    continue
                if batches is None:
                    batches = prepare_calibration(
                        case.calibration,
                        case.tokenizer,
                        samples=args.samples,
                        sequence_length=case.sequence_length,
                        seed=draw,
                    ).batches
                preset, changes = RECIPES[recipe]
                options = {**GRIDS[grid], **changes}
                if options["group_size"] is not None:
                    sizes = NEAREST.get(name, {}).items()
                    options["overrides"] = {k: {"group_size": size} for k, size in sizes}
                facts, losses = measure(case, floats, batches, preset, options)
                runs.add([(*key, *facts)])
                rows = ((*key, i, f"{v:.4f}", case.scored) for i, v in enumerate(losses))
                windows.add(rows)
                value = torch.tensor(losses).sum() / (len(losses) * case.scored)
                print(*key, *facts, f"{value.exp():.4f}", sep=" | ", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True, help="folder of the models and texts")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--model", action="append", choices=MODELS)
    p.add_argument("--recipe", action="append", choices=RECIPES)
    p.add_argument("--grid", action="append", choices=GRIDS)
    p.add_argument("--draws", type=int, default=3, help="calibration seeds")
    p.add_argument("--samples", type=int, default=64, help="calibration windows")
    p.add_argument("--windows", type=int, default=48, help="test windows")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    windows, runs = (
        Table(args.out / f"{n}.csv", c) for n, c in (("windows", WINDOWS), ("runs", RUNS))
    )
    for name in args.model or MODELS:
        study(name, args, windows, runs)


if __name__ == "__main__":
    main()
