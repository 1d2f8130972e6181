"""Peak memory of runs in memory and streamed, against their estimates, at several sizes.

    python -m benchmarks.large.memory --json benchmarks/results/large/memory.json

Every case has a process of its own, on one thread. The growth is the largest resident memory that
belongs to no file, looked at every 5 ms, less what was there before; what a run in memory holds of
the model itself is in neither figure, what a streamed one holds of it is in both.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.common import show
from benchmarks.large.measure import fork
from benchmarks.large.models import Size
from benchmarks.large.results import write

_BASE = Size(256, 704, 4, 4, 4, 1024)
SIZES = {
    "4 blocks of 256": _BASE,
    "12 blocks of 256": replace(_BASE, layers=12),
    "4 blocks of 512": Size(512, 1408, 4, 8, 8, 1024),
}
_ERRORS = {"error_propagation": 0.5, "residual_propagation": 0.5}
# name: (streamed, options of quantize, key of the estimate)
WAYS: dict[str, tuple[bool, dict[str, Any], str]] = {
    "one pass": (False, {"schedule": "one-pass"}, "estimate_one_pass"),
    "replay": (False, {"schedule": "replay"}, "estimate_replay"),
    "one pass, both models": (False, {"schedule": "one-pass", **_ERRORS}, "estimate_one_pass"),
    "replay, both models": (False, {"schedule": "replay", **_ERRORS}, "estimate_replay"),
    "streamed": (True, {}, "estimate_streamed"),
    "streamed, outputs in files": (True, {"memory_budget": 0}, "estimate_streamed"),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--size", action="append", choices=SIZES, help="all by default")
    p.add_argument("--way", action="append", choices=WAYS, help="all by default")
    p.add_argument("--samples", type=int, default=8)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--batch-size", type=int, default=2)
    p.add_argument("--json", type=Path, help="write the results to this file")
    args = p.parse_args()
    cases, rows = [], []
    for name in args.size or SIZES:
        needed = 0
        for way in args.way or WAYS:
            stream, options, key = WAYS[way]
            if "memory_budget" in options:
                if not needed:
                    continue
                options = {"memory_budget": needed - 1}  # so that outputs go to files
            job = {
                "size": asdict(SIZES[name]),
                "samples": args.samples,
                "length": args.length,
                "batch_size": args.batch_size,
                "dtype": "float32",
                "device": "cpu",
                "recipe": "reference",
                "options": {"bits": 4, "group_size": 64, "symmetric": True, **options},
                "stream": stream,
                "forward": False,
            }
            found = fork(job)
            memory = found["memory"]
            needed = memory[key] if stream else 0
            cases.append({"size": name, "way": way, "job": job, "found": found})
            files = 4 * found["parameters"] / 2**20
            growth, estimate = memory["growth"] / 2**20, memory[key] / 2**20
            rows.append([f"{name}, {way}", files, estimate, growth, growth / estimate])
            write(args.json, "memory", {"cases": cases})
    show("MiB", ["case", "parameters", "estimate", "growth", "ratio"], rows)


if __name__ == "__main__":
    main()
