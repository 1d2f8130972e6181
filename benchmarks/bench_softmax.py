"""Fused softmax against NumPy and PyTorch, in a model's attention too; bias estimation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import interleave, medians, parser, save, show, torch_threads

import ptqkit
from ptqkit.nn.attention import AttentionCall
from ptqkit.nn.attention_quantizer import AttentionQuantizer
from ptqkit.nn.softmax.quantizer import SoftmaxQuantizer


def numpy_softmax(x: np.ndarray, grid: ptqkit.SoftmaxGrid, beta: float, out: np.ndarray) -> None:
    """Softmax, rounding and correction in NumPy, every step in place."""
    np.subtract(x, x.max(axis=-1, keepdims=True), out=out)
    np.exp(out, out=out)
    out *= np.float32(1 / grid.scale) / out.sum(axis=-1, keepdims=True)
    np.rint(out, out=out)
    np.clip(out, 0, grid.max_code, out=out)
    out *= np.float32(grid.scale)
    out += np.float32(beta)


def torch_in_place(
    x: torch.Tensor, grid: ptqkit.SoftmaxGrid, beta: float, out: torch.Tensor
) -> None:
    """The same in PyTorch, every step in place."""
    torch.softmax(x, -1, out=out)
    out.mul_(1 / grid.scale).round_().clamp_(0, grid.max_code).mul_(grid.scale).add_(beta)


def torch_fake_quantize(x: torch.Tensor, grid: ptqkit.SoftmaxGrid, beta: float) -> torch.Tensor:
    """The same with PyTorch's fused fake quantization."""
    P = torch.softmax(x, -1)
    y = torch.fake_quantize_per_tensor_affine(P, grid.scale, grid.zero_point, 0, grid.max_code)
    return y.add_(beta)


def softmax_candidates(scores: np.ndarray) -> dict[str, Callable[[], Any]]:
    """The same result by every way, and what ptqkit offers beyond it."""
    grid, beta, ours = ptqkit.softmax_grid(8), 4e-4, ptqkit.softmax_on_grid
    out, codes = np.empty_like(scores), np.empty(scores.shape, np.uint8)
    x, y = torch.from_numpy(scores), torch.empty(scores.shape)
    bias = {"correction": "bias", "bias": beta}
    return {
        "NumPy": lambda: numpy_softmax(scores, grid, beta, out),
        "PyTorch in place": lambda: torch_in_place(x, grid, beta, y),
        "PyTorch fake_quantize": lambda: torch_fake_quantize(x, grid, beta),
        "PyTorch softmax alone": lambda: torch.softmax(x, -1, out=y),
        "ptqkit": lambda: ours(scores, grid, out=out, **bias),
        "ptqkit, new array": lambda: ours(scores, grid, **bias),
        "ptqkit row_sum": lambda: ours(scores, grid, out=out, correction="row_sum"),
        "ptqkit codes": lambda: ours(scores, grid, out=codes, codes=True, **bias),
        "ptqkit causal": lambda: ours(scores, grid, out=out, causal=True, **bias),
    }


