"""Quantized softmax outputs of a UNet, their bias and its correction.

A fixed grid rounds most probabilities of a long row to zero, so that rows no longer sum to one.
The mean of what is missing, per tensor, head, time step or step and head, can be taken from the
offset of the grid at no cost at run time (Pandey et al. 2023); see
:mod:`ptqkit.nn.softmax.quantizer` for the formulas.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptqkit.arrays.softmax import SoftmaxGrid, softmax_grid
from ptqkit.arrays.softmax_bias import SoftmaxBias
from ptqkit.diffusion.attention import (
    UNetAttention,
    find_attention,
    install_attention,
    installed_attention,
    remove_attention,
)
from ptqkit.diffusion.calibration import CalibrationLatents, run_calibration
from ptqkit.diffusion.checks import check_choice, naming
from ptqkit.diffusion.clock import StepClock
from ptqkit.diffusion.comparison import SoftmaxComparison, SQNRPair, layer_report
from ptqkit.diffusion.fused import SoftmaxHook
from ptqkit.diffusion.grid_search import NamedRanges, search_grids
from ptqkit.diffusion.step_quantizer import StepSoftmaxQuantizer
from ptqkit.errors import CalibrationError
from ptqkit.nn.attention import AttentionHook
from ptqkit.nn.softmax.quantizer import SoftmaxQuantizer
from ptqkit.nn.softmax.report import SoftmaxLayerReport, SoftmaxReport

__all__ = [
    "CORRECTIONS",
    "GRANULARITIES",
    "SoftmaxCalibration",
    "UNetSoftmaxQuantization",
    "quantize_softmax",
]

CORRECTIONS = ("bias", "row_sum", None)
GRANULARITIES = ("tensor", "head", "step", "step_head")
RANGES = ("fixed", "calibrated", "search")

Quantizer = SoftmaxQuantizer | StepSoftmaxQuantizer


class SoftmaxStatistics(AttentionHook):
    """Collects the bias of one attention module by time step and head, in one pass.

    Attributes
    ----------
    bias : ptqkit.SoftmaxBias
    longest : int
        Keys of a row.
    """

    def __init__(self, module: UNetAttention, grid: Any, clock: StepClock) -> None:
        self.name, self.heads, self.grid, self.clock = module.name, module.heads, grid, clock
        self.bias = SoftmaxBias(module.heads, grid=grid, steps=len(clock.steps))
        self.longest = 0

    def softmax(self, p: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """Count the probabilities in."""
        mask = None if allowed is None else allowed.cpu()
        step = self.clock.now(len(p))[0]
        with naming(f"softmax of {self.name}"):
            self.bias.update(p.detach().cpu(), allowed=mask, step=step)
        self.longest = max(self.longest, p.shape[-1])
        return p

    def quantizer(self, correction: str | None, granularity: str) -> Quantizer:
        """Quantizer with a correction from what was counted."""
        if correction != "bias":
            return SoftmaxQuantizer(self.grid, correction)
        values = self.bias.bias(granularity)
        if granularity in ("tensor", "head"):
            return SoftmaxQuantizer(self.grid, "bias", values)
        return StepSoftmaxQuantizer(self.grid, values, self.clock)


class SoftmaxCalibration:
    """What one pass over calibration latents tells about the softmax of a UNet.

    Any number of corrections can be made from it, at one bit width.

    Parameters
    ----------
    unet : diffusers.UNet2DConditionModel
    calibration : CalibrationLatents
    bits : int from 2 to 16
    range : {"fixed", "calibrated", "search"}
        Grid on [0, 1]; up to the largest probability seen (one more pass); or to where the error
        of the module's output, its bias corrected, is least (three more passes).
    layers : iterable of str, optional
        Names of attention modules, "self" for those over positions, "cross" for those over the
        condition; by default all.

    Attributes
    ----------
    modules : dict of str to UNetAttention
    statistics : dict of str to SoftmaxStatistics
    clock : StepClock

    Raises
    ------
    UnsupportedModuleError, ValueError
        As :func:`quantize_softmax`.
    """

    def __init__(
        self,
        unet: nn.Module,
        calibration: CalibrationLatents,
        *,
        bits: int = 8,
        range: str = "fixed",
        layers: Iterable[str] | None = None,
    ) -> None:
        check_choice(range, "range", RANGES)
        softmax_grid(bits)
        if not isinstance(calibration, CalibrationLatents):
            kind = type(calibration).__name__
            raise TypeError(f"calibration must be CalibrationLatents, not {kind}")
        refuse_installed(unet)
        self.unet, self.calibration = unet, calibration
        self.modules = choose_modules(unet, layers)
        self.clock = StepClock(calibration.steps)
        grids = self._grids(bits, range)
        self.statistics = {
            name: SoftmaxStatistics(m, grids[name], self.clock) for name, m in self.modules.items()
        }
        self.outputs = run_calibration(unet, calibration, self.statistics, self.clock)
        missed = [name for name, s in self.statistics.items() if not s.longest]
        if missed:
            raise CalibrationError(f"no latent reached the softmax of {missed[0]}")

    def _grids(self, bits: int, range: str) -> dict[str, SoftmaxGrid]:
        """Grid of every module; see ``range``."""
        if range == "fixed":
            return {name: softmax_grid(bits) for name in self.modules}
        ranges = {name: NamedRanges(name) for name in self.modules}
        run_calibration(self.unet, self.calibration, ranges)
        largest = {name: seen.maximum["softmax"] for name, seen in ranges.items()}
        if range == "search":
            return search_grids(self.unet, self.calibration, self.modules, largest, bits)
        return {name: softmax_grid(bits, 0.0, top) for name, top in largest.items()}

    def quantizers(
        self, correction: str | None = "bias", granularity: str = "head"
    ) -> dict[str, Quantizer]:
        """Quantizers with a correction; see :func:`quantize_softmax`."""
        check_choice(correction, "correction", CORRECTIONS)
        check_choice(granularity, "granularity", GRANULARITIES)
        return {n: s.quantizer(correction, granularity) for n, s in self.statistics.items()}

    def hooks(self, quantizers: dict[str, Quantizer]) -> dict[str, AttentionHook]:
        """Hooks that apply quantizers, for :func:`install_attention` with ``self.clock``."""
        return {name: SoftmaxHook(quantizer) for name, quantizer in quantizers.items()}

    def compare(self, quantizers: dict[str, Quantizer], guard: bool = True) -> SoftmaxReport:
        """Measure layers and UNet with and without corrections, in three more passes.

        With ``guard``, a correction that adds to the squared error of its layer's output on the
        calibration set is taken out of ``quantizers``, and all are where together they add to
        that of the UNet's output; the report says so.
        """
        plain: dict[str, Quantizer] = {n: SoftmaxQuantizer(q.grid) for n, q in quantizers.items()}
        hooks = {n: SoftmaxComparison(n, plain[n], q) for n, q in quantizers.items()}
        reference = run_calibration(self.unet, self.calibration, hooks, self.clock)
        report = SoftmaxReport(
            calibration={"latents": len(self.calibration), "steps": list(self.clock.steps)}
        )
        for name, hook in hooks.items():
            row = layer_report(self.statistics[name], quantizers[name], hook)
            if guard and hook.sqnr.hurts:
                self._leave_out(quantizers, row)
            report.layers.append(row)
        sqnr = SQNRPair("output of the UNet")
        for place, chosen in enumerate((plain, quantizers)):
            used = self.hooks(chosen)
            output = run_calibration(self.unet, self.calibration, used, self.clock)
            sqnr.update(place, reference, output)
        report.output_db, report.output_corrected_db = sqnr.decibel
        if guard and sqnr.hurts:
            report.notes = f"corrections left out: {report.output_corrected_db:.2f} dB with them"
            report.output_corrected_db = report.output_db
            for row in report.layers:
                if row.correction is not None:
                    self._leave_out(quantizers, row)
        return report

    @staticmethod
    def _leave_out(quantizers: dict[str, Quantizer], row: SoftmaxLayerReport) -> None:
        row.notes = f"correction {row.correction!r} left out: {row.sqnr_corrected_db:.2f} dB"
        row.correction, row.sqnr_corrected_db = None, row.sqnr_db
        quantizers[row.name] = SoftmaxQuantizer(quantizers[row.name].grid)


@dataclass
class UNetSoftmaxQuantization:
    """A quantized softmax on a UNet.

    Attributes
    ----------
    unet : nn.Module
    quantizers : dict of str to SoftmaxQuantizer or StepSoftmaxQuantizer
        By attention module.
    clock : StepClock
    report : SoftmaxReport or None
    """

    unet: nn.Module = field(repr=False)
    quantizers: dict[str, Quantizer]
    clock: StepClock
    report: SoftmaxReport | None = None

    def install(self) -> None:
        """Put the quantizers on the UNet.

        Raises
        ------
        ValueError
            If it has attention hooks already, or other heads than the quantizers.
        """
        check_heads(find_attention(self.unet), self.quantizers)
        hooks = {n: SoftmaxHook(q) for n, q in self.quantizers.items()}
        install_attention(self.unet, hooks, self.clock)

    def remove(self) -> int:
        """Take the quantizers off: the UNet is as before; returns how many there were."""
        return remove_attention(self.unet)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the corrections beside the weights; see :mod:`ptqkit.diffusion.state`."""
        from ptqkit.diffusion.state import save_softmax

        return save_softmax(self.unet, self.quantizers, self.clock, directory)


