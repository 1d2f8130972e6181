"""Quantize the layers of any torch module: ``ptqkit.nn.quantize_module(model, batches)``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ptqkit.arrays.bias import bias_correction
from ptqkit.arrays.matrix import QuantizedMatrix, stack_rows
from ptqkit.arrays.solvers import objective
from ptqkit.errors import LAYER_FAILURES, CalibrationError, UsageError, prefix_error
from ptqkit.nn.convolution import warn_transposed
from ptqkit.nn.forward import StopForwardError, calibration_mode, device_of, hooks
from ptqkit.nn.matrix_solver import quantize_matrix
from ptqkit.nn.module_inputs import GroupMoments, InputMoments
from ptqkit.nn.module_layers import ModuleLayer, Order, find_layers, left_float, probe_order
from ptqkit.nn.module_result import ModuleResult, ModuleRow
from ptqkit.nn.on_grid import dequantize, rtn_on_grid
from ptqkit.nn.quantized_mark import mark_quantized
from ptqkit.recipe import as_recipe
from ptqkit.recipe.options import check_names
from ptqkit.recipe.recipe import Recipe

__all__ = ["quantize_module"]

#: One scale per output: few convolutions have a multiple of 128 inputs.
_DEFAULT = Recipe(group_size=None)

Call = Callable[[nn.Module, Any], Any]


def quantize_module(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    recipe: Recipe | str | Mapping[str, Any] | Sequence[Any] = _DEFAULT,
    *,
    call: Call | None = None,
    threads: int = 0,
    progress: Callable[[ModuleRow], None] | None = None,
    **changes: Any,
) -> ModuleResult:
    """Quantize the linear layers and convolutions of any module in place: ResNets, UNets, others.

    Layers go in order of execution. For each, the batches run through the model up to it, so that
    it is calibrated on what the quantized layers before it give: on average half a forward pass per
    layer and batch, with one H in memory. Layers with the same input tensor share the pass. With
    ``calibrate_on="float"`` all layers are calibrated on the float model's inputs in a single pass,
    with every H in memory, and weights change at the end. Models of transformers are for
    :func:`ptqkit.quantize`, which needs one pass for either.

    Transposed convolutions stay float, with a warning that names them; they and whatever else holds
    matrices and is not quantized are in ``left_float`` of the result.

    A convolution with groups has one H per group. A module that runs several times in one forward
    pass has one H of all its inputs.

    Parameters
    ----------
    model : nn.Module
        On CPU or GPU; runs in evaluation mode.
    batches : iterable, optional
        What the model is called with: a tensor, a tuple of positional arguments or a mapping of
        named ones. All are kept in memory. Only ``method="rtn"`` works without.
    recipe : Recipe, preset name, dict or list of parts
        By default ``quality`` with one scale per output channel. All layers are quantized;
        overrides leave some out (``{"conv1": "skip"}``). Activations, equalization and propagated
        errors are refused.
    call : callable, optional
        ``call(model, batch)`` if the model takes a batch in another way.
    threads : int
        Of the solver; 0 is its own policy.
    progress : callable, optional
        Called with the :class:`ModuleRow` of each layer that is done.
    **changes
        Options of the recipe, such as ``bits=3``.

    Returns
    -------
    ModuleResult

    Raises
    ------
    PreflightError
        With all problems that show before a weight changes: layers that are never called, tied or
        computed weights, groups that do not divide, weights that are not finite, OBQ that would
        take hours.
    CalibrationError
        If there is no batch, or one without samples.
    ValueError
        If a layer's inputs are not finite; the message names it. Layers before it are quantized.

    Examples
    --------
    >>> images = [x for x, _ in loader]
    >>> result = quantize_module(resnet, images, bits=4, overrides={"fc": {"bits": 8}})
    >>> print(result.table())
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    start = time.perf_counter()
    check_names(changes, "recipe", [f.name for f in fields(Recipe)])
    chosen = replace(as_recipe(recipe), **changes)
    if chosen.beyond_weights:
        raise UsageError(
            f"quantize_module quantizes weights alone: leave {chosen.beyond_weights} out"
        )
    if chosen.bits_budget is not None:
        raise UsageError(
            f"bits {chosen.bits} is an average, which ptqkit.quantize shares out; give whole bits "
            "here, and others to single layers by overrides"
        )
    data = None if batches is None else _read(batches)
    layers = find_layers(model, chosen, data is not None, threads)
    rest = left_float(model, layers)
    warn_transposed(model, lambda name: chosen.for_layer(name) is None)
    run = _Run(threads, progress)
    with run.telling(len(layers)):
        if data is None:
            for layer in layers.values():
                run.write(layer, run.solve(layer, GroupMoments()))
        else:
            with calibration_mode(model):
                _calibrated(model, layers, data, chosen, run, call)
    total = time.perf_counter() - start
    solve = run.seconds
    seconds = {"total": total, "solve": solve, "calibration": total - solve}
    return ModuleResult(model, run.matrices, run.rows, chosen, seconds, rest)


