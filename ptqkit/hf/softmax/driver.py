"""Quantize the softmax of a transformers model and correct its bias."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ptqkit._defaults import BATCH_SIZE, SEQUENCE_LENGTH
from ptqkit.arrays.softmax import UNFITTED
from ptqkit.errors import check_choice
from ptqkit.hf.data.calibration import CalibrationSet, max_positions, prepare_calibration
from ptqkit.hf.models import attention
from ptqkit.hf.softmax.files import save_softmax
from ptqkit.nn.attention import AttentionHook
from ptqkit.nn.forward import calibration_mode, model_inputs
from ptqkit.nn.softmax.file import SOFTMAX_FILE, read_values
from ptqkit.nn.softmax.quantizer import CORRECTIONS, SoftmaxQuantizer
from ptqkit.nn.softmax.search import SearchEnds
from ptqkit.nn.softmax.statistics import Quantizer
from ptqkit.nn.softmax.study import (
    RANGES,
    AttentionAccess,
    SoftmaxStudy,
    choose_modules,
    fixed_grid,
    refuse_installed,
)
from ptqkit.nn.softmax.study import SoftmaxQuantization as _SoftmaxQuantization

__all__ = [
    "SoftmaxCalibration",
    "SoftmaxQuantization",
    "describe",
    "load_softmax",
    "quantize_softmax",
]

GRANULARITIES = ("tensor", "head")


class _LanguageModel:
    """A transformers model with calibration data; see SoftmaxBackend."""

    attention: AttentionAccess = attention
    corrections: tuple[str | None, ...] = CORRECTIONS
    granularities: tuple[str, ...] = GRANULARITIES
    # Shorter ranges were never better, at 4 to 8 bits.
    ends = SearchEnds((1.0, 0.8, 0.6))
    by_total = False
    steps: tuple[int, ...] = ()

    def __init__(self, model: nn.Module, calibration: CalibrationSet) -> None:
        self.model, self.calibration = model, calibration

    def run(self, hooks: Mapping[str, AttentionHook]) -> None:
        attention.run_calibration(self.model, self.calibration, hooks)

    def outputs(
        self, variants: Sequence[Mapping[str, AttentionHook]]
    ) -> Iterator[Sequence[np.ndarray]]:
        for batch, rows in zip(self.calibration.batches, self.calibration.masks(), strict=True):
            found = [self._output(batch, rows)]
            for hooks in variants:
                with attention.attention_hooks(self.model, hooks):
                    found.append(self._output(batch, rows))
            yield found

    def _output(self, batch: dict[str, torch.Tensor], rows: torch.Tensor | None) -> np.ndarray:
        """Logits, or last hidden states, in float32, zero at padding."""
        with calibration_mode(self.model):
            x = self.model(**model_inputs(self.model, batch))[0].float()
        if rows is not None and x.dim() == 3 and x.shape[:2] == rows.shape:
            x = x * rows.to(x.device)[..., None]
        return x.cpu().numpy()

    def describe(self) -> dict[str, Any]:
        return describe(self.calibration)


def describe(calibration: CalibrationSet) -> dict[str, Any]:
    """Return what a report says about calibration data."""
    return {
        "source": calibration.source,
        "samples": calibration.samples,
        "sequence_length": calibration.sequence_length,
        "tokens": calibration.tokens,
        "start_token": calibration.start_token,
    }


class SoftmaxCalibration(SoftmaxStudy):
    """Statistics of the softmax of a language model, from one pass over calibration data.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    calibration : CalibrationSet
    bits, grid_range, layers
        See :class:`ptqkit.nn.softmax.study.SoftmaxStudy`. "calibrated" equals "fixed" in a causal
        model, whose first row is 1; "search" tries [0, 1], [0, 0.8] and [0, 0.6].
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: CalibrationSet,
        *,
        bits: int = 8,
        grid_range: str = "fixed",
        layers: Iterable[str] | None = None,
    ) -> None:
        backend = _LanguageModel(model, calibration)
        super().__init__(backend, bits=bits, grid_range=grid_range, layers=layers)


