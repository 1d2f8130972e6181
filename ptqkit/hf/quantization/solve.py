"""Quantize the layers that share one input: the thin seam to the functions on arrays."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ptqkit.arrays.bias import bias_correction
from ptqkit.arrays.factorization import factorize
from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.arrays.solvers import gptq, objective, rtn
from ptqkit.arrays.targets import propagate_error
from ptqkit.hf.models.structure import Target
from ptqkit.nn.on_grid import dequantize, row_blocks, rtn_on_grid
from ptqkit.recipe.recipe import Recipe

__all__ = ["Solved", "rtn_on_grid", "solve_group"]


@dataclass
class Solved:
    """Result for one layer.

    Attributes
    ----------
    matrix : QuantizedMatrix
    seconds_solve : float
        This layer's share of the time, by rows.
    objective : float
        tr((W - Q) H (W - Q)^T) with the undamped H; with error propagation W is the corrected
        weight, here and in the diagnostics.
    objective_rtn, output_power, weight_power, weight_error : float
        Diagnostics; NaN where they were not asked for.
    bias_shift : ndarray of float64, shape (out,), or None
        Mean output error, with bias correction: to be subtracted from the bias.
    """

    matrix: QuantizedMatrix
    seconds_solve: float = 0.0
    objective: float = float("nan")
    objective_rtn: float = float("nan")
    output_power: float = float("nan")
    weight_power: float = float("nan")
    weight_error: float = float("nan")
    seconds_diagnostics: float = 0.0
    seconds_propagation: float = 0.0
    dequantized: np.ndarray | None = field(default=None, repr=False)
    bias_shift: np.ndarray | None = field(default=None, repr=False)


def solve_group(
    targets: Sequence[Target],
    hessian: Any,
    moment: np.ndarray | None = None,
    ranges: Any = None,
    *,
    threads: int = 0,
    diagnostics: bool = True,
) -> dict[str, Solved]:
    """Quantize all layers fed by one tensor; nothing is written to the model.

    Layers with equal options are stacked into one matrix and solved at once (each row depends on
    nothing but itself and H); others share the factor of H where its options agree.

    Parameters
    ----------
    targets : sequence of Target
    hessian : Hessian or None
        None only for round-to-nearest without calibration.
    moment : ndarray of float64, shape (in, in), optional
        G = (2/N) sum x x~^T, for layers with error propagation.
    ranges : ChannelRanges, optional
        Of the inputs, for layers with bias correction.
    threads : int
    diagnostics : bool
        Also compute what the report shows beyond the objective.
    """
    stacks: list[list[Target]] = []
    for target in targets:
        options = _effective(target)
        for stack in stacks:
            # One scale for a whole matrix: not for several in one.
            if not options.per_tensor and _effective(stack[0]) == options:
                stack.append(target)
                break
        else:
            stacks.append([target])
    factors: dict[tuple[Any, ...], Any] = {}
    solved: dict[str, Solved] = {}
    for stack in stacks:
        name = ", ".join(t.name for t in stack)
        source = hessian
        shared = len(stacks) > 1 or moment is not None
        if shared and hessian is not None and stack[0].options.method == "gptq":
            source = _factor(factors, hessian, _effective(stack[0]), threads, name)
        moments = (hessian, moment, ranges)
        solved.update(_solve_stack(stack, name, source, moments, threads, diagnostics))
    return solved


def _effective(target: Target) -> Recipe:
    """Options with the scales' dtype resolved to the weight's."""
    options = target.options
    if options.scale_dtype is not None:
        return options
    dtype = str(target.module.weight.dtype).removeprefix("torch.")
    changed = {**options.to_dict(), "scale_dtype": "float32" if dtype == "float64" else dtype}
    return Recipe(**changed)


def _factor(
    factors: dict[tuple[Any, ...], Any], hessian: Any, options: Recipe, threads: int, name: str
) -> Any:
    key = (options.order, options.group_size, options.damping, options.max_damping)
    if key not in factors:
        factors[key] = factorize(
            hessian,
            order=options.order,
            group_size=options.group_size,
            damping=options.damping,
            max_damping=options.max_damping,
            threads=threads,
            name=name,
        )
    return factors[key]


def _solve_stack(
    stack: list[Target],
    name: str,
    source: Any,
    moments: tuple[Any, np.ndarray | None, Any],
    threads: int,
    diagnostics: bool,
) -> dict[str, Solved]:
    hessian, moment, ranges = moments
    start = begin = time.perf_counter()
    options = _effective(stack[0])
    parts = [t.read() for t in stack]
    weight = parts[0] if len(parts) == 1 else np.concatenate(parts)
    del parts
    if moment is not None:
        # With the damping that the solver's factor took, which may have been raised.
        weight = propagate_error(
            weight, hessian, moment, options.error_propagation, source.damping, name=name
        )
        start = time.perf_counter()
    matrix = _quantize(weight, source, options, threads, name)
    dequantized = dequantize(matrix)
    shift = None
    if options.bias_correction:
        shift = bias_correction(weight, dequantized, ranges.mean)
    middle = time.perf_counter()
    extra = None
    if diagnostics:
        extra = _diagnose(weight, dequantized, matrix, hessian)
    end = time.perf_counter()
    results, row = {}, 0
    for target in stack:
        rows = slice(row, row + target.shape[0])
        share = target.shape[0] / len(weight)
        result = Solved(matrix.rows(rows.start, rows.stop), share * (middle - start))
        result.seconds_propagation = share * (start - begin)
        result.dequantized = dequantized[rows]
        result.objective = result.matrix.objective
        result.bias_shift = None if shift is None else shift[rows]
        if extra is not None:
            for key, values in extra.items():
                setattr(result, key, float(values[rows].sum()))
            result.seconds_diagnostics = share * (end - middle)
        results[target.name] = result
        row = rows.stop
    return results


def _quantize(
    weight: np.ndarray, source: Any, options: Recipe, threads: int, name: str
) -> QuantizedMatrix:
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
    return gptq(
        weight,
        source,
        order=options.order,
        static_groups=options.static_groups,
        refine_passes=options.refine_passes,
        damping=options.damping,
        max_damping=options.max_damping,
        feedback=options.feedback,
        block_size=options.block_size,
        **common,
    )


def _diagnose(
    weight: np.ndarray, dequantized: np.ndarray, matrix: QuantizedMatrix, hessian: Any
) -> dict[str, np.ndarray]:
    """Per row: power of weights and error; with H also RTN's objective and the output's power."""
    values, found = torch.from_numpy(weight), torch.from_numpy(dequantized)
    power, error = torch.empty(len(values)), torch.empty(len(values))
    for rows in row_blocks(len(values)):
        torch.linalg.vector_norm(values[rows], dim=1, out=power[rows])
        torch.linalg.vector_norm(values[rows] - found[rows], dim=1, out=error[rows])
    out = {"weight_power": power.double().numpy() ** 2, "weight_error": error.double().numpy() ** 2}
    if hessian is not None:
        rounded = rtn_on_grid(weight, matrix)
        out["objective_rtn"] = objective(np.subtract(weight, rounded, rounded), 0, hessian)
        if matrix.row_objectives is None:
            out["objective"] = objective(weight, dequantized, hessian)
        out["output_power"] = objective(weight, 0, hessian)
    return out
