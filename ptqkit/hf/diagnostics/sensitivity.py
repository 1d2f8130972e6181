"""Which tensors of a model suffer most from quantization: one kind or layer at a time.

Table 1 of Pandey et al. 2023 for any model of transformers: everything stays float but the tensors
of one case, and the signal-to-noise ratio of the final logits says what they cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ptqkit._defaults import BATCH_SIZE
from ptqkit.errors import UsageError, check_choice
from ptqkit.hf.data.calibration import max_positions, prepare_calibration
from ptqkit.hf.diagnostics.bench import Bench
from ptqkit.hf.diagnostics.report import SensitivityReport, SensitivityRow
from ptqkit.hf.evaluation.likelihood import perplexity
from ptqkit.hf.progress import Progress, ProgressStage, close_progress, make_progress
from ptqkit.hf.softmax.driver import describe
from ptqkit.nn.attention_quantizer import (
    ATTENTION_KINDS,
)
from ptqkit.recipe.options import ActivationQuantization

__all__ = ["CASES", "KINDS", "sensitivity"]

KINDS = (*ATTENTION_KINDS, "weights", "inputs")
"""Tensors that can be quantized alone; inputs are those of linear layers."""

CASES = ("kind", "layer", "module")


def sensitivity(
    model: nn.Module,
    calibration: Any,
    *,
    kinds: Sequence[str] = KINDS,
    bits: int = 8,
    by: str = "kind",
    tokenizer: Any = None,
    text: Any = None,
    samples: int = 8,
    sequence_length: int = 256,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    start_token: str | int | None = "auto",
    progress: bool | Progress | None = None,
    **windows: Any,
) -> SensitivityReport:
    """Quantize one case at a time and rank by what it costs; the model stays as it was.

    Grids: weights round to nearest per output channel, asymmetric min-max; all others one
    asymmetric grid per tensor with the range of the calibration data, the softmax [0, 1] without
    correction.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Anything that returns ``logits``.
    calibration
        Ranges come from it, and it is what the logits are compared on; see
        :func:`ptqkit.hf.prepare_calibration`. The float logits of all of it are kept in memory.
    kinds : sequence of str
        Of :data:`KINDS`.
    bits : int from 2 to 16 (weights: 8)
    by : {"kind", "layer", "module"}
        A case is one kind in all layers; all kinds in one block; or one kind of one module.
    text : optional
        Also measure the perplexity on it, for every case; see :func:`ptqkit.hf.perplexity`, which
        takes ``**windows`` (``window``, ``stride``, ``max_tokens``).
    progress : bool or callable, optional
        An event per case, with stage "measuring"; see :func:`ptqkit.hf.progress.make_progress`.

    Raises
    ------
    ValueError
        If an option is not one of those above, or something in the model is quantized by hooks.
    UnsupportedModuleError
        If attention kinds are asked for and the model's attention cannot be hooked.
    CalibrationError
        If the data cannot be used, or the model's values are not finite on it.
    """
    kinds = _check(kinds, bits, by)
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
    bench = Bench(model, data, kinds, bits)
    cases = bench.cases(by)
    score = None
    if text is not None:
        options = {"start_token": start_token, "batch_size": batch_size, **windows}

        def score(case: str | None) -> float:
            found = perplexity(model, tokenizer, text, check=case is None, **options)
            found.warn_unless_finite(f"the model with quantized {case}")
            return found.perplexity

    report = SensitivityReport(
        bits=bits,
        by=by,
        calibration=describe(data),
        float_perplexity=score(None) if score is not None else None,
    )
    resolved = make_progress(progress)
    stage = ProgressStage(resolved, "measuring", len(cases))
    try:
        for case in cases:
            with bench.quantized(case):
                row = SensitivityRow(case.kind, case.layer, len(case.members))
                sqnr = bench.compare()
                value = score(row.name) if score is not None else None
            row.sqnr_db, row.infinite = float(sqnr.decibel), int(sqnr.infinite)
            row.perplexity = value
            report.rows.append(row)
            stage.step(row.name)
    finally:
        close_progress(resolved)
    report.rows.sort(key=lambda row: row.sqnr_db)
    return report


def _check(kinds: Sequence[str], bits: int, by: str) -> tuple[str, ...]:
    kinds = (kinds,) if isinstance(kinds, str) else tuple(dict.fromkeys(kinds))
    if not kinds:
        raise UsageError(f"kinds is empty; give some of {', '.join(map(repr, KINDS))}")
    for kind in kinds:
        check_choice("each of kinds", kind, KINDS)
    check_choice("by", by, CASES)
    ActivationQuantization(bits, "tensor")
    if "weights" in kinds and bits > 8:
        raise ValueError(f"weights take at most 8 bits, not {bits}: leave them out of kinds")
    return kinds
