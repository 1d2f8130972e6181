"""ptqkit: post-training quantization, compiled and checked against float64 twins.

Functions on NumPy arrays: :class:`Hessian`, :func:`gptq`, :func:`rtn`, :func:`obq`. Whole models:
:func:`quantize`, :func:`load` (these import PyTorch and transformers when first used).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ptqkit._config import configure as _configure
from ptqkit._config import show_config
from ptqkit.activations import (
    QuantizedActivations,
    activation_grid,
    outlier_columns,
    quantize_activations,
)
from ptqkit.bias_correction import bias_correction
from ptqkit.equalization import (
    EqualizationSearch,
    equalization_scales,
    search_equalization,
    weight_extent,
)
from ptqkit.errors import (
    CalibrationError,
    NotPositiveDefiniteError,
    PreflightError,
    PtqkitError,
    UnsupportedModuleError,
)
from ptqkit.factorization import Factorization, factorize
from ptqkit.hessian import Hessian
from ptqkit.int8 import int8_matmul
from ptqkit.propagation import propagate_error
from ptqkit.ranges import ChannelRanges
from ptqkit.result import QuantizedMatrix
from ptqkit.softmax import (
    QuantizedProbabilities,
    SoftmaxGrid,
    quantized_softmax,
    softmax_grid,
)
from ptqkit.softmax_bias import SoftmaxBias
from ptqkit.solvers import gptq, objective, obq, rtn
from ptqkit.sqnr import SQNR, sqnr

if TYPE_CHECKING:
    from ptqkit.hf import (
        AWE,
        GPTQ,
        RTN,
        Activations,
        BiasCorrection,
        Recipe,
        SmoothQuant,
        equalize,
        load,
        quantize,
        quantize_softmax,
    )

__version__ = "0.1.0"
__all__ = [
    "AWE",
    "GPTQ",
    "RTN",
    "SQNR",
    "Activations",
    "BiasCorrection",
    "CalibrationError",
    "ChannelRanges",
    "EqualizationSearch",
    "Factorization",
    "Hessian",
    "NotPositiveDefiniteError",
    "PreflightError",
    "PtqkitError",
    "QuantizedActivations",
    "QuantizedMatrix",
    "QuantizedProbabilities",
    "Recipe",
    "SmoothQuant",
    "SoftmaxBias",
    "SoftmaxGrid",
    "UnsupportedModuleError",
    "activation_grid",
    "bias_correction",
    "equalization_scales",
    "equalize",
    "factorize",
    "gptq",
    "int8_matmul",
    "load",
    "objective",
    "obq",
    "outlier_columns",
    "propagate_error",
    "quantize",
    "quantize_activations",
    "quantize_softmax",
    "quantized_softmax",
    "rtn",
    "search_equalization",
    "show_config",
    "softmax_grid",
    "sqnr",
    "weight_extent",
]

_configure()

# Names that need PyTorch and transformers, imported where first used.
_LAZY = dict.fromkeys(
    (
        "AWE",
        "GPTQ",
        "RTN",
        "Activations",
        "BiasCorrection",
        "Recipe",
        "SmoothQuant",
        "equalize",
        "load",
        "quantize",
        "quantize_softmax",
    ),
    "ptqkit.hf",
)
_MODULES = ("demo", "hf", "packing", "reference")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"ptqkit.{name}")
    if name in _LAZY:
        try:
            return getattr(import_module(_LAZY[name]), name)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("ptqkit"):
                raise
            raise ModuleNotFoundError(
                f"ptqkit.{name} needs {error.name}; install it with: pip install 'ptqkit[hf]'",
                name=error.name,
            ) from error
    raise AttributeError(f"module 'ptqkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
