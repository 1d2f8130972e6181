"""Find everything that can be known to go wrong before the first calibration forward."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ptqkit.errors import CalibrationError, PreflightError, Problem, UnsupportedModuleError
from ptqkit.hf.checkpoint.biases import plan_biases
from ptqkit.hf.checkpoint.formats import FORMATS
from ptqkit.hf.checkpoint.inputs import measure_flat_inputs
from ptqkit.hf.checkpoint.spec import describe_targets
from ptqkit.hf.data.calibration import CalibrationSet, max_positions
from ptqkit.hf.models.probe import Probe
from ptqkit.hf.models.structure import Structure, Target
from ptqkit.nn.activations import installed_quantizer
from ptqkit.nn.linear import is_linear
from ptqkit.recipe.recipe import Recipe

__all__ = ["Problems", "check_model", "check_output", "check_probe", "check_tokens"]


class Problems:
    """Collects problems and raises them together."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def add(self, text: str, kind: type[Exception] = ValueError) -> None:
        """Note a problem; ``kind`` is the class of error that it is."""
        self.found.append(Problem(text, kind))

    def raise_if_any(self) -> None:
        """Raise PreflightError with all problems."""
        if self.found:
            raise PreflightError(self.found)


def check_model(
    problems: Problems,
    model: nn.Module,
    structure: Structure,
    recipe: Recipe,
    calibrated: bool,
    checkpoint_format: str,
) -> None:
    """Check what the model and the recipe show by themselves: shapes, patterns, weights, format."""
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        problems.add("the model is quantized already; load the float model", UnsupportedModuleError)
    for text in structure.problems:
        problems.add(text, UnsupportedModuleError)
    if recipe.equalization is not None:
        if not calibrated:
            problems.add("equalization needs calibration data", CalibrationError)
        if getattr(getattr(model, "config", None), "ptqkit_equalized", None) is not None:
            problems.add(
                "the model is equalized already (config.ptqkit_equalized says how); load the "
                "original model, or leave equalization out of the recipe",
                UnsupportedModuleError,
            )
    for pattern in recipe.unmatched(structure.known_names):
        problems.add(f"pattern {pattern!r} of the recipe matches no module of the model")
    meta = [n for n, p in model.named_parameters() if p.device.type == "meta"]
    if meta:
        problems.add(
            f"{len(meta)} parameters are on the meta device (the first is {meta[0]}); load the "
            "weights before quantizing"
        )
        return
    for target in structure.targets.values():
        _check_target(problems, target, calibrated)
    for text in _format_conflicts(model, structure.targets, checkpoint_format):
        problems.add(f"checkpoint_format={checkpoint_format!r}: {text}")
    gaining = [n for n, t in structure.targets.items() if t.options.bias_correction]
    if gaining and checkpoint_format != "auto" and FORMATS[checkpoint_format].foreign:
        for text in plan_biases(model, gaining).problems():
            problems.add(text)


def _check_target(problems: Problems, target: Target, calibrated: bool) -> None:
    options, (rows, columns) = target.options, target.view.shape
    if options.group_size is not None and columns % options.group_size:
        problems.add(
            f"{target.name}: group_size {options.group_size} does not divide its {columns} inputs; "
            "use a divisor, or one scale per channel (None; on the command line: channel), for "
            "this layer alone by an override"
        )
    needed_for = replace(options, equalization=None).needs_calibration()
    if needed_for and not calibrated:
        problems.add(f"{target.name}: {needed_for} needs calibration data", CalibrationError)
    if installed_quantizer(target.module) is not None:
        problems.add(
            f"{target.name}: its activations are quantized already; load the model again, or take "
            "the quantizers off with ptqkit.nn.remove_quantizers(model)",
            UnsupportedModuleError,
        )
    weight = target.view.weight
    # A sum is finite only if every term is; it may overflow, so look twice before complaining.
    if not math.isfinite(float(weight.sum(dtype=torch.float32))):
        bad = int((~torch.isfinite(weight)).sum())
        if bad:
            problems.add(f"{target.name}: {bad} of its {rows}x{columns} weights are not finite")