class SoftmaxQuantization(_SoftmaxQuantization):
    """A quantized softmax on a transformers model."""

    attention: ClassVar[AttentionAccess] = attention

    def save(self, directory: str | os.PathLike[str], **options: Any) -> Path:
        """Write the corrections into the folder of a model; see :func:`ptqkit.hf.save_softmax`."""
        return save_softmax(self.model, self.quantizers, directory, **options)


def load_softmax(model: nn.Module, directory: str | os.PathLike[str]) -> SoftmaxQuantization | None:
    """Install what ``ptqkit_softmax.json`` in a folder says; None if there is no such file.

    Raises
    ------
    ValueError
        If the file is damaged, from a later version, or for another model; it names the layer.
    """
    path = Path(directory) / SOFTMAX_FILE
    if not path.is_file():
        return None
    values = read_values(path, attention.find_attention(model))
    result = SoftmaxQuantization(model, dict(values.quantizers))
    result.install()
    return result


def quantize_softmax(
    model: nn.Module,
    calibration: Any = None,
    *,
    bits: int = 8,
    correction: str | None = "bias",
    granularity: str = "head",
    grid_range: str = "fixed",
    layers: Iterable[str] | None = None,
    tokenizer: Any = None,
    samples: int = 32,
    sequence_length: int = SEQUENCE_LENGTH,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    start_token: str | int | None = "auto",
    grid_of: str = "probabilities",
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
        ``seed`` and ``start_token``. May be left out for ``correction`` None, "row_sum" and
        "code_sum" with a fixed range; then there is no report.
    bits : int from 2 to 16
    correction : {"bias", "row_length", "row_sum", "code_sum", None}
        See :mod:`ptqkit.nn.softmax.quantizer`. "bias" is the paper's, free if the offset of the
        quantizer absorbs it, and so the default; "row_length" its refinement by the number of
        allowed keys; "row_sum" needs a sum per row at run time but no calibration, was the best
        in most of our measurements, and does not depend on the lengths calibrated on.
    granularity : {"head", "tensor"}
        Of "bias" and "row_length": one per head, or one per attention module.
    grid_range : {"fixed", "calibrated", "search"}
        See :class:`SoftmaxCalibration`.
    layers : iterable of str, optional
        Patterns of attention modules; by default all.
    grid_of : {"probabilities", "exponentials", "squares"}
        What is rounded: the paper rounds probabilities, on [0, 1]. Rounding exp(x - max) before it
        is divided by its sum gives every row the whole grid, on [0, 1] always, and keeps far more
        of rows without a peak; its corrections are "row_sum" and "code_sum". So are those of
        "squares", whose codes are of the root of exp(x - max): finer steps next to 0.
    diagnostics : bool
        Measure signal-to-noise ratios on the calibration set, and leave out corrections that
        lower them: that of a layer's output, or all if the model's output suffers.

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
    check_choice("correction", correction, CORRECTIONS)
    check_choice("granularity", granularity, GRANULARITIES)
    check_choice("grid_range", grid_range, RANGES)
    grid = fixed_grid(bits, grid_of, correction, grid_range)
    # Before calibration data is prepared, which may take long.
    modules = choose_modules(attention.find_attention(model), layers)
    refuse_installed(attention.installed_attention(model))
    if calibration is None and correction in UNFITTED and grid_range == "fixed":
        plain: dict[str, Quantizer] = {n: SoftmaxQuantizer(grid, correction) for n in modules}
        result = SoftmaxQuantization(model, plain)
    else:
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
        study = SoftmaxCalibration(model, data, bits=bits, grid_range=grid_range, layers=layers)
        quantizers = study.quantizers(correction, granularity, grid_of)
        report = study.compare(quantizers) if diagnostics else None
        result = SoftmaxQuantization(model, quantizers, report)
    result.install()
    return result
