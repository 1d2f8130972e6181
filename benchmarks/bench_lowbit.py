"""Packed low-bit products against the read rate of memory and against other libraries.

Every product takes the next of several copies of its weights, larger together than the last cache,
so that one token is bound by memory. All candidates of a shape and a number of threads take turns,
the ceilings among them. Values are random: they do not matter for speed. Peers that are not
installed are left out with a line that says so.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import header, parser, show

import ptqkit
import ptqkit._core as _core

SHAPES = [(4096, 4096), (11008, 4096)]  # outputs, inputs
TOKENS = [1, 4, 16]
BITS = [2, 3, 4, 8]
GROUPS = {"g128": 128, "g32": 32, "channel": None}
LEAST_SECONDS = 0.003  # of products timed together


def last_cache() -> int:
    """Bytes of the last cache, as far as Linux tells."""
    sizes = [1 << 23]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}.get(text[-1], 0))
    return max(sizes)


def copies(nbytes: int, least: int) -> int:
    return max(2, -(-least // nbytes))


Candidate = tuple[Callable[[], Any], int]  # a product with the next copy, bytes of its weights


def packed(outputs: int, inputs: int, bits: int, group: int | None, least: int) -> list[Any]:
    """Copies of random packed weights, their scales of float16."""
    rng = np.random.default_rng(bits)
    size = group or inputs
    first = ptqkit.PackedMatrix.pack(
        rng.integers(0, 1 << bits, (outputs, inputs), dtype=np.uint8),
        np.full((outputs, inputs // size), 0.01, np.float16),
        rng.integers(0, 1 << bits, (outputs, inputs // size)),
        bits=bits,
    )
    return [first] + [first.copy() for _ in range(copies(first.nbytes, least) - 1)]


def ours(matrices: list[Any], x: np.ndarray, activations: str, threads: int) -> Candidate:
    turn = itertools.cycle(matrices)
    out = np.empty((len(x), matrices[0].shape[0]), np.float32)
    return (
        lambda: next(turn).matmul(x, activations=activations, threads=threads, out=out),
        matrices[0].nbytes,
    )


def torch_peers(outputs: int, inputs: int, tokens: list[int], least: int) -> dict[Any, Candidate]:
    """torch in fp32, in bf16, and its int4 weights with bf16 activations."""
    import torch
    from torch.nn.functional import linear

    found: dict[Any, Candidate] = {}

    def add(name: str, dtype: torch.dtype, weights: list[Any], nbytes: int, call: Any) -> None:
        for m in tokens:
            x = torch.ones(m, inputs, dtype=dtype)
            turn = itertools.cycle(weights)
            found[name, m] = (lambda x=x, turn=turn: call(x, next(turn)), nbytes)

    for name, dtype in (("torch fp32", torch.float32), ("torch bf16", torch.bfloat16)):
        nbytes = outputs * inputs * dtype.itemsize
        count = copies(nbytes, least)
        weights = [torch.full((outputs, inputs), 0.01, dtype=dtype) for _ in range(count)]
        add(name, dtype, weights, nbytes, linear)
    try:
        codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
        one = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        grids = torch.full((inputs // 128, outputs, 2), 0.01, dtype=torch.bfloat16)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        nbytes = one.nbytes + grids.nbytes
        weights = [(one.clone(), grids.clone()) for _ in range(copies(nbytes, least))]
        product(torch.ones(1, inputs, dtype=torch.bfloat16), one, 128, grids)
        add(
            "torch int4 g128",
            torch.bfloat16,
            weights,
            nbytes,
            lambda x, w: product(x, w[0], 128, w[1]),
        )
    except (AttributeError, RuntimeError) as error:
        print(f"left out: torch int4 ({str(error).splitlines()[0]})")
    return found


def onnx_peers(
    outputs: int, inputs: int, tokens: list[int], least: int, threads: int
) -> dict[Any, Candidate]:
    """MatMulNBits of ONNX Runtime, with int8 (accuracy level 4) and float compute."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    found: dict[Any, Candidate] = {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    for bits, group, level in ((4, 128, 4), (4, 128, 0), (4, 32, 4), (2, 128, 4)):
        name = f"onnxruntime {bits} bit g{group} {'int8' if level == 4 else 'float'}"
        rng = np.random.default_rng(0)
        blob = rng.integers(0, 256, (outputs, inputs // group, group * bits // 8), dtype=np.uint8)
        scales = np.full(outputs * inputs // group, 0.01, np.float32)
        node = helper.make_node(
            "MatMulNBits",
            ["x", "w", "s"],
            ["y"],
            domain="com.microsoft",
            K=inputs,
            N=outputs,
            bits=bits,
            block_size=group,
            accuracy_level=level,
        )
        shapes = {"x": ["m", inputs], "y": ["m", outputs]}
        values = {
            k: helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in shapes.items()
        }
        graph = helper.make_graph(
            [node],
            "product",
            [values["x"]],
            [values["y"]],
            [numpy_helper.from_array(blob, "w"), numpy_helper.from_array(scales, "s")],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
        nbytes = blob.nbytes + scales.nbytes
        try:
            sessions = [
                onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
                for _ in range(min(64, copies(nbytes, least)))
            ]
            sessions[0].run(None, {"x": np.ones((1, inputs), np.float32)})
        except Exception as error:  # whatever a version does not know
            print(f"left out: {name} ({str(error).splitlines()[0][:80]})")
            continue
        for m in tokens:
            x = np.ones((m, inputs), np.float32)
            turn = itertools.cycle(sessions)
            found[name, m] = (lambda x=x, turn=turn: next(turn).run(None, {"x": x}), nbytes)
    return found


def readers(least: int, threads: int) -> dict[Any, Candidate]:
    """Ways to do nothing but read."""
    data = [np.ones((1 << 10, 1 << 12), np.float32) for _ in range(copies(1 << 24, 2 * least))]
    turn = itertools.cycle(data)
    found: dict[Any, Candidate] = {
        ("read: finite check", 0): (lambda: _core.finite_check(next(turn), threads), 1 << 24)
    }
    try:
        import torch

        tensors = itertools.cycle([torch.from_numpy(a) for a in data])
        found["read: torch.sum", 0] = (lambda: next(tensors).sum(), 1 << 24)
    except ImportError:
        pass
    return found


def sgemm(threads: int) -> tuple[Any, Candidate] | None:
    """A product of torch in the caches: what remains of the FMA peak. Bytes: its operations."""
    try:
        import torch
    except ImportError:
        return None
    A = torch.ones(1024, 1024)
    return ("sgemm", 0), (lambda: torch.mm(A, A), 2 << 30)


def measure(
    candidates: dict[Any, Candidate], repeats: int, clock: Callable[[], float]
) -> dict[Any, float]:
    """Median seconds of a product; candidates take turns."""
    loops, runs = {}, {name: [] for name in candidates}
    for name, (run, _) in candidates.items():
        run()
        start = clock()
        run()
        loops[name] = max(1, int(LEAST_SECONDS / max(1e-6, clock() - start)))
    for _ in range(repeats):
        for name, (run, _) in candidates.items():
            start = clock()
            for _ in range(loops[name]):
                run()
            runs[name].append((clock() - start) / loops[name])
    return {name: statistics.median(seconds) for name, seconds in runs.items()}


def candidates_of(outputs: int, inputs: int, threads: int, args: Any) -> dict[Any, Candidate]:
    found = readers(args.least, threads)
    if (peak := sgemm(threads)) is not None:
        found[peak[0]] = peak[1]
    x = np.random.default_rng(0).standard_normal((max(args.tokens), inputs)).astype(np.float32)
    for bits, (name, group) in itertools.product(args.bits, GROUPS.items()):
        if name not in args.groups:
            continue
        matrices = packed(outputs, inputs, bits, group, args.least)
        for activations, m in itertools.product(("float", "int8"), args.tokens):
            key = f"ptqkit {bits} bit {name} {activations}"
            found[key, m] = ours(matrices, x[:m].copy(), activations, threads)
    if args.no_peers:
        return found
    for make in (
        lambda: torch_peers(outputs, inputs, args.tokens, args.least),
        lambda: onnx_peers(outputs, inputs, args.tokens, args.least, threads),
    ):
        try:
            found.update(make())
        except ImportError as error:
            print(f"left out: {error.name} is not installed")
    return found


def fastest(seconds: dict[Any, float], prefix: str, m: int) -> float | None:
    times = [s for (name, tokens), s in seconds.items() if name.startswith(prefix) and tokens == m]
    return min(times) if times else None


def report(title: str, candidates: dict[Any, Candidate], seconds: dict[Any, float]) -> list[Any]:
    """Print a table for each number of tokens; return its rows."""
    # whoever reads fastest shows what can be read: products of one token are readers too
    rates = {k: candidates[k][1] / s / 1e9 for k, s in seconds.items() if k[1] <= 1}
    rates.pop(("sgemm", 0), None)
    reader = max(rates, key=lambda k: rates[k])
    read = rates[reader]
    flops = candidates["sgemm", 0][1] / seconds["sgemm", 0] / 1e9 if ("sgemm", 0) in seconds else 0
    print(f"\n{title}: read {read:.2f} GB/s ({reader[0]}), sgemm {flops:.0f} GFLOP/s")
    entries: list[Any] = [
        {"case": title, "read_gbs": read, "reader": reader[0], "sgemm_gflops": flops}
    ]
    peers = ["torch fp32", "torch bf16", "torch int4", "onnxruntime 4 bit"]
    for m in sorted({m for _, m in seconds if m}):
        rows = []
        for (name, tokens), s in seconds.items():
            if tokens != m:
                continue
            gbs = candidates[name, tokens][1] / s / 1e9
            best = [fastest(seconds, peer, m) for peer in peers]
            rows.append(
                [name, s * 1e6, gbs, f"{100 * gbs / read:.0f} %"]
                + [f"{b / s:.2f}" if b else "-" for b in best]
            )
            entries.append(
                {"case": title, "name": name, "tokens": m, "us": s * 1e6, "gbs": gbs}
                | {f"x {p}": b / s for p, b in zip(peers, best, strict=True) if b}
            )
        show(
            f"{title}, {m} token(s)",
            ["kernel", "us", "GB/s", "of read", *[f"x {p}" for p in peers]],
            rows,
        )
    return entries


def main() -> None:
    p = parser(__doc__.splitlines()[0], repeats=9)
    p.add_argument("--quick", action="store_true", help="one small shape, within a minute")
    p.add_argument("--shape", action="append", help="OUTPUTSxINPUTS (default both of LLaMA 7B)")
    p.add_argument("--tokens", type=int, action="append")
    p.add_argument("--bits", type=int, action="append")
    p.add_argument("--groups", action="append", choices=list(GROUPS))
    p.add_argument("--threads", type=int, action="append", help="default 1 and 2")
    p.add_argument("--no-peers", action="store_true")
    p.add_argument(
        "--cpu-time", action="store_true", help="for one thread, on a machine that others use"
    )
    p.add_argument("--mib", type=int, help="copies of each weight together (default: 2 caches)")
    args = p.parse_args()
    shapes = [tuple(map(int, s.split("x"))) for s in args.shape or []] or SHAPES
    if args.quick:
        shapes, args.repeats = [(1024, 1024)] if not args.shape else shapes, min(args.repeats, 3)
        args.tokens, args.bits = args.tokens or [1, 4], args.bits or [4]
        args.groups = args.groups or ["g128"]
    args.tokens, args.bits = args.tokens or TOKENS, args.bits or BITS
    args.groups = args.groups or list(GROUPS)
    args.least = (args.mib << 20) if args.mib else max(64 << 20, 2 * last_cache())
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    results: list[Any] = []
    info = header()
    print(", ".join(f"{k}={v}" for k, v in info.items()))
    for outputs, inputs in shapes:
        for threads in args.threads or [1, 2]:
            if threads > cpus:
                continue
            try:
                import torch

                torch.set_num_threads(threads)
            except ImportError:
                pass
            candidates = candidates_of(outputs, inputs, threads, args)
            busy = args.cpu_time and threads == 1
            clock = time.process_time if busy else time.perf_counter
            seconds = measure(candidates, args.repeats, clock)
            results += report(f"{outputs}x{inputs}, {threads} thread(s)", candidates, seconds)
            if args.json is not None:  # as far as it has come
                found = {"benchmark": "lowbit", "machine": info, "cases": results}
                args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
