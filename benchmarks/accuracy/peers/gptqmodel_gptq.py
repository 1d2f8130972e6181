"""GPTQ and GPTAQ of GPTQModel (`pip install gptqmodel`)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.looper.gptq_processor import GPTQProcessor
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.config import GPTAQConfig
from transformers import AutoModelForCausalLM

from benchmarks.accuracy.peers.common import divisor, main


def _quantize(
    folder: Path,
    calibration: torch.Tensor,
    bits: int,
    group_size: int | None,
    gptaq: GPTAQConfig | None = None,
) -> Any:
    """Asymmetric grids by its search of the least error.

    With groups it takes whole groups, and columns within them, in the order of activations; per
    channel, columns. Weights are taken as they are solved, before it packs them for 16-bit inputs:
    it packs neither groups nor layers as wide as these models have.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    del layers["lm_head"]
    own = {}
    for name, layer in layers.items():
        size = group_size and divisor(layer.in_features, group_size)
        if size != group_size:
            own[f"+:.*{name.replace('.', '[.]')}$"] = {"group_size": size}
    found: dict[str, torch.Tensor] = {}

    def finalize(self: Any, module: Any, *args: Any, **options: Any) -> None:
        found[module.full_name] = module.weight.data.float().cpu().clone()

    config = QuantizeConfig(
        bits=bits,
        group_size=-1 if group_size is None else group_size,
        dynamic=own or None,
        sym=False,
        mse=2.4,
        act_group_aware=group_size is not None,
        desc_act=group_size is None,
        gptaq=gptaq,
        offload_to_disk=False,
    )
    peer = GPTQModel.load(str(folder), config, device="cpu", dtype=torch.float32)
    rows = [{"input_ids": r[None], "attention_mask": torch.ones_like(r)[None]} for r in calibration]
    widths = [*TorchLinear.SUPPORTS_GROUP_SIZE, *(o["group_size"] for o in own.values())]
    with (
        mock.patch.object(GPTQProcessor, "submodule_finalize", finalize),
        mock.patch.object(TorchLinear, "SUPPORTS_GROUP_SIZE", widths),
    ):
        peer.quantize(rows, batch_size=8)
    for name, layer in layers.items():
        layer.weight.data.copy_(found[name])
    return model


if __name__ == "__main__":
    main(
        "GPTQModel",
        {"GPTQ": _quantize, "GPTAQ": partial(_quantize, gptaq=GPTAQConfig(device="cpu"))},
    )
