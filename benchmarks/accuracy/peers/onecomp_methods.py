"""GPTQ, QEP and LPCD of OneComp (`pip install onecomp`, Python 3.12)."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from onecomp import GPTQ, ModelConfig, Runner
from onecomp.log import setup_logger

from benchmarks.accuracy.peers.common import main

#: Where the library makes its calibration batch, each under a name of its own.
PLACES = (
    "onecomp.runner",
    "onecomp.qep._quantize_with_qep",
    "onecomp.qep._quantize_with_qep_arch",
    "onecomp.lpcd._lpcd_runner",
)


@contextlib.contextmanager
def _calibrated_on(tokens: torch.Tensor) -> Iterator[None]:
    """Have the library calibrate on given tokens instead of a data set."""

    def prepare(*args: Any, device: Any = "cpu", **options: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    with contextlib.ExitStack() as stack:
        for place in PLACES:
            module = importlib.import_module(place)
            stack.enter_context(mock.patch.object(module, "prepare_calibration_dataset", prepare))
        yield


def _quantize(
    folder: Path, calibration: torch.Tensor, bits: int, group_size: int | None, **options: Any
) -> Any:
    """Asymmetric grids, its defaults otherwise."""
    config = ModelConfig(path=str(folder), dtype="float32", device="cpu")
    size = -1 if group_size is None else group_size
    runner = Runner(
        config,
        GPTQ(wbits=bits, groupsize=size, sym=False, bitpack_on_quantize=False),
        report_progress=False,
        **options,
    )
    with _calibrated_on(calibration):
        runner.run()
    model = config.load_model()
    runner.update_model_weights(model)
    return model.eval()


if __name__ == "__main__":
    setup_logger("ERROR")
    main(
        "OneComp",
        {
            "GPTQ": _quantize,
            "QEP": partial(_quantize, qep=True),
            "QEP and LPCD": partial(_quantize, qep=True, lpcd=True),
        },
    )