def _format_conflicts(
    model: nn.Module, targets: Mapping[str, Target], checkpoint_format: str
) -> list[str]:
    """Ask a checkpoint format why it could not hold the layers once they are quantized."""
    if checkpoint_format == "auto" or not targets:
        return []
    chosen = FORMATS[checkpoint_format]
    recipes = {name: target.options.activations for name, target in targets.items()}
    dynamic = [name for name, a in recipes.items() if a is not None and a.dynamic]
    flat_inputs = measure_flat_inputs(model, dynamic) if chosen.foreign else {}
    specs = describe_targets(targets, flat_inputs)
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    found = []
    for spec in specs:
        # A group size that does not divide is refused already, whatever the format.
        size = spec.grid.group_size
        if size is not None and spec.in_features % size:
            spec = replace(spec, grid=replace(spec.grid, group_size=None))
        found += chosen.problems(spec)
        found += chosen.forecast(spec)
    return found + chosen.joint_problems(specs, linears)


def check_tokens(problems: Problems, model: nn.Module, calibration: CalibrationSet) -> None:
    """Check token ids and lengths against the model's tables."""
    limit = max_positions(model)
    if limit is not None and calibration.sequence_length > limit:
        problems.add(
            f"calibration has sequences of {calibration.sequence_length} tokens, but the model "
            f"takes at most {limit}",
            CalibrationError,
        )
    try:
        vocabulary = model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return
    low = min(int(b["input_ids"].min()) for b in calibration.batches)
    high = max(int(b["input_ids"].max()) for b in calibration.batches)
    if low < 0 or high >= vocabulary:
        problems.add(
            f"calibration holds token ids from {low} to {high}, but the model's vocabulary has "
            f"{vocabulary}; is this the right tokenizer?",
            CalibrationError,
        )


def check_output(
    problems: Problems,
    model: nn.Module,
    targets: Mapping[str, Target],
    out_dir: str | os.PathLike[str],
    overwrite: bool,
) -> None:
    """Check that a checkpoint can be written: the place is free and the disk has room."""
    path = Path(out_dir)
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        problems.add(f"out_dir {path.name!r} exists already; use overwrite=True or another name")
    parent = next((p for p in [path.absolute(), *path.absolute().parents] if p.is_dir()), None)
    if parent is None or not os.access(parent, os.W_OK):
        problems.add(f"out_dir {str(path)!r} cannot be created there")
        return
    needed = checkpoint_bytes(model, targets)
    free = shutil.disk_usage(parent).free
    if free < needed:
        problems.add(
            f"out_dir: the checkpoint needs about {needed / 2**20:,.0f} MiB, the disk has "
            f"{free / 2**20:,.0f} MiB free"
        )


def checkpoint_bytes(model: nn.Module, targets: Mapping[str, Target]) -> int:
    """Estimate the checkpoint's size: float parameters as they are, codes, scales, zero-points."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    for target in targets.values():
        rows, columns = target.view.shape
        bits = 2 if target.options.bits == "ternary" else int(target.options.bits)
        groups = columns // min(target.options.group_size or columns, columns)
        total -= rows * columns * target.view.weight.element_size()
        total += rows * columns * bits // 8 + rows * groups * 5 + 4 * columns
    return total


def check_probe(problems: Problems, structure: Structure, found: Probe) -> set[str]:
    """Check what the short forward pass showed.

    Returns
    -------
    set of str
        Layers the probe did not reach that may still see tokens: items of a list inside a block,
        as experts are.
    """
    for name, count in found.repeated.items():
        problems.add(
            f"{name} runs {count} times in one forward pass: a reused layer cannot be quantized; "
            "add an override 'skip'",
            UnsupportedModuleError,
        )
    unprobed = set()
    for name in found.uncalled:
        block = structure.targets[name].block
        inside = name[len(block) + 1 :].split(".") if block is not None else []
        if any(part.isdigit() for part in inside):
            unprobed.add(name)
        else:
            problems.add(
                f"{name} is never called by the model's forward on this calibration data (its "
                "weight may be used directly); add an override 'skip'",
                UnsupportedModuleError,
            )
    return unprobed
