"""Seconds of the solve with a feedback grid, as parts of those with the search under H.

    python -m benchmarks.accuracy.grid_times

On random correlated inputs, one thread, a sweep after each solve; both in turn.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

import ptqkit

ROWS, ROUNDS = 256, 5


def main() -> None:
    rng = np.random.default_rng(0)
    print("| inputs | bits | group | seconds, hessian | times that, feedback | objective |")
    print("|---|---|---|---|---|---|")
    for n in (512, 1024, 2048):
        mixing = rng.standard_normal((n, n), np.float32) / np.float32(n) ** 0.5
        X = rng.standard_normal((2 * n, n), np.float32) @ mixing
        H, W = 2 / len(X) * X.T @ X, rng.standard_normal((ROWS, n), np.float32)
        for bits, size in ((3, 64), (4, 128), (4, None)):
            F = ptqkit.factorize(H, order="group-act", group_size=size, threads=1)
            seconds: dict[str, list[float]] = {"hessian": [], "feedback": []}
            objectives = {}
            for grid in list(seconds) * ROUNDS:
                begin = time.perf_counter()
                q = ptqkit.gptq(
                    W, F, bits=bits, group_size=size, order="group-act", grid=grid,
                    refine_passes=1, threads=1,
                )  # fmt: skip
                seconds[grid].append(time.perf_counter() - begin)
                objectives[grid] = q.objective
            under_h, fed_back = (statistics.median(v) for v in seconds.values())
            part = objectives["feedback"] / objectives["hessian"]
            cells = (n, bits, size, f"{under_h:.4f}", f"{fed_back / under_h:.2f}", f"{part:.4f}")
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
