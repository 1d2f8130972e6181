"""The tables and the figure of Pandey et al. 2023 for a UNet: what quantized attention costs.

Every figure is the signal-to-quantization-noise ratio (eq. 1) of final samples against those of the
float model from the same starting noise, in dB, unless it says otherwise.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from ptqkit.arrays.metrics import sqnr
from ptqkit.diffusion.attention import attention_hooks, find_attention, installed_attention
from ptqkit.diffusion.calibration import CalibrationLatents, draw_calibration, run_calibration
from ptqkit.diffusion.checks import check_positive
from ptqkit.diffusion.sampling import ClassConditionalUNet, sample
from ptqkit.diffusion.softmax import SoftmaxCalibration
from ptqkit.diffusion.weights import quantize_weights
from ptqkit.nn.attention_quantizer import ATTENTION_KINDS, AttentionQuantizer, AttentionRanges
from ptqkit.nn.softmax.compare import softmax_hooks
from ptqkit.nn.softmax.study import refuse_installed
from ptqkit.nn.softmax.variants import UNET_VARIANTS as TABLE

__all__ = ["Experiment", "granularity_table", "row_sum_figure", "sensitivity_table", "total_table"]

VARIANTS: Mapping[str, tuple[str | None, str, str]] = {
    "none": TABLE["none"],
    "per tensor": TABLE["bias"],
    "per head": TABLE["bias/head"],
    "per step": TABLE["bias/step"],
    "per step and head": TABLE["bias/step_head"],
    "row sum": TABLE["row_sum"],
    "before": TABLE["before"],
    "before + code sum": TABLE["before/code_sum"],
    "before + row sum": TABLE["before/row_sum"],
}
"""Corrections by name: arguments of ``SoftmaxCalibration.quantizers``."""
BIASES = ("per tensor", "per head", "per step", "per step and head")
"""The paper's."""


