"""Diagnose a model: one pass over calibration data, its weights, and what quantization costs it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from ptqkit._defaults import BATCH_SIZE
from ptqkit.arrays._inputs import check_count
from ptqkit.arrays.outliers import outlier_dimensions, relative_outliers
from ptqkit.arrays.spectrum import spectral_norm, stable_rank
from ptqkit.arrays.statistics import ActivationStatistics
from ptqkit.errors import CalibrationError, UnsupportedModuleError, check_choice
from ptqkit.hf.data.calibration import CalibrationSet, max_positions, prepare_calibration
from ptqkit.hf.diagnostics.depth import measure_sensitivity
from ptqkit.hf.diagnostics.diagnosis import DiagnosisReport
from ptqkit.hf.diagnostics.observe import AttentionObserver, InputObserver, Place, is_norm
from ptqkit.hf.diagnostics.rows import AttentionRow, InputRow, NormRow, WeightRow
from ptqkit.hf.diagnostics.sdpa import FusedAttention
from ptqkit.hf.models.attention import attention_hooks, find_attention, installed_attention
from ptqkit.hf.models.structure import find_blocks
from ptqkit.hf.progress import Progress, ProgressStage, close_progress, make_progress
from ptqkit.hf.softmax.driver import describe
from ptqkit.nn.attention import BatchFacts
from ptqkit.nn.experts import expert_shape
from ptqkit.nn.forward import calibration_mode, forward
from ptqkit.nn.linear import LinearView, is_linear
from ptqkit.nn.softmax.study import refuse_installed

__all__ = ["QUANTILES", "SENSITIVITIES", "check_rules", "diagnose", "find_outliers"]

SENSITIVITIES = ("kind", "layer", "depth")
QUANTILES = (0.0, 0.001, 0.01, 0.25, 0.5, 0.75, 0.99, 0.999, 1.0)

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def diagnose(
    model: nn.Module,
    calibration: Any,
    *,
    tokenizer: Any = None,
    samples: int = 8,
    sequence_length: int = 256,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    start_token: str | int | None = "auto",
    bits: int = 8,
    value: float = 6.0,
    layers: float = 0.25,
    tokens: float = 0.06,
    ratio: float = 6.0,
    sensitivity: Collection[str] | bool = True,
    blocks: tuple[str, ...] | None = None,
    name: str = "",
    progress: bool | Progress | None = None,
) -> DiagnosisReport:
    """Measure why a model is hard to quantize, and where; the model stays as it was.

    One pass over the data collects everything about activations while the model runs: nothing of
    them is kept, and on a GPU they stay there. Sensitivity runs the data once more per case.

    Two rules name outlier channels. "relative" holds for models of any size: a channel of an input
    that follows a norm, whose largest magnitude is at least ``ratio`` times that of the median
    channel. The other is the published one for dimensions of the hidden states [LLM.int8()]: a
    magnitude of at least ``value`` in a share ``layers`` of these inputs, at a share ``tokens`` of
    all tokens. In a model without norms the first inputs of attention and MLP take their place.

    Parameters
    ----------
    model : nn.Module
        With repeated blocks. Attention is measured where transformers lets it be hooked, or where
        blocks call torch's fused attention; sensitivity (inside attention: where transformers lets
        it be hooked) where the model returns ``logits``; elsewhere ``notes`` say so.
    calibration
        A :class:`ptqkit.hf.CalibrationSet`, or what :func:`ptqkit.hf.prepare_calibration` makes
        one of, with the options up to ``start_token``.
    bits : int from 2 to 8
        Of all grids.
    value, layers, tokens, ratio : float
        Of the outlier rules.
    sensitivity : collection of str, or bool
        Of "kind" (each kind of tensor in all blocks), "layer" (each block alone) and "depth" (all
        blocks up to each one); all of them by default.
    blocks : tuple of str, optional
        Paths of the lists of repeated blocks, where structure does not tell.
    name : str
        Of the model, for tables.
    progress : bool or callable, optional
        An event per batch, weight and case of sensitivity, with the stages "activations",
        "weights" and "sensitivity"; see :func:`ptqkit.hf.progress.make_progress`.

    Raises
    ------
    ValueError
        If an option is out of range, or something in the model is quantized by hooks.
    UnsupportedModuleError
        If the model has no repeated blocks with linear layers.
    CalibrationError
        If the data cannot be used, or values on it or weights are not finite; the message names
        the layer.
    """
    wanted = _check(bits, sensitivity)
    rules = {"value": value, "layers": layers, "tokens": tokens, "ratio": ratio}
    check_rules(**rules)
    data = prepare_calibration(
        calibration,
        tokenizer,
        samples=samples,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        start_token=start_token,
        max_length=max_positions(model),
    )
    names = [block for stack in find_blocks(model, blocks).values() for block in stack]
    parts = _Parts(model, names)
    report = DiagnosisReport(
        name or type(model).__name__,
        bits=bits,
        options=rules,
        quantiles=list(QUANTILES),
        calibration=describe(data),
    )
    report.notes += _unmeasured_experts(model)
    resolved = make_progress(progress)
    try:
        _measure(model, data, parts, report, wanted, resolved)
    finally:
        close_progress(resolved)
    return report


def _measure(
    model: nn.Module,
    data: CalibrationSet,
    parts: _Parts,
    report: DiagnosisReport,
    wanted: Sequence[str],
    progress: Progress | None,
) -> None:
    _run(model, data, parts, report, ProgressStage(progress, "activations", len(data.batches)))
    stage = ProgressStage(progress, "weights", len(parts.linears))
    for path, module in parts.linears.items():
        report.weights.append(parts.weight(path, module))
        stage.step(path)
    report.norms = [parts.norm(path, module) for path, module in parts.norms.items()]
    spread = {row.name: row.std for row in report.norms}
    for row in report.inputs:
        row.norm_std = spread.get(row.norm or "", row.norm_std)
    find_outliers(report)
    if wanted:
        measure_sensitivity(model, data, wanted, report.bits, report, progress)


def _check(bits: int, sensitivity: Collection[str] | bool) -> tuple[str, ...]:
    check_count(bits, "bits", 2, 8)
    if isinstance(sensitivity, bool):
        return SENSITIVITIES if sensitivity else ()
    wanted = (sensitivity,) if isinstance(sensitivity, str) else tuple(sensitivity)
    for name in wanted:
        check_choice("each of sensitivity", name, SENSITIVITIES)
    return wanted


def check_rules(*, value: float, layers: float, tokens: float, ratio: float) -> None:
    """Refuse thresholds of :func:`diagnose` out of range before anything runs."""
    try:
        ActivationStatistics(1, threshold=value)
    except ValueError as error:
        raise ValueError(f"value: the {error}") from None
    outlier_dimensions([np.zeros(1, np.int64)], 1, layers=layers, tokens=tokens)
    relative_outliers(np.ones(1), ratio)


class _Parts:
    """Linear layers and norms inside the blocks of a model."""

    def __init__(self, model: nn.Module, blocks: list[str]) -> None:
        self.blocks = blocks
        inside = [(n, m) for n, m in model.named_modules() if self.block(n) is not None]
        self.linears = {n: m for n, m in inside if is_linear(m)}
        self.norms = {n: m for n, m in inside if is_norm(m)}
        if not self.linears:
            raise UnsupportedModuleError(
                f"the blocks of {type(model).__name__} hold no float linear layers"
            )
        self._part: dict[str, str] = {}

    def block(self, name: str) -> str | None:
        """Block that a module lies in."""
        return next((b for b in self.blocks if name.startswith(f"{b}.")), None)

    def where(self, name: str) -> tuple[str, int]:
        """Block and its number."""
        block = name if name in self.blocks else self.block(name) or self.blocks[0]
        return block, self.blocks.index(block)

    def name_parts(self, places: Mapping[str, Place]) -> None:
        """Say of every layer which part of its block it belongs to: see :data:`PARTS`."""
        seen: set[tuple[str, str]] = set()
        for place in places.values():
            first = place.consumers[0]
            block = self.where(first)[0]
            kind = "attention" if _ATTENTION.search(first[len(block) :]) else "mlp"
            kind = kind if not first.endswith("output.dense") or "attention" in kind else "mlp"
            part = f"{kind} {'out' if (block, kind) in seen else 'in'}"
            seen.add((block, kind))
            self._part |= dict.fromkeys(place.consumers, part)

    def part(self, name: str) -> str:
        """Part of a layer; those that never ran belong to the MLP."""
        return self._part.get(name, "mlp out")

    def weight(self, name: str, module: nn.Module) -> WeightRow:
        """Statistics of a weight."""
        block, depth = self.where(name)
        W = LinearView(module).read()
        try:
            norm = spectral_norm(W)
        except ValueError as error:
            raise CalibrationError(f"the weight of {name}: {error}") from None
        mean, std = float(W.mean(dtype=np.float64)), float(W.std(dtype=np.float64))
        fourth = float(np.mean((W - np.float32(mean)) ** 4, dtype=np.float64))
        return WeightRow(
            name,
            block,
            depth,
            self.part(name),
            list(W.shape),
            std,
            float(np.abs(W).max()),
            fourth / std**4 - 3 if std else float("nan"),
            norm,
            stable_rank(W, norm),
            np.quantile(W, QUANTILES).tolist(),
        )

    def norm(self, name: str, module: nn.Module) -> NormRow:
        """Statistics of a gain."""
        gain = module.weight.detach().double().cpu().numpy()
        return NormRow(
            name,
            *self.where(name),
            gain.size,
            float(np.mean(gain)),
            float(np.std(gain)),
            float(np.min(gain)),
            float(np.max(gain)),
            np.quantile(gain, QUANTILES).tolist(),
        )


def _unmeasured_experts(model: nn.Module) -> list[str]:
    """Say that experts in joined weights are no linear layers to measure."""
    names = [name for name, module in model.named_modules() if expert_shape(module) is not None]
    if not names:
        return []
    return [
        f"the experts of {len(names)} mixtures ({names[0]}, ...) were not measured: their weights "
        "are joined; what comes to them is the output of the norm before them"
    ]


def _attention_observers(model: nn.Module, bits: int) -> tuple[dict[str, AttentionObserver], str]:
    """Hooks by name; or none, and why."""
    try:
        found = find_attention(model)
    except UnsupportedModuleError as error:
        return {}, str(error)
    refuse_installed(installed_attention(model))
    return {name: AttentionObserver(name, bits) for name in found}, ""


def _run(
    model: nn.Module,
    data: CalibrationSet,
    parts: _Parts,
    report: DiagnosisReport,
    stage: ProgressStage,
) -> None:
    """Run the data through the model and fill the rows of inputs and attention."""
    value = report.options["value"]
    observer = InputObserver(parts.linears, parts.norms, bits=report.bits, threshold=value)
    attention, reason = _attention_observers(model, report.bits)
    fused = FusedAttention(model, parts.blocks, report.bits)
    facts = BatchFacts()
    with contextlib.ExitStack() as stack:
        if attention:
            facts = stack.enter_context(attention_hooks(model, attention))
        else:
            stack.enter_context(fused.watching())
        stack.enter_context(observer.watching())
        stack.enter_context(calibration_mode(model))
        for index, (batch, mask) in enumerate(zip(data.batches, data.masks(), strict=True)):
            observer.batch, observer.mask, fused.rows = batch, mask, mask
            facts.rows = mask
            forward(model, batch)
            stage.step(f"batch {index + 1}")
    parts.name_parts(observer.places)
    for name, place in observer.places.items():
        report.inputs.append(_input_row(parts, name, place))
    idle = set(parts.linears) - {c for p in observer.places.values() for c in p.consumers}
    report.notes += [f"no calibration token reached {name}" for name in sorted(idle)]
    if not report.inputs:
        raise CalibrationError("no calibration token reached a linear layer; give more data")
    if not attention and not fused.observers:
        report.notes.append(f"attention was not measured: {reason}")
    for name, hook in {**attention, **fused.observers}.items():
        block, depth = parts.where(name.partition(" ")[0])
        row = AttentionRow(name, block, depth, **hook.finish())
        if row.sink:
            report.attention.append(row)


def _input_row(parts: _Parts, name: str, place: Place) -> InputRow:
    seen = place.finish()
    if not seen.tokens:
        raise CalibrationError(f"no calibration token reached {name}; give more data")
    edges, counts = seen.histogram()
    names = ("rms", "rmse_token", "rmse_tensor", "std", "kurtosis", "maximum", "median")
    return InputRow(
        name,
        *parts.where(name),
        parts.part(name),
        list(place.consumers),
        seen.channels,
        seen.tokens,
        place.norm,
        **{k: getattr(seen, k) for k in names},
        largest=[list(entry) for entry in seen.largest],
        channel_absmax=seen.channel_absmax.tolist(),
        channel_counts=seen.channel_counts.tolist(),
        histogram={"edges": edges.tolist(), "counts": counts.tolist()},
    )


def find_outliers(report: DiagnosisReport) -> None:
    """Apply both rules of :func:`diagnose` to the inputs of a report, with its options."""
    rules = report.options
    rows = [r for r in report.inputs if r.norm is not None]
    rows = rows or [r for r in report.inputs if r.part.endswith(" in")]
    found = {r.name: relative_outliers(r.channel_absmax, rules["ratio"]).tolist() for r in rows}
    report.outliers = {name: channels for name, channels in found.items() if channels}
    widths = [r.channels for r in rows if r.channel_counts]
    if not widths:
        return
    width = max(set(widths), key=widths.count)
    hidden = [r for r in rows if r.channels == width and r.channel_counts]
    report.outlier_dimensions = outlier_dimensions(
        [r.channel_counts for r in hidden],
        [r.tokens for r in hidden],
        layers=rules["layers"],
        tokens=rules["tokens"],
    ).tolist()
