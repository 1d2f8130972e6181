"""Quantize the layers that share one input: the thin seam to the functions on arrays."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ptqkit.arrays.bias import bias_correction
from ptqkit.arrays.factorization import factorize
from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.arrays.solvers import objective
from ptqkit.arrays.targets import target_weights
from ptqkit.hf.models.dtypes import dtype_name
from ptqkit.hf.models.structure import Target
from ptqkit.hf.quantization.moments import Moments
from ptqkit.hf.quantization.processes import Processes
from ptqkit.hf.quantization.row_coupling import couple_stack
from ptqkit.hf.quantization.row_shares import RowShare
from ptqkit.nn.device_factor import hessian_on
from ptqkit.nn.device_gptq import gptq_on, why_on_host
from ptqkit.nn.device_matrix import DeviceMatrix, matrix_on
from ptqkit.nn.device_refine import refine_on
from ptqkit.nn.device_solver import corrected_weights, factorize_on
from ptqkit.nn.matrix_solver import quantize_matrix
from ptqkit.nn.on_grid import dequantize_on, nearest, row_blocks
from ptqkit.nn.output_moments import OutputMoments
from ptqkit.nn.row_objectives import row_objectives
from ptqkit.nn.statistics import DeviceMean
from ptqkit.nn.transfer import HostCopies, computes, host_copy
from ptqkit.recipe.recipe import Recipe

__all__ = ["LayerResult", "solve_group"]

_SHIFT = "bias shift"


@dataclass
class LayerResult:
    """Result for one layer.

    Attributes
    ----------
    matrix : QuantizedMatrix
    dequantized : Tensor of float32, shape (out, in)
        On the layer's device.
    seconds_solve : float
        This layer's share of the time, by rows.
    objective : float
        tr((W - Q) H (W - Q)^T) with the undamped H; with error propagation W is the corrected
        weight, here and in the diagnostics.
    objective_rtn, output_power, weight_power, weight_error : float
        Diagnostics; NaN if they were not asked for.
    bias_shift : ndarray of float64, shape (out,), or None
        Mean output error, with bias correction: to be subtracted from the bias.
    target : str
        What was quantized instead of the weight, such as ``"residual 0.5"``; empty if nothing.
    solved_on : str
        ``"cpu"`` or the device's type; ``"cpu: why"`` if the layer is on a device, but the host
        made the solve.
    """

    matrix: QuantizedMatrix
    dequantized: torch.Tensor = field(repr=False)
    seconds_solve: float = 0.0
    objective: float = float("nan")
    objective_rtn: float = float("nan")
    output_power: float = float("nan")
    weight_power: float = float("nan")
    weight_error: float = float("nan")
    seconds_diagnostics: float = 0.0
    seconds_propagation: float = 0.0
    bias_shift: np.ndarray | None = field(default=None, repr=False)
    target: str = ""
    solved_on: str = ""


def solve_group(
    targets: Sequence[Target],
    moments: Moments,
    *,
    threads: int = 0,
    diagnostics: bool = True,
    processes: Processes | None = None,
    outputs: OutputMoments | None = None,
    copies: HostCopies | None = None,
) -> dict[str, LayerResult]:
    """Quantize all layers fed by one tensor; nothing is written to the model.

    Layers with equal options are stacked into one matrix and solved at once (each row depends on
    nothing but itself and H); others share the factor of H if its options agree.

    Parameters
    ----------
    targets : sequence of Target
    moments : Moments
        Of their input; without H only rounding to nearest is possible.
    threads : int
    diagnostics : bool
        Also compute what the report shows in addition to the objective.
    processes : Processes, optional
        Others with equal targets and moments, each of which solves some of the rows.
    outputs : OutputMoments, optional
        What ``row_coupling`` needs: one process solves rows that are coupled.
    copies : HostCopies, optional
        Of codes and grids that were found on a device: they may come later. By default they are
        there when the call returns.
    """
    stacks: list[tuple[Recipe, list[Target]]] = []
    for target in targets:
        options = target.options.with_scale_dtype(dtype_name(target.view.weight.dtype))
        # One scale for a whole matrix, and D, are not for several in one.
        alone = options.per_tensor or target.name in moments.residuals
        same = (s for o, s in stacks if o == options and s[0].name not in moments.residuals)
        stack = None if alone else next(same, None)
        if stack is None:
            stacks.append((options, [target]))
        else:
            stack.append(target)
    factors: dict[tuple[Any, ...], Any] = {}
    solved: dict[str, LayerResult] = {}
    for options, stack in stacks:
        name = ", ".join(t.name for t in stack)
        source = moments.hessian
        shared = len(stacks) > 1 or moments.propagates
        device = stack[0].view.weight.device
        shared = shared or computes(device)  # which factorizes faster
        if shared and source is not None and options.method == "gptq":
            source = _factor(factors, source, options, threads, name, device)
        solved.update(
            _solve_stack(
                stack,
                options,
                name,
                source,
                moments,
                threads,
                diagnostics,
                processes,
                outputs,
                copies,
            )
        )
    return solved


def _factor(
    factors: dict[tuple[Any, ...], Any],
    hessian: Any,
    options: Recipe,
    threads: int,
    name: str,
    device: torch.device,
) -> Any:
    key = (options.order, options.group_size, options.damping, options.max_damping)
    if key not in factors:
        make = partial(factorize_on, device) if computes(device) else factorize
        factors[key] = make(
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
    options: Recipe,
    name: str,
    source: Any,
    moments: Moments,
    threads: int,
    diagnostics: bool,
    processes: Processes | None = None,
    outputs: OutputMoments | None = None,
    copies: HostCopies | None = None,
) -> dict[str, LayerResult]:
    """Quantize layers as one matrix; ``source`` is H or its factor."""
    start = begin = time.perf_counter()
    device = stack[0].view.weight.device
    values, instead = _read(stack), ""
    runs, shared = _coupled_runs(stack, options, outputs), None
    coupled = bool(runs)
    if options.per_tensor:
        processes = None  # the rows depend on each other
    if processes is not None:
        shared = RowShare(processes, len(values), [rows for rows, _ in runs])
        values, runs = values[shared.own], _within(runs, shared.own)
        residual = moments.residuals.get(stack[0].name)
        if residual is not None:
            part = residual.rows(shared.own.start, shared.own.stop)
            moments = replace(moments, residuals={stack[0].name: part})
    with contextlib.nullcontext() if processes is None else processes.together():
        if moments.propagates:
            layer = stack[0].name
            values, instead = _target(values, layer, options, source, moments, threads, name)
            start = time.perf_counter()
        rtn = None if diagnostics else False
        matrix, solved_on = _quantized(values, source, options, threads, rtn, name)
        if coupled:  # in another process, if not here
            most = options.row_coupling
            matrix = couple_stack(values, matrix, source, runs, most, threads=threads, name=name)
        matrix = matrix_on(device, matrix)
        dequantized = dequantize_on(device, matrix)
        beside: dict[str, torch.Tensor] = {}
        if options.bias_correction:
            mean = moments.ranges.mean
            shift = bias_correction(_on_host(values), dequantized.cpu().numpy(), mean)
            beside[_SHIFT] = torch.from_numpy(shift).to(device)
        middle = time.perf_counter()
        if diagnostics:
            beside |= _diagnose(values, dequantized, matrix, source)
    if shared is not None:
        matrix, beside = shared.join_matrix(matrix, beside)
        dequantized = dequantize_on(device, matrix)
    extra = _rows_on_host(beside)
    found = matrix.finish(copies)
    whole = LayerResult(found, dequantized, middle - start, target=instead)
    if _SHIFT in extra:
        whole.bias_shift = extra.pop(_SHIFT)
    whole.solved_on = solved_on
    whole.seconds_propagation = start - begin
    whole.seconds_diagnostics = time.perf_counter() - middle if diagnostics else 0.0
    return _by_layer(stack, whole, extra)


def _rows_on_host(values: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Return vectors of float64 with a number for each row on the host, by one copy."""
    if not values:
        return {}
    return dict(zip(values, host_copy(torch.stack(list(values.values()))), strict=True))


