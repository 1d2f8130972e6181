"""Quantize a whole model: ``ptqkit.quantize(model, recipe, calibration)``."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from ptqkit._defaults import BATCH_SIZE, SAMPLES, SEQUENCE_LENGTH
from ptqkit._folders import resolve
from ptqkit._frames import Tabular
from ptqkit._repr import one_line_repr
from ptqkit._units import parse_bytes
from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.errors import Problems, UnsupportedModuleError, UsageError, check_choice
from ptqkit.hf.checkpoint.formats import FORMATS
from ptqkit.hf.checkpoint.save import CheckpointInfo, save_checkpoint
from ptqkit.hf.checkpoint.stored_model import StoredModel
from ptqkit.hf.equalization.driver import EqualizationReport, equalize_calibrated
from ptqkit.hf.models.dtypes import as_dtype, dtype_name, dtype_of, slow_arithmetic, stored_as
from ptqkit.hf.models.experts import ExpertSwap, wanted_by, wanted_for
from ptqkit.hf.models.wrappers import is_compiled, unwrap_compiled
from ptqkit.hf.progress import Progress, make_progress
from ptqkit.hf.quantization.inspection import Inspection, inspect_model
from ptqkit.hf.quantization.mixed_bits import choose_bits
from ptqkit.hf.quantization.opening import open_model, reopen
from ptqkit.hf.quantization.plan import SCHEDULES, plan_schedule
from ptqkit.hf.quantization.processes import Processes
from ptqkit.hf.quantization.report import Report
from ptqkit.hf.quantization.row_coupling import measure_outputs, outputs_of_first
from ptqkit.hf.quantization.run import QuantizationInterrupted, QuantizationRun, RunOptions
from ptqkit.hf.quantization.state import RunState, check_room, state_folder
from ptqkit.hf.quantization.streamed import (
    StreamedRun,
    attached_source,
    check_stream,
    describe_run,
    float_tensors,
    float_twin,
    noting_values,
    plan_stream,
    state_bytes,
)
from ptqkit.hf.quantization.tuner import prepare_tuning, tune_prepared
from ptqkit.hf.quantization.tuning import TuningOptions, TuningReport
from ptqkit.nn.activations import ActivationQuantizer
from ptqkit.nn.forward import device_of, forget_compiled
from ptqkit.nn.linear import LinearView
from ptqkit.recipe import as_recipe
from ptqkit.recipe.options import check_names
from ptqkit.recipe.recipe import Recipe

__all__ = ["QuantizationInterrupted", "QuantizationResult", "quantize"]


@dataclass
class QuantizationResult(Tabular):
    """What :func:`quantize` returns.

    Attributes
    ----------
    model : nn.Module
        The model given, its linear weights replaced by their dequantized values.
    matrices : dict of str to QuantizedMatrix
        Codes and grids, always (out, in): the transpose of what a ``Conv1D`` stores.
    report : Report
    recipe : Recipe
    activations : dict of str to ActivationQuantizer
        What quantizes the inputs of layers in ``model``, if the recipe says so; it is installed
        on them (:func:`ptqkit.nn.remove_quantizers` removes it).
    equalization : EqualizationReport or None
        If scales were folded before the weights were quantized.
    tokenizer : optional
        Saved with the model.
    stored_dtype : str
        Type in which :meth:`save` writes the float values.
    tuning : TuningReport or None
        What :func:`ptqkit.hf.tune`, or ``tune`` of the recipe, has done.
    checkpoint : CheckpointInfo or None
        What was written last.
    """

    __repr__ = one_line_repr

    model: nn.Module
    matrices: dict[str, QuantizedMatrix]
    report: Report
    recipe: Recipe
    activations: dict[str, ActivationQuantizer] = field(default_factory=dict)
    equalization: EqualizationReport | None = None
    tokenizer: Any = field(default=None, repr=False)
    stored_dtype: str = ""
    tuning: TuningReport | None = None
    checkpoint: CheckpointInfo | None = None

    def _rows(self) -> list[dict[str, Any]]:
        return self.report.to_dicts()

    def save(
        self,
        directory: str | os.PathLike[str],
        checkpoint_format: str = "auto",
        *,
        dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> CheckpointInfo:
        """Write a checkpoint; see :func:`ptqkit.hf.checkpoint.save.save_checkpoint`.

        Parameters
        ----------
        directory : path
        checkpoint_format : str
        dtype : str or torch.dtype, optional
            Type of the float values in the files; ``stored_dtype`` by default. The model has its
            own again afterwards, but float values that are not exact in this one are rounded.
        **options
            Of :func:`~ptqkit.hf.checkpoint.save.save_checkpoint`.
        """
        options.setdefault("tokenizer", self.tokenizer)
        options.setdefault("report", self.report)
        if self.activations:
            options.setdefault("activations", self.activations)
        written = as_dtype(dtype or self.stored_dtype or dtype_of(self.model))
        with self._converted(written):
            self.checkpoint = save_checkpoint(
                self.model,
                self.matrices,
                self.recipe,
                directory,
                checkpoint_format=checkpoint_format,
                **options,
            )
        return self.checkpoint

    @contextlib.contextmanager
    def _converted(self, dtype: torch.dtype) -> Iterator[None]:
        """Convert the model for its files; quantized weights are exact again on leaving."""
        if dtype == dtype_of(self.model):
            yield
            return
        try:
            with stored_as(self.model, dtype):
                yield
        finally:
            with ExpertSwap(self.model, wanted_for(self.matrices)):
                for name, matrix in self.matrices.items():
                    LinearView(self.model.get_submodule(name)).write(matrix.dequantize())


def quantize(
    model: nn.Module | StoredModel | str | os.PathLike[str],
    recipe: Recipe | str | Mapping[str, Any] | Sequence[Any] = "quality",
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    samples: int = SAMPLES,
    sequence_length: int = SEQUENCE_LENGTH,
    batch_size: int = BATCH_SIZE,
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
    stored_dtype: str | torch.dtype | None = None,
    requantize: bool = False,
    stream: bool | None = None,
    distributed: bool = False,
    **changes: Any,
) -> QuantizationResult:
    """Quantize the linear layers of a model in place, in one forward pass over calibration data.

    Parameters
    ----------
    model : nn.Module, StoredModel or path
        A transformers model, on CPU or GPU. A compiled one runs eagerly meanwhile; of
        ``torch.compile(model)`` the result holds the model inside. Or a folder with one, or what
        :func:`ptqkit.hf.open_model` makes of it.
    recipe : Recipe, preset name, dict or list of parts
        A name in :data:`ptqkit.recipe.presets.PRESETS` (``"quality"``, ``"best"``, ``"reference"``,
        ``"rtn"``, ``"aweq"``, ...) or parts such as ``[AWE(), GPTQ(bits=4)]``
        (:mod:`ptqkit.recipe.parts`); ``**changes`` are applied to it, such as ``bits=3``, or
        ``error_propagation=0.75``, which corrects every weight for the errors of the layers before
        it at the price of a second forward pass and twice the activations; ``"best"`` does that and
        more.
    calibration
        Text, tokens, batches or a dataset; see
        :func:`ptqkit.hf.data.calibration.prepare_calibration`, which also explains ``samples``,
        ``sequence_length`` (capped by what the model takes), ``seed`` and ``start_token``. Only
        ``method="rtn"`` works without.
    tokenizer : optional
        Needed for text; saved with the checkpoint.
    schedule : {"auto", "one-pass", "replay"}
        Results are equal bit for bit; "auto" takes one pass if memory and model allow it.
    memory_budget : int or str, optional
        Bytes (or ``"8GiB"``) for activations, H, the solver and the codes in addition to the model;
        by default the free memory. What a container's limit leaves bounds either. Of a model on a
        GPU, blocks may wait on the host where the room is less than one pass needs.
    share_inputs : bool
        Let layers fed by one tensor share H and its factor.
    blocks : tuple of str, optional
        Paths of the lists of repeated blocks, if structure does not show them.
    threads : int
        Of the solver; 0 is its own policy.
    diagnostics : bool
        Compute RTN's objective and the signal-to-noise ratios for the report.
    on_error : {"raise", "leave_float"}
        "leave_float" leaves a layer that fails in float and marks its row in the report.
    progress : bool or callable, optional
        See :func:`ptqkit.hf.progress.make_progress`.
    out_dir, checkpoint_format, overwrite : optional
        Also write a checkpoint there; checked before anything runs.
    stored_dtype : str or torch.dtype, optional
        Type in which the model was stored, if it was widened to compute (float16 as float32 on a
        CPU). Scales then have this type, and :meth:`QuantizationResult.save` writes it, unless the
        recipe makes float values that it cannot hold: folded scales, corrected biases or grids of
        activations.
    requantize : bool
        Go on from weights that a run on this model object has quantized before, which is an error
        otherwise. To start from the float weights again see :class:`ptqkit.hf.FloatWeights`.
    stream : bool, optional
        Of a folder: read, quantize and drop the model block by block, with its state in a folder
        ``OUT_DIR.partial``, so that the same call goes on where it was killed; results are equal,
        bit for bit. By default if the model does not fit into memory. It needs ``out_dir``;
        ``memory_budget`` is then of all that the run needs; of the result, ``model`` is on the meta
        device and ``matrices`` is empty (:func:`ptqkit.hf.read_matrices` reads them).
    distributed : bool
        Share the batches and the solving with the other processes of the default group of
        ``torch.distributed``, which make the same call. All return the same codes; the first one
        alone writes ``out_dir``. ``memory_budget`` is of one process.

    Raises
    ------
    PreflightError
        With all problems found before the first forward pass; each has a ``kind``, such as
        UnsupportedModuleError or CalibrationError. An argument that is wrong by itself and the
        only problem is a ValueError.
    QuantizationInterrupted
        On Ctrl-C (a KeyboardInterrupt); it says which layers had been replaced.
    Exception
        If saving fails all the same; its attribute ``result`` is what would have been returned.

    Examples
    --------
    >>> result = quantize(model, "quality", "train.txt", tokenizer=tokenizer, bits=3)
    >>> print(result.report.table())
    >>> result.save("model-w3")
    """
    model, stored, tokenizer, stored_dtype = _opened(model, tokenizer, stored_dtype, stream)
    # What is wrong is told at once, the arguments with the rest.
    problems = Problems()
    for name, value, allowed in (
        ("schedule", schedule, SCHEDULES),
        ("on_error", on_error, ("raise", "leave_float")),
        ("checkpoint_format", checkpoint_format, ("auto", *FORMATS)),
    ):
        with problems.noting():
            check_choice(name, value, allowed)
    outer, model = model, unwrap_compiled(model)
    budget = chosen = written = None
    with problems.noting():
        budget = parse_bytes(memory_budget)
    with problems.noting():
        chosen = _changed(recipe, changes, problems)
    with problems.noting():
        written = _written_dtype(model, chosen, stored_dtype)
    if chosen is not None and checkpoint_format in FORMATS:
        chosen = FORMATS[checkpoint_format].adapt(chosen)
    if chosen is not None and written not in (None, dtype_of(model)):
        chosen = chosen.with_scale_dtype(dtype_name(written))
    slow = slow_arithmetic(model)
    for text in slow:
        warnings.warn(text, stacklevel=2)
    processes = _processes(distributed, model, stored)
    shown = make_progress(progress if processes is None or processes.rank == 0 else False)
    options = RunOptions(threads, diagnostics, on_error, shown, processes)
    inspection: dict[str, Any] = {
        "problems": problems,
        "written": written,
        "blocks": blocks,
        "share_inputs": share_inputs,
        "checkpoint_format": checkpoint_format,
        "out_dir": out_dir,
        "overwrite": overwrite,
        "requantize": requantize,
        "samples": samples,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "seed": seed,
        "start_token": start_token,
    }
    if stored is not None:
        return _quantize_stored(
            stored, chosen, calibration, tokenizer, budget, schedule, options, inspection, slow
        )
    swap = ExpertSwap(model, wanted_by(chosen))
    every_token = chosen is not None and chosen.calibrate_all_experts
    with swap as experts, swap.calibrating(every_token):
        found = inspect_model(model, chosen, calibration, tokenizer, **inspection)
        assert chosen is not None and written is not None  # or there had been problems
        result = _quantize_inspected(
            model,
            chosen,
            found,
            experts,
            written,
            schedule,
            budget,
            batch_size,
            blocks,
            options,
            slow,
        )
    if result.activations and (outer is not model or is_compiled(model)):
        forget_compiled()
    result.tokenizer = tokenizer
    if out_dir is not None and (processes is None or processes.rank == 0):
        with _carrying(result):
            result.save(out_dir, checkpoint_format=checkpoint_format, overwrite=overwrite)
    return result


def _quantize_inspected(
    model: nn.Module,
    recipe: Recipe,
    found: Inspection,
    experts: ExpertSwap,
    written: torch.dtype,
    schedule: str,
    budget: int | None,
    batch_size: int,
    blocks: tuple[str, ...] | None,
    options: RunOptions,
    slow: list[str],
) -> QuantizationResult:
    """Quantize a model in which no problem was found; the arguments are those of the driver."""
    tuning = None
    if recipe.tune and found.calibration is not None:
        tuning = TuningOptions(
            steps=recipe.tune,
            batch_size=batch_size,
            code_rate=recipe.tune_codes,
            own_text=recipe.tune_own_text,
        )
        # Its memory is checked now, and taken from what the schedule finds free.
        layers = found.structure.targets
        learned_from = prepare_tuning(model, layers, found.calibration, tuning, budget)
        options = replace(options, start=options.start + learned_from.seconds)  # told as tuning's
    processes = options.processes
    held = found if processes is None else _share_of(found, processes, processes.size - 1)
    plan = plan_schedule(model, held, schedule, budget, bool(recipe.propagation))
    equalized = None
    if recipe.equalization is not None and found.calibration is not None:
        with experts.fused():
            equalized = equalize_calibrated(
                model,
                found.calibration,
                recipe.equalization,
                recipe,
                blocks,
                options.threads,
                options.progress,
            )
    learned = _learn(model, recipe, found, options, plan.expected)
    recipe, found, options = learned.recipe, learned.inspection, learned.options
    if processes is not None:
        found = _share_of(found, processes, processes.rank)
        plan = processes.first(plan)
    run = QuantizationRun(model, recipe, found, plan, options, equalized)
    learned.tell(run)
    run.report.warnings += slow
    run.execute()
    result = QuantizationResult(model, run.matrices, run.report, recipe, run.activations, equalized)
    result.stored_dtype = dtype_name(written)
    if tuning is not None:
        with _carrying(result):
            tune_prepared(result, learned_from, tuning, options.progress)
    return result


@dataclass
class _Learned:
    """What the gradients of the float model say before anything is quantized.

    Attributes
    ----------
    recipe : Recipe
        With the bits of each layer, if it names their average alone.
    inspection : Inspection
    options : RunOptions
        With what row coupling needs.
    losses : dict
        As :class:`~ptqkit.hf.quantization.mixed_bits.MixedBits` has them.
    seconds : dict of str to float
    """

    __repr__ = one_line_repr

    recipe: Recipe
    inspection: Inspection
    options: RunOptions
    losses: dict[str, dict[int, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def tell(self, run: QuantizationRun) -> None:
        """Put losses and times into a run's report."""
        run.report.rounding_losses = self.losses
        run.seconds |= self.seconds


