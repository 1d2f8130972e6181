"""Find everything that can be known to go wrong before the first calibration forward."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ptqkit._places import claim_place, source_folder
from ptqkit.errors import CalibrationError, Problems, UnsupportedModuleError
from ptqkit.hf.checkpoint.biases import plan_biases
from ptqkit.hf.checkpoint.formats import FORMATS, NATIVE
from ptqkit.hf.checkpoint.inputs import measure_flat_inputs
from ptqkit.hf.checkpoint.save import SHARD_BYTES, check_savable, room_needed, saved_tensors
from ptqkit.hf.checkpoint.spec import describe_targets
from ptqkit.hf.data.calibration import CalibrationSet, max_positions
from ptqkit.hf.models.dtypes import dtype_of
from ptqkit.hf.models.probe import Probe
from ptqkit.hf.models.structure import Structure, Target
from ptqkit.hf.models.wrappers import wrapper_problem
from ptqkit.nn.activations import installed_quantizer
from ptqkit.nn.linear import is_linear
from ptqkit.nn.matrix_solver import obq_problem
from ptqkit.nn.quantized_mark import is_quantized
from ptqkit.recipe.budget import candidate_bits
from ptqkit.recipe.groups import group_size_problem
from ptqkit.recipe.recipe import Recipe

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = [
    "check_finite",
    "check_float",
    "check_kind",
    "check_model",
    "check_output",
    "check_probe",
    "check_tokens",
]


def check_model(
    problems: Problems,
    model: nn.Module,
    structure: Structure,
    recipe: Recipe,
    calibrated: bool,
    checkpoint_format: str | None,
    stored: bool = False,
) -> None:
    """Check what the model and the recipe show by themselves: shapes, patterns, weights, format.

    Parameters
    ----------
    checkpoint_format : str or None
        What must hold the result; None if it may stay in memory.
    stored : bool
        Weights are read from files when they are needed, so nothing is said of their values.
    """
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
    if meta and not stored:
        problems.add(
            f"{len(meta)} parameters are on the meta device (the first is {meta[0]}); load the "
            "weights before quantizing"
        )
        return
    for target in structure.targets.values():
        _check_target(problems, target, calibrated)
    slow = {n: t.view.shape for n, t in structure.targets.items() if t.options.method == "obq"}
    if text := obq_problem(slow):
        problems.add(text, UnsupportedModuleError)
    if not stored:
        check_finite(problems, structure.targets)
    if checkpoint_format is None or not structure.targets:
        return
    for text in _format_conflicts(model, structure.targets, checkpoint_format):
        problems.add(f"checkpoint_format={checkpoint_format!r}: {text}")
    gaining = [n for n, t in structure.targets.items() if t.options.bias_correction]
    foreign = checkpoint_format != "auto" and FORMATS[checkpoint_format].foreign
    if gaining and foreign and getattr(model, "config", None) is not None:
        for text in plan_biases(model, gaining).problems():
            problems.add(text)


def check_kind(problems: Problems, model: nn.Module) -> None:
    """Refuse at once what is no float model by itself: everything else would follow from it."""
    text = wrapper_problem(model)
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        text = text or "the model is quantized already; load the float model"
    if text is not None:
        problems.add(text, UnsupportedModuleError)
        problems.raise_if_any()


def check_float(problems: Problems, structure: Structure) -> None:
    """Check that no layer holds what an earlier run on this model object made of it."""
    found = [name for name, target in structure.targets.items() if is_quantized(target.module)]
    if found:
        problems.add(
            f"{len(found)} of {len(structure.targets)} layers (the first is {found[0]}) are "
            "quantized already in this model object: load the float model again, restore a copy "
            "of its weights (ptqkit.hf.FloatWeights), or give requantize=True to go on from the "
            "quantized ones",
            UnsupportedModuleError,
        )


def _check_target(problems: Problems, target: Target, calibrated: bool) -> None:
    options, columns = target.options, target.view.shape[1]
    if text := group_size_problem(target.name, columns, options.group_size):
        problems.add(text)
    needed_for = replace(options, equalization=None).needs_calibration()
    if needed_for and not calibrated:
        problems.add(f"{target.name}: {needed_for} needs calibration data", CalibrationError)
    if installed_quantizer(target.module) is not None:
        problems.add(
            f"{target.name}: its activations are quantized already; load the model again, or take "
            "the quantizers off with ptqkit.nn.remove_quantizers(model)",
            UnsupportedModuleError,
        )


def check_finite(problems: Problems, targets: Mapping[str, Target]) -> None:
    """Check that weights are finite."""
    bad = {}
    for name, target in targets.items():
        weight = target.view.weight
        # A sum is finite only if every term is; it may overflow, so look twice before complaining.
        if not math.isfinite(float(weight.sum(dtype=torch.float32))):
            bad[name] = int((~torch.isfinite(weight)).sum())
    found = [name for name, count in bad.items() if count]
    if len(found) == 1:
        rows, columns = targets[found[0]].view.shape
        problems.add(f"{found[0]}: {bad[found[0]]} of its {rows}x{columns} weights are not finite")
    elif found:
        problems.add(
            f"{found[0]} and {len(found) - 1} more layers: {sum(bad.values())} of their weights "
            "are not finite"
        )


def _format_conflicts(
    model: nn.Module, targets: Mapping[str, Target], checkpoint_format: str
) -> list[str]:
    """Ask a checkpoint format why it could not hold the layers once they are quantized.

    "auto" ends with ptqkit's own format, so what that cannot hold nothing can.
    """
    chosen = NATIVE if checkpoint_format == "auto" else FORMATS[checkpoint_format]
    targets = _with_unlike_bits(targets)
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


def _with_unlike_bits(targets: Mapping[str, Target]) -> dict[str, Target]:
    """Give layers that share an average all bits that they may get, in turn."""
    found: dict[str, Target] = {}
    for name, target in targets.items():
        budget = target.options.bits_budget
        if budget is not None:
            levels = candidate_bits(budget)
            options = replace(target.options, bits=levels[len(found) % len(levels)])
            target = replace(target, options=options)
        found[name] = target
    return found


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
    ids = [b["input_ids"] for b in calibration.batches if "input_ids" in b]
    if not ids:
        return
    low, high = min(int(i.min()) for i in ids), max(int(i.max()) for i in ids)
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
    tokenizer: Any = None,
    written: torch.dtype | None = None,
) -> None:
    """Check that a checkpoint can be written: the model, the place, and room on the disk.

    Parameters
    ----------
    written : torch.dtype, optional
        Type of the float values in the files; that of the model by default.
    """
    meta = any(p.device.type == "meta" for p in model.parameters())
    try:
        if not meta:
            check_savable(model, targets)
    except ValueError as error:
        problems.add(f"out_dir: {error}", UnsupportedModuleError)
    taken = "exists already; use overwrite=True or another name"
    label = f"out_dir {os.path.basename(os.path.normpath(out_dir))!r}"
    try:
        place = claim_place(out_dir, overwrite, source_folder(model), taken, label)
    except (OSError, ValueError) as error:
        problems.add(str(error), type(error))
        return
    parent = next(p for p in place.parents if p.is_dir())
    size = checkpoint_bytes(model, targets, written)
    needed, free = room_needed(size, len(targets), tokenizer), shutil.disk_usage(parent).free
    if free < needed:
        problems.add(
            f"out_dir: the checkpoint needs about {needed / 2**20:,.0f} MiB, the disk has "
            f"{free / 2**20:,.0f} MiB free",
            OSError,
        )
    largest = min(size, SHARD_BYTES)
    if resource is not None:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if 0 <= limit < largest:
            problems.add(
                f"out_dir: a file of {largest:,} bytes is needed, but the limit of this process "
                f"(ulimit -f) is {limit:,}",
                OSError,
            )


def checkpoint_bytes(
    model: nn.Module, targets: Mapping[str, Target], written: torch.dtype | None = None
) -> int:
    """Return the size of all tensors of a checkpoint in the widest format, or a little more."""
    own = dtype_of(model)
    total = 0
    for name, tensor in saved_tensors(model).items():
        if name.removesuffix(".weight") not in targets:
            dtype = written if written is not None and tensor.dtype == own else tensor.dtype
            total += tensor.numel() * dtype.itemsize
    for target in targets.values():
        rows, columns = target.view.shape
        options = target.options
        bits = 2 if options.bits == "ternary" else int(options.whole_bits)
        groups = -(-columns // min(options.group_size or columns, columns))
        # Codes, which int-quantized files hold in bytes; scales; zero-points; g_idx; the shape.
        total += rows * (-(-columns * (8 if options.activations else bits) // 32) * 4)
        total += rows * groups * 4 + rows * -(-groups * bits // 8) + 4 * groups + 4 * columns + 64
        total += 4 * rows if options.bias_correction else 0
    return total


def check_probe(
    problems: Problems, structure: Structure, found: Probe, padded: bool = False
) -> set[str]:
    """Check what the short forward pass showed; ``padded`` says if any batch holds padding.

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
    if found.expands and padded:
        problems.add(
            "no layer reads a row for each of input_ids: the model puts the places of images "
            "between the tokens itself, so padding cannot be left out; calibrate without padding "
            "(a sample a batch, or samples of one length)",
            CalibrationError,
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
