"""The work of an equalization: choose the scales of all folds, then fold them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ptqkit._repr import one_line_repr
from ptqkit.arrays.equalization import (
    SCALE_LIMITS,
    equalization_scales,
    search_equalization,
    weight_span,
)
from ptqkit.errors import LAYER_FAILURES, CalibrationError, PtqkitError, prefix_error
from ptqkit.hf.data.calibration import CalibrationSet, batch_shape
from ptqkit.hf.equalization.find import find_folds
from ptqkit.hf.equalization.fold import Fold, FoldPlan, apply_fold, uninterrupted
from ptqkit.hf.equalization.inputs import Inputs, measure_inputs
from ptqkit.hf.equalization.report import EqualizationReport, EqualizedGroup
from ptqkit.hf.equalization.trace import model_outputs, relative_difference, short_batch
from ptqkit.hf.progress import Progress, ProgressStage
from ptqkit.nn.forward import calibration_mode
from ptqkit.nn.linear import LinearView
from ptqkit.recipe.options import Equalization
from ptqkit.recipe.recipe import Recipe

__all__ = ["Choice", "EqualizationError", "EqualizationRun", "owner_of_mark"]

#: Largest relative difference of a float32 model's outputs that rounding explains.
LOGITS_TOLERANCE = 1e-4


class EqualizationError(PtqkitError, ArithmeticError):
    """The float model's outputs changed by more than rounding: do not use this model."""


def _wanted(plan: FoldPlan, equalization: Equalization, recipe: Recipe | None) -> FoldPlan:
    """Leave out folds that the method or the recipe does not want, with the reason."""
    kept = FoldPlan(left_alone=dict(plan.left_alone))
    for fold in plan.folds:
        names = ", ".join(fold.consumers)
        if equalization.method == "smoothquant" and fold.kind != "norm":
            kept.left_alone[names] = "SmoothQuant scales only what norms return"
        elif not _quantized(fold, recipe):
            kept.left_alone[names] = "the recipe skips every layer of the group"
        else:
            kept.folds.append(fold)
    return kept


def _quantized(fold: Fold, recipe: Recipe | None) -> dict[str, Recipe | None]:
    """Return the consumers that the recipe quantizes, with their options; all without a recipe."""
    if recipe is None:
        return dict.fromkeys(fold.consumers)
    options = {name: recipe.for_layer(name) for name in fold.consumers}
    return {name: found for name, found in options.items() if found is not None}


@dataclass
class Choice:
    """What was found for one fold.

    Attributes
    ----------
    fold : Fold
    scales : ndarray of float64, shape (channels,)
        Of the producer's channels.
    row : EqualizedGroup
        Of the report.
    activation, weight : ndarray of float32, shape (in,)
        Spans of the consumers' inputs and columns (of SmoothQuant: largest magnitudes) that the
        scales come from.
    """

    __repr__ = one_line_repr

    fold: Fold
    scales: np.ndarray
    row: EqualizedGroup
    activation: np.ndarray
    weight: np.ndarray


