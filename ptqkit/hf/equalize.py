"""Equalize a model: ``ptqkit.equalize(model, calibration)`` moves range from inputs to weights."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import ptqkit
from ptqkit.equalization import SCALE_LIMITS
from ptqkit.errors import CalibrationError, PtqkitError, UnsupportedModuleError
from ptqkit.hf.calibration import CalibrationSet, max_positions, prepare_calibration
from ptqkit.hf.capture import calibration_mode
from ptqkit.hf.equalization_report import EqualizationReport, EqualizedGroup
from ptqkit.hf.fold import Fold, FoldPlan, apply_fold, uninterrupted
from ptqkit.hf.fold_probe import model_outputs, relative_difference, short_batch
from ptqkit.hf.folding import find_folds
from ptqkit.hf.input_samples import Inputs, measure_inputs
from ptqkit.hf.progress import Progress, ProgressEvent, make_progress
from ptqkit.hf.recipe import Equalization, Recipe
from ptqkit.hf.solve import named_error
from ptqkit.hf.structure import Target

__all__ = [
    "EqualizationError",
    "EqualizationInterrupted",
    "EqualizationReport",
    "EqualizedGroup",
    "equalize",
    "equalize_calibrated",
]

#: Largest relative difference of a float32 model's outputs that rounding explains.
LOGITS_TOLERANCE = 1e-4


class EqualizationError(PtqkitError, ArithmeticError):
    """The float model's outputs changed by more than rounding: do not use this model."""


class EqualizationInterrupted(KeyboardInterrupt):
    """Ctrl-C while scales were folded; the message says what had been done.

    Attributes
    ----------
    folded : list of str
        Producers of the folds that had been applied.
    """

    def __init__(self, folded: list[str], total: int) -> None:
        self.folded = folded
        super().__init__(_partial_text("interrupted", folded, total))


def _partial_text(what: str, folded: list[str], total: int) -> str:
    if not folded:
        return f"equalization {what}: nothing had been folded, the model is unchanged"
    return (
        f"equalization {what}: {len(folded)} of {total} folds are applied, from {folded[0]} to "
        f"{folded[-1]}; the model computes what it did, but load it again before another run"
    )


def equalize(
    model: nn.Module,
    calibration: Any,
    *,
    tokenizer: Any = None,
    method: str = "awe",
    alpha: float | str = 0.5,
    tokens: int = 512,
    recipe: Recipe | str | Mapping[str, Any] | None = None,
    samples: int = 128,
    sequence_length: int = 512,
    batch_size: int = 4,
    seed: int = 0,
    start_token: str | int | None = "auto",
    blocks: tuple[str, ...] | None = None,
    threads: int = 0,
    progress: bool | Progress | None = None,
) -> EqualizationReport:
    """Equalize a float model in place: its outputs stay, its inputs and weights share the range.

    Wherever a scale per channel folds (:func:`ptqkit.hf.find_folds`), inputs are divided and weight
    columns multiplied by s = r_x^alpha / r_w^(1 - alpha), with r_x and r_w the ranges of a channel
    over the calibration tokens and over all layers that read it [AWEQ, section 3.2]. All ranges
    are of the float model before any fold. A fold into a linear layer scales that layer's rows, so
    these scales are found first and the weight ranges of norm folds are of the rows as they will
    be; a norm fold scales columns only, which changes no other group's figures.

    Nothing is written until all scales are known, and then fold by fold, each as a whole: a run
    that stops in the middle leaves a model that computes what it did. No copy of the weights is
    kept.

    Parameters
    ----------
    model : nn.Module
        A transformers model in float, on CPU or GPU.
    calibration
        Text, tokens, batches or a dataset; with ``tokenizer``, ``samples``, ``sequence_length``,
        ``batch_size``, ``seed`` and ``start_token`` as :func:`ptqkit.quantize` takes them.
    method : {"awe", "smoothquant"}
        "smoothquant" takes absolute maxima for ranges and folds into norms only (Xiao et al. 2022,
        eq. 4).
    alpha : float from 0 to 1, or "search"
        0.5 is AWEQ's eq. 10. "search" needs ``recipe`` and takes for each group the alpha with the
        least quantized output error (:func:`ptqkit.search_equalization`), or no equalization.
    tokens : int
        Calibration tokens, evenly spread, that the search measures on.
    recipe : optional
        How the model is to be quantized: what the search measures. Layers that it skips count for
        no range, and groups it skips altogether are left alone.
    blocks : tuple of str, optional
        Paths of the lists of repeated blocks, where structure does not tell.
    threads : int
        0 is automatic. No result depends on it.
    progress : bool or callable, optional
        An event per group; see :func:`ptqkit.hf.progress.make_progress`.

    Returns
    -------
    EqualizationReport

    Raises
    ------
    CalibrationError
        If the calibration data is missing, too small (fewer than two tokens) or not finite.
    UnsupportedModuleError
        If the model is equalized already (``model.config.ptqkit_equalized``, which a saved model
        keeps), is quantized, or has no repeated blocks.
    EqualizationError
        If a float32 model's outputs on a short batch change by more than 1e-4.
    EqualizationInterrupted
        On Ctrl-C (a KeyboardInterrupt); it says what had been folded.

    Examples
    --------
    >>> report = ptqkit.equalize(model, "train.txt", tokenizer=tokenizer)
    >>> print(report.table())
    """
    options = Equalization(method, alpha, tokens)
    prepared = prepare_calibration(
        calibration,
        tokenizer,
        samples=samples,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        start_token=start_token,
        limit=max_positions(model),
    )
    parsed = None if recipe is None else Recipe.parse(recipe)
    return equalize_calibrated(
        model, prepared, options, parsed, blocks, threads, make_progress(progress)
    )


