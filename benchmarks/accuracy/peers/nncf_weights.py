"""Weight compression of NNCF (`pip install nncf torch transformers`), which has GPTQ elsewhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import nncf
import torch
from transformers import AutoModelForCausalLM

from benchmarks.accuracy.peers.common import main


class _Logits(torch.nn.Module):
    """The model as NNCF traces it: tokens alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        return self.model(input_ids=input_ids, use_cache=False)


def _compress(
    folder: Path, calibration: torch.Tensor, bits: int, group_size: int | None, **options: Any
) -> Any:
    if bits != 4:
        raise ValueError("asymmetric grids of 4 bits only")
    float_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = _Logits(float_model).eval()
    inputs = {m.in_features for m in float_model.model.modules() if isinstance(m, torch.nn.Linear)}
    if group_size is not None and any(n % group_size for n in inputs):
        raise ValueError("its groups are one width in all layers, which these do not divide")
    return nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_ASYM,
        group_size=-1 if group_size is None else group_size,
        ratio=1.0,
        backup_mode=nncf.BackupMode.NONE,
        dataset=nncf.Dataset([row[None] for row in calibration]),
        **options,
    )


if __name__ == "__main__":
    main(
        "NNCF",
        {
            "scale estimation": partial(_compress, scale_estimation=True),
            "scale estimation, AWQ": partial(_compress, scale_estimation=True, awq=True),
        },
    )