def _learn(
    model: nn.Module, recipe: Recipe, found: Inspection, options: RunOptions, room: int = 0
) -> _Learned:
    """Run the float model backward for what the recipe needs of that, if anything.

    ``room`` is what the run itself will need, in bytes.
    """
    learned = _Learned(recipe, found, options)
    if recipe.bits_budget is not None:
        start = time.perf_counter()
        mixed = choose_bits(model, recipe, found, options.threads)
        learned.recipe, learned.inspection = mixed.recipe, mixed.inspection
        learned.losses = mixed.losses
        learned.seconds["rounding_losses"] = time.perf_counter() - start
    if any(t.options.row_coupling for t in learned.inspection.structure.targets.values()):
        start = time.perf_counter()
        outputs = measure_outputs(model, learned.inspection, room)
        if options.processes is not None:
            outputs = outputs_of_first(outputs, options.processes)
        learned.options = replace(options, outputs=outputs)
        learned.seconds["row_coupling"] = time.perf_counter() - start
    return learned


def _opened(
    model: Any, tokenizer: Any, stored_dtype: Any, stream: bool | None
) -> tuple[nn.Module, StoredModel | None, Any, Any]:
    """Open what was given as the model; returns it, and whence it is streamed if it is."""
    if isinstance(model, (str, os.PathLike)) and os.path.isdir(model):
        model, found, facts = open_model(model, stream=stream)
        tokenizer = found if tokenizer is None else tokenizer
        stored_dtype = facts["stored_dtype"] if stored_dtype is None else stored_dtype
    elif stream and not isinstance(model, StoredModel):
        raise UsageError("stream=True is for the folder of a model: give its path")
    if isinstance(model, nn.Module):
        model = reopen(model) or model
    if isinstance(model, StoredModel):
        return model.model, model, tokenizer, stored_dtype
    if not isinstance(model, nn.Module):
        given = repr(model) if isinstance(model, str) else type(model).__name__
        raise TypeError(f"model must be a torch.nn.Module or a folder that exists, not {given}")
    return model, None, tokenizer, stored_dtype


