"""What a run is about to work on, found and checked before anything changes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ptqkit.errors import CalibrationError, Problems, UnsupportedModuleError
from ptqkit.hf.checkpoint.formats import FORMATS
from ptqkit.hf.data.calibration import CalibrationSet, max_positions, prepare_calibration
from ptqkit.hf.models.experts import expert_modules
from ptqkit.hf.models.probe import Probe, probe_model
from ptqkit.hf.models.stream import StreamWriters, find_writers
from ptqkit.hf.models.structure import Structure, find_structure
from ptqkit.hf.quantization.expert_checks import check_experts
from ptqkit.hf.quantization.preflight import (
    check_float,
    check_kind,
    check_model,
    check_output,
    check_probe,
    check_tokens,
)
from ptqkit.nn.experts import ExpertLinears
from ptqkit.recipe.recipe import Recipe

__all__ = ["Inspection", "inspect_model"]


@dataclass(frozen=True)
class Inspection:
    """A model's structure, the calibration data, and what a short forward pass showed.

    Attributes
    ----------
    structure : Structure
    calibration : CalibrationSet or None
    probe : Probe
        Empty without calibration.
    unprobed : set of str
        Layers that the probe did not reach, but that may still see tokens.
    stream : StreamWriters
        Layers that write into residual streams, if the recipe asks for them.
    experts : mapping of str to ExpertLinears
        Modules of ``model`` with one linear layer per expert.
    """

    structure: Structure
    calibration: CalibrationSet | None = None
    probe: Probe = field(default_factory=Probe)
    unprobed: set[str] = field(default_factory=set)
    stream: StreamWriters = field(default_factory=StreamWriters)
    experts: Mapping[str, ExpertLinears] = field(default_factory=dict)


def inspect_model(
    model: nn.Module,
    recipe: Recipe | None,
    calibration: Any,
    tokenizer: Any,
    *,
    problems: Problems | None = None,
    written: torch.dtype | None = None,
    blocks: tuple[str, ...] | None,
    share_inputs: bool,
    checkpoint_format: str,
    out_dir: str | os.PathLike[str] | None,
    overwrite: bool,
    requantize: bool = False,
    stored: bool = False,
    **windows: Any,
) -> Inspection:
    """Read the data, find the structure, check both, and run a short probe.

    Parameters are those of :func:`ptqkit.quantize`; ``**windows`` are the options of
    :func:`~ptqkit.hf.data.calibration.prepare_calibration`, ``written`` is the type of the float
    values in the files, and ``problems`` holds what is wrong with the arguments themselves: then
    the recipe may be None. With ``stored``, weights are read from files when they are needed.

    Raises
    ------
    PreflightError
        With every problem at once: first what needs no forward pass, then what the probe shows.
    """
    problems = problems or Problems()
    check_kind(problems, model)
    data = None
    if calibration is not None:
        data = _read_data(problems, model, calibration, tokenizer, windows)
    structure = Structure({})
    if recipe is not None:
        try:
            structure = find_structure(model, recipe, blocks)
        except UnsupportedModuleError as error:
            problems.add(str(error), UnsupportedModuleError)
        if not requantize:
            check_float(problems, structure)
        held: str | None = checkpoint_format
        if held not in FORMATS:
            held = "auto" if out_dir is not None else None
        # Data that is there but unusable is one problem, not one more for every layer.
        check_model(problems, model, structure, recipe, calibration is not None, held, stored)
        check_experts(problems, model, structure.targets, expert_modules(model))
    if out_dir is not None:
        check_output(problems, model, structure.targets, out_dir, overwrite, tokenizer, written)
    problems.raise_if_any(structure.targets)
    if data is None:
        return Inspection(structure, experts=expert_modules(model))
    shown = probe_model(
        model,
        {name: target.module for name, target in structure.targets.items()},
        data.batches[0],
        {block: model.get_submodule(block) for block in structure.blocks},
        share_inputs,
    )
    if data.sequence_length == 1:
        # Of images and sounds only the model knows how many positions they have.
        positions = data.samples * shown.positions
        data = replace(data, tokens=positions, sequence_length=shown.positions)
    padded = any(mask is not None for mask in data.masks())
    unprobed = check_probe(problems, structure, shown, padded)
    problems.raise_if_any(structure.targets)
    stream = StreamWriters()
    if recipe is not None and recipe.residual_propagation:
        blocks_run = {block: model.get_submodule(block) for block in shown.blocks}
        stream = find_writers(model, blocks_run, data.batches[0])
    return Inspection(structure, data, shown, unprobed, stream, expert_modules(model))


def _read_data(
    problems: Problems, model: nn.Module, source: Any, tokenizer: Any, windows: dict[str, Any]
) -> CalibrationSet | None:
    try:
        data = prepare_calibration(source, tokenizer, max_length=max_positions(model), **windows)
    except (CalibrationError, ValueError, TypeError) as error:
        kind = type(error) if isinstance(error, CalibrationError) else CalibrationError
        problems.add(str(error), kind)
        return None
    check_tokens(problems, model, data)
    return data
