"""Weight compression of NNCF (`pip install nncf torch transformers`)."""

from __future__ import annotations

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
        raise ValueError("weights of 4 bits only")
    model = _Logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).eval()
    return nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_ASYM,
        group_size=-1 if group_size is None else group_size,
        ratio=1.0,
        backup_mode=nncf.BackupMode.NONE,
        dataset=nncf.Dataset([row[None] for row in calibration]),
        **options,
    )


def scale_estimation(folder: Path, calibration: torch.Tensor, bits: int, size: int | None) -> Any:
    """Scale estimation with its defaults."""
    return _compress(folder, calibration, bits, size, scale_estimation=True)


if __name__ == "__main__":
    main("NNCF", {"scale estimation": scale_estimation})