def _processes(distributed: bool, model: nn.Module, stored: StoredModel | None) -> Processes | None:
    if not distributed:
        return None
    if stored is not None:
        raise UsageError(
            "a model that is streamed from its files is quantized by one process: give "
            "distributed=False, or stream=False if it fits into memory"
        )
    return Processes(device_of(model))


def _share_of(found: Inspection, processes: Processes, rank: int) -> Inspection:
    """Return an inspection with the batches of one process alone."""
    if found.calibration is None:
        return found
    if found.experts:
        raise UnsupportedModuleError(
            f"{next(iter(found.experts))} routes tokens to experts, which are counted in one "
            "process: give distributed=False, or start without torchrun"
        )
    batches = processes.share(found.calibration.batches, rank)
    return replace(found, calibration=replace(found.calibration, batches=batches))


def _quantize_stored(
    stored: StoredModel,
    recipe: Recipe | None,
    calibration: Any,
    tokenizer: Any,
    budget: int | None,
    schedule: str,
    options: RunOptions,
    inspection: dict[str, Any],
    slow: list[str],
) -> QuantizationResult:
    """Quantize a model block by block from its files; the arguments are those of the driver."""
    problems, written = inspection["problems"], inspection["written"]
    out_dir, checkpoint_format = inspection["out_dir"], inspection["checkpoint_format"]
    if out_dir is None:
        problems.add("a model that is streamed from its files needs out_dir: give one", UsageError)
    if schedule == "one-pass":
        problems.add(
            "schedule='one-pass' needs the model in memory: use 'auto' or 'replay'", UsageError
        )
    if recipe is not None:
        check_stream(problems, recipe)
    if recipe is None or problems.found:
        problems.raise_if_any()
    assert recipe is not None and written is not None and out_dir is not None
    target = resolve(out_dir)
    with RunState(state_folder(target)).opened() as state:
        given, propagate = (stored, recipe, inspection["blocks"]), bool(recipe.propagation)
        with attached_source(*given) as (source, structure), float_twin(*given) as twin:
            with noting_values(source, structure, problems):
                found = inspect_model(
                    stored.model, recipe, calibration, tokenizer, stored=True, **inspection
                )
            plan = plan_stream(source, found, budget, propagate)
            needed = state_bytes(source, found.structure, found.calibration, propagate)
            check_room(state.root, needed)
            about = describe_run(
                stored,
                found,
                recipe,
                written=dtype_name(written),
                dtype=dtype_name(dtype_of(stored.model)),
                blocks=inspection["blocks"],
                share_inputs=inspection["share_inputs"],
                diagnostics=options.diagnostics,
                on_error=options.on_error,
            )
            learned = _learn(stored.model, recipe, found, options)
            recipe, found = learned.recipe, learned.inspection
            run = StreamedRun(stored.model, recipe, found, plan, learned.options)
            learned.tell(run)
            run.report.warnings += slow
            run.attach(source, state, about, twin)
            run.execute()
        with stored_as(stored.model, written):
            info = save_checkpoint(
                stored.model,
                run.matrices,
                recipe,
                target,
                checkpoint_format=checkpoint_format,
                tokenizer=tokenizer,
                report=run.report,
                overwrite=inspection["overwrite"],
                activations=run.activations,
                fetch=float_tensors(source, run.changed),
            )
        state.remove()
    result = QuantizationResult(stored.model, {}, run.report, recipe, run.activations)
    result.tokenizer, result.stored_dtype, result.checkpoint = tokenizer, dtype_name(written), info
    return result


