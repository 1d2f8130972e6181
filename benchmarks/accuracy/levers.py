"""Levers that were tried on top of a recipe, as prototypes: what each does to the test windows.

    python -m benchmarks.accuracy.levers --data ../shared/data --out levers.csv --processes 16

Every lever patches the package for the duration of one run, so that what did not pay stays out of
it. Rows are appended to the file as they come; cells that are in it already are left alone.
`--summary` prints the table of differences to "none", paired by test window.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import math
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.accuracy.models import Case, load_case
from benchmarks.accuracy.prototypes import attention, codes, fits, rotation
from benchmarks.accuracy.run import grid_options
from benchmarks.accuracy.windows import window_losses
from ptqkit.arrays.solvers import gptq
from ptqkit.hf import quantize
from ptqkit.hf.quantization import solve
from ptqkit.hf.quantization.moments import MomentAccumulator
from ptqkit.nn import matrix_solver

COLUMNS = ("model", "grid", "recipe", "lever", "draw", "seconds", "objective", "float", "nll")
GRIDS: dict[str, dict[str, Any]] = {
    "3 g64": {"bits": 3, "group_size": 64},
    "2 g64": {"bits": 2, "group_size": 64},
    "4 channel": {"bits": 4, "group_size": None},
    "3 channel": {"bits": 3, "group_size": None},
    "4 channel symmetric": {"bits": 4, "group_size": None, "symmetric": True},
    "3 g64 symmetric": {"bits": 3, "group_size": 64, "symmetric": True},
    "2 g64 symmetric": {"bits": 2, "group_size": 64, "symmetric": True},
    "2.5 average g64": {"bits": 2.5, "group_size": 64},
    "3.0 average g64": {"bits": 3.0, "group_size": 64},
}
#: Objective of the layers, and the loss per token of each test window.
Run = tuple[float, list[float]]
#: Rough costs, for the order of the tasks.
COSTS = {"embedded": 10.0, "stories260k": 2.0, "babyllama105": 1.0}


@contextlib.contextmanager
def _solving_after(change: Callable[..., Any]) -> Iterator[None]:
    """Pass every solved matrix through ``change(weight, matrix, H)``."""
    own = solve.quantize_matrix

    def both(weight: np.ndarray, source: Any, *rest: Any, **options: Any) -> Any:
        matrix = own(weight, source, *rest, **options)
        return change(weight, matrix, np.asarray(source.matrix, np.float64))

    with mock.patch.object(solve, "quantize_matrix", both):
        yield


@contextlib.contextmanager
def _weighted(case: Case, batches: Any, power: float, floor: float) -> Iterator[None]:
    """Weight tokens by the attention that they receive in the float model's block."""
    received = attention.received(case.model, batches, power, floor)
    own = MomentAccumulator.add

    def add(self: Any, value: Any, batch: Any, mask: Any, floats: Any = None, streams: Any = None):
        root = received[self.name.split(".layers.")[1].split(".")[0], batch["input_ids"].data_ptr()]
        root = root.sqrt()[..., None].to(value)
        if streams is not None:
            streams = tuple(s * root for s in streams)
        own(self, value * root, batch, mask, None if floats is None else floats * root, streams)

    with mock.patch.object(MomentAccumulator, "add", add):
        yield


@contextlib.contextmanager
def _grid_search(**options: Any) -> Iterator[None]:
    with mock.patch.object(matrix_solver, "gptq", functools.partial(gptq, **options)):
        yield


#: Options of the recipe, or a context that is entered before quantization.
LEVERS: dict[str, Callable[[Case, Any], Any]] = {
    "none": lambda case, batches: contextlib.nullcontext(),
    "received attention": lambda case, batches: _weighted(case, batches, 1.0, 0.1),
    "root of received attention": lambda case, batches: _weighted(case, batches, 0.5, 0.1),
    "rotation": lambda case, batches: rotation.rotated(case.model),
    "256 grid steps": lambda case, batches: _grid_search(
        grid_steps=256, grid_min_shrink=0.2, grid_candidates=40
    ),
    "grids again under H": lambda case, batches: _solving_after(
        functools.partial(codes.fit_again, zeros=0)
    ),
    "grids and zeros again": lambda case, batches: _solving_after(
        functools.partial(codes.fit_again, zeros=1)
    ),
    "scales refitted": lambda case, batches: {"refit_rounds": 2},
    "grid feedback": lambda case, batches: {"grid": "feedback"},
    "rows coupled": lambda case, batches: {"row_coupling": 3},
    "beam of 4": lambda case, batches: {"beam_width": 4},
    "beam of 16": lambda case, batches: {"beam_width": 16},
    "attention under v": lambda case, batches: attention.attended_values(case.model),
    "rows of q and k": lambda case, batches: attention.coupled_rows(case.model),
    # The float64 solver for all of these, so "fit: search" is what they are compared to.
    **{
        f"fit: {name}": lambda case, batches, name=name: fits.solving_with(name)
        for name in fits.FITS
    },
}


@functools.cache
def _float_loss(model: str, data: str, windows: int) -> float:
    torch.set_num_threads(1)
    case = load_case(model, Path(data), windows)
    return statistics.fmean(window_losses(case.model, case.windows)) / case.scored