def quantize_softmax(
    unet: nn.Module,
    calibration: CalibrationLatents,
    *,
    bits: int = 8,
    correction: str | None = "bias",
    granularity: str = "head",
    range: str = "fixed",
    layers: Iterable[str] | None = None,
    diagnostics: bool = True,
) -> UNetSoftmaxQuantization:
    """Quantize the softmax outputs of a UNet's attention, with a correction of their bias.

    The quantizers are put on the UNet and stay until ``.remove()``; the bias is that of the model
    as it is given. Weights are left alone.

    Parameters
    ----------
    unet, calibration, bits, range, layers
        See :class:`SoftmaxCalibration`.
    correction : {"bias", "row_sum", None}
        "bias" is the paper's; "row_sum" needs one sum per row at run time and no calibration.
    granularity : {"head", "tensor", "step", "step_head"}
        Of "bias". Those with steps are for the time steps of the calibration set; at others the
        nearest one counts.
    diagnostics : bool
        Three more passes for signal-to-noise ratios of layers and UNet; corrections that lower
        them are left out, see :meth:`SoftmaxCalibration.compare`.

    Raises
    ------
    UnsupportedModuleError
        If an attention processor of the UNet is none of diffusers' two plain ones.
    CalibrationError
        If its attention or its output is not finite.
    ValueError
        If an option is not one of those above, or attention hooks are installed already.

    Source: Pandey et al. 2023, "Softmax Bias Correction for Quantized Generative Models", eq. 4.
    """
    check_choice(correction, "correction", CORRECTIONS)
    check_choice(granularity, "granularity", GRANULARITIES)
    study = SoftmaxCalibration(unet, calibration, bits=bits, range=range, layers=layers)
    quantizers = study.quantizers(correction, granularity)
    report = study.compare(quantizers) if diagnostics else None
    result = UNetSoftmaxQuantization(unet, quantizers, study.clock, report)
    result.install()
    return result


