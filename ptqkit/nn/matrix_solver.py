"""One weight matrix by the solver that a recipe names, and how long the slow one takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import ptqkit._core as _core
from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.arrays.solvers import gptq, obq, rtn
from ptqkit.recipe.recipe import Recipe

__all__ = ["OBQ_HOURS", "obq_problem", "obq_seconds", "quantize_matrix"]

#: OBQ that is estimated to take longer than this is refused.
OBQ_HOURS = 2.0
# Multiply-adds per second and core: 0.95e9 measured (288 and 576 inputs) on a shared Zen 1 core.
_OBQ_RATE = 0.7e9


def quantize_matrix(
    weight: np.ndarray,
    source: Any,
    options: Recipe,
    *,
    threads: int = 0,
    compare_rtn: bool | None = None,
    name: str | None = None,
) -> QuantizedMatrix:
    """Quantize a weight as its layer's options say.

    Parameters
    ----------
    weight : ndarray of float32, shape (out, in)
    source : Hessian, Factorization, array or None
        Only rounding to nearest can do without.
    options : Recipe
        Of the layer, with ``scale_dtype`` set.
    threads : int
    compare_rtn : bool, optional
        As :func:`ptqkit.gptq` takes it.
    name : str, optional
        Of the layer, for messages.
    """
    common: dict[str, Any] = {
        "bits": options.bits,
        "group_size": options.group_size,
        "symmetric": options.symmetric,
        "grid": options.grid,
        "scale_dtype": options.scale_dtype,
        "min_zero_point": options.min_zero_point,
        "threads": threads,
        "name": name,
    }
    if options.method == "rtn":
        return rtn(weight, H=source, per_tensor=options.per_tensor, **common)
    if options.method == "obq":
        return obq(weight, source, damping=options.damping, **common)
    return gptq(
        weight,
        source,
        order=options.order,
        static_groups=options.static_groups,
        refine_passes=options.refine_passes,
        refit_rounds=options.refit_rounds,
        beam_width=options.beam_width,
        damping=options.damping,
        max_damping=options.max_damping,
        feedback=options.feedback,
        block_size=options.block_size,
        compare_rtn=compare_rtn,
        **common,
    )


def obq_seconds(rows: int, columns: int, threads: int = 1) -> float:
    """Estimate how long OBQ takes for a weight: rows * columns**3 / 2 multiply-adds."""
    return rows * float(columns) ** 3 / 2 / _OBQ_RATE / max(1, min(threads, rows))


def obq_problem(shapes: Mapping[str, tuple[int, int]], threads: int = 0) -> str:
    """Return why OBQ would take too long for layers; empty if it would not.

    Parameters
    ----------
    shapes : mapping of str to (int, int)
        Outputs and inputs of each layer that is for OBQ.
    threads : int
        0 means those that the core would use.
    """
    threads = threads or int(_core.config()[2])
    seconds = {name: obq_seconds(*shape, threads) for name, shape in shapes.items()}
    hours = sum(seconds.values()) / 3600
    if hours <= OBQ_HOURS:
        return ""
    longest = max(seconds, key=lambda name: seconds[name])
    return (
        f"method 'obq' would take about {hours:,.0f} hours on {threads} threads (the limit is "
        f"{OBQ_HOURS:g}), {seconds[longest] / 3600:,.1f} of them for {longest} with its "
        f"{shapes[longest][1]:,} inputs: it takes inputs**3 per output; use method 'gptq', for "
        "single layers by an override"
    )
