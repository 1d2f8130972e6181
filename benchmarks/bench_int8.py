"""W8A8 products with the activations' quantization included, against peers and the CPU's peaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import ceilings, interleave, medians, parser, save, show, torch_threads
from peaks import peak_loops

import ptqkit
from ptqkit.arrays.matmul import int8_linear, pack_int8


def per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed codes and scales of each token, as torch users write it."""
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale).round().to(torch.int8), scale


def per_tensor(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Unsigned codes with the zero-point 128."""
    return (x / scale + 128).round().clamp(0, 255).to(torch.uint8)


def torch_peers(x: torch.Tensor, W: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The products of torch, with and without what quantizes their input."""
    w_scale = W.abs().amax(1) / 127
    codes = (W / w_scale[:, None]).round().to(torch.int8)
    qx = per_token(x)[0]
    peers: dict[str, Callable[[], Any]] = {
        "torch fp32": lambda: torch.nn.functional.linear(x, W),
    }

    def int_mm() -> torch.Tensor:
        q, s = per_token(x)
        return torch._int_mm(q, codes.t()) * (s * w_scale)

    peers["torch._int_mm, tokens quantized"] = int_mm
    peers["torch._int_mm, product alone"] = lambda: torch._int_mm(qx, codes.t())
    scale = float(x.abs().max()) / 127
    ux = per_tensor(x, scale)
    zeros = torch.zeros(len(W), dtype=torch.int32)
    packed = torch.ops.onednn.qlinear_prepack(codes, list(x.shape))

    def onednn(u: torch.Tensor) -> torch.Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            u, scale, 128, packed, w_scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )

    peers["oneDNN, tensor quantized"] = lambda: onednn(per_tensor(x, scale))
    peers["oneDNN, product alone"] = lambda: onednn(ux)
    return peers


def onnx_peer(x: np.ndarray, W: np.ndarray) -> dict[str, Callable[[], Any]]:
    """QLinearMatMul of ONNX Runtime, product alone; none, with a line, if it is not installed."""
    try:
        import onnx
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        print(f"left out: ONNX Runtime QLinearMatMul ({error})")
        return {}
    w_scale = (np.abs(W).max(1) / 127).astype(np.float32)
    codes = np.rint(W / w_scale[:, None]).astype(np.int8).T.copy()
    scale = np.float32(np.abs(x).max() / 127)
    constants = {
        "xs": scale,
        "xz": np.uint8(128),
        "w": codes,
        "ws": w_scale,
        "wz": np.zeros(len(W), np.int8),
        "ys": np.float32(1),
        "yz": np.uint8(128),
    }
    node = helper.make_node("QLinearMatMul", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["y"])
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [len(x), len(W)])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(ptqkit.show_config()["threads"])
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    ux = np.clip(np.rint(x / scale + 128), 0, 255).astype(np.uint8)
    return {"ONNX Runtime, product alone": lambda: session.run(None, {"x": ux})}


def main() -> None:
    p = parser(__doc__.splitlines()[0], repeats=9)
    p.add_argument("--tokens", type=int, action="append", help="default 1, 16, 512, 2048")
    p.add_argument("--size", type=int, default=4096, help="inputs and outputs")
    p.add_argument("--quick", action="store_true", help="512 tokens, a minute at most")
    args = p.parse_args()
    torch_threads()
    rates, loops = ceilings(repeats=3), peak_loops(seconds=0.05)
    print(", ".join(f"{k} {v:.4g}" for k, v in rates.items()))
    results: dict[str, Any] = {"ceilings": rates, "cases": {}}
    repeats = min(args.repeats, 3) if args.quick else args.repeats
    rng = np.random.default_rng(0)
    W = rng.standard_normal((args.size, args.size), np.float32)
    w = ptqkit.quantize_activations(W)
    words, sums = pack_int8(w.codes)
    w_scales = w.scales.reshape(-1)
    w_zeros = np.full(len(W), 128, np.float32)
    level = str(ptqkit.show_config()["cpu_level"])
    kinds = [k for k, part in (("amx int8", "amx"), ("vnni", "vnni")) if part in level]
    kinds += [k for k in loops if k.startswith("int16 madd") and k.split()[-1] in level]
    used = next((k for k in kinds if k in loops), None)
    for tokens in args.tokens or ([512] if args.quick else [1, 16, 512, 2048]):
        x = rng.standard_normal((tokens, args.size), np.float32)
        bf16 = torch.from_numpy(x).bfloat16()
        scale = float(np.abs(x).max()) / 127
        runs: dict[str, Callable[[], Any]] = {
            "ptqkit per token": lambda x=x: int8_linear(x, words, w_scales, w_zeros, sums=sums),
            "ptqkit per token, asymmetric": lambda x=x: int8_linear(
                x, words, w_scales, w_zeros, sums=sums, symmetric=False
            ),
            "ptqkit per token, bf16": lambda x=bf16: int8_linear(
                x, words, w_scales, w_zeros, sums=sums
            ),
            "ptqkit per tensor": lambda x=x, s=scale: int8_linear(
                x, words, w_scales, w_zeros, sums=sums, scale=s
            ),
            **torch_peers(torch.from_numpy(x), torch.from_numpy(W)),
            **onnx_peer(x, W),
        }
        if used:  # in turn with the others: the clock falls where wide registers multiply
            runs[f"peak {used}"] = loops[used]
        seconds = interleave(runs, repeats)
        wall = medians(seconds)
        work = 2 * tokens * args.size**2 / 1e9
        peak = loops[used].operations / wall.pop(f"peak {used}") / 1e9 if used else float("nan")
        rows = [
            [
                name,
                1e3 * value,
                work / value,
                work / value / peak,
                wall["torch fp32"] / value,
                value / wall["ptqkit per token"],
                args.size**2 / value / 1e9,
            ]
            for name, value in wall.items()
        ]
        show(
            f"{tokens} tokens, {args.size} x {args.size}; peak of {used}: {peak:.0f} GOP/s",
            ["case", "ms", "GOP/s", "/ peak", "x torch fp32", "/ ptqkit's time", "weights GB/s"],
            rows,
        )
        results["cases"][str(tokens)] = {"seconds": seconds, "median": wall, "peak": peak}
    save(args.json, "int8", results)


if __name__ == "__main__":
    main()
