"""Hugging Face models: quantize, evaluate, save and load.

Importing this package registers the ``ptqkit`` checkpoint format with transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

# Imported with the package, not on first use: a stock ``from_pretrained`` cannot read a checkpoint
# of ours unless the format is registered.
# ``load``, ``perplexity`` and ``equalize`` are modules too: importing the functions here makes the
# names theirs.
from ptqkit.hf.equalize import equalize
from ptqkit.hf.load import load, read_layers
from ptqkit.hf.perplexity import perplexity
from ptqkit.hf.quantizer import register

_LAZY = {
    "AWE": "parts",
    "ActivationQuantizer": "activations",
    "Activations": "activations",
    "BiasCorrection": "parts",
    "CalibrationSet": "calibration",
    "CheckpointInfo": "checkpoint",
    "Equalization": "recipe",
    "EqualizationReport": "equalize",
    "GPTQ": "parts",
    "LayerReport": "report",
    "PerplexityResult": "perplexity",
    "ProgressEvent": "progress",
    "QuantizationInterrupted": "driver",
    "QuantizationResult": "driver",
    "RTN": "parts",
    "Recipe": "recipe",
    "Report": "report",
    "SmoothQuant": "parts",
    "find_folds": "folding",
    "make_outliers": "hard",
    "prepare_calibration": "calibration",
    "quantize": "driver",
    "remove_quantizers": "activations",
    "save_checkpoint": "checkpoint",
}

__all__ = [*sorted(_LAZY), "equalize", "load", "perplexity", "read_layers", "register"]

register()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return __all__
