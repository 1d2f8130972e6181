"""Find where a scale per channel folds: proposed by structure, proven by running the model."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ptqkit.hf.equalization.fold import Fold, FoldPlan, apply_fold
from ptqkit.hf.equalization.layouts import head_sizes
from ptqkit.hf.equalization.proof import TOLERANCE, BlockProver, random_scales
from ptqkit.hf.equalization.trace import (
    capture_blocks,
    changed_inputs,
    model_outputs,
    relative_difference,
    scaled_output,
    short_batch,
)
from ptqkit.hf.models.structure import find_blocks
from ptqkit.nn.forward import calibration_mode
from ptqkit.nn.linear import LinearView, is_linear

__all__ = ["Fold", "FoldPlan", "apply_fold", "find_folds"]


def find_folds(
    model: nn.Module, batch: Mapping[str, torch.Tensor], blocks: tuple[str, ...] | None = None
) -> FoldPlan:
    """Find and prove the folds inside the repeated blocks of a model.

    No architecture is known by name. In a forward pass of at most 16 tokens, linear layers that
    read one tensor form a group; the layers of the same block that ran before it are candidates
    for its producer. A fold is accepted when three proofs hold, all with random powers of two,
    which floating point carries exactly:

    1. scaling the producer's outputs scales the group's inputs by the same factors, channel by
       channel and for every token, and changes nothing else in the block;
    2. with the parameters themselves scaled the block returns what it did (relative difference at
       most 1e-5 in float32, 1e-3 in float16, 8e-3 in bfloat16, 1e-10 in float64);
    3. with all folds at once the model returns what it did.

    Blocks are run one by one on what they were given, about eight times each. The model is as it
    was afterwards, bit for bit.

    Parameters
    ----------
    model : nn.Module
    batch : mapping of str to Tensor
        Keyword arguments of the model's forward; the first row needs at least two tokens.
    blocks : tuple of str, optional
        Paths of the lists of repeated blocks, if structure does not show them.

    Returns
    -------
    FoldPlan

    Raises
    ------
    CalibrationError
        If the batch holds a single token.
    UnsupportedModuleError
        If the model has no repeated blocks.

    Examples
    --------
    >>> plan = find_folds(model, tokenizer("Some words to try.", return_tensors="pt"))
    >>> print(plan.table())
    """
    names = [block for stack in find_blocks(model, blocks).values() for block in stack]
    batch = short_batch(batch)
    plan = FoldPlan()
    taken, heads = _shared(model), head_sizes(model)
    with calibration_mode(model):
        calls, outputs = capture_blocks(model, names, batch)
        for name, call in calls.items():
            if call.count != 1:
                _leave_block(plan, model, name, call.count)
                continue
            prover = BlockProver(model, name, call, heads, taken)
            prover.run()
            plan.folds.extend(prover.folds)
            plan.left_alone.update(prover.left_alone)
        for fold in _not_exact(model, batch, outputs, plan.folds):
            plan.folds.remove(fold)
            plan.left_alone[", ".join(fold.consumers)] = (
                f"what {fold.producer} returns is also read outside its block"
            )
    return plan


def _leave_block(plan: FoldPlan, model: nn.Module, name: str, count: int) -> None:
    reason = f"its block {name} runs {count} times in one forward pass"
    for path, module in model.get_submodule(name).named_modules(prefix=name):
        if is_linear(module):
            plan.left_alone[path] = reason


def _shared(model: nn.Module) -> dict[str, str]:
    """Return the modules that share parameters, or stand in the model twice, with the reason."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    reasons: dict[str, str] = {}
    for names in owners.values():
        for name in names if len(names) > 1 else ():
            others = ", ".join(n for n in names if n != name)
            reasons[name] = f"{name} shares its parameters with {others}"
    return reasons


def _not_exact(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    outputs: list[torch.Tensor],
    folds: Sequence[Fold],
) -> list[Fold]:
    """Return the folds that change what the model returns, by bisection."""
    if not folds:
        return []
    with contextlib.ExitStack() as stack:
        for fold in folds:
            _emulate(stack, model, fold)
        new = model_outputs(model, batch)
    dtypes = {t.dtype for t in model.parameters() if t.is_floating_point()}
    tolerance = max(TOLERANCE.get(d, TOLERANCE[torch.float32]) for d in dtypes)
    if relative_difference(new, outputs) <= tolerance:
        return []
    if len(folds) == 1:
        return list(folds)
    half = len(folds) // 2
    return [
        f for part in (folds[:half], folds[half:]) for f in _not_exact(model, batch, outputs, part)
    ]


def _emulate(stack: contextlib.ExitStack, model: nn.Module, fold: Fold) -> None:
    """Apply a fold by hooks: no parameter is touched, and none has to be kept twice."""
    producer = model.get_submodule(fold.producer)
    scales = random_scales(fold.channels, np.random.default_rng(0))
    width = fold.channels if fold.kind == "norm" else LinearView(producer).shape[0]
    factors = np.ones(width)
    factors[fold.rows] = 1.0 / scales
    spread = torch.from_numpy(fold.spread(scales))

    def change(name: str, value: Any) -> Any:
        return value * spread.to(value)

    stack.enter_context(scaled_output(producer, torch.from_numpy(factors)))
    modules = {name: model.get_submodule(name) for name in fold.consumers}
    stack.enter_context(changed_inputs(modules, change))
