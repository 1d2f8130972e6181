"""Quantize a whole model: ``ptqkit.quantize(model, recipe, calibration)``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from ptqkit._units import parse_bytes
from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.hf.checkpoint.formats import FORMATS
from ptqkit.hf.progress import Progress, make_progress
from ptqkit.hf.quantization.report import Report
from ptqkit.hf.quantization.run import QuantizationInterrupted, Runner
from ptqkit.nn.activations import ActivationQuantizer
from ptqkit.recipe import as_recipe
from ptqkit.recipe.recipe import Recipe

if TYPE_CHECKING:
    from ptqkit.hf.equalization.driver import EqualizationReport

__all__ = ["QuantizationInterrupted", "QuantizationResult", "quantize"]

_SCHEDULES = ("auto", "one-pass", "re-forward")


@dataclass
class QuantizationResult:
    """What :func:`quantize` returns.

    Attributes
    ----------
    model : nn.Module
        The model given, its linear weights replaced by their dequantized values.
    layers : dict of str to QuantizedMatrix
        Codes and grids, always (out, in): the transpose of what a ``Conv1D`` stores.
    report : Report
    recipe : Recipe
    activations : dict of str to ActivationQuantizer
        What quantizes the inputs of layers in ``model``, where the recipe says so; it is installed
        on them (:func:`ptqkit.nn.remove_quantizers` takes it off).
    equalization : EqualizationReport or None
        Where scales were folded before the weights were quantized.
    """

    model: nn.Module
    layers: dict[str, QuantizedMatrix]
    report: Report
    recipe: Recipe
    activations: dict[str, ActivationQuantizer] = field(default_factory=dict)
    equalization: EqualizationReport | None = None
    tokenizer: Any = field(default=None, repr=False)

    def save(
        self, directory: str | os.PathLike[str], checkpoint_format: str = "auto", **options: Any
    ) -> Any:
        """Write a checkpoint; see :func:`ptqkit.hf.checkpoint.save.save_checkpoint`."""
        from ptqkit.hf.checkpoint.save import save_checkpoint

        options.setdefault("tokenizer", self.tokenizer)
        options.setdefault("report", self.report)
        if self.activations:
            options.setdefault("activations", self.activations)
        return save_checkpoint(
            self.model,
            self.layers,
            self.recipe,
            directory,
            checkpoint_format=checkpoint_format,
            **options,
        )


def quantize(
    model: nn.Module,
    recipe: Recipe | str | Mapping[str, Any] | Sequence[Any] = "quality",
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    samples: int = 128,
    sequence_length: int = 512,
    batch_size: int = 4,
    seed: int = 0,
    start_token: str | int | None = "auto",
    schedule: str = "auto",
    memory_budget: int | str | None = None,
    share_inputs: bool = True,
    blocks: tuple[str, ...] | None = None,
    threads: int = 0,
    diagnostics: bool = True,
    on_error: str = "raise",
    progress: bool | Progress | None = None,
    out_dir: str | os.PathLike[str] | None = None,
    checkpoint_format: str = "auto",
    overwrite: bool = False,
    **changes: Any,
) -> QuantizationResult:
    """Quantize the linear layers of a model in place, in one forward pass over calibration data.

    Parameters
    ----------
    model : nn.Module
        A transformers model, on CPU or GPU.
    recipe : Recipe, preset name, dict or list of parts
        A name in :data:`ptqkit.recipe.presets.PRESETS` (``"quality"``, ``"reference"``, ``"rtn"``,
        ``"aweq"``, ...) or parts such as ``[AWE(), GPTQ(bits=4)]`` (:mod:`ptqkit.recipe.parts`);
        ``**changes`` are applied to it, such as ``bits=3``, or ``error_propagation=0.5``, which
        corrects every weight for the errors of the layers before
        it at the price of a second forward pass and twice the activations.
    calibration
        Text, tokens, batches or a dataset; see
        :func:`ptqkit.hf.data.calibration.prepare_calibration`, which also explains ``samples``,
        ``sequence_length`` (capped by what the model takes), ``seed`` and ``start_token``. Only
        ``method="rtn"`` does without.
    tokenizer : optional
        Needed for text; saved with the checkpoint.
    schedule : {"auto", "one-pass", "re-forward"}
        Results are equal bit for bit; "auto" takes one pass where it can. Error propagation
        needs one pass: where that cannot work it is an error.
    memory_budget : int or str, optional
        Bytes (or ``"8GiB"``) for activations, H and the solver beyond the model; by default what
        is free.
    share_inputs : bool
        Let layers fed by one tensor share H and its factor.
    blocks : tuple of str, optional
        Paths of the lists of repeated blocks, where structure does not tell.
    threads : int
        Of the solver; 0 is its own policy.
    diagnostics : bool
        Compute RTN's objective and the signal-to-noise ratios for the report.
    on_error : {"raise", "leave_float"}
        "leave_float" leaves a layer that fails float and marks its row in the report.
    progress : bool or callable, optional
        See :func:`ptqkit.hf.progress.make_progress`.
    out_dir, checkpoint_format, overwrite : optional
        Also write a checkpoint there; checked before anything runs.

    Raises
    ------
    PreflightError
        With all problems found before the first forward; it is also an UnsupportedModuleError or
        CalibrationError where one of them is.
    QuantizationInterrupted
        On Ctrl-C (a KeyboardInterrupt); it says which layers had been replaced.

    Examples
    --------
    >>> result = quantize(model, "quality", "train.txt", tokenizer=tokenizer, bits=3)
    >>> print(result.report.table())
    >>> result.save("model-w3")
    """
    for name, value, allowed in (
        ("schedule", schedule, _SCHEDULES),
        ("on_error", on_error, ("raise", "leave_float")),
        ("checkpoint_format", checkpoint_format, ("auto", *FORMATS)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, not {value!r}")
    budget = parse_bytes(memory_budget)
    recipe = as_recipe(recipe)
    if changes:
        recipe = Recipe.from_dict({**recipe.to_dict(), **changes})
    if checkpoint_format != "auto":
        recipe = FORMATS[checkpoint_format].adapt(recipe)
    run = Runner(model, recipe, threads, diagnostics, on_error, make_progress(progress))
    run.prepare_data(
        calibration,
        tokenizer,
        samples=samples,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        start_token=start_token,
    )
    run.check(blocks, checkpoint_format, out_dir, overwrite, share_inputs)
    run.choose_schedule(schedule, budget)
    run.equalize(blocks)
    run.execute(schedule)
    result = QuantizationResult(
        model, run.matrices, run.report, recipe, run.activations, run.equalization, tokenizer
    )
    if out_dir is not None:
        result.save(out_dir, checkpoint_format=checkpoint_format, overwrite=overwrite)
    return result
