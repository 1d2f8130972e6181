"""Equalize a model: ``ptqkit.equalize(model, calibration)`` moves range from inputs to weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ptqkit._defaults import BATCH_SIZE, SAMPLES, SEQUENCE_LENGTH
from ptqkit.errors import CalibrationError, UnsupportedModuleError
from ptqkit.hf.data.calibration import CalibrationSet, max_positions, prepare_calibration
from ptqkit.hf.equalization.report import EqualizationReport, EqualizedGroup
from ptqkit.hf.equalization.run import EqualizationError, EqualizationRun, owner_of_mark
from ptqkit.hf.models.experts import ExpertSwap
from ptqkit.hf.models.wrappers import unwrap_compiled, wrapper_problem
from ptqkit.hf.progress import Progress, close_progress, make_progress
from ptqkit.nn.quantized_mark import is_quantized
from ptqkit.recipe import as_recipe
from ptqkit.recipe.options import Equalization
from ptqkit.recipe.recipe import Recipe

__all__ = [
    "EqualizationError",
    "EqualizationInterrupted",
    "EqualizationReport",
    "EqualizedGroup",
    "check_equalizable",
    "check_float",
    "equalize",
    "equalize_calibrated",
]

_QUANTIZED = "the model is quantized already; equalize the float model"


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
    samples: int = SAMPLES,
    sequence_length: int = SEQUENCE_LENGTH,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    start_token: str | int | None = "auto",
    blocks: Sequence[str] | None = None,
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
    blocks : sequence of str, optional
        Paths of the lists of repeated blocks, if structure does not show them.
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
    check_float(model)
    prepared = prepare_calibration(
        calibration,
        tokenizer,
        samples=samples,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        start_token=start_token,
        max_length=max_positions(model),
    )
    parsed = None if recipe is None else as_recipe(recipe)
    places = None if blocks is None else tuple(blocks)
    return equalize_calibrated(
        unwrap_compiled(model), prepared, options, parsed, places, threads, make_progress(progress)
    )


def check_float(model: nn.Module) -> None:
    """Refuse a model of which some layer, or some expert, is quantized."""
    if not isinstance(model, nn.Module):
        return  # check_equalizable says so
    with ExpertSwap(model, lambda name: True):
        if any(map(is_quantized, model.modules())):
            raise UnsupportedModuleError(_QUANTIZED)


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
    check_equalizable(model, calibration, equalization, recipe)
    run = EqualizationRun(model, calibration, equalization, recipe, blocks, threads, progress)
    try:
        run.execute()
    except KeyboardInterrupt as error:
        raise EqualizationInterrupted(run.folded, run.total) from error
    except Exception as error:
        if hasattr(error, "add_note") and not isinstance(error, EqualizationError):
            error.add_note(_partial_text("stopped by an error", run.folded, run.total))
        raise
    finally:
        close_progress(progress)
    return run.report


def check_equalizable(
    model: nn.Module,
    calibration: CalibrationSet,
    equalization: Equalization,
    recipe: Recipe | None,
) -> None:
    """Refuse a model or options that :func:`equalize` cannot work with."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    wrapped = wrapper_problem(model)
    if wrapped is not None:
        raise UnsupportedModuleError(wrapped)
    config = owner_of_mark(model)
    if getattr(config, "ptqkit_equalized", None) is not None:
        raise UnsupportedModuleError(
            "the model is equalized already (config.ptqkit_equalized says how); load the original "
            "model"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModuleError(_QUANTIZED)
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