def _by_layer(
    stack: Sequence[Target], whole: LayerResult, extra: Mapping[str, np.ndarray]
) -> dict[str, LayerResult]:
    """Give each layer its rows of what was solved as one, of the diagnostics and of the times."""
    results, row, shift = {}, 0, whole.bias_shift
    for target in stack:
        rows = slice(row, row + target.view.shape[0])
        share = target.view.shape[0] / len(whole.dequantized)
        own = whole.matrix.rows(rows.start, rows.stop)
        sums: dict[str, Any] = {key: float(values[rows].sum()) for key, values in extra.items()}
        results[target.name] = replace(
            whole,
            matrix=own,
            dequantized=whole.dequantized[rows],
            seconds_solve=share * whole.seconds_solve,
            seconds_propagation=share * whole.seconds_propagation,
            seconds_diagnostics=share * whole.seconds_diagnostics,
            bias_shift=None if shift is None else shift[rows],
            **{"objective": own.objective, **sums},
        )
        row = rows.stop
    return results


def _quantized(
    values: torch.Tensor,
    source: Any,
    options: Recipe,
    threads: int,
    compare_rtn: bool | None,
    name: str,
) -> tuple[QuantizedMatrix | DeviceMatrix, str]:
    """Quantize a weight where it is, or on the host; return where as well."""
    both: dict[str, Any] = {"compare_rtn": compare_rtn, "name": name}
    if not computes(values.device):
        return quantize_matrix(values.numpy(), source, options, threads=threads, **both), "cpu"
    reason, passes = why_on_host(values.device, options), dict[str, Any]()
    # With a beam a search follows these passes, on the host, which needs them without feedback too.
    if options.method == "gptq" and options.beam_width == 1 and (options.feedback or not reason):
        passes = {"refine_passes": options.refine_passes, "refit_rounds": options.refit_rounds}
    if reason:
        none: dict[str, Any] = dict.fromkeys(passes, 0)
        first, weight = replace(options, **none), _on_host(values)
        solved = quantize_matrix(weight, source, first, threads=threads, **both)
        matrix = matrix_on(values.device, solved)
    else:
        matrix = gptq_on(values, source, options, **both)
    if any(passes.values()):
        matrix = refine_on(values, matrix, source, **passes)
    return matrix, f"cpu: {reason}" if reason else values.device.type


