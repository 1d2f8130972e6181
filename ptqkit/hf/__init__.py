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
    "AttentionHook": "attention",
    "AttentionQuantizer": "attention_kinds",
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
    "SensitivityReport": "diagnose_report",
    "SmoothQuant": "parts",
    "SoftmaxQuantization": "softmax",
    "SoftmaxQuantizer": "softmax_quantizer",
    "SoftmaxReport": "softmax_report",
    "SoftmaxStudy": "softmax",
    "attention_hooks": "attention",
    "find_attention": "attention",
    "find_folds": "folding",
    "install_attention": "attention",
    "load_softmax": "softmax_state",
    "make_outliers": "hard",
    "prepare_calibration": "calibration",
    "quantize": "driver",
    "quantize_softmax": "softmax",
    "remove_attention": "attention",
    "remove_quantizers": "activations",
    "save_checkpoint": "checkpoint",
    "save_softmax": "softmax_state",
    "sensitivity": "diagnose",
}

__all__ = [*sorted(_LAZY), "equalize", "load", "perplexity", "read_layers", "register"]

register()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return __all__
