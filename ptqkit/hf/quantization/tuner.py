"""Tune a result of quantize, or prepare for it while the model is still in float."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from ptqkit._defaults import BATCH_SIZE, SAMPLES, SEQUENCE_LENGTH, TUNE_STEPS
from ptqkit._places import source_folder
from ptqkit._repr import one_line_repr
from ptqkit._units import parse_bytes
from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.errors import UnsupportedModuleError, UsageError
from ptqkit.hf.data.calibration import CalibrationSet, max_positions, prepare_calibration
from ptqkit.hf.data.own_text import own_text as write_text
from ptqkit.hf.models.dtypes import as_dtype, dtype_of
from ptqkit.hf.models.experts import ExpertSwap, wanted_for
from ptqkit.hf.progress import Progress, close_progress, make_progress
from ptqkit.hf.quantization.float_logits import (
    FloatLogits,
    Window,
    record_logits,
    split_windows,
)
from ptqkit.hf.quantization.float_weights import FloatWeights
from ptqkit.hf.quantization.memory import available_memory
from ptqkit.hf.quantization.report import Report
from ptqkit.hf.quantization.tuning import (
    TuningOptions,
    TuningReport,
    interruptible,
    learn,
    learned_vectors,
    write_learned,
)
from ptqkit.hf.quantization.tuning_memory import TuningMemory, check_memory, measure_memory
from ptqkit.nn.activations import installed_quantizer
from ptqkit.nn.forward import device_of
from ptqkit.recipe.options import check_int

__all__ = ["TuningData", "prepare_tuning", "tune", "tune_prepared"]


class _Result(Protocol):
    """What tuning reads and changes of a :class:`ptqkit.hf.QuantizationResult`."""

    model: nn.Module
    matrices: dict[str, QuantizedMatrix]
    report: Report
    tokenizer: Any
    stored_dtype: str
    tuning: TuningReport | None


_R = TypeVar("_R", bound=_Result)


@dataclass(frozen=True)
class TuningData:
    """What tuning needs of the float model.

    Attributes
    ----------
    windows : list of dict
        Calibration windows, then those of the model's own text.
    own : int
        How many of them are its own text.
    logits : FloatLogits
    memory : dict of str to int
        See :class:`TuningReport`.
    seconds : float
    """

    __repr__ = one_line_repr

    windows: list[Window]
    own: int
    logits: FloatLogits
    memory: dict[str, int]
    seconds: float


def tune(
    result: _R,
    calibration: Any,
    steps: int = TUNE_STEPS,
    *,
    float_model: nn.Module | FloatWeights | str | os.PathLike[str] | None = None,
    own_text: int | Sequence[Window] = 0,
    tokenizer: Any = None,
    samples: int = SAMPLES,
    sequence_length: int = SEQUENCE_LENGTH,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    start_token: str | int | None = "auto",
    memory_budget: int | str | None = None,
    progress: bool | Progress | None = None,
    **options: Any,
) -> _R:
    """Let scales, norm gains and biases of a quantized model learn from the float model's logits.

    Zero-points stay, and codes too unless ``code_rate`` lets them learn, so that every format that
    holds the result holds the tuned one. Adam minimizes KL(float || quantized) per token; scales,
    gains, biases and codes are rounded to what is stored in every forward pass. Codes are many:
    calibration text alone is soon learned by heart, and ``own_text`` adds what the float model
    writes itself. One window in eight is held out: the step with the least loss on those is kept,
    and step 0 is among them, so that their loss never rises. Fewer than 2 windows are an error.

    The model changes in place, at the very end: after an error, or Ctrl-C, it is as it was. Neither
    ``requires_grad``, gradients, training mode nor random states of the process are touched. On a
    CPU the result is the same for every number of threads as far as torch's products are; on a GPU
    the backward pass of some attention kernels is not repeatable to the bit.

    Parameters
    ----------
    result : QuantizationResult
        Without quantized activations. Its model, matrices and report are changed.
    calibration
        As for :func:`ptqkit.quantize`, and the same data may be used.
    steps : int
        0 changes nothing.
    float_model : nn.Module, FloatWeights or path, optional
        Where the logits come from: another model object in float, the weights that
        :class:`ptqkit.hf.FloatWeights` kept of this one, or a folder to load. By default the folder
        that the model was loaded from. ``quantize(..., tune=150)`` needs none of them.
    own_text : int or list of dict
        How many windows the float model writes itself, or windows that :func:`ptqkit.hf.own_text`
        wrote before, to tune several results on the same.
    tokenizer : optional
        The result's by default.
    samples, sequence_length, batch_size, seed, start_token
        As for :func:`ptqkit.quantize`; ``batch_size`` bounds the memory of a training step.
    memory_budget : int or str, optional
        Bytes in addition to the model; by default the free memory.
    progress : bool or callable, optional
        See :func:`ptqkit.hf.progress.make_progress`.
    **options
        Of :class:`~ptqkit.hf.quantization.tuning.TuningOptions`: ``code_rate``, ``code_hold``,
        ``windows`` per step, ``rate``, ``scale_rate``, ``held_out``, ``checks``, ``patience``.

    Returns
    -------
    QuantizationResult
        The one given; ``result.tuning`` tells what was done.

    Raises
    ------
    PreflightError
        If the memory of a training step, or the float model's logits, exceed what is available.
    UnsupportedModuleError
        If inputs are quantized too, or the model returns no logits.
    UsageError
        If there is no float model.
    TuningInterrupted
        On Ctrl-C (a KeyboardInterrupt).

    Examples
    --------
    >>> result = ptqkit.quantize(model, "best", "train.txt", tokenizer=tokenizer, bits=3)
    >>> ptqkit.hf.tune(result, "train.txt")
    >>> print(result.tuning)

    Codes learn too, for minutes, which takes much further at 2 to 4 bits:

    >>> ptqkit.hf.tune(result, "train.txt", 1000, code_rate=0.01, own_text=2048, windows=16)
    """
    check_int("steps", steps, 0)
    written = None if isinstance(own_text, int) else list(own_text)
    count = own_text if isinstance(own_text, int) else len(own_text)
    chosen = TuningOptions(steps=steps, batch_size=batch_size, seed=seed, own_text=count, **options)
    budget = parse_bytes(memory_budget)
    if steps == 0:
        return result
    model = result.model
    data = prepare_calibration(
        calibration,
        tokenizer if tokenizer is not None else result.tokenizer,
        samples=samples,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        start_token=start_token,
        max_length=max_positions(model),
    )
    with interruptible(), torch.inference_mode(False):
        # Its memory is that of the quantized model; its logits those of the float one.
        with _expert_layers(model, result.matrices):
            _check_inputs(model, result.matrices)
            needed, free = _measure(
                model, result.matrices, data, chosen, budget, written is not None
            )
        start = time.perf_counter()
        with _as_float(model, float_model) as source:
            windows, logits = source.learned_from(data, chosen, needed.texts, written)
        told = _told(needed, free)
        seconds = time.perf_counter() - start
        ready = TuningData(windows, chosen.own_text, logits, told, seconds)
    with _expert_layers(model, result.matrices):
        return tune_prepared(result, ready, chosen, make_progress(progress))


@contextlib.contextmanager
def _expert_layers(model: nn.Module, layers: Iterable[str]) -> Iterator[None]:
    """Have the experts of mixtures as linear layers meanwhile, if some of these layers are."""
    swap = ExpertSwap(model, wanted_for(layers))
    with swap, swap.calibrating(False):
        yield


def prepare_tuning(
    model: nn.Module,
    layers: Iterable[str],
    data: CalibrationSet,
    options: TuningOptions,
    budget: int | None = None,
    copy_head: bool = True,
) -> TuningData:
    """Check the memory, and record the logits of a model that is still in float.

    Parameters
    ----------
    model : nn.Module
    layers : iterable of str
        Layers that are going to be quantized.
    data : CalibrationSet
    options : TuningOptions
    budget : int, optional
        Bytes in addition to the model.
    copy_head : bool
        False if the quantization leaves the head's weight alone.
    """
    start = time.perf_counter()
    with torch.inference_mode(False):
        needed, free = _measure(model, layers, data, options, budget)
        source = _Float(model, stays=not copy_head)
        windows, logits = source.learned_from(data, options, needed.texts)
    told = _told(needed, free)
    return TuningData(windows, options.own_text, logits, told, time.perf_counter() - start)


def tune_prepared(
    result: _R, data: TuningData, options: TuningOptions, progress: Progress | None
) -> _R:
    """Tune a result in place; experts are linear layers already."""
    stored = as_dtype(result.stored_dtype or dtype_of(result.model))
    start = time.perf_counter()
    with interruptible(), torch.inference_mode(False):
        try:
            learned, report = learn(
                result.model,
                result.matrices,
                data.windows,
                data.logits,
                options,
                stored,
                progress,
                data.own,
            )
            if learned is not None:
                write_learned(result.model, result.matrices, learned)
        finally:
            close_progress(progress)
    seconds = data.seconds + time.perf_counter() - start
    result.tuning = replace(report, seconds=seconds, memory=data.memory)
    result.report.note_tuning(result.tuning.to_dict())
    return result


def _measure(
    model: nn.Module,
    layers: Iterable[str],
    data: CalibrationSet,
    options: TuningOptions,
    budget: int | None,
    written: bool = False,
) -> tuple[TuningMemory, int]:
    """Return what tuning needs and the free memory; raises if the first is more."""
    modules = {name: model.get_submodule(name) for name in layers}
    windows = split_windows(data.batches)
    free = available_memory(device_of(model))
    learned = sum(p.numel() for p in learned_vectors(model).values())
    # A scale per 32 weights is more than most grids have.
    weights = sum(m.weight.numel() for m in modules.values())
    learned += weights if options.code_rate > 0 else weights // 32
    limit = free if budget is None else budget
    needed = measure_memory(
        model, modules, windows, options.batch_size, learned, limit, options.own_text, written
    )
    return needed, check_memory(needed, model, budget)


def _told(needed: TuningMemory, free: int) -> dict[str, int]:
    return {
        "estimate": needed.total,
        "step": needed.step,
        "window": needed.window,
        "text": needed.text,
        "available": free,
    }


def _check_inputs(model: nn.Module, matrices: Mapping[str, QuantizedMatrix]) -> None:
    for name in matrices:
        if installed_quantizer(model.get_submodule(name)) is not None:
            raise UnsupportedModuleError(
                f"{name} quantizes its inputs, through which no gradient passes: tune a result "
                "without activations"
            )


@dataclass(frozen=True)
class _Float:
    """A float model: the module, values of its parameters if it has others, whether they stay."""

    model: nn.Module
    parameters: dict[str, torch.Tensor] | None = None
    stays: bool = False

    def learned_from(
        self,
        data: CalibrationSet,
        options: TuningOptions,
        texts: int,
        written: list[Window] | None = None,
    ) -> tuple[list[Window], FloatLogits]:
        """Return the windows, the model's own text last, and its logits on them.

        ``texts`` windows of it are written at once, if they are not there.
        """
        windows = split_windows(data.batches)
        if written is not None:
            windows += written
        elif options.own_text:
            windows += write_text(
                self.model,
                windows,
                options.own_text,
                batch_size=texts,
                seed=options.seed,
                parameters=self.parameters,
            )
        return windows, record_logits(
            self.model,
            windows,
            self.parameters,
            batch_size=options.batch_size,
            copy_head=not self.stays,
        )


@contextlib.contextmanager
def _as_float(
    model: nn.Module, source: nn.Module | FloatWeights | str | os.PathLike[str] | None
) -> Iterator[_Float]:
    """Yield the float model, wherever it is."""
    if isinstance(source, FloatWeights):
        if source.model is not model:
            raise UsageError("float_model: these FloatWeights are of another model object")
        yield _Float(model, source.parameters())
    elif isinstance(source, nn.Module):
        if source is model:
            raise UsageError(
                "float_model is the quantized model itself; give the float one, or FloatWeights "
                "made before it was quantized"
            )
        yield _Float(source)
    else:
        with contextlib.closing(_Loaded(model, source)) as loaded:
            yield _Float(loaded.model, stays=True)


class _Loaded:
    """The float model of a folder, until it is closed."""

    def __init__(self, model: nn.Module, folder: str | os.PathLike[str] | None) -> None:
        found = source_folder(model) if folder is None else os.fspath(folder)
        if found is None:
            raise UsageError(
                "tuning needs the float model: give float_model= (a model, its folder, or "
                "ptqkit.hf.FloatWeights made before quantize), or quantize with tune=150"
            )
        kind: Any = type(model)
        device = device_of(model)
        loaded = kind.from_pretrained(found, dtype=dtype_of(model))
        if getattr(loaded.config, "quantization_config", None) is not None:
            raise UsageError(f"float_model {found} is quantized; give the float model")
        self.model: nn.Module = loaded.to(device).eval()

    def close(self) -> None:
        """Let the model go."""
        del self.model
