"""Codes of one model by every way to run it: compared file by file and code by code.

    python -m benchmarks.large.equality --json benchmarks/results/large/equality.json

Each way is the command line's: in memory (one pass, replay), streamed, streamed and killed
(`kill -9`) after some blocks and resumed, and under torchrun with one, two and four processes. In
memory is what the others are compared with, but for runs of torchrun, which add their sums up
otherwise: several processes are compared with one. The model is the embedded one by default.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import show
from benchmarks.large.measure import launcher
from benchmarks.large.results import write
from ptqkit.demo import MODEL_DIR, text

# name: (options of the command line, processes of torchrun, blocks before it is killed, reference)
WAYS: dict[str, tuple[list[str], int, int, str]] = {
    "in memory, one pass": (["--no-stream", "--schedule", "one-pass"], 0, 0, ""),
    "in memory, replay": (["--no-stream", "--schedule", "replay"], 0, 0, "in memory, one pass"),
    "streamed": (["--stream"], 0, 0, "in memory, one pass"),
    "streamed, killed and resumed": (["--stream"], 0, 3, "in memory, one pass"),
    "torchrun, 1 process": (["--no-stream"], 1, 0, "in memory, one pass"),
    "torchrun, 2 processes": (["--no-stream"], 2, 0, "torchrun, 1 process"),
    "torchrun, 4 processes": (["--no-stream"], 4, 0, "torchrun, 1 process"),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default=MODEL_DIR, help="folder; the embedded model by default")
    p.add_argument("--calibration", help="file; the embedded model's text by default")
    p.add_argument("--recipe", default="quality")
    p.add_argument("--bits", type=int, default=3)
    p.add_argument("--samples", type=int, default=8)
    p.add_argument("--length", type=int, default=64)
    p.add_argument("--batch-size", type=int, default=2)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--way", action="append", choices=WAYS, help="all by default")
    p.add_argument("--json", type=Path, help="write the results to this file")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, data = Path(folder), args.calibration
        if data is None:
            data = str(root / "calibration.txt")
            Path(data).write_text(text("calibration"), encoding="utf-8")
        common = [str(args.model), "--calibration", data, "--recipe", args.recipe]
        common += ["--bits", str(args.bits), "--samples", str(args.samples)]
        common += ["--sequence-length", str(args.length), "--batch-size", str(args.batch_size)]
        common += ["--dtype", "float32", "--device", args.device, "--quiet"]
        found: dict[str, dict[str, Any]] = {}
        for number, name in enumerate(args.way or WAYS):
            options, processes, blocks, reference = WAYS[name]
            out = root / f"out-{number}"
            started = time.perf_counter()
            killed = _run([*common, *options, "--out", str(out)], processes, blocks, out)
            entry = {"seconds": time.perf_counter() - started, "killed_after_blocks": killed}
            if reference in found:
                entry |= _compared(out, root / found[reference]["folder"])
                entry["compared_with"] = reference
            found[name] = {**entry, "folder": out.name}
    rows = [
        [n, f["seconds"], f.get("compared_with", ""), f.get("equal_bytes", ""), f.get("codes", "")]
        for n, f in found.items()
    ]
    columns = ["way", "seconds", "compared with", "same files", "share of other codes"]
    show(f"{args.recipe}, {args.bits} bits, {args.samples} x {args.length} tokens", columns, rows)
    setting = {k: v for k, v in vars(args).items() if k not in ("json", "way", "calibration")}
    setting["model"] = Path(setting["model"]).name
    write(args.json, "equality", {"setting": setting, "ways": found})


def _run(arguments: list[str], processes: int, blocks: int, out: Path) -> int | None:
    """Run the command line; kill it after so many blocks and run it again. Return the blocks."""
    command = [*launcher(processes), "ptqkit", "quantize", *arguments]
    # Every way has one thread per process, so that two processes on two cores do not wait.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = None
    if blocks:
        state = out.with_name(f"{out.name}.partial")
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(state.glob("block-*.json"))) < blocks:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = len(list(state.glob("block-*.json")))
        if not done:
            raise SystemExit("the run was over before it could be killed: use a larger model")
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return done


def _compared(out: Path, other: Path) -> dict[str, Any]:
    """Return whether the files are the same, and the share of codes that differ."""
    from ptqkit.hf import read_matrices

    names = sorted(f.name for f in out.iterdir())
    same = all(
        (out / name).read_bytes() == (other / name).read_bytes()
        for name in names
        if name != "ptqkit_report.json"  # which holds times
    )
    own, theirs = read_matrices(out), read_matrices(other)
    different = sum(int(np.sum(m.codes != theirs[n].codes)) for n, m in own.items())
    total = sum(m.codes.size for m in own.values())
    return {"equal_bytes": same, "codes": different / total, "weights": total}


if __name__ == "__main__":
    main()
