"""Quantize the softmax of a transformers model and correct its bias."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ptqkit.arrays.softmax import softmax_grid
from ptqkit.errors import CalibrationError
from ptqkit.hf.data.calibration import CalibrationSet, max_positions, prepare_calibration
from ptqkit.nn.attention import (
    AttentionModule,
    attention_hooks,
    find_attention,
    install_attention,
    installed_attention,
    remove_attention,
)
from ptqkit.nn.attention_quantizer import AttentionQuantizer, AttentionRanges, measure_ranges
from ptqkit.nn.forward import calibration_mode, forward
from ptqkit.nn.softmax.quantizer import (
    CORRECTIONS,
    GRANULARITIES,
    SoftmaxQuantizer,
    SoftmaxStatistics,
)
from ptqkit.nn.softmax.report import (
    SoftmaxComparison,
    SoftmaxLayerReport,
    SoftmaxReport,
    compare_outputs,
    describe,
    softmax_row,
)
from ptqkit.nn.softmax.search import RangeSearch
from ptqkit.recipe.recipe import match_pattern

__all__ = ["SoftmaxCalibration", "SoftmaxQuantization", "quantize_softmax"]

RANGES = ("fixed", "calibrated", "search")


@dataclass
class SoftmaxQuantization:
    """A quantized softmax on a model.

    Attributes
    ----------
    model : transformers.PreTrainedModel
    quantizers : dict of str to SoftmaxQuantizer
        By attention module.
    report : SoftmaxReport or None
        None where there was no calibration data.
    """

    model: nn.Module = field(repr=False)
    quantizers: dict[str, SoftmaxQuantizer]
    report: SoftmaxReport | None = None

    def install(self) -> None:
        """Put the quantizers on the model.

        Raises
        ------
        ValueError
            If the model has attention hooks already, or other heads than the quantizers.
        """
        check_heads(find_attention(self.model), self.quantizers)
        hooks = {n: AttentionQuantizer({"softmax": q}) for n, q in self.quantizers.items()}
        install_attention(self.model, hooks)

    def remove(self) -> int:
        """Take the quantizers off: the model is as before; returns how many there were."""
        return remove_attention(self.model)

    @property
    def installed(self) -> bool:
        """Whether the model's attention has hooks now."""
        return bool(installed_attention(self.model))

    def save(self, directory: str | os.PathLike[str], **options: Any) -> Any:
        """Write the corrections beside a model; see :func:`ptqkit.hf.save_softmax`."""
        from ptqkit.nn.softmax.file import save_softmax

        return save_softmax(self.model, self.quantizers, directory, **options)


def check_heads(
    modules: Mapping[str, AttentionModule], quantizers: Mapping[str, SoftmaxQuantizer]
) -> None:
    """Refuse corrections that are for other modules or other numbers of heads."""
    for name, quantizer in quantizers.items():
        if name not in modules:
            raise ValueError(
                f"there is a softmax correction for {name}, but the model has no such attention "
                f"module (its first is {next(iter(modules))})"
            )
        heads = modules[name].heads
        if quantizer.heads is not None and quantizer.heads != heads:
            raise ValueError(
                f"{name} has {heads} heads, its softmax correction is for {quantizer.heads}"
            )


