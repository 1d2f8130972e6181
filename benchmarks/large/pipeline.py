"""Time of the whole pipeline on a model of some size, where it goes, peaks, and more processes.

    python -m benchmarks.large.pipeline --device cuda --recipe reference --recipe quality \\
        --json benchmarks/results/large/pipeline_7b.json

LLaMA-7B's shape, random weights, 128 x 2,048 tokens, W4 in groups of 128 by default. With
`--processes 1 --processes 2` each run is repeated under torchrun with so many (NCCL on GPUs, gloo
on the host), and the speed-up over the first is told. Every run has fresh processes, which share
the threads of the machine; checksums tell in how many layers codes differ from the first run's. On
a GPU work is queued and waited for later, so the split of the time is that of the waits;
`--blocking` makes every operation wait (a slower run, with its own split).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import show
from benchmarks.large.measure import start
from benchmarks.large.models import add_size, size_of
from benchmarks.large.results import write

PARTS = ("setup", "forward", "hessian", "solve", "diagnostics", "propagation")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_size(p)
    p.add_argument("--recipe", action="append", help="reference by default; several in turn")
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--group-size", type=int, default=128)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--processes", type=int, action="append", help="under torchrun; 0: without")
    p.add_argument("--threads", type=int, default=0, help="of all processes; all cores by default")
    p.add_argument("--threads-each", type=int, default=0, help="of every process, instead")
    p.add_argument("--change", action="append", default=[], help="of the recipe, as refit_rounds=0")
    p.add_argument("--memory-budget", help="as ptqkit.quantize takes it")
    p.add_argument("--profile", type=Path, help="file for what took the time, one a process")
    p.add_argument("--stream", action="store_true", help="read the model block by block")
    p.add_argument("--schedule", choices=("auto", "one-pass", "replay"), default="auto")
    p.add_argument("--no-diagnostics", action="store_true")
    p.add_argument("--blocking", action="store_true", help="every operation on a GPU waits")
    p.add_argument("--repeats", type=int, default=1)
    p.add_argument("--json", type=Path, help="write the results to this file")
    args = p.parse_args()
    size, runs = size_of(args), []
    changes = {
        name: json.loads(value) for name, _, value in (c.partition("=") for c in args.change)
    }
    for _ in range(args.repeats):
        for recipe in args.recipe or ["reference"]:
            for processes in args.processes or [0]:
                job = {
                    "size": asdict(size),
                    "samples": args.samples,
                    "length": args.length,
                    "batch_size": args.batch_size,
                    "dtype": args.dtype,
                    "device": args.device,
                    "recipe": recipe,
                    "options": {
                        "bits": args.bits,
                        "group_size": args.group_size,
                        "symmetric": True,
                        "schedule": args.schedule,
                        "diagnostics": not args.no_diagnostics,
                        "memory_budget": args.memory_budget,
                        **changes,
                    },
                    "stream": args.stream,
                    "forward": processes in (0, 1),
                    "blocking": args.blocking,
                    "profile": str(args.profile or ""),
                }
                found = start(job, processes, args.threads, args.threads_each)
                runs.append({"recipe": recipe, "processes": processes, "job": job, "ranks": found})
                _tell(runs[-1], runs)
                write(args.json, "pipeline", {"runs": runs})


def _tell(run: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """Print one run: the time of the slowest process, its split, peaks, the speed-up."""
    slowest = max(run["ranks"], key=lambda r: r["seconds"]["total"])
    seconds, memory = slowest["seconds"], slowest["memory"]
    first = next(r for r in runs if r["recipe"] == run["recipe"])
    base = max(r["seconds"]["total"] for r in first["ranks"])
    row = [run["recipe"], run["processes"], seconds["total"], base / seconds["total"]]
    row += [seconds.get(part, 0.0) for part in PARTS]
    forward = run["ranks"][0].get("float_forward", float("nan"))
    row += [forward, memory["growth"] / 2**20, memory.get("gpu_allocated", 0) / 2**20]
    columns = ["recipe", "processes", "seconds", "speed-up", *PARTS, "one forward"]
    own, others = run["ranks"][0].get("codes", {}), first["ranks"][0].get("codes", {})
    row.append(f"{sum(own[n] != others.get(n) for n in own)} of {len(own)}")
    show(
        f"{slowest['schedule']}",
        [*columns, "host MiB", "GPU MiB", "layers with other codes"],
        [row],
    )


if __name__ == "__main__":
    main()