@dataclass
class Experiment:
    """A model, the noise it starts from, and latents to calibrate on and to hold out.

    Parameters
    ----------
    model : ClassConditionalUNet
    samples : int
        Final samples to compare, the classes in turn.
    steps : int
        Of DDIM.
    latents : int
        Calibration latents, and held-out latents.
    seed : int
        The samples, the calibration set and the held-out set start from noise of three seeds.
    """

    model: ClassConditionalUNet
    samples: int = 32
    steps: int = 50
    latents: int = 400
    batch_size: int = 8
    seed: int = 0
    progress: Callable[[str], None] = field(default=lambda text: None, repr=False)

    def __post_init__(self) -> None:
        for name in ("samples", "steps", "latents", "batch_size"):
            check_positive(getattr(self, name), name)

    def run(self, unet: nn.Module | None = None) -> np.ndarray:
        """Sample from the fixed noise: (samples, channels, height, width)."""
        result = sample(
            self.model.unet if unet is None else unet,
            self.model.scheduler,
            self.model.noise(self.samples, seed=self.seed),
            self.model.context(self.samples),
            steps=self.steps,
            batch_size=self.batch_size,
        )
        return result.numpy()

    def _draw(self, seed: int) -> CalibrationLatents:
        count = max(10, -(-self.latents // self.steps))
        refuse_installed(installed_attention(self.model.unet))
        return draw_calibration(
            self.model.unet,
            self.model.scheduler,
            self.model.noise(count, seed=seed),
            self.model.context(count),
            count=self.latents,
            steps=self.steps,
            seed=seed,
            batch_size=self.batch_size,
        )

    @cached_property
    def reference(self) -> np.ndarray:
        """Samples of the float model."""
        # What is computed now is kept: hooks on the model at this moment would stay in it.
        refuse_installed(installed_attention(self.model.unet))
        self.progress("float samples")
        return self.run()

    @cached_property
    def calibration(self) -> CalibrationLatents:
        """Latents of the float model, uniform over the time steps."""
        self.progress("calibration latents")
        return self._draw(self.seed + 1)

    @cached_property
    def held_out(self) -> CalibrationLatents:
        """Latents from other noise than those of the calibration set."""
        self.progress("held-out latents")
        return self._draw(self.seed + 2)

    @cached_property
    def rounded(self) -> nn.Module:
        """A copy of the UNet with 8-bit weights."""
        unet = copy.deepcopy(self.model.unet)
        quantize_weights(unet, 8)
        return unet

    def study(
        self, bits: int = 8, unet: nn.Module | None = None, **options: Any
    ) -> SoftmaxCalibration:
        """Bias of the softmax outputs on the calibration latents."""
        self.progress(f"softmax bias, {bits} bits")
        target = self.model.unet if unet is None else unet
        return SoftmaxCalibration(target, self.calibration, bits=bits, **options)

    def final(self, unet: nn.Module | None = None, hooks: Any = None) -> float:
        """SQNR of final samples of a UNet, with hooks on its attention, in dB."""
        reference = self.reference
        target = self.model.unet if unet is None else unet
        with attention_hooks(target, hooks) if hooks else contextlib.nullcontext():
            return float(sqnr(reference, self.run(target), per="sample"))


def variant_hooks(study: SoftmaxCalibration, variant: str) -> dict[str, Any]:
    """Hooks that quantize the softmax, with the correction of that name."""
    return softmax_hooks(study.quantizers(*VARIANTS[variant]))


def sensitivity_table(experiment: Experiment, bits: Sequence[int] = (8,)) -> list[dict[str, Any]]:
    """Table 1: each kind of tensor inside attention quantized alone, in all layers.

    Query, key, value and scores on asymmetric grids over the range of the calibration latents, the
    softmax output on [0, 1]; all per tensor.
    """
    unet = experiment.model.unet
    ranges = {name: AttentionRanges(name) for name in find_attention(unet)}
    run_calibration(unet, experiment.calibration, ranges)
    dtype = next(unet.parameters()).dtype
    rows = []
    for width in bits:
        study = experiment.study(width)
        for kind in ATTENTION_KINDS:
            experiment.progress(f"{kind}, {width} bits")
            if kind == "softmax":
                hooks: Any = softmax_hooks(study.quantizers(None))
            else:
                hooks = {
                    name: AttentionQuantizer({kind: seen.quantizer(kind, width, dtype)})
                    for name, seen in ranges.items()
                }
            result = experiment.final(hooks=hooks)
            rows.append({"bits": width, "quantized": kind, "sqnr_db": result})
    return rows


def granularity_table(
    experiment: Experiment,
    bits: Sequence[int] = (8,),
    ranges: Sequence[str] = ("fixed",),
    variants: Sequence[str] = tuple(VARIANTS),
    final: bool = True,
) -> list[dict[str, Any]]:
    """Table 2: corrections of a quantized softmax, on grids of these ranges (SoftmaxCalibration).

    Besides the final samples (unless ``final`` is false: they take the most time), the output of
    the UNet on the calibration latents and on held-out ones ("calibration_db", "held_out_db").
    """
    unet = experiment.model.unet
    held_out = experiment.held_out
    plain = run_calibration(unet, held_out).numpy()
    rows = []
    for width, span in itertools.product(bits, ranges):
        study = experiment.study(width, grid_range=span)
        for variant in variants:
            experiment.progress(f"correction {variant}, {width} bits, range {span}")
            hooks = variant_hooks(study, variant)
            seen = run_calibration(unet, experiment.calibration, hooks).numpy()
            unseen = run_calibration(unet, held_out, hooks).numpy()
            row = {
                "bits": width,
                "range": span,
                "correction": variant,
                **({"sqnr_db": experiment.final(hooks=hooks)} if final else {}),
                "calibration_db": float(sqnr(study.outputs, seen, per="sample")),
                "held_out_db": float(sqnr(plain, unseen, per="sample")),
            }
            rows.append(row)
    return rows


def total_table(
    experiment: Experiment, bits: int = 8, correction: str = "per step and head"
) -> list[dict[str, Any]]:
    """Table 3: float, 8-bit softmax, 8-bit weights, both, each with a correction.

    The bias for the model with 8-bit weights is that of this model, on the same latents.
    """
    rows = [{"model": "FP32", "sqnr_db": float("inf")}]
    label = f"SM{bits}"
    for name, unet in (("", experiment.model.unet), ("W8A16", experiment.rounded)):
        if name:
            experiment.progress(name)
            rows.append({"model": name, "sqnr_db": experiment.final(unet)})
        study = experiment.study(bits, unet)
        full = f"{name}-{label}" if name else label
        endings = {"none": "", correction: " + correction", "row sum": " + row sum"}
        endings["before + row sum"] = " before + row sum"
        for variant, ending in endings.items():
            experiment.progress(full + ending)
            result = experiment.final(unet, variant_hooks(study, variant))
            rows.append({"model": full + ending, "sqnr_db": result})
    return rows


def row_sum_figure(experiment: Experiment, bits: int = 8) -> dict[str, Any]:
    """Figure 1: expected row sum of a layer against the SQNR with only this layer quantized.

    The SQNR is that of the UNet's output on the calibration latents. Returns ``points``, one per
    layer, and the correlation of the two over the layers: ``pearson`` and ``spearman``.
    """
    study = experiment.study(bits)
    quantizers = study.quantizers(None)
    points = []
    for name, statistics in study.statistics.items():
        experiment.progress(f"only {name}")
        hooks = softmax_hooks({name: quantizers[name]})
        seen = run_calibration(experiment.model.unet, experiment.calibration, hooks).numpy()
        points.append(
            {
                "layer": name,
                "cross": study.modules[name].kind == "cross",
                "keys": statistics.longest,
                "zero_fraction": float(statistics.bias.zero_fraction),
                "mean_row_sum": float(statistics.bias.mean_row_sum),
                "sqnr_db": float(sqnr(study.outputs, seen, per="sample")),
            }
        )
    sums = np.array([p["mean_row_sum"] for p in points])
    ratios = np.array([p["sqnr_db"] for p in points])
    return {
        "points": points,
        "pearson": correlation(sums, ratios),
        "spearman": correlation(ranks(sums), ranks(ratios)),
    }


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of two rows of numbers; NaN if one of them is constant."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks up to a constant; equal values share the mean of theirs."""
    return np.array([np.mean([v > values, v >= values], axis=0).sum() for v in values])
