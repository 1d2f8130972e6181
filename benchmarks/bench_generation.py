"""Where the time of a generated token goes: packed layers by modules, and in fused blocks.

A LLaMA of random weights (the shape of 1.1 billion, or a narrow deep one, which shows what a block
costs beside its weights), one token at a time, in turn with decoder blocks fused and not. A step is
split into what the core takes (products; with fused blocks attention, norms and rotations too) and
the rest: PyTorch's operations, the modules and transformers around them. The model without blocks
tells what of that belongs to no block::

    python -m benchmarks.bench_generation --forms W4 "W4 int8" W8A8 --threads 8
    python -m benchmarks.bench_generation --shape narrow --threads 1
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import ptqkit._core as _core
from benchmarks.common import save, show
from ptqkit.hf.models.one_token import fuse_blocks, unfuse_blocks
from ptqkit.hf.speed.random_model import random_model
from ptqkit.hf.speed.shapes import ONE_B, ModelShape
from ptqkit.nn.packed_linear import PackedLinear

SHAPES = {"1b": ONE_B, "narrow": ModelShape(256, 704, 22, 8, 2, 1000)}
CALLS = ("packed_matmul", "int8_linear", "decoder_begin", "decoder_end", "decoder_blocks")
FORMS = ("W8A8", "W8", "W4", "W4 int8", "W3", "W2", "W2 int8")
PATHS = {"modules": unfuse_blocks, "fused": fuse_blocks}
CONTEXT = 16


@contextmanager
def core_time(spent: dict[str, float]) -> Iterator[None]:
    """Add up the seconds inside the core for the time of a ``with`` block."""
    kept = {name: getattr(_core, name) for name in CALLS}

    def timed(name: str) -> Any:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return kept[name](*args)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

        return call

    try:
        for name in CALLS:
            setattr(_core, name, timed(name))
        yield
    finally:
        for name, call in kept.items():
            setattr(_core, name, call)


@torch.no_grad()
def steps(
    model: Any, count: int, spent: dict[str, float] | None = None
) -> tuple[list[float], torch.Tensor]:
    """Seconds of each step after a short prompt, which `spent` forgets; logits of the last."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, CONTEXT + count), generator=draw)
    output, seconds = model(ids[:, :CONTEXT], use_cache=True), []
    if spent is not None:
        spent.clear()
    for at in range(CONTEXT, CONTEXT + count):
        start = time.perf_counter()
        output = model(ids[:, at : at + 1], past_key_values=output.past_key_values, use_cache=True)
        seconds.append(time.perf_counter() - start)
    return seconds, output.logits[0, -1].float()


def read_rate() -> float:
    """GB/s at which PyTorch's threads find the largest of 1 GiB of integers."""
    data, seconds = torch.ones(1 << 28, dtype=torch.int32), []
    for _ in range(5):
        start = time.perf_counter()
        data.max()
        seconds.append(time.perf_counter() - start)
    return 4 * data.numel() / min(seconds) / 1e9


def measure(form: str, shape: ModelShape, dtype: torch.dtype, args: Any) -> dict[str, Any]:
    """One form: milliseconds of both paths, in turn."""
    variant, _, compute = form.partition(" ")
    model = random_model(shape, variant, dtype=dtype, compute=compute or "packed", fused=False)
    packed = [m.matrix() for m in model.modules() if isinstance(m, PackedLinear)]
    times: dict[str, list[float]] = {name: [] for name in PATHS}
    core, around, logits = {}, {}, {}
    for turn in range(args.repeats + 1):
        for name, switch in PATHS.items():
            switch(model)
            seconds, logits[name] = steps(model, args.tokens)
            if turn:  # the first warms up
                times[name] += seconds
    for name, switch in PATHS.items():
        switch(model)
        spent: dict[str, float] = {}
        with core_time(spent):
            steps(model, args.tokens, spent)
        core[name] = 1e3 * sum(spent.values()) / args.tokens
        model.config.num_hidden_layers = 0
        around[name] = 1e3 * statistics.median(steps(model, args.tokens)[0])
        model.config.num_hidden_layers = shape.layers
    apart = (logits["fused"] - logits["modules"]).norm() / logits["modules"].norm()
    found: dict[str, Any] = {"weights_MB": sum(m.nbytes for m in packed) / 1e6}
    for name in PATHS:
        token = 1e3 * statistics.median(times[name])
        found[name] = {
            "token_ms": token,
            "core_ms": core[name],
            "no_blocks_ms": around[name],
            "per_block_us": 1e3 * (token - around[name]) / shape.layers,
            "tokens_per_second": 1e3 / token,
        }
    return {**found, "logits_apart": float(apart)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--shape", default="1b", choices=SHAPES)
    p.add_argument("--layers", type=int, help="fewer layers, for a trial")
    p.add_argument("--forms", nargs="+", default=["W4", "W4 int8", "W8A8"], choices=FORMS)
    p.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    p.add_argument("--tokens", type=int, default=32, help="steps of a turn")
    p.add_argument("--repeats", type=int, default=3, help="turns")
    p.add_argument("--threads", type=int, default=0, help="0: as the environment says")
    p.add_argument("--json", type=Path, help="write the results to this file")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.threads and os.environ.get("OMP_NUM_THREADS") != str(args.threads):
        p.error(f"set OMP_NUM_THREADS={args.threads}: the core takes its threads from there")
    shape = SHAPES[args.shape]
    if args.layers:
        shape = ModelShape(**{**vars(shape), "layers": args.layers})
    read = read_rate()
    print(f"all threads together read {read:.1f} GB/s")
    found: dict[str, Any] = {}
    for form in args.forms:
        found[form] = measure(form, shape, getattr(torch, args.dtype), args)
        rows = []
        for name in PATHS:
            row = found[form][name]
            rows.append([f"{form}, {name}", *(row[k] for k in row)])
        columns = ["", "token ms", "in the core", "without blocks", "us a block", "tokens/s"]
        weights = found[form]["weights_MB"]
        title = f"{args.shape}, {shape.layers} blocks, {args.dtype}, {weights:.0f} MB of weights"
        show(title, columns, rows)
    settings = {k: getattr(args, k) for k in ("shape", "dtype", "tokens", "repeats", "threads")}
    save(args.json, "generation", {"settings": settings, "read_GBps": read, "found": found})


if __name__ == "__main__":
    main()
