"""Seconds of every part of a run at several sizes, for the cost model: one thread, CPU time.

    OMP_NUM_THREADS=1 python -m benchmarks.large.sizes --json benchmarks/results/large/sizes.json

All clocks count the CPU time of this process, which with one thread is the time that a quiet core
takes, whatever else the machine does. Some of the sizes are what the model is fitted to
(`benchmarks.large.cost`), the others, larger ones among them, are what it is checked against.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
time.perf_counter = time.process_time  # before anything that reads a clock is imported

import torch  # noqa: E402

import ptqkit  # noqa: E402
from benchmarks.common import show  # noqa: E402
from benchmarks.large.cost import PARTS  # noqa: E402
from benchmarks.large.models import Size, build, draw_tokens  # noqa: E402
from benchmarks.large.results import write  # noqa: E402

# name: (what it is for, size, samples of 128 tokens, schedule)
RUNS: dict[str, tuple[str, Size, int, str]] = {
    "128": ("fit", Size(128, 352, 2, 2, 2, 256), 8, "one-pass"),
    "192": ("fit", Size(192, 512, 2, 3, 3, 256), 16, "one-pass"),
    "256": ("fit", Size(256, 704, 2, 4, 4, 256), 8, "one-pass"),
    "384": ("fit", Size(384, 1024, 1, 6, 6, 256), 16, "one-pass"),
    "256, 8 experts": ("fit", Size(256, 128, 1, 4, 4, 256, 8, 2), 16, "one-pass"),
    "256, replay": ("fit", Size(256, 704, 2, 4, 4, 256), 16, "replay"),
    "320": ("check", Size(320, 864, 4, 5, 5, 256), 16, "one-pass"),
    "512": ("fit", Size(512, 1408, 2, 8, 8, 256), 16, "one-pass"),
    "768": ("check", Size(768, 2048, 1, 12, 12, 256), 32, "one-pass"),
    "320, 16 experts": ("check", Size(320, 192, 2, 5, 5, 256, 16, 4), 32, "one-pass"),
    "384, replay": ("check", Size(384, 1024, 2, 6, 6, 256), 16, "replay"),
    "320, streamed": ("check", Size(320, 864, 4, 5, 5, 256), 16, "streamed"),
}
LENGTH = 128


def _run(size: Size, samples: int, schedule: str) -> dict[str, Any]:
    """Quantize one model and return the seconds of its report."""
    tokens = draw_tokens(size, samples, LENGTH)
    options: dict[str, Any] = {"bits": 4, "group_size": 32, "symmetric": True, "progress": False}
    model: Any = build(size, LENGTH, "float32")
    with tempfile.TemporaryDirectory() as folder:
        if schedule == "streamed":
            model.save_pretrained(Path(folder) / "model")
            model = Path(folder) / "model"
            options |= {"stream": True, "out_dir": Path(folder) / "out"}
        else:
            options["schedule"] = schedule
        report = ptqkit.quantize(model, "reference", tokens, batch_size=4, **options).report
    layers = [row for row in report.quantized if ".experts." in row.name]
    return {"seconds": report.seconds, "filled_up": sum(bool(row.rule) for row in layers)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--run", action="append", choices=RUNS, help="all by default")
    p.add_argument("--json", type=Path, help="write the results to this file")
    args = p.parse_args()
    torch.set_num_threads(1)
    _run(Size(64, 128, 1, 2, 2, 64), 2, "one-pass")  # first calls of everything
    runs, rows = [], []
    for name in args.run or RUNS:
        purpose, size, samples, schedule = RUNS[name]
        found = _run(size, samples, schedule)
        entry = {"name": name, "for": purpose, "size": asdict(size), "schedule": schedule}
        runs.append({**entry, "samples": samples, "length": LENGTH, **found})
        rows.append([name, purpose, *(found["seconds"][part] for part in PARTS)])
        show("CPU seconds", ["run", "for", *PARTS], rows[-1:])
    write(args.json, "sizes", {"runs": runs})


if __name__ == "__main__":
    main()
