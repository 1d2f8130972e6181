"""GPTQ of llm-compressor (`pip install llmcompressor`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM

from benchmarks.accuracy.peers.common import main


def _scheme(targets: list[str], bits: int, group_size: int | None) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=bits,
        symmetric=False,
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
        actorder="static" if group_size else None,
    )
    return QuantizationScheme(targets=targets, weights=weights)


def gptq(folder: Path, calibration: torch.Tensor, bits: int, group_size: int | None) -> Any:
    """Asymmetric grids, its defaults otherwise (static act-order with groups)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = {n: m for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)}
    groups: dict[int | None, list[str]] = {}
    for name, layer in layers.items():
        size = group_size
        if size is not None and layer.in_features % size:  # the divisor nearest to it
            divisors = [d for d in range(1, layer.in_features + 1) if layer.in_features % d == 0]
            size = min(divisors, key=lambda d: abs(d - group_size))
        groups.setdefault(size, []).append(f"re:.*{name}$")
    config = {f"group_{i}": _scheme(t, bits, s) for i, (s, t) in enumerate(groups.items())}
    rows = Dataset.from_dict(
        {"input_ids": calibration.tolist(), "attention_mask": torch.ones_like(calibration).tolist()}
    )
    oneshot(
        model=model,
        dataset=rows,
        recipe=GPTQModifier(config_groups=config, ignore=["lm_head"]),
        num_calibration_samples=len(rows),
        max_seq_length=calibration.shape[1],
        shuffle_calibration_samples=False,
    )
    return model.eval()


if __name__ == "__main__":
    main("llm-compressor", {"GPTQ": gptq})
