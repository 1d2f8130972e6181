"""Measure how the outputs of a model's layers matter together, before it is quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ptqkit.arrays.coupling import couple_rows
from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.hf.data.calibration import padding_mask
from ptqkit.hf.quantization.float_logits import split_windows
from ptqkit.hf.quantization.inspection import Inspection
from ptqkit.hf.quantization.processes import Processes
from ptqkit.nn.device_coupling import couple_rows_on
from ptqkit.nn.device_matrix import DeviceMatrix
from ptqkit.nn.output_moments import OutputMoments, output_moments

__all__ = ["couple_stack", "measure_outputs", "outputs_of_first"]

#: Calibration windows that it is measured on.
WINDOWS = 8
#: Bytes that may be kept of a window in any case: blocks run again on the way back if it is more.
_KEPT = 1 << 26


def measure_outputs(model: nn.Module, found: Inspection, room: int = 0) -> OutputMoments:
    """Return the second moments of the gradients at the outputs of layers with ``row_coupling``.

    Parameters
    ----------
    model : nn.Module
        Float; it is as before afterwards.
    found : Inspection
        With calibration data.
    room : int
        Bytes that the run will need later on, half of which may be kept of a window.
    """
    assert found.calibration is not None
    targets = found.structure.targets
    groups = [
        {n: targets[n].module for n in group if n in targets and targets[n].options.row_coupling}
        for group in found.probe.groups
    ]
    # One at a time: the memory of a backward pass is that of one window.
    windows = split_windows(found.calibration.batches[:WINDOWS])[:WINDOWS]
    masks = [padding_mask(window) for window in windows]
    blocks = [model.get_submodule(block) for block in found.structure.blocks]
    modules = [targets[n].module for n in targets]
    # What is kept would keep the weights of blocks that are read by turns.
    by_turns = any(p.device.type == "meta" for p in model.parameters())
    most = max(_KEPT, room // 2)
    if not by_turns and all(_activations(modules, window) <= most for window in windows):
        blocks = []  # what is inside of all of them is kept: no block runs again
    return output_moments(model, [g for g in groups if g], blocks, windows, masks)


def outputs_of_first(own: OutputMoments, processes: Processes) -> OutputMoments:
    """Return what the first process has measured: gradients on a GPU need not repeat to the bit."""
    lengths = {group: [len(m) for m in runs] for group, runs in own.groups.items()}
    lengths, sizes = processes.first((lengths, own.sizes))
    groups = {}
    for group, each in lengths.items():
        # All of a group at once, and not as objects: of a large model they are gigabytes.
        numbers = [n * n for n in each]
        flat = torch.empty(sum(numbers), dtype=torch.float32)
        if not processes.rank:
            flat = torch.from_numpy(np.concatenate([m.reshape(-1) for m in own.groups[group]]))
        processes.broadcast(flat)
        parts = flat.split(numbers)
        groups[group] = [v.view(n, n).numpy() for v, n in zip(parts, each, strict=True)]
    return OutputMoments(groups, sizes)


def _activations(modules: Sequence[nn.Module], window: Mapping[str, torch.Tensor]) -> int:
    """Return about how many bytes the gradients of a window keep of these layers' blocks."""
    tokens = max((v.shape[0] * v.shape[1] for v in window.values() if v.dim() > 1), default=0)
    # Inputs and outputs, and about as much again in norms, activations and attention.
    return 2 * 4 * tokens * sum(sum(m.weight.shape[:2]) for m in modules)


def couple_stack(
    weight: torch.Tensor,
    matrix: QuantizedMatrix | DeviceMatrix,
    source: Any,
    parts: Sequence[tuple[slice, np.ndarray]],
    passes: int,
    *,
    threads: int = 0,
    name: str = "",
) -> QuantizedMatrix | DeviceMatrix:
    """Couple rows of a stack of layers; rows of which no moments are known stay as they are.

    Parameters
    ----------
    weight : Tensor of float32, shape (out, in)
    matrix : QuantizedMatrix or DeviceMatrix
        The latter is coupled on its device.
    source : Hessian or Factorization
    parts : sequence of tuple
        Runs of rows with their second moments, as
        :meth:`~ptqkit.nn.output_moments.OutputMoments.parts` gives them; possibly none.
    passes, threads, name
        As :func:`ptqkit.couple_rows` takes them.
    """
    if isinstance(matrix, DeviceMatrix):
        return couple_rows_on(
            weight, matrix, source, parts, passes=passes, threads=threads, name=name
        )
    codes, last = matrix.codes.copy(), _objectives(matrix)
    for rows, B in parts:
        part, own = matrix.rows(rows.start, rows.stop), weight[rows].numpy()
        found = couple_rows(own, part, source, B, passes=passes, threads=threads, name=name)
        codes[rows], last[rows] = found.codes, _objectives(found)
    history = np.concatenate([matrix.row_objectives, last[None]])
    return replace(matrix, codes=codes, row_objectives=history)


def _objectives(matrix: QuantizedMatrix) -> np.ndarray:
    assert matrix.row_objectives is not None  # GPTQ's results have them
    return matrix.row_objectives[-1].copy()