def _calibrated(
    model: nn.Module,
    layers: dict[str, ModuleLayer],
    data: list[Any],
    recipe: Recipe,
    run: _Run,
    call: Call | None,
) -> None:
    """Quantize all layers, on the inputs that the recipe asks for."""
    device = device_of(model)

    def forward(batch: Any) -> None:
        _forward(model, _moved(batch, device), call)

    order = probe_order(layers, data, forward)
    if recipe.calibrate_on == "float":
        moments = _all_at_once(layers, order, data, forward)
        solved = {n: run.solve(layers[n], moments[n], order) for g in order.groups for n in g}
        for name, result in solved.items():
            run.write(layers[name], result)
        return
    for group in order.groups:
        inputs = _accumulators(layers, group)
        _up_to(layers[group[0]], order, data, forward, inputs)
        found = {kind: x.finish() for kind, x in inputs.items()}
        for name in group:
            run.write(layers[name], run.solve(layers[name], found[layers[name].geometry], order))


def _accumulators(
    layers: dict[str, ModuleLayer], group: Sequence[str]
) -> dict[tuple[Any, ...], InputMoments]:
    """Return what accumulates the one input of a group, per way in which it is unfolded."""
    means = any(layers[name].options.bias_correction for name in group)
    found: dict[tuple[Any, ...], InputMoments] = {}
    for name in group:
        kind = layers[name].geometry
        found.setdefault(kind, InputMoments(name, layers[name].view, means))
    return found


def _up_to(
    layer: ModuleLayer,
    order: Order,
    data: Sequence[Any],
    forward: Callable[[Any], None],
    inputs: Mapping[tuple[Any, ...], InputMoments],
) -> None:
    """Run the batches up to the last call of a layer and add its inputs."""
    for batch, calls in zip(data, order.calls, strict=True):
        left = calls[layer.name]
        if not left:
            continue

        def add(name: str, value: torch.Tensor) -> None:
            nonlocal left
            for moments in inputs.values():
                moments.add(value)
            left -= 1
            if not left:
                raise StopForwardError

        with hooks({layer.name: layer.module}, add), contextlib.suppress(StopForwardError):
            forward(batch)


def _all_at_once(
    layers: dict[str, ModuleLayer],
    order: Order,
    data: Sequence[Any],
    forward: Callable[[Any], None],
) -> dict[str, GroupMoments]:
    """Return the moments of every layer's inputs in the float model."""
    inputs = {group[0]: _accumulators(layers, group) for group in order.groups}

    def add(name: str, value: torch.Tensor) -> None:
        for moments in inputs[name].values():
            moments.add(value)

    with hooks({name: layers[name].module for name in inputs}, add):
        for batch in data:
            forward(batch)
    found = {name: {k: x.finish() for k, x in kinds.items()} for name, kinds in inputs.items()}
    return {n: found[group[0]][layers[n].geometry] for group in order.groups for n in group}


@dataclass(frozen=True)
class _Solved:
    matrix: QuantizedMatrix
    row: ModuleRow
    shift: np.ndarray | None


@dataclass
class _Run:
    """What has been quantized so far."""

    threads: int
    progress: Callable[[ModuleRow], None] | None
    matrices: dict[str, QuantizedMatrix] = field(default_factory=dict)
    rows: list[ModuleRow] = field(default_factory=list)
    seconds: float = 0.0

    @contextlib.contextmanager
    def telling(self, total: int) -> Iterator[None]:
        """Say of an error, or of Ctrl-C, what has been quantized by then."""
        try:
            yield
        except BaseException as error:
            if self.matrices and hasattr(error, "add_note"):
                error.add_note(
                    f"{len(self.matrices)} of {total} layers are already quantized in this model; "
                    "load it again before another run"
                )
            raise

    def solve(
        self, layer: ModuleLayer, moments: GroupMoments, order: Order | None = None
    ) -> _Solved:
        """Quantize a layer; nothing is written to the model."""
        start = time.perf_counter()
        try:
            solved = _solve(layer, moments, self.threads)
        except LAYER_FAILURES as error:
            raise prefix_error(error, layer.name) from None
        spent = time.perf_counter() - start
        self.seconds += spent
        calls = 0 if order is None else order.calls[0][layer.name]
        return replace(solved, row=replace(solved.row, calls=calls, seconds=spent))

    def write(self, layer: ModuleLayer, solved: _Solved) -> None:
        """Put a layer's result into the model."""
        with torch.no_grad():
            layer.view.write(dequantize(solved.matrix))
            if solved.shift is not None:
                layer.view.subtract_bias(solved.shift)
        mark_quantized(layer.module)
        self.matrices[layer.name] = solved.matrix
        self.rows.append(solved.row)
        if self.progress is not None:
            self.progress(solved.row)