@contextlib.contextmanager
def _carrying(result: QuantizationResult) -> Iterator[None]:
    """Let an error, or Ctrl-C, carry the result, which took so long, as its ``result``."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(AttributeError):
            error.result = result  # type: ignore[attr-defined]
            if hasattr(error, "add_note"):
                error.add_note(
                    "the model is quantized and not lost: the attribute result of this exception "
                    "is what quantize() returns; error.result.save(another_folder) writes it"
                )
        raise


def _changed(recipe: Any, changes: Mapping[str, Any], problems: Problems) -> Recipe | None:
    """Return the recipe with the changes; None if there are names that it does not have."""
    known = [f.name for f in fields(Recipe)]
    with problems.noting():
        check_names(changes, "recipe", known)
    found = replace(as_recipe(recipe), **{k: v for k, v in changes.items() if k in known})
    return found if changes.keys() <= set(known) else None


def _written_dtype(
    model: nn.Module, recipe: Recipe | None, stored: str | torch.dtype | None
) -> torch.dtype:
    """Return the type for the files: that of the model, or of the files it came from if exact."""
    own = dtype_of(model)
    if stored is None:
        return own
    held = as_dtype(stored)
    if recipe is None:
        return own
    inexact = recipe.equalization or recipe.activations or recipe.bias_correction
    narrower = held.itemsize < own.itemsize
    return held if narrower and not inexact else own
