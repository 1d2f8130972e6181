"""Channel ranges of a stream of batches against the fastest reader of the same data.

Every batch is other memory and larger than the last cache, so each pass comes from memory. The
ceiling is the fastest of several ways to do nothing but read on the same number of threads; all
passes over the stream take turns in one run.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from common import interleave, medians, parser, save, show, torch_threads

import ptqkit
import ptqkit._core as _core

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PIECE = 1 << 17  # bytes: a copy of this stays in the second cache


def make_stream(batches: int, tokens: int, n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Batches of equal size in memory of their own; values beyond the first are cheap to make."""
    first = torch.from_numpy(np.random.default_rng(0).standard_normal((tokens, n), np.float32))
    return [(first + i).to(dtype) for i in range(batches)]


def copier(threads: int) -> Callable[[np.ndarray], Any]:
    """memcpy of a batch, piece by piece, into buffers that stay cached: a read in wide loads."""
    pool = ThreadPoolExecutor(threads)
    buffers = [np.empty(PIECE // 8) for _ in range(threads)]

    def share(data: np.ndarray, thread: int) -> None:
        buffer, words = buffers[thread], PIECE // 8
        part = len(data) // threads
        for start in range(thread * part, (thread + 1) * part - words + 1, words):
            np.copyto(buffer, data[start : start + words])

    def run(data: np.ndarray) -> None:
        words = data.reshape(-1).view(np.float64)
        list(pool.map(lambda t: share(words, t), range(threads)))

    return run


def readers(stream: list[torch.Tensor], threads: int) -> dict[str, Callable[[], Any]]:
    """Ways to read the whole stream once."""
    bits = [x.view(torch.int32).numpy() for x in stream]  # the same bytes, whatever the type
    ints = [x.view(torch.int64) for x in stream]
    copy = copier(threads)

    def every(run: Callable[[Any], Any], data: list[Any]) -> Callable[[], None]:
        return lambda: [run(x) for x in data] and None

    return {
        "read: finite check": every(
            lambda x: _core.finite_check(x.view(np.float32), threads), bits
        ),
        "read: torch.sum": every(torch.sum, [x.view(torch.float32) for x in stream]),
        "read: torch.amax int64": every(torch.amax, ints),
        "read: np.bitwise_or.reduce": every(lambda x: np.bitwise_or.reduce(x, axis=None), bits),
        "read: memcpy to cache": every(copy, bits),
    }


def ranges_of(stream: list[torch.Tensor]) -> None:
    """What is measured."""
    ranges = ptqkit.ChannelRanges(stream[0].shape[1])
    for x in stream:
        ranges.update(x)


def main() -> None:
    p = parser(__doc__.splitlines()[0], repeats=5)
    p.add_argument("--inputs", type=int, action="append", help="channels (default 768, 4096)")
    p.add_argument("--batches", type=int, default=100)
    p.add_argument(
        "--batch-mib", type=int, default=40, help="size of a batch; above the last cache"
    )
    args = p.parse_args()
    torch_threads()
    threads = int(ptqkit.show_config()["threads"])
    results: dict[str, Any] = {"batches": args.batches, "batch_mib": args.batch_mib, "cases": {}}
    rows = []
    for n in args.inputs or (768, 4096):
        for name, dtype in DTYPES.items():
            tokens = (args.batch_mib << 20) // (n * dtype.itemsize)
            stream = make_stream(args.batches, tokens, n, dtype)
            size = sum(x.nbytes for x in stream) / 1e9
            runs = {"ChannelRanges": lambda s=stream: ranges_of(s), **readers(stream, threads)}
            seconds = interleave(runs, args.repeats)
            wall = medians(seconds)
            fastest = min(v for k, v in wall.items() if k.startswith("read"))
            for run, value in wall.items():
                rows.append([f"{n}, {name}, {run}", value, size / value, value / fastest])
            results["cases"][f"{n} {name}"] = {
                "gb": size,
                "tokens": tokens,
                "seconds": seconds,
                "median": wall,
                "over_fastest_read": wall["ChannelRanges"] / fastest,
            }
    show(
        f"{args.batches} batches of {args.batch_mib} MiB, {threads} threads",
        ["channels, dtype, pass", "s", "GB/s", "x fastest read"],
        rows,
    )
    save(args.json, "ranges", results)


if __name__ == "__main__":
    main()