def _on_host(values: torch.Tensor) -> np.ndarray:
    return host_copy(values) if computes(values.device) else values.numpy()


def _read(stack: Sequence[Target]) -> torch.Tensor:
    """Return the weights of some layers as one, float32 (out, in), where they are."""
    if not computes(stack[0].view.weight.device):
        parts = [t.view.read() for t in stack]
        return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))
    return torch.cat([t.view.matrix for t in stack]).float().contiguous()


def _coupled_runs(
    stack: Sequence[Target], options: Recipe, outputs: OutputMoments | None
) -> list[tuple[slice, np.ndarray]]:
    """Return the runs of rows that make up for each other's errors, with their moments."""
    if not options.row_coupling or outputs is None:
        return []
    return list(outputs.parts([target.name for target in stack]))


def _within(
    runs: Sequence[tuple[slice, np.ndarray]], rows: slice
) -> list[tuple[slice, np.ndarray]]:
    """Return the runs that lie among some rows, counted from the first of these."""
    first = rows.start
    return [
        (slice(run.start - first, run.stop - first), B)
        for run, B in runs
        if first <= run.start and run.stop <= rows.stop
    ]


def _target(
    weight: torch.Tensor,
    layer: str,
    options: Recipe,
    source: Any,
    moments: Moments,
    threads: int,
    name: str,
) -> tuple[torch.Tensor, str]:
    """Return the weight corrected for the errors before it, and what that is called."""
    residual, drift = moments.residuals.get(layer), moments.drift
    alpha = options.error_propagation if residual is None else options.residual_propagation
    if alpha == 0:
        return weight, ""
    kind = options.target if residual is None else "residual"
    # By default what the solver's factor took, which may have been raised.
    damping = source.damping if options.target_damping is None else options.target_damping
    both: dict[str, Any] = {"alpha": alpha, "damping": damping, "name": name}
    if isinstance(drift, DeviceMean) and options.target == "least-squares":
        stream = None if residual is None else residual.matrix
        corrected = corrected_weights(weight, source, drift.matrix, stream, **both)
        return corrected, f"{kind} {alpha:g}"
    moved = None if residual is None else residual.finish()
    found = target_weights(
        weight.cpu().numpy(),
        source,
        drift.finish() if drift is not None else None,
        moved,
        method=options.target,
        threads=threads,
        **both,
    )
    return torch.from_numpy(found).to(weight.device), f"{kind} {alpha:g}"


def _diagnose(
    weight: torch.Tensor, dequantized: torch.Tensor, matrix: DeviceMatrix, hessian: Any
) -> dict[str, torch.Tensor]:
    """Return per row: power of weights and error; with H also RTN's objective, output power.

    In float64, computed where the weights are.
    """
    power, error = torch.empty((2, len(weight)), dtype=torch.float32, device=weight.device)
    for rows in row_blocks(weight):
        torch.linalg.vector_norm(weight[rows], dim=1, out=power[rows])
        torch.linalg.vector_norm(weight[rows] - dequantized[rows], dim=1, out=error[rows])
    squares = {"weight_power": power, "weight_error": error}
    out = {key: norms.double().square() for key, norms in squares.items()}
    if hessian is not None:
        measure = _measure(hessian, weight.device)
        if matrix.rtn_objectives is None:
            rounded = nearest(weight, matrix)
            out["objective_rtn"] = measure(torch.sub(weight, rounded, out=rounded))
        else:  # permuted groups, or rounding to nearest itself
            out["objective_rtn"] = matrix.rtn_objectives
        if matrix.row_objectives is None:
            out["objective"] = measure(weight - dequantized)
        out["output_power"] = measure(weight)
    return out


def _measure(hessian: Any, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what gives e H e^T of each row e: on the host, or where the model is."""
    if not computes(device):
        return lambda errors: torch.from_numpy(objective(errors.numpy(), 0, hessian))
    return partial(row_objectives, hessian=hessian_on(device, hessian))