class EqualizationRun:
    """One equalization: all scales first, with the model only read, then the folds."""

    def __init__(
        self,
        model: nn.Module,
        calibration: CalibrationSet,
        equalization: Equalization,
        recipe: Recipe | None,
        blocks: tuple[str, ...] | None,
        threads: int,
        progress: Progress | None,
    ) -> None:
        self.model, self.calibration, self.equalization = model, calibration, equalization
        self.recipe, self.blocks, self.threads = recipe, blocks, threads
        self.progress = progress
        self.report = EqualizationReport(equalization.method, equalization.alpha)
        self.report.calibration_tokens = calibration.tokens
        self.start = time.perf_counter()
        self.inputs: dict[str, Inputs] = {}
        # What folds decided so far will multiply the rows of layers by.
        self.rows: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.folded: list[str] = []
        self.total = 0

    def execute(self) -> None:
        """Find the folds, measure, choose scales, fold them and compare."""
        batch = self._batch()
        plan = self._plan(batch)
        with calibration_mode(self.model):
            before = model_outputs(self.model, batch)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in before):
            raise CalibrationError(
                "the float model's outputs on the first calibration tokens hold NaN or Inf: what "
                "folds cannot be recognized in them"
            )
        choices = self._choices(plan)
        self._apply(choices)
        self.report.groups = [choice.row for choice in choices]
        if choices:
            _compare(self.model, batch, before, self.report)
        else:
            self.report.warnings.append("nothing was folded: the model is unchanged")
        self.report.seconds["total"] = time.perf_counter() - self.start

    def choose(self) -> list[Choice]:
        """Find the folds, measure and choose all scales, in order of execution.

        The model is as it was.
        """
        return self._choices(self._plan(self._batch()))

    def _plan(self, batch: dict[str, torch.Tensor]) -> FoldPlan:
        plan = find_folds(self.model, batch, self.blocks)
        plan = _wanted(plan, self.equalization, self.recipe)
        self.report.left_alone = plan.left_alone
        self._lap("folds")
        return plan

    def _choices(self, plan: FoldPlan) -> list[Choice]:
        readers = {f.consumers[0]: self.model.get_submodule(f.consumers[0]) for f in plan.folds}
        tokens = self.equalization.tokens if self.equalization.alpha == "search" else 0
        self.inputs = measure_inputs(self.model, readers, self.calibration, tokens)
        self.report.search_tokens = min(tokens, self.calibration.tokens)
        self._lap("ranges")
        choices = self._find_scales(plan)
        self._lap("scales")
        return choices

    def _batch(self) -> dict[str, torch.Tensor]:
        longest = max(self.calibration.batches, key=lambda b: batch_shape(b)[1])
        return short_batch(longest)

    def _lap(self, name: str) -> None:
        spent = sum(self.report.seconds.values())
        self.report.seconds[name] = time.perf_counter() - self.start - spent

    def _find_scales(self, plan: FoldPlan) -> list[Choice]:
        """Choose the scales of all folds.

        Folds into linear layers come first, the last ones before: they scale rows that the choice
        of others is based on.
        """
        found: dict[int, Choice] = {}
        order = sorted(range(len(plan.folds)), key=lambda i: (plan.folds[i].kind == "norm", -i))
        stage = ProgressStage(self.progress, "equalizing", len(order))
        for index in order:
            fold = plan.folds[index]
            if fold.consumers[0] not in self.inputs:
                names = ", ".join(fold.consumers)
                plan.left_alone[names] = "it saw no token of the calibration data"
                stage.skip()
                continue
            try:
                found[index] = self._choose(fold)
            except LAYER_FAILURES as error:
                raise prefix_error(error, fold.consumers[0]) from error
            stage.step(fold.consumers[0], found[index].row.error)
        return [found[i] for i in sorted(found)]

    def _weight(self, name: str) -> np.ndarray:
        """Return the weight of a layer, float32 (out, in), with its rows as they will be."""
        weight = LinearView(self.model.get_submodule(name)).read()
        if name in self.rows:
            weight = weight.copy()
            rows, factors = self.rows[name]
            weight[rows] *= factors[:, None].astype(np.float32)
        return weight

    def _choose(self, fold: Fold) -> Choice:
        ranges = self.inputs[fold.consumers[0]].ranges
        quantized = _quantized(fold, self.recipe)
        weights = [self._weight(name) for name in quantized]
        if self.equalization.method == "smoothquant":
            activation = ranges.absmax
            weight = np.max([np.abs(w).max(axis=0) for w in weights], axis=0)
        else:
            activation = ranges.span
            weight = weight_span(weights, threads=self.threads)
        shared = fold.channel_of if fold.channels < len(fold.channel_of) else None
        row = EqualizedGroup(fold.kind, fold.producer, list(fold.consumers), math.nan)
        if self.equalization.alpha == "search":
            self._note_options(quantized)
            spread = self._search(fold, row, weights, next(iter(quantized.values())), shared)
        else:
            row.alpha = float(self.equalization.alpha)
            spread = equalization_scales(activation, weight, row.alpha, channel_of=shared)
        scales = fold.gather(spread).astype(np.float64)
        row.scale_minimum, row.scale_maximum = float(scales.min()), float(scales.max())
        row.dead_channels = int(((activation == 0) | (weight == 0)).sum())
        row.tokens = ranges.tokens
        if fold.kind != "norm":
            self.rows[fold.producer] = (fold.rows, 1.0 / scales)
        return Choice(fold, scales, row, activation, weight)

    def _note_options(self, quantized: Mapping[str, Recipe | None]) -> None:
        """Warn if layers will be quantized in another way than the search measures."""
        first, *others = quantized
        different = [n for n in others if _measured(quantized[n]) != _measured(quantized[first])]
        if different:
            self.report.warnings.append(
                f"the search measured {', '.join(different)} with the options of {first}, which "
                "reads the same input; theirs differ"
            )
        options = quantized[first]
        activations = None if options is None else options.activations
        if activations is not None and activations.outlier_threshold is not None:
            text = "the search measured without leaving columns of outliers in float"
            if text not in self.report.warnings:
                self.report.warnings.append(text)

    def _search(
        self,
        fold: Fold,
        row: EqualizedGroup,
        weights: list[np.ndarray],
        options: Recipe | None,
        shared: np.ndarray | None,
    ) -> np.ndarray:
        """Return the scales of the alpha with the least quantized output error, float32 (in,)."""
        assert options is not None
        inputs, activations = self.inputs[fold.consumers[0]], options.activations
        quantizing: dict[str, Any] = {}
        if activations is not None:
            quantizing["activation_bits"] = activations.bits
            quantizing["activation_granularity"] = activations.granularity
            quantizing["activation_symmetric"] = activations.symmetric
        found = search_equalization(
            weights,
            inputs.sample,
            inputs.ranges,
            bits=options.whole_bits,
            group_size=options.group_size,
            symmetric=options.symmetric,
            per_tensor=options.per_tensor,
            channel_of=shared,
            threads=self.threads,
            name=fold.consumers[0],
            **quantizing,
        )
        row.alpha, row.error = found.alpha, found.error
        errors = dict(zip(found.alphas.tolist(), found.errors.tolist(), strict=True))
        row.error_closed_form = errors[0.5]
        row.error_none = next(e for a, e in errors.items() if math.isnan(a))
        return found.scales

    def _apply(self, choices: list[Choice]) -> None:
        """Fold all scales; the model is marked with the first."""
        self.total = len(choices)
        mark = {"method": self.equalization.method, "alpha": self.equalization.alpha}
        for choice in choices:
            with uninterrupted():
                apply_fold(self.model, choice.fold, choice.scales)
                self.folded.append(choice.fold.producer)
                owner_of_mark(self.model).ptqkit_equalized = {**mark, "folds": len(self.folded)}


