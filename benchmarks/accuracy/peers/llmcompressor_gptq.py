"""GPTQ of llm-compressor (`pip install llmcompressor`)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM

from benchmarks.accuracy.peers.common import divisor, main


def _scheme(
    targets: list[str], bits: int, group_size: int | None, observer: str
) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=bits,
        symmetric=False,
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
        actorder="static",
        observer=observer,
    )
    return QuantizationScheme(targets=targets, weights=weights)


def gptq(
    folder: Path, calibration: torch.Tensor, bits: int, group_size: int | None, observer: str
) -> Any:
    """Asymmetric grids, columns in the order of activations, grids by an observer of its."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = {n: m for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)}
    groups: dict[int | None, list[str]] = {}
    for name, layer in layers.items():
        size = None if group_size is None else divisor(layer.in_features, group_size)
        groups.setdefault(size, []).append(f"re:.*{name}$")
    config = {
        f"group_{i}": _scheme(t, bits, s, observer) for i, (s, t) in enumerate(groups.items())
    }
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
    main(
        "llm-compressor",
        {
            "GPTQ": partial(gptq, observer="memoryless_minmax"),
            "GPTQ, MSE grids": partial(gptq, observer="memoryless_mse"),
            "GPTQ, weighted MSE grids": partial(gptq, observer="imatrix_mse"),
        },
    )
