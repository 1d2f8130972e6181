"""Give each layer its bits if a recipe names their average alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from ptqkit._repr import one_line_repr
from ptqkit.arrays.solvers import rtn
from ptqkit.hf.models.structure import Target
from ptqkit.hf.quantization.inspection import Inspection
from ptqkit.nn.rounding_loss import rounding_losses
from ptqkit.recipe.budget import candidate_bits, share_budget
from ptqkit.recipe.recipe import Recipe

__all__ = ["MixedBits", "choose_bits"]

#: Calibration windows that layers are compared on: batches are taken until there are so many.
WINDOWS = 8


@dataclass(frozen=True)
class MixedBits:
    """What :func:`choose_bits` found.

    Attributes
    ----------
    recipe : Recipe
        With one override per layer in addition, so that no average is left to share out.
    inspection : Inspection
        Its targets with their bits.
    losses : dict of str to dict of int to float
        Estimated cost of rounding each layer alone, in nats per token, by bits.
    """

    __repr__ = one_line_repr

    recipe: Recipe
    inspection: Inspection
    losses: dict[str, dict[int, float]]


def choose_bits(model: nn.Module, recipe: Recipe, found: Inspection, threads: int = 0) -> MixedBits:
    """Measure what rounding each layer costs, and share the recipe's average bits out.

    Layers whose bits an override names keep them, and do not count. Each of the others is rounded
    to nearest, with its own groups, at every number of bits that it may get; what that costs the
    model is estimated by :func:`ptqkit.nn.rounding_loss.rounding_losses`. Layers that no token
    reached get the budget without its fraction.

    Parameters
    ----------
    model : nn.Module
        Float; it is as before afterwards.
    recipe : Recipe
    found : Inspection
        With calibration data.
    threads : int
        Of rounding.
    """
    assert found.calibration is not None and recipe.bits_budget is not None
    targets = found.structure.targets
    open_ones = {n: t for n, t in targets.items() if t.options.bits_budget is not None}
    if not open_ones:
        return MixedBits(recipe, found, {})
    levels = candidate_bits(recipe.bits_budget)
    batches, masks = found.calibration.batches, found.calibration.masks()
    count, seen = 0, 0
    while count < len(batches) and seen < WINDOWS:
        seen += len(next(iter(batches[count].values())))
        count += 1

    def changes(name: str) -> Mapping[int, torch.Tensor]:
        return {bits: _change(open_ones[name], bits, threads) for bits in levels}

    losses = rounding_losses(
        model,
        {name: target.module for name, target in open_ones.items()},
        [model.get_submodule(block) for block in found.structure.blocks],
        batches[:count],
        masks[:count],
        changes,
    )
    sizes = {n: t.view.shape[0] * t.view.shape[1] for n, t in open_ones.items()}
    shared = share_budget(losses, {n: sizes[n] for n in losses}, recipe.bits_budget)
    bits = {name: shared.get(name, int(recipe.bits_budget)) for name in open_ones}
    overrides = {**recipe.overrides, **{name: {"bits": b} for name, b in bits.items()}}
    new = {n: replace(t, options=replace(t.options, bits=bits[n])) for n, t in open_ones.items()}
    structure = replace(found.structure, targets={**targets, **new})
    return MixedBits(
        replace(recipe, overrides=overrides), replace(found, structure=structure), losses
    )


def _change(target: Target, bits: int, threads: int) -> torch.Tensor:
    """Return what rounding to nearest changes in the weight."""
    options, weight = target.options, target.view.read()
    rounded = rtn(
        weight,
        bits=bits,
        group_size=options.group_size,
        symmetric=options.symmetric,
        per_tensor=options.per_tensor,
        grid="minmax" if options.per_tensor else "mse",
        threads=threads,
        name=target.name,
    )
    return torch.from_numpy(rounded.dequantize() - weight)
