"""Models of cells: float, quantized, with a quantized softmax."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

from ptqkit.hf.data.calibration import CalibrationSet
from ptqkit.hf.softmax.driver import quantize_softmax
from ptqkit.hf.workbench import Workbench
from ptqkit.study.engine import Quantized

__all__ = ["float_model", "quantized_copy"]

# What the literature calls activations that stay as they are: W8A16.
_FLOAT_BITS = 16.0


def float_model(bench: Workbench) -> Quantized:
    """Return the model as it is."""
    return Quantized(bench.model, bench.float_bits, _FLOAT_BITS)


def quantized_copy(
    bench: Workbench,
    recipe: Any,
    softmax: Mapping[str, Any] | None = None,
    calibration: CalibrationSet | None = None,
) -> Quantized:
    """Quantize a copy of the model.

    Parameters
    ----------
    bench : Workbench
    recipe : Recipe, preset name, dict or list of parts, or None
        None leaves weights and activations float.
    softmax : mapping, optional
        Options of :func:`ptqkit.quantize_softmax`, such as ``{"bits": 8}``: the softmax of the
        quantized model is quantized too.
    calibration : CalibrationSet, optional
        Instead of the bench's own; for a softmax whose correction needs none, None.

    Raises
    ------
    Exception
        Whatever :func:`ptqkit.quantize` and :func:`ptqkit.quantize_softmax` raise.
    """
    if recipe is None:
        made = Quantized(copy.deepcopy(bench.model), bench.float_bits, _FLOAT_BITS)
    else:
        result = bench.quantize(recipe, calibration=calibration)
        activations = result.recipe.activations
        made = Quantized(
            result.model,
            result.report.totals()["bits_per_weight"],
            _FLOAT_BITS if activations is None else float(activations.bits),
            result.report.seconds["total"],
            tuple(result.report.warnings),
        )
    if softmax is None:
        return made
    started = time.perf_counter()
    quantize_softmax(made.model, calibration, **{"diagnostics": False, **softmax})
    seconds = made.seconds + time.perf_counter() - started
    return Quantized(made.model, made.bits_per_weight, made.activation_bits, seconds, made.warnings)