def _solve(layer: ModuleLayer, moments: GroupMoments, threads: int) -> _Solved:
    name = layer.name
    dtype = str(layer.view.weight.dtype).removeprefix("torch.")
    options = layer.options.with_scale_dtype(dtype)
    weight, hessians = layer.view.read(), moments.hessians
    parts = np.split(weight, layer.groups)
    if options.method == "rtn" and options.grid != "hessian":
        # One scale per tensor is one for all groups.
        matrix = quantize_matrix(weight, None, options, threads=threads, name=name)
    else:
        matrix = stack_rows(
            [
                quantize_matrix(part, hessian, options, threads=threads, name=name)
                for part, hessian in zip(parts, hessians or [None] * len(parts), strict=True)
            ]
        )
    values = dequantize(matrix)
    measured: dict[str, Any] = {}
    if hessians:
        nearest = matrix.rtn_objectives
        measured = {
            "objective": _objective(weight - values, hessians, threads),
            "objective_rtn": float(nearest.sum())
            if nearest is not None
            else _objective(weight - rtn_on_grid(weight, matrix), hessians, threads),
            "output_power": _objective(weight, hessians, threads),
        }
    shift = None
    if options.bias_correction:
        pieces = zip(parts, np.split(values, layer.groups), moments.means, strict=True)
        shift = np.concatenate([bias_correction(w, q, m, threads=threads) for w, q, m in pieces])
    row = ModuleRow(
        name,
        type(layer.module).__name__,
        options.method,
        tuple(layer.view.weight.shape),
        layer.groups,
        matrix.bits,
        options.group_size,
        bits_per_weight=matrix.bits_per_weight,
        tokens=moments.tokens,
        dead_inputs=matrix.dead_inputs,
        damping_raised=matrix.damping_raised,
        notes=_notes(layer, moments, matrix),
        **measured,
    )
    return _Solved(matrix, row, shift)


def _objective(error: np.ndarray, hessians: Sequence[Any], threads: int) -> float:
    """Return the sum over groups of tr(E H E^T)."""
    parts = zip(np.split(error, len(hessians)), hessians, strict=True)
    return float(sum(objective(e, 0, h, threads=threads).sum() for e, h in parts))


def _notes(layer: ModuleLayer, moments: GroupMoments, matrix: QuantizedMatrix) -> str:
    notes = []
    if matrix.damping_raised:
        notes.append(f"damping raised to {matrix.damping:g}")
    if 0 < moments.tokens < layer.view.shape[1]:
        notes.append(f"only {moments.tokens} rows for {layer.view.shape[1]} inputs")
    return "; ".join(notes)


def _read(batches: Iterable[Any]) -> list[Any]:
    """Return the batches as a list; none may be empty."""
    if isinstance(batches, (torch.Tensor, Mapping)):
        raise CalibrationError(
            f"batches must be a list of batches, not one {type(batches).__name__}: put it into one"
        )
    found = list(batches)
    if not found:
        raise CalibrationError("batches is empty: there is nothing to calibrate on")
    for index, batch in enumerate(found):
        for tensor in _tensors(batch):
            if not tensor.numel():
                raise CalibrationError(
                    f"batches[{index}] holds an empty tensor of shape {tuple(tensor.shape)}"
                )
    return found


def _tensors(batch: Any) -> list[torch.Tensor]:
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    values = batch if isinstance(batch, (list, tuple)) else (batch,)
    return [v for v in values if isinstance(v, torch.Tensor)]


def _moved(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: _moved(v, device) for k, v in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_moved(v, device) for v in batch)
    return batch


def _forward(model: nn.Module, batch: Any, call: Call | None) -> None:
    """Call the model with a batch; its result is dropped."""
    if call is not None:
        call(model, batch)
        return
    try:
        if isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, (list, tuple)):
            model(*batch)
        else:
            model(batch)
    except TypeError as error:
        raise CalibrationError(
            f"{type(model).__name__} cannot be called with a batch ({error}); say how with "
            "call=lambda model, batch: ..."
        ) from error