class SoftmaxCalibration:
    """What one pass over calibration data tells about the softmax of a model.

    Any number of corrections can be made from it, at one bit width.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its own probabilities are used, as in the paper: those of a model whose softmax is float.
    calibration : CalibrationSet
    bits : int from 2 to 16
    range : {"fixed", "calibrated", "search"}
        [0, 1]; from the smallest to the largest probability (0 included), which needs one more
        pass (in a causal model the first row is 1, so both are one); or for every module the one
        of [0, 1], [0, 0.8] and [0, 0.6] with the least output error under the correction, which
        needs one more pass for every correction.
    layers : iterable of str, optional
        Patterns of attention modules; by default all.

    Attributes
    ----------
    statistics : dict of str to SoftmaxStatistics
        Of the range chosen last.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: CalibrationSet,
        *,
        bits: int = 8,
        range: str = "fixed",
        layers: Iterable[str] | None = None,
    ) -> None:
        modules = choose_modules(model, layers)
        refuse_installed(model)
        self.model, self.calibration = model, calibration
        self._search: RangeSearch | None = None
        if _check_range(range) == "search":
            self._search = RangeSearch(modules, bits, self._run)
            self.statistics = {n: found[0] for n, found in self._search.candidates.items()}
        else:
            seen = measure_ranges(model, calibration) if range == "calibrated" else {}
            self.statistics = {
                name: SoftmaxStatistics(name, m.heads, _grid(bits, seen.get(name)))
                for name, m in modules.items()
            }
            self._run(self.statistics)
        missed = [name for name, s in self.statistics.items() if not s.longest]
        if missed:
            raise CalibrationError(
                f"no calibration token reached the softmax of {missed[0]} "
                f"({len(missed)} of {len(modules)} attention modules); leave it out with layers="
            )

    def _run(self, hooks: Mapping[str, Any]) -> None:
        with attention_hooks(self.model, hooks), calibration_mode(self.model):
            for batch, rows in zip(self.calibration.batches, self.calibration.masks(), strict=True):
                for hook in hooks.values():
                    hook.rows = rows
                forward(self.model, batch)

    def quantizers(
        self, correction: str | None = "bias", granularity: str = "head"
    ) -> dict[str, SoftmaxQuantizer]:
        """Quantizers with a correction; see :func:`quantize_softmax`."""
        check_correction(correction, granularity)
        if self._search is not None:
            self.statistics = self._search.best(correction, granularity)
        return {n: s.quantizer(correction, granularity) for n, s in self.statistics.items()}

    def compare(self, quantizers: dict[str, SoftmaxQuantizer], guard: bool = True) -> SoftmaxReport:
        """Measure layers and model with and without corrections: one pass, then three forwards.

        With ``guard``, a correction that lowers the signal-to-noise ratio of its layer's output
        on the calibration set is taken out of ``quantizers``, and all are where together they
        lower that of the model's output; the report says so.
        """
        plain = {name: SoftmaxQuantizer(q.grid) for name, q in quantizers.items()}
        hooks = {name: SoftmaxComparison([plain[name], q]) for name, q in quantizers.items()}
        self._run(hooks)
        report = SoftmaxReport(calibration=describe(self.calibration))
        for name, hook in hooks.items():
            row = softmax_row(self.statistics[name], quantizers[name], hook)
            if guard and hook.sqnr[1].below(hook.sqnr[0]):
                self._leave_out(quantizers, row)
            report.layers.append(row)
        without, corrected = compare_outputs(self.model, self.calibration, [plain, quantizers])
        report.output_db, report.output_corrected_db = without.decibel, corrected.decibel
        if guard and corrected.below(without):
            report.notes = f"corrections left out: {report.output_corrected_db:.2f} dB with them"
            report.output_corrected_db = report.output_db
            for row in report.layers:
                if row.correction is not None:
                    self._leave_out(quantizers, row)
        return report

    @staticmethod
    def _leave_out(quantizers: dict[str, SoftmaxQuantizer], row: SoftmaxLayerReport) -> None:
        row.notes = f"correction {row.correction!r} left out: {row.sqnr_corrected_db:.2f} dB"
        row.correction, row.sqnr_corrected_db = None, row.sqnr_db
        quantizers[row.name] = SoftmaxQuantizer(quantizers[row.name].grid)


def quantize_softmax(
    model: nn.Module,
    calibration: Any = None,
    *,
    bits: int = 8,
    correction: str | None = "bias",
    granularity: str = "head",
    range: str = "fixed",
    layers: Iterable[str] | None = None,
    tokenizer: Any = None,
    samples: int = 32,
    sequence_length: int = 512,
    batch_size: int = 4,
    seed: int = 0,
    start_token: str | int | None = "auto",
    diagnostics: bool = True,
) -> SoftmaxQuantization:
    """Quantize the softmax outputs of a model's attention, with a correction of their bias.

    The quantizers are put on the model and stay until ``.remove()``. Weights are left alone; they
    may be quantized already, or be quantized later.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Causal or bidirectional, with the attention functions of transformers' registry.
    calibration
        As for :func:`ptqkit.quantize`, which also explains ``samples``, ``sequence_length``,
        ``seed`` and ``start_token``. May be left out for ``correction`` None and "row_sum" with a
        fixed range; then there is no report.
    bits : int from 2 to 16
    correction : {"bias", "row_length", "row_sum", None}
        See :mod:`ptqkit.nn.softmax.quantizer`. "bias" is the paper's, free where the offset of
        the quantizer absorbs it, and so the default; "row_length" its refinement by the number of
        allowed keys; "row_sum" needs a sum per row at run time but no calibration, was the best
        in most of our measurements, and does not depend on the lengths calibrated on.
    granularity : {"head", "tensor"}
        Of "bias" and "row_length": one per head, or one per attention module.
    range : {"fixed", "calibrated", "search"}
        See :class:`SoftmaxCalibration`.
    layers : iterable of str, optional
        Patterns of attention modules; by default all.
    diagnostics : bool
        Measure signal-to-noise ratios on the calibration set, and leave out corrections that
        lower them: of a layer's output, or all where the model's output suffers.

    Raises
    ------
    UnsupportedModuleError
        If the model's attention cannot be hooked.
    CalibrationError
        If calibration data is missing or cannot be used.
    ValueError
        If an option is not one of those above, or attention hooks are installed already.

    Source: Pandey et al. 2023, "Softmax Bias Correction for Quantized Generative Models", eq. 4.

    Examples
    --------
    >>> softmax = quantize_softmax(model, "train.txt", tokenizer=tokenizer, bits=8)
    >>> print(softmax.report.table())
    >>> softmax.remove()
    """
    check_correction(correction, granularity)
    modules = choose_modules(model, layers)
    refuse_installed(model)
    if calibration is None and correction in (None, "row_sum") and _check_range(range) == "fixed":
        quantizers = {name: SoftmaxQuantizer(softmax_grid(bits), correction) for name in modules}
        result = SoftmaxQuantization(model, quantizers)
    else:
        softmax_grid(bits)
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
        study = SoftmaxCalibration(model, data, bits=bits, range=range, layers=layers)
        quantizers = study.quantizers(correction, granularity)
        report = study.compare(quantizers) if diagnostics else None
        result = SoftmaxQuantization(model, quantizers, report)
    result.install()
    return result


def check_correction(correction: str | None, granularity: str) -> None:
    """Refuse options that do not exist."""
    if correction not in CORRECTIONS:
        raise ValueError(f"correction must be one of {CORRECTIONS}, not {correction!r}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {GRANULARITIES}, not {granularity!r}")


def _check_range(range: str) -> str:
    if range not in RANGES:
        raise ValueError(f"range must be one of {RANGES}, not {range!r}")
    return range


def refuse_installed(model: nn.Module) -> None:
    """Refuse a model whose probabilities another hook may change."""
    if installed_attention(model):
        raise ValueError(
            "the attention of the model has hooks already (a quantized softmax?): remove them "
            "first with .remove() or ptqkit.nn.remove_attention(model)"
        )


def choose_modules(model: nn.Module, layers: Iterable[str] | None) -> dict[str, AttentionModule]:
    """Attention modules whose names match a pattern; all where there is none."""
    modules = find_attention(model)
    if layers is None:
        return modules
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not any(match_pattern(pattern, name) for name in modules):
            raise ValueError(
                f"layers: {pattern!r} matches no attention module; the first is "
                f"{next(iter(modules))}"
            )
    chosen = {n: m for n, m in modules.items() if any(match_pattern(p, n) for p in patterns)}
    if not chosen:
        raise ValueError("layers is empty: name at least one pattern, or leave it out for all")
    return chosen


def _grid(bits: int, seen: AttentionRanges | None) -> Any:
    if seen is None:
        return softmax_grid(bits)
    return softmax_grid(bits, seen.minimum["softmax"], seen.maximum["softmax"])
