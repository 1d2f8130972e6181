"""Codes of one model by every way to run it: compared file by file and code by code.

    python -m benchmarks.large.equality --json benchmarks/results/large/equality.json
    python -m benchmarks.large.equality --device cuda --at-once 8 \\
        --json benchmarks/results/large/equality_gpu.json

Each way is the command line's: in memory (one pass, replay), streamed, streamed and killed
(`kill -9`) after some blocks and resumed, and under torchrun with one, two and four processes. In
memory is what the others are compared with, but for runs of torchrun, which add their sums up
otherwise: several processes are compared with one. On GPUs, as many processes as there are GPUs
are run at most, and one run in memory on the CPU is compared too. The model is the embedded one by
default.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import show
from benchmarks.large.measure import launcher
from benchmarks.large.results import write
from ptqkit.demo import MODEL_DIR, text


class Way(NamedTuple):
    """A way to run a model.

    Attributes
    ----------
    options : tuple of str
        Of the command line.
    processes : int
        Of torchrun; 0: without.
    blocks : int
        After which it is killed, and run again.
    reference : str
        The way whose codes it is compared with.
    on_cpu : bool
        Run on the CPU beside those on a GPU.
    """

    options: tuple[str, ...]
    processes: int = 0
    blocks: int = 0
    reference: str = ""
    on_cpu: bool = False


_MEMORY, _ONE = "in memory, one pass", "torchrun, 1 process"
WAYS = {
    _MEMORY: Way(("--no-stream", "--schedule", "one-pass")),
    "in memory, replay": Way(("--no-stream", "--schedule", "replay"), reference=_MEMORY),
    "streamed": Way(("--stream",), reference=_MEMORY),
    "streamed, killed and resumed": Way(("--stream",), blocks=3, reference=_MEMORY),
    _ONE: Way(("--no-stream",), 1, reference=_MEMORY),
    "torchrun, 2 processes": Way(("--no-stream",), 2, reference=_ONE),
    "torchrun, 4 processes": Way(("--no-stream",), 4, reference=_ONE),
    "in memory, on the CPU": Way(("--no-stream",), reference=_MEMORY, on_cpu=True),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default=MODEL_DIR, help="folder; the embedded model by default")
    p.add_argument("--calibration", help="file; the embedded model's text by default")
    p.add_argument("--recipe", default="quality")
    p.add_argument("--bits", type=int, default=3)
    p.add_argument("--group-size", type=int, help="that of the recipe by default")
    p.add_argument("--samples", type=int, default=8)
    p.add_argument("--length", type=int, default=64)
    p.add_argument("--batch-size", type=int, default=2)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--way", action="append", choices=WAYS, help="all by default")
    p.add_argument("--at-once", type=int, default=1, help="ways that run at the same time")
    p.add_argument("--limit", type=float, default=3600.0, help="seconds of a way")
    p.add_argument("--json", type=Path, help="write the results to this file, way by way")
    args = p.parse_args()
    setting = {k: v for k, v in vars(args).items() if k not in ("json", "way", "calibration")}
    setting["model"] = Path(setting["model"]).name
    gpus = _gpus() if args.device == "cuda" else []
    names = [name for name in args.way or WAYS if _possible(WAYS[name], args.device, len(gpus))]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root, data = Path(folder), args.calibration
        if data is None:
            data = str(root / "calibration.txt")
            Path(data).write_text(text("calibration"), encoding="utf-8")
        common = [str(args.model), "--calibration", data, "--recipe", args.recipe]
        common += ["--bits", str(args.bits), "--samples", str(args.samples)]
        common += ["--sequence-length", str(args.length), "--batch-size", str(args.batch_size)]
        if args.group_size is not None:
            common += ["--group-size", str(args.group_size)]
        common += ["--dtype", "float32", "--quiet"]
        outs = {name: root / f"out-{number}" for number, name in enumerate(names)}
        with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
            runs = {}
            for number, (name, out) in enumerate(outs.items()):
                way = WAYS[name]
                device = "cpu" if way.on_cpu else args.device
                options = [*common, *way.options, "--device", device, "--out", str(out)]
                seen = gpus if way.processes else gpus[number % max(1, len(gpus)) :][:1]
                runs[name] = pool.submit(_run, options, way, out, seen, args.limit)
            for name, run in runs.items():
                found[name] = run.result()
                reference = WAYS[name].reference
                if "error" not in found.get(reference, {"error": ""}) | found[name]:
                    found[name] |= _compared(outs[name], outs[reference])
                    found[name]["compared_with"] = reference
                write(args.json, "equality", {"setting": setting, "ways": found})
    keys = ("compared_with", "equal_bytes", "different", "weights", "first", "error")
    rows = [[n, f["seconds"], *(f.get(key, "") for key in keys)] for n, f in found.items()]
    columns = ["way", "seconds", "compared with", "same files", "other codes", "of", "first in"]
    title = f"{args.recipe}, {args.bits} bits, {args.samples} x {args.length} tokens, {args.device}"
    show(title, [*columns, "error"], rows)


def _gpus() -> list[str]:
    """Return the GPUs that may be used, as CUDA names them."""
    import torch

    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",") if chosen else [str(i) for i in range(torch.cuda.device_count())]


def _possible(way: Way, device: str, gpus: int) -> bool:
    if device == "cpu":
        return not way.on_cpu
    return way.processes <= gpus


def _run(
    arguments: Sequence[str], way: Way, out: Path, gpus: Sequence[str], limit: float
) -> dict[str, Any]:
    """Run the command line; kill it after so many blocks and run it again.

    Returns
    -------
    dict
        Seconds, blocks that were done when it was killed, and what went wrong, if anything.
    """
    command = [*launcher(way.processes), "ptqkit", "quantize", *arguments]
    # Every way has one thread per process, so that two processes on two cores do not wait.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    begun, found = time.perf_counter(), {"killed_after_blocks": None}
    if way.blocks:
        found["killed_after_blocks"] = done = _killed(command, environment, way.blocks, out)
        if not done:
            found["error"] = "the run was over before it could be killed: use a larger model"
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.DEVNULL, timeout=limit, check=False
        ).returncode
        if done:
            found["error"] = f"code {done}"
    except subprocess.TimeoutExpired:
        found["error"] = f"not over after {limit:g} seconds"
    return {"seconds": time.perf_counter() - begun, **found}


def _killed(command: Sequence[str], environment: dict[str, str], blocks: int, out: Path) -> int:
    """Kill a streamed run once so many blocks are done; return how many were."""
    state = out.with_name(f"{out.name}.partial")
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list(state.glob("block-*.json"))) < blocks:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return len(list(state.glob("block-*.json")))


def _compared(out: Path, other: Path) -> dict[str, Any]:
    """Return whether the files are the same, how many codes differ, and in which layer first."""
    from ptqkit.hf import read_matrices

    names = sorted(f.name for f in out.iterdir())
    same = all(
        (out / name).read_bytes() == (other / name).read_bytes()
        for name in names
        if name != "ptqkit_report.json"  # which holds times
    )
    own, theirs = read_matrices(out), read_matrices(other)
    different = {n: int(np.sum(m.codes != theirs[n].codes)) for n, m in own.items()}
    return {
        "equal_bytes": same,
        "different": sum(different.values()),
        "weights": sum(m.codes.size for m in own.values()),
        "layers": len(own),
        "layers_with_others": sum(map(bool, different.values())),
        "first": next((name for name, count in different.items() if count), ""),
    }


if __name__ == "__main__":
    main()
