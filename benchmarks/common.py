"""What every benchmark shares: interleaved timing, ceilings measured in the same run, results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import ptqkit

__all__ = [
    "ceilings",
    "header",
    "interleave",
    "markdown",
    "parser",
    "save",
    "show",
    "torch_threads",
]


def parser(description: str, repeats: int) -> argparse.ArgumentParser:
    """The options all benchmarks have."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--repeats", type=int, default=repeats, help="timed runs of each candidate")
    p.add_argument("--json", type=Path, help="write the results to this file")
    return p


def torch_threads() -> None:
    """Give torch the threads that ptqkit uses."""
    import torch

    torch.set_num_threads(int(ptqkit.show_config()["threads"]))


def interleave(candidates: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Time the candidates in turn, A B C A B C ..., after one warm-up of each.

    Returns
    -------
    dict of str to list of float
        Wall seconds of each run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Median of each candidate."""
    return {name: statistics.median(runs) for name, runs in seconds.items()}


def ceilings(size: int = 2048, repeats: int = 5) -> dict[str, float]:
    """Rates of this machine: SGEMM and SSYRK of SciPy's BLAS (GFLOP/s), reading memory (GB/s)."""
    from scipy.linalg import blas

    A = np.asfortranarray(np.random.default_rng(0).standard_normal((size, size), np.float32))
    data = np.ones(64 << 20, np.float32)
    runs = {
        "sgemm": lambda: blas.sgemm(1.0, A, A),
        "ssyrk": lambda: blas.ssyrk(1.0, A),
        "read": lambda: data.max(),
    }
    best = {name: min(s) for name, s in interleave(runs, repeats).items()}
    return {
        "sgemm_gflops": 2 * size**3 / best["sgemm"] / 1e9,
        "ssyrk_gflops": size**3 / best["ssyrk"] / 1e9,
        "read_gbs": data.nbytes / best["read"] / 1e9,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def header() -> dict[str, Any]:
    """Machine, versions and threads, for the result file."""
    info: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count(), **ptqkit.show_config()}
    info["numpy"] = np.__version__
    try:
        import torch

        info["torch"] = torch.__version__
        info["torch_threads"] = torch.get_num_threads()
    except ImportError:
        pass
    if hasattr(os, "getloadavg"):
        info["load"] = round(os.getloadavg()[0], 2)
    return info


def show(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print an aligned table."""
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    widths = [max(len(str(c)), *(len(r[i]) for r in cells)) for i, c in enumerate(columns)]
    print(f"\n{title}")
    for row in [columns, *cells]:
        print(
            "  ".join(
                str(v).rjust(w) if i else str(v).ljust(w)
                for i, (v, w) in enumerate(zip(row, widths, strict=True))
            )
        )


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown, without a line's end."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def save(path: Path | None, name: str, results: Any) -> None:
    """Print the machine; write everything as JSON where a file was asked for."""
    info = header()
    print("\n" + ", ".join(f"{k}={v}" for k, v in info.items()))
    if path is not None:
        path.write_text(
            json.dumps({"benchmark": name, "machine": info, **results}, indent=1) + "\n"
        )