def bias_candidates(P: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Bias estimation, and the fastest readers of the same memory."""
    grid, tensor = ptqkit.softmax_grid(8), torch.from_numpy(P)
    flat, heads = tensor.view(-1), P.shape[1]
    whole, causal = (ptqkit.SoftmaxBias(heads, grid=grid) for _ in range(2))
    lower = np.tril(np.ones(P.shape[2:], np.float32))
    masked = P * lower
    masked /= masked.sum(axis=-1, keepdims=True)
    return {
        "read: torch.sum": lambda: tensor.sum(),
        "read: torch.amax": lambda: tensor.amax(),
        "read: torch.dot": lambda: torch.dot(flat, flat),
        "read: NumPy max": lambda: P.max(),
        "ptqkit SoftmaxBias": lambda: whole.update(P),
        "ptqkit SoftmaxBias, causal": lambda: causal.update(masked, causal=True),
        "NumPy": lambda: np.rint(P * np.float32(255)).mean(axis=(0, 2, 3)),
    }


def attention_candidates(scores: np.ndarray) -> dict[str, Callable[[], Any]]:
    """The softmax of one attention module of a causal language model, by its hook and without.

    "separate" is PyTorch's softmax and the quantizer after it, as models on a GPU and models in
    half precision run; "fused" is what float32 models on the CPU run. Both start from a copy of
    the masked scores, whose time is the first line.
    """
    heads, q, k = scores.shape[1:]
    allowed = torch.ones(q, k, dtype=torch.bool).tril(k - q)[None, None]
    masked = torch.from_numpy(scores).masked_fill(~allowed, torch.finfo(torch.float32).min)
    work, grid, beta = torch.empty_like(masked), ptqkit.softmax_grid(8), np.full(heads, 4e-4)
    quantizers = {
        "no correction": SoftmaxQuantizer(grid),
        "bias per head": SoftmaxQuantizer(grid, "bias", beta, longest=k),
        "bias, rows longer": SoftmaxQuantizer(grid, "bias", beta, longest=k // 2),
        "row_sum": SoftmaxQuantizer(grid, "row_sum"),
    }
    call = AttentionCall("attention", torch.nn.Module(), allowed=allowed)
    found: dict[str, Callable[[], Any]] = {
        "copy of the scores": lambda: work.copy_(masked),
        "float softmax": lambda: work.copy_(masked).softmax(-1),
    }
    for name, quantizer in quantizers.items():
        hook = AttentionQuantizer({"softmax": quantizer})
        found[f"{name}, separate"] = lambda hook=hook: hook.softmax(
            work.copy_(masked).softmax(-1), call
        )
        found[f"{name}, fused"] = lambda hook=hook: hook.fused(work.copy_(masked), call)
    return found


def main() -> None:
    p = parser(__doc__.splitlines()[0], repeats=15)
    p.add_argument("--heads", type=int, default=16)
    p.add_argument("--length", type=int, default=1024, help="queries and keys")
    args = p.parse_args()
    torch_threads()
    shape = (1, args.heads, args.length, args.length)
    scores = 2 * np.random.default_rng(0).standard_normal(shape, np.float32)
    seconds = interleave(softmax_candidates(scores), args.repeats)
    wall = medians(seconds)
    peers = ("NumPy", "PyTorch in place", "PyTorch fake_quantize")
    best = min(wall[name] for name in peers)
    size = scores.nbytes / 1e9
    rows = [[name, 1e3 * t, 2 * size / t, best / t] for name, t in wall.items()]
    title = f"softmax, 8 bits, one bias, {shape[1]} x {shape[2]} x {shape[3]}"
    show(title, ["case", "ms", "GB/s in + out", "x best peer"], rows)

    hooked = interleave(attention_candidates(scores), args.repeats)
    spent = medians(hooked)
    pairs = {name: spent.get(name.replace("fused", "separate"), t) / t for name, t in spent.items()}
    show(
        f"hook of a causal language model, {shape[1]} x {shape[2]} x {shape[3]}",
        ["case", "ms", "x separate"],
        [[name, 1e3 * t, pairs[name] if "fused" in name else ""] for name, t in spent.items()],
    )

    P = torch.softmax(torch.from_numpy(np.tile(scores, (2, 1, 1, 1))), -1).numpy()
    reads = interleave(bias_candidates(P), args.repeats)
    times = medians(reads)
    size = P.nbytes / 1e9
    ceiling = max(size / t for name, t in times.items() if name.startswith("read"))
    # half of the entries and their rows' diagonal, of which ptqkit reads nothing else
    share = {"ptqkit SoftmaxBias, causal": (args.length + 1) / (2 * args.length)}
    rates = {name: share.get(name, 1.0) * size / t for name, t in times.items()}
    show(
        f"bias of {size:.2g} GB of probabilities; fastest reader {ceiling:.1f} GB/s",
        ["case", "ms", "GB/s", "/ fastest reader"],
        [[name, 1e3 * t, rates[name], rates[name] / ceiling] for name, t in times.items()],
    )
    results = {
        "softmax": {"seconds": seconds, "median": wall, "speedup": best / wall["ptqkit"]},
        "attention": {"seconds": hooked, "median": spent},
        "bias": {
            "seconds": reads,
            "median": times,
            "read_gbs": ceiling,
            "share": rates["ptqkit SoftmaxBias"] / ceiling,
        },
    }
    save(args.json, "softmax", results)


if __name__ == "__main__":
    main()