def equalize_calibrated(
    model: nn.Module,
    calibration: CalibrationSet,
    equalization: Equalization,
    recipe: Recipe | None = None,
    blocks: tuple[str, ...] | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> EqualizationReport:
    """Equalize a model on prepared calibration data; see :func:`equalize`."""
    _check(model, calibration, equalization, recipe)
    start = time.perf_counter()
    report = EqualizationReport(equalization.method, equalization.alpha)
    report.calibration_tokens = calibration.tokens
    batch = short_batch(max(calibration.batches, key=lambda b: b["input_ids"].shape[1]))
    plan = _wanted(find_folds(model, batch, blocks), equalization, recipe)
    report.seconds["folds"] = time.perf_counter() - start
    with calibration_mode(model):
        before = model_outputs(model, batch)
    started = time.perf_counter()
    searching = equalization.alpha == "search"
    readers = {f.consumers[0]: model.get_submodule(f.consumers[0]) for f in plan.folds}
    inputs = measure_inputs(model, readers, calibration, equalization.tokens if searching else 0)
    report.seconds["ranges"] = time.perf_counter() - started
    started = time.perf_counter()
    stage = _Stage(model, equalization, recipe, inputs, threads, progress)
    found = stage.find_scales(plan)
    report.seconds["scales"] = time.perf_counter() - started
    _apply(model, equalization, found)
    report.groups = [choice.row for choice in found]
    report.left_alone = plan.left_alone
    if searching:
        report.search_tokens = min(equalization.tokens, calibration.tokens)
    if found:
        _compare(model, batch, before, report)
    else:
        report.warnings.append("no place was found where a scale folds: the model is unchanged")
    report.seconds["total"] = time.perf_counter() - start
    return report


def _check(
    model: nn.Module,
    calibration: CalibrationSet,
    equalization: Equalization,
    recipe: Recipe | None,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    config = getattr(model, "config", model)
    if getattr(config, "ptqkit_equalized", None) is not None:
        raise UnsupportedModuleError(
            "the model is equalized already (config.ptqkit_equalized says how); load the original "
            "model"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModuleError("the model is quantized already; equalize the float model")
    if any(p.device.type == "meta" for p in model.parameters()):
        raise UnsupportedModuleError(
            "parameters are on the meta device; load the weights before equalizing"
        )
    if equalization.alpha == "search" and recipe is None:
        raise ValueError("alpha='search' needs recipe=: it measures the error of quantizing so")
    if calibration.tokens < 2:
        raise CalibrationError(
            f"equalization needs at least 2 calibration tokens, there is {calibration.tokens}: one "
            "token has no range"
        )


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
    """Consumers that the recipe quantizes, with their options; all of them without a recipe."""
    if recipe is None:
        return dict.fromkeys(fold.consumers)
    options = {name: recipe.for_layer(name) for name in fold.consumers}
    return {name: found for name, found in options.items() if found is not None}


@dataclass
class _Choice:
    """The scales of one fold, float64 (channels,), and its row of the report."""

    fold: Fold
    scales: np.ndarray
    row: EqualizedGroup


class _Stage:
    """Finds the scales of all folds; the model is only read."""

    def __init__(
        self,
        model: nn.Module,
        equalization: Equalization,
        recipe: Recipe | None,
        inputs: Mapping[str, Inputs],
        threads: int,
        progress: Progress | None,
    ) -> None:
        self.model, self.equalization, self.recipe = model, equalization, recipe
        self.inputs, self.threads, self.progress = inputs, threads, progress
        self.start = time.perf_counter()
        # What folds decided so far will multiply the rows of layers by.
        self.rows: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    def find_scales(self, plan: FoldPlan) -> list[_Choice]:
        """Folds into linear layers first: they scale rows that norm folds look at."""
        found: dict[int, _Choice] = {}
        order = sorted(range(len(plan.folds)), key=lambda i: plan.folds[i].kind == "norm")
        for done, index in enumerate(order, 1):
            fold = plan.folds[index]
            if fold.consumers[0] not in self.inputs:
                names = ", ".join(fold.consumers)
                plan.left_alone[names] = "it saw no token of the calibration data"
                continue
            try:
                found[index] = self._choose(fold)
            except Exception as error:
                raise named_error(error, fold.consumers[0]) from error
            self._notify(found[index].row, done, len(order))
        return [found[i] for i in sorted(found)]

    def _weight(self, name: str) -> np.ndarray:
        """Weight of a layer, float32 (out, in), its rows as they will be."""
        module = self.model.get_submodule(name)
        weight = Target(name, module, Recipe(), None).read()
        if name in self.rows:
            weight = weight.copy()
            for rows, factors in self.rows[name]:
                weight[rows] *= factors[:, None].astype(np.float32)
        return weight

    def _choose(self, fold: Fold) -> _Choice:
        ranges = self.inputs[fold.consumers[0]].ranges
        quantized = _quantized(fold, self.recipe)
        weights = [self._weight(name) for name in quantized]
        if self.equalization.method == "smoothquant":
            activation = ranges.absmax
            weight = np.max([np.abs(w).max(axis=0) for w in weights], axis=0)
        else:
            activation = ranges.extent
            weight = ptqkit.weight_extent(weights, threads=self.threads)
        shared = fold.channel_of if fold.channels < len(fold.channel_of) else None
        row = EqualizedGroup(fold.kind, fold.producer, list(fold.consumers), math.nan)
        if self.equalization.alpha == "search":
            spread = self._search(fold, row, weights, next(iter(quantized.values())), shared)
        else:
            row.alpha = float(self.equalization.alpha)
            spread = ptqkit.equalization_scales(activation, weight, row.alpha, channel_of=shared)
        scales = fold.gather(spread).astype(np.float64)
        row.scale_minimum, row.scale_maximum = float(scales.min()), float(scales.max())
        row.dead_channels = int(((activation == 0) | (weight == 0)).sum())
        row.tokens = ranges.tokens
        if fold.kind != "norm":
            self.rows.setdefault(fold.producer, []).append((fold.rows, 1.0 / scales))
        return _Choice(fold, scales, row)

    def _search(
        self,
        fold: Fold,
        row: EqualizedGroup,
        weights: list[np.ndarray],
        options: Recipe | None,
        shared: np.ndarray | None,
    ) -> np.ndarray:
        """Scales of the alpha with the least quantized output error, float32 (in,)."""
        assert options is not None
        inputs, activations = self.inputs[fold.consumers[0]], options.activations
        quantizing: dict[str, Any] = {}
        if activations is not None:
            quantizing["activation_bits"] = activations.bits
            quantizing["activation_granularity"] = activations.granularity
            quantizing["activation_symmetric"] = activations.symmetric
        found = ptqkit.search_equalization(
            weights,
            inputs.sample,
            inputs.ranges,
            bits=options.bits,
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

    def _notify(self, row: EqualizedGroup, done: int, total: int) -> None:
        if self.progress is None:
            return
        elapsed = time.perf_counter() - self.start
        left = elapsed / done * (total - done)
        name = row.consumers[0]
        self.progress(ProgressEvent(name, done, total, row.error, elapsed, left))


def _apply(model: nn.Module, equalization: Equalization, choices: list[_Choice]) -> None:
    """Fold all scales; the model is marked with the first."""
    mark = {"method": equalization.method, "alpha": equalization.alpha, "folds": len(choices)}
    folded: list[str] = []
    try:
        for choice in choices:
            with uninterrupted():
                apply_fold(model, choice.fold, choice.scales)
                folded.append(choice.fold.producer)
                getattr(model, "config", model).ptqkit_equalized = mark
    except KeyboardInterrupt as error:
        raise EqualizationInterrupted(folded, len(choices)) from error
    except Exception as error:
        if hasattr(error, "add_note"):
            error.add_note(_partial_text("stopped by an error", folded, len(choices)))
        raise


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