def measure(task: tuple[Any, ...]) -> tuple[Any, ...]:
    """Quantize with one lever, and return the row of the table."""
    data, windows, samples, model, grid, recipe, lever, draw = task
    floating = _float_loss(model, data, windows)
    # A lever may change the model's structure: each run has a model of its own.
    case = load_case(model, Path(data), windows)
    batches = case.batches(samples, draw)
    # Compared on `best` as it was before its rows were coupled, which is a lever here.
    options = grid_options(case.model, GRIDS[grid]) | {"row_coupling": 0}
    start = time.perf_counter()
    made = LEVERS[lever](case, batches)
    if isinstance(made, dict):
        options |= made
        made = contextlib.nullcontext()
    with made:
        result = quantize(
            case.model,
            recipe,
            batches,
            tokenizer=case.tokenizer,
            progress=False,
            diagnostics=False,
            stored_dtype=case.stored_dtype,
            threads=1,
            **options,
        )
    seconds = time.perf_counter() - start
    losses = window_losses(case.model, case.windows)
    nll = " ".join(f"{v / case.scored:.6f}" for v in losses)
    objective = result.report.totals()["objective"]
    return (
        model, grid, recipe, lever, draw, f"{seconds:.1f}", f"{objective:.6g}", f"{floating:.6f}",
        nll,
    )  # fmt: skip


def _against(draws: dict[int, Run], none: dict[int, Run]) -> tuple[str, str, str]:
    """Return the difference in mnats with both standard errors, and the part of the objective."""
    both = sorted(draws.keys() & none.keys())
    each = np.array([np.subtract(draws[d][1], none[d][1]) for d in both]) * 1e3
    error = each.mean(0).std(ddof=1) / math.sqrt(each.shape[1])
    over = f"{each.mean(1).std(ddof=1) / math.sqrt(len(both)):.1f}" if len(both) > 1 else ""
    part = statistics.fmean(draws[d][0] / none[d][0] for d in both)
    return f"{each.mean():+.1f} ± {error:.1f}", over, f"{part:.3f}"


def summary(path: Path) -> list[str]:
    """Return the table in Markdown: excess perplexity, and the difference to "none" in mnats.

    Its standard errors are those over test windows and those over draws; then the layers'
    objective, of that of "none".
    """
    cells: dict[tuple[str, ...], dict[str, dict[int, Run]]] = defaultdict(lambda: defaultdict(dict))
    floats = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = (row["model"], row["grid"], row["recipe"])
            run = float(row["objective"]), [float(v) for v in row["nll"].split()]
            cells[key][row["lever"]][int(row["draw"])] = run
            floats[row["model"]] = float(row["float"])
    lines = [
        "| model | grid | recipe | lever | draws | excess perplexity | mnats to none | over draws "
        "| objective |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, grid, recipe), levers in cells.items():
        for lever, draws in levers.items():
            mean = statistics.fmean(statistics.fmean(losses) for _, losses in draws.values())
            excess = math.exp(mean) - math.exp(floats[model])
            against = ("", "", "")
            if lever != "none" and draws.keys() & levers.get("none", {}).keys():
                against = _against(draws, levers["none"])
            line = (model, grid, recipe, lever, len(draws), f"{excess:.4g}", *against)
            lines.append(f"| {' | '.join(map(str, line))} |")
    return lines


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, help="folder of the models and texts")
    p.add_argument("--out", type=Path, required=True, help="CSV file")
    p.add_argument("--model", action="append", choices=COSTS)
    p.add_argument("--grid", action="append", choices=GRIDS)
    p.add_argument("--recipe", action="append")
    p.add_argument("--lever", action="append", choices=LEVERS)
    p.add_argument("--draws", type=int, default=3, help="calibration seeds")
    p.add_argument("--samples", type=int, default=64, help="calibration windows")
    p.add_argument("--windows", type=int, default=48, help="test windows")
    p.add_argument("--processes", type=int, default=1)
    p.add_argument("--summary", action="store_true", help="print the table and do nothing else")
    args = p.parse_args()
    if args.summary:
        print(*summary(args.out), sep="\n")
        return
    seen = set()
    if args.out.exists():
        with args.out.open(newline="", encoding="utf-8") as file:
            seen = {tuple(row[c] for c in COLUMNS[:5]) for row in csv.DictReader(file)}
    tasks = [
        (str(args.data), args.windows, args.samples, model, grid, recipe, lever, draw)
        for draw in range(args.draws)
        for grid in args.grid or list(GRIDS)[:2]
        for recipe in args.recipe or ["best"]
        for lever in args.lever or LEVERS
        for model in args.model or COSTS
        if (model, grid, recipe, lever, str(draw)) not in seen
    ]
    # The draws in order, so that a run that is cut off leaves whole draws; dear ones first.
    tasks.sort(key=lambda task: (task[-1], -COSTS[task[3]]))
    with args.out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not seen:
            writer.writerow(COLUMNS)
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            for row in pool.imap_unordered(measure, tasks, chunksize=1):
                writer.writerow(row)
                file.flush()
                print(*row[:-1], f"{statistics.fmean(map(float, row[-1].split())):.5f}", flush=True)


if __name__ == "__main__":
    main()
