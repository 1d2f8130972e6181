"""How much memory a schedule needs beyond the model, and how much there is."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ptqkit.hf.data.calibration import CalibrationSet
from ptqkit.hf.models.structure import Target

__all__ = ["MemoryEstimate", "available_memory", "estimate_memory", "peak_memory"]

# Allocators keep more than is alive: one pass measured 1.16 times the plain sum of shapes.
_SLACK = 1.25


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that each schedule needs beyond the model itself, from shapes."""

    one_pass: int
    reforward: int


def available_memory(device: torch.device) -> int | None:
    """Free memory where the activations live; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def peak_memory(device: torch.device) -> int | None:
    """Largest memory of this process so far: resident, or allocated by torch on a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def estimate_memory(
    model: nn.Module,
    targets: Mapping[str, Target],
    groups: Sequence[Sequence[str]],
    calibration: CalibrationSet,
    propagate: bool = False,
) -> MemoryEstimate:
    """Estimate from shapes.

    While all batches wait at a layer, each holds the residual stream, the block's normalized input,
    the outputs of the layers before it in the block, and the layer's input; one-pass holds that for
    all tokens, re-forward for one batch, with one block output (old and new) for all tokens.
    With error propagation (``propagate``) one-pass holds it twice: for the float model too.
    """
    size = next(model.parameters()).element_size()
    hidden: dict[str | None, int] = {}
    before: dict[str | None, int] = {}
    live = work = wide = 0
    for group in groups:
        target = targets[group[0]]
        inputs = target.shape[1]
        outputs = sum(targets[n].shape[0] for n in group)
        stream = hidden.setdefault(target.block, inputs)
        live = max(live, 2 * stream + before.get(target.block, 0) + inputs)
        before[target.block] = outputs
        wide = max(wide, stream)
        # H, its factor and the solver's copies; the weight as float32, its result and error.
        # Error propagation adds G and a factor in float64; the original, corrected weights in both.
        squares, weights = (8, 9) if propagate else (4, 4)
        work = max(work, 4 * inputs * (squares * inputs + weights * outputs))
    tokens = [b["input_ids"].numel() for b in calibration.batches]
    masks = _mask_bytes(model, calibration, size)
    largest = max(tokens)
    one_pass = (sum(tokens) * size * live + sum(masks)) * (2 if propagate else 1)
    reforward = sum(tokens) * size * 2 * wide + 2 * largest * size * live + max(masks)
    return MemoryEstimate(int(_SLACK * one_pass) + work, int(_SLACK * reforward) + work)


def _mask_bytes(model: nn.Module, calibration: CalibrationSet, size: int) -> list[int]:
    """Bytes of the (batch, 1, sequence, sequence) masks, which each batch holds while it waits."""
    eager = getattr(getattr(model, "config", None), "_attn_implementation", None) == "eager"
    result = []
    for batch, mask in zip(calibration.batches, calibration.masks(), strict=True):
        rows, length = batch["input_ids"].shape
        result.append(rows * length * length * size if eager or mask is not None else 0)
    return result