def refuse_installed(unet: nn.Module) -> None:
    """Refuse a UNet whose probabilities another hook may change."""
    if installed_attention(unet):
        raise ValueError(
            "the attention of the UNet has hooks already (a quantized softmax?): remove them "
            "first with .remove() or ptqkit.diffusion.remove_attention(unet)"
        )


def choose_modules(unet: nn.Module, layers: Iterable[str] | None) -> dict[str, UNetAttention]:
    """Attention modules by name, or by "self" and "cross"; all where ``layers`` is None."""
    modules = find_attention(unet)
    if layers is None:
        return modules
    chosen: dict[str, UNetAttention] = {}
    for wanted in [layers] if isinstance(layers, str) else list(layers):
        kinds = {"self": False, "cross": True}
        found = {
            name: m for name, m in modules.items() if name == wanted or kinds.get(wanted) == m.cross
        }
        if not found:
            raise ValueError(
                f"layers: {wanted!r} is no attention module; the first is {next(iter(modules))}, "
                "and 'self' and 'cross' name all of a kind"
            )
        chosen |= found
    if not chosen:
        raise ValueError("layers is empty: name at least one, or leave it out for all")
    return {name: m for name, m in modules.items() if name in chosen}


def check_heads(modules: dict[str, UNetAttention], quantizers: dict[str, Quantizer]) -> None:
    """Refuse corrections that are for other modules or other numbers of heads."""
    for name, quantizer in quantizers.items():
        if name not in modules:
            raise ValueError(
                f"there is a softmax correction for {name}, but the UNet has no such attention "
                f"module (its first is {next(iter(modules))})"
            )
        if quantizer.heads not in (None, modules[name].heads):
            raise ValueError(
                f"{name} has {modules[name].heads} heads, its softmax correction is for "
                f"{quantizer.heads}"
            )