def _measured(options: Recipe | None) -> tuple[Any, ...]:
    """Return the options of a recipe that the search measures."""
    if options is None:
        return ()
    o = options
    return (o.bits, o.group_size, o.symmetric, o.per_tensor, o.activations)


def owner_of_mark(model: nn.Module) -> Any:
    """Return the object that holds the mark of an equalized model: its configuration, if any."""
    config = getattr(model, "config", None)
    return model if config is None else config


def _compare(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    before: list[torch.Tensor],
    report: EqualizationReport,
) -> None:
    """Measure how much the float model's outputs changed."""
    with calibration_mode(model):
        report.logits_difference = relative_difference(model_outputs(model, batch), before)
    text = (
        f"the float model's outputs changed by {report.logits_difference:.2g} (relative to the "
        "largest)"
    )
    half = [p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    limits = [g for g in report.groups if g.scale_maximum >= SCALE_LIMITS[1]]
    if report.logits_difference <= LOGITS_TOLERANCE:
        return
    if half:
        report.warnings.append(f"{text}: {half[0]} rounds scaled weights; float32 would not")
        return
    hint = f"; {limits[0].producer} has scales at their limit" if limits else ""
    raise EqualizationError(f"{text}, more than {LOGITS_TOLERANCE:g}: load the model again{hint}")
