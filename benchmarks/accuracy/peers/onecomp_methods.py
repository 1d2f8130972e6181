"""GPTQ, QEP, LPCD and JointQ of OneComp (`pip install onecomp`, by its word Python 3.12)."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from onecomp import GPTQ, JointQ, ModelConfig, Runner
from onecomp.log import setup_logger

from benchmarks.accuracy.peers.common import divisor, main

#: Where the library makes its calibration batch, each under a name of its own.
PLACES = (
    "onecomp.runner",
    "onecomp.qep._quantize_with_qep",
    "onecomp.qep._quantize_with_qep_arch",
    "onecomp.lpcd._lpcd_runner",
)

#: Of the strengths of regularization, the greatest that costs next to no error of outputs.
BY_LAYER = {"lambda_mode": "incremental_lambda", "regularization_mode": "identity"}


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


class _Gptq(GPTQ):
    """Groups as wide as the divisor of the inputs, where the library's last one is shorter."""

    def quantize_layer(self, module: Any, input: Any, hessian: Any = None) -> Any:
        size = -1 if self.groupsize == -1 else divisor(module.in_features, self.groupsize)
        with mock.patch.object(self, "groupsize", size):
            return super().quantize_layer(module, input, hessian)


class _JointQ(JointQ):
    """The same for JointQ, which refuses groups that do not divide the inputs."""

    def quantize_layer(self, module: Any, *args: Any, **options: Any) -> Any:
        size = None if self.group_size is None else divisor(module.in_features, self.group_size)
        with mock.patch.object(self, "group_size", size):
            return super().quantize_layer(module, *args, **options)


def _gptq(bits: int, group_size: int | None) -> GPTQ:
    """Grids by its search of the least error.

    Columns in the order of activations per channel alone: with groups the library would form them
    of columns in that order, which is another format.
    """
    size = -1 if group_size is None else group_size
    return _Gptq(
        wbits=bits,
        groupsize=size,
        sym=False,
        mse=True,
        actorder=group_size is None,
        bitpack_on_quantize=False,
    )


def _jointq(bits: int, group_size: int | None, **options: Any) -> JointQ:
    """GPTQ that it starts from has the same search of grids."""
    start = _gptq(bits, group_size)
    start.actorder = False  # which it demands
    return _JointQ(bits=bits, group_size=group_size, symmetric=False, gptq=start, **options)


def _quantize(
    folder: Path,
    calibration: torch.Tensor,
    bits: int,
    group_size: int | None,
    method: Callable[[int, int | None], Any] = _gptq,
    **options: Any,
) -> Any:
    """Asymmetric grids."""
    config = ModelConfig(path=str(folder), dtype="float32", device="cpu")
    runner = Runner(config, method(bits, group_size), report_progress=False, **options)
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
            "JointQ": partial(_quantize, method=_jointq),
            "JointQ, lambda by layer": partial(_quantize, method=partial(_jointq, **BY_LAYER)),
        },
    )
