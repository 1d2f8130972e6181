"""One thread against all of them on a quiet machine and with a busy loop on each core.

A layer from its inputs to its codes: many short loops, between which threads wait for each other.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
from common import interleave, medians, parser, save, show

import ptqkit

SHAPES = ((128, 128, 20), (256, 256, 8), (512, 512, 3), (2048, 1024, 1))  # rows, inputs, times


def layer(rows: int, n: int, times: int, threads: int) -> None:
    """Quantize a layer so many times."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((1024, n), np.float32)
    W = rng.standard_normal((rows, n), np.float32)
    for _ in range(times):
        H = ptqkit.Hessian(n, threads=threads)
        H.update(X)
        ptqkit.gptq(W, H, bits=4, group_size=64, refine_passes=1, threads=threads)
        ptqkit.quantize_activations(X, threads=threads)


def main() -> None:
    p = parser(__doc__.splitlines()[0], repeats=7)
    p.add_argument("--busy", type=int, default=os.cpu_count(), help="busy loops to run")
    args = p.parse_args()
    results: dict[str, dict[str, float]] = {}
    rows_out = []
    for busy in (0, args.busy):
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            for rows, n, times in SHAPES:
                wall = medians(
                    interleave(
                        {
                            "one": lambda s=(rows, n, times): layer(*s, threads=1),
                            "all": lambda s=(rows, n, times): layer(*s, threads=0),
                        },
                        args.repeats,
                    )
                )
                results[f"{rows}x{n}, {busy} busy loops"] = wall
                ratio = wall["all"] / wall["one"]
                cells = [1e3 * wall["one"], 1e3 * wall["all"], ratio]
                rows_out.append([f"{times} x {rows} x {n}", busy, *cells])
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()
    columns = ["layers", "busy loops", "one thread, ms", "all threads, ms", "ratio"]
    show("From inputs to codes", columns, rows_out)
    save(args.json, "load", {"cases": results})


if __name__ == "__main__":
    main()
