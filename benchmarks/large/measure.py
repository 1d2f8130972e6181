"""Quantize one model in this process (or one of several) and measure it: a JSON line per process.

Started by the other scripts of this folder: ``python -m benchmarks.large.measure JOB``.
"""

from __future__ import annotations

import concurrent.futures
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["fork", "launcher", "own_memory", "start"]

_MARK = "measured "


def start(
    job: dict[str, Any], processes: int = 0, threads: int = 0, threads_each: int = 0
) -> list[dict[str, Any]]:
    """Measure a job in fresh processes; return what each of them found, the first one first.

    Parameters
    ----------
    job : dict
        Arguments of :func:`_measure`.
    processes : int
        Of torchrun; 0 for a single one without it.
    threads : int
        Of all processes together; by default one per core.
    threads_each : int
        Of every process, instead.
    """
    threads = threads or len(os.sched_getaffinity(0))
    command = [*launcher(processes), "benchmarks.large.measure", json.dumps(job)]
    each = threads_each or max(1, threads // max(1, processes))
    environment = {**os.environ, "OMP_NUM_THREADS": str(each)}
    if job.get("blocking"):
        environment["CUDA_LAUNCH_BLOCKING"] = "1"
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    lines = [s.split(_MARK, 1)[1] for s in done.stdout.splitlines() if _MARK in s]
    if done.returncode or not lines:
        raise SystemExit(f"a run failed with code {done.returncode}: {json.dumps(job)}")
    return sorted(map(json.loads, lines), key=lambda found: found["rank"])


def launcher(processes: int) -> list[str]:
    """Return what comes before a module on the command line; 0 processes: without torchrun."""
    command = [sys.executable, "-m"]
    if processes:
        # A port of our own: two rendezvous on one host must not meet.
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return command


def fork(job: dict[str, Any]) -> dict[str, Any]:
    """Measure a job in a child of this process, on one thread, without a new interpreter."""
    import torch
    import transformers  # noqa: F401

    import ptqkit.hf  # noqa: F401

    with tempfile.TemporaryFile("w+") as file:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                torch.set_num_threads(1)
                file.write(json.dumps(_measure({**job, "threads": 1})))
                file.flush()
                code = 0
            finally:
                os._exit(code)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise SystemExit(f"a run failed: {json.dumps(job)}")
        file.seek(0)
        return json.load(file)


def own_memory(field: str = "RssAnon") -> int:
    """Return bytes of this process from its status: resident ones that belong to no file."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {field}: these scripts need Linux")


@contextmanager
def _peak() -> Iterator[dict[str, int]]:
    """Note the largest memory meanwhile, by looking every few milliseconds.

    The kernel keeps peaks of all resident pages alone, those of mapped files among them.
    """
    import ctypes

    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # or what building the model has freed would hide growth
    before = own_memory()
    found, over = {"before": before, "growth": 0}, threading.Event()

    def look() -> None:
        while not over.wait(0.005):
            found["growth"] = max(found["growth"], own_memory() - before)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def _forward_seconds(model: Any, batches: list[Any]) -> float:
    """Return how long one float forward of batches takes."""
    import torch

    device = next(model.parameters()).device
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    started = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            model(batch.to(device), use_cache=False)
    wait()
    return time.perf_counter() - started


def _measure(job: dict[str, Any]) -> dict[str, Any]:
    """Quantize the model of a job, in memory or streamed from files written before.

    Keys of a job: ``size``, ``samples``, ``length``, ``batch_size``, ``dtype``, ``device``,
    ``recipe``, ``options`` (of :func:`ptqkit.quantize`), ``stream``, ``forward`` (whether the float
    forward is timed too), ``blocking``, ``threads`` (of torch; those of ptqkit by default),
    ``profile`` (a file for what took the time).
    """
    import torch

    import ptqkit
    from benchmarks.large.models import Size, build, draw_tokens
    from ptqkit.hf import open_model
    from ptqkit.hf.quantization.processes import launched, own_device, started

    torch.set_num_threads(job.get("threads") or int(ptqkit.show_config()["threads"]))
    size, several = Size(**job["size"]), launched()
    tokens = draw_tokens(size, job["samples"], job["length"])
    options = {"progress": False, **job["options"]}
    rank = 0
    with tempfile.TemporaryDirectory() as folder, started() if several else nullcontext():
        if several:
            rank = torch.distributed.get_rank()
            options["distributed"] = True
        device = own_device() if several and job["device"] == "cuda" else job["device"]
        begun = time.perf_counter()
        model = build(size, job["length"], job["dtype"], device)
        found: dict[str, Any] = {"rank": rank, "build_seconds": time.perf_counter() - begun}
        found["parameters"] = sum(p.numel() for p in model.parameters())
        given = [(model, tokens)]
        batches = list(tokens.split(job["batch_size"]))
        _forward_seconds(model, batches[:1])  # in every process: its first kernels are loaded
        if job["forward"]:
            found["float_forward"] = _forward_seconds(model, batches)
        if job["stream"]:
            model.save_pretrained(Path(folder) / "model")
            found["file_bytes"] = sum(
                p.stat().st_size for p in (Path(folder) / "model").glob("*.safetensors")
            )
            options |= {"stream": True, "out_dir": Path(folder) / "out"}
            stored, _, _ = open_model(Path(folder) / "model", device=device, stream=True)
            given = [(stored, tokens)]
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        _warm_up(job["dtype"], device)
        if several:
            _meet(device)
        with _peak() as memory, _profiled(job.get("profile", ""), rank):
            source, data = given.pop()
            result = ptqkit.quantize(
                source, job["recipe"], data, batch_size=job["batch_size"], **options
            )
            del source
        if torch.cuda.is_available():
            memory["gpu_allocated"] = torch.cuda.max_memory_allocated()
            memory["gpu_reserved"] = torch.cuda.max_memory_reserved()
        report = result.report
        if not rank:
            found["codes"] = _digests(result.matrices)
        if job["forward"] and device != "cpu" and not size.experts:
            found["pieces"] = _pieces(job, device)
        return {
            **found,
            "schedule": report.schedule,
            "seconds": report.seconds,
            "memory": {**report.memory, **memory},
            "objective": sum(row.objective for row in report.quantized),
            "solve_by_inputs": _by_inputs(report),
        }


def _pieces(job: dict[str, Any], device: str) -> dict[str, float]:
    """Return what the products of H and the factors of a whole run take on a GPU, by themselves."""
    import torch

    from benchmarks.large.cost import groups_of
    from benchmarks.large.models import Size
    from ptqkit.nn.device_solver import factorize_on
    from ptqkit.nn.statistics import TorchHessian

    def timed(call: Callable[[], Any], repeats: int = 3) -> float:
        call()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / repeats

    size = Size(**job["size"])
    tokens = job["batch_size"] * job["length"]
    found = {"products of H": 0.0, "factors": 0.0}
    for inputs in sorted({group.inputs for group in groups_of(size)}):
        times = size.layers * sum(group.inputs == inputs for group in groups_of(size))
        X = torch.randn(tokens, inputs, dtype=getattr(torch, job["dtype"]), device=device)
        sums = TorchHessian(inputs, device)
        batches = job["samples"] / job["batch_size"]
        found["products of H"] += times * batches * timed(partial(sums.update, X))
        H = sums.finish_there()
        found["factors"] += times * timed(partial(factorize_on, X.device, H, damping=0.01))
        del X, sums, H
    return found


def _digests(matrices: dict[str, Any]) -> dict[str, str]:
    """Return a checksum of every layer's codes, by which runs are compared."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = pool.map(lambda m: f"{zlib.crc32(m.codes):08x}", matrices.values())
        return dict(zip(matrices, found, strict=True))


@contextmanager
def _profiled(path: str, rank: int) -> Iterator[None]:
    """Write what takes a process's time to a file: Python functions, and operations of a GPU."""
    if not path:
        yield
        return
    import cProfile
    import io
    import pstats

    from torch.profiler import ProfilerActivity, profile

    python = cProfile.Profile()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as device:
        python.enable()
        try:
            yield
        finally:
            python.disable()
    text = io.StringIO()
    stats = pstats.Stats(python, stream=text)
    for order in ("tottime", "cumulative"):
        stats.sort_stats(order).print_stats(45)
    averages = device.key_averages()
    for order in ("self_device_time_total", "self_cpu_time_total"):
        text.write(averages.table(sort_by=order, row_limit=30, max_name_column_width=60))
    file = Path(path)
    file.with_stem(f"{file.stem}-{rank}").write_text(text.getvalue(), encoding="utf-8")


def _meet(device: str) -> None:
    """Wait for all processes: the first to be ready would wait for the last by its clock."""
    import torch

    ready = torch.zeros(1, device=device)
    torch.distributed.all_reduce(ready)
    ready.item()


def _warm_up(dtype: str, device: str) -> None:
    """Quantize a tiny model, so that libraries and their buffers are there already."""
    import ptqkit
    from benchmarks.large.models import Size, build, draw_tokens

    tiny = Size(64, 128, 1, 2, 2, 64)
    model = build(tiny, 16, dtype, device)
    ptqkit.quantize(model, "quality", draw_tokens(tiny, 2, 16), group_size=32, progress=False)


def _by_inputs(report: Any) -> dict[str, dict[str, float]]:
    """Sum up the times of layers with equal numbers of inputs."""
    found: dict[str, dict[str, float]] = {}
    for row in report.quantized:
        entry = found.setdefault(str(row.shape[1]), {"rows": 0, "hessian": 0.0, "solve": 0.0})
        entry["rows"] += row.shape[0]
        entry["hessian"] += row.seconds_hessian
        entry["solve"] += row.seconds_solve
    return found


if __name__ == "__main__":
    # One write: those of several processes must not mix.
    sys.stdout.write(_MARK + json.dumps(_measure(json.loads(sys.argv[1]))) + "\n")
