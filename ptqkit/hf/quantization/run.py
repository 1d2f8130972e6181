"""One quantization run: its checks, its schedule, and the report as it grows."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from torch import nn

from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.errors import CalibrationError, UnsupportedModuleError, prefix_error
from ptqkit.hf.data.calibration import CalibrationSet, max_positions, prepare_calibration
from ptqkit.hf.models.probe import Probe, probe
from ptqkit.hf.models.structure import Structure, Target, find_structure
from ptqkit.hf.progress import Progress, ProgressEvent
from ptqkit.hf.quantization.float_model import Moments
from ptqkit.hf.quantization.memory import peak_memory
from ptqkit.hf.quantization.plan import only_one_pass, why_not_one_pass
from ptqkit.hf.quantization.preflight import (
    Problems,
    check_model,
    check_output,
    check_probe,
    check_tokens,
    missing_kind,
)
from ptqkit.hf.quantization.report import LayerReport, Report, layer_report
from ptqkit.hf.quantization.schedule import Run, run_one_pass, run_reforward
from ptqkit.hf.quantization.solve import solve_group
from ptqkit.nn.activations import ActivationQuantizer, install_quantizer
from ptqkit.nn.forward import calibration_mode
from ptqkit.recipe.recipe import Recipe

if TYPE_CHECKING:
    from ptqkit.hf.equalization.driver import EqualizationReport

__all__ = ["QuantizationInterrupted", "Runner"]


class QuantizationInterrupted(KeyboardInterrupt):
    """Ctrl-C in the middle of a run; the message says what had been quantized.

    Attributes
    ----------
    quantized : list of str
        Layers whose weights had been replaced in the model.
    """

    def __init__(self, quantized: list[str], total: int, folds: int = 0) -> None:
        self.quantized = quantized
        super().__init__(_partial_text("interrupted", quantized, total, folds))


def _partial_text(what: str, quantized: list[str], total: int, folds: int = 0) -> str:
    """What an unfinished run has left in the model."""
    if not quantized and folds:
        return (
            f"{what}: no layer had been quantized, but the model is equalized ({folds} folds), "
            "which its float outputs do not show; load it again before another run"
        )
    if not quantized:
        return f"{what}: no layer had been quantized, the model is unchanged"
    return (
        f"{what}: {len(quantized)} of {total} layers are already quantized in this model, from "
        f"{quantized[0]} to {quantized[-1]}; load the model again before another run"
    )


class Runner:
    """One run: checks, schedule, and the report as it grows."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        threads: int,
        diagnostics: bool,
        on_error: str,
        progress: Progress | None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        self.model, self.recipe = model, recipe
        self.threads, self.diagnostics = threads, diagnostics
        self.on_error, self.progress = on_error, progress
        self.start = time.perf_counter()
        self.problems = Problems()
        self.calibration: CalibrationSet | None = None
        self.structure = Structure({})
        self.probe = Probe()
        self.late: set[str] = set()
        self.not_one_pass: str | None = None
        self.matrices: dict[str, QuantizedMatrix] = {}
        self.activations: dict[str, ActivationQuantizer] = {}
        self.equalization: EqualizationReport | None = None
        self.report = Report(recipe=recipe.to_dict())
        self.propagate = recipe.error_propagation > 0
        steps = ("hessian", "solve", "diagnostics", *(["propagation"] if self.propagate else []))
        self.seconds = dict.fromkeys(steps, 0.0)
        self.work_done = self.total_work = 0.0
        self.rows_told = 0

    def prepare_data(self, source: Any, tokenizer: Any, **options: Any) -> None:
        """Read the calibration data; a problem with it is kept for the pre-flight check."""
        if source is None:
            return
        try:
            self.calibration = prepare_calibration(
                source, tokenizer, max_length=max_positions(self.model), **options
            )
        except (CalibrationError, ValueError, TypeError) as error:
            self.problems.add(str(error), missing_kind(error))
            return
        check_tokens(self.problems, self.model, self.calibration)

    def check(
        self,
        blocks: tuple[str, ...] | None,
        out_format: str,
        out_dir: str | os.PathLike[str] | None,
        overwrite: bool,
        share_inputs: bool,
    ) -> None:
        """Raise every problem at once: first what needs no forward, then what a probe shows."""
        try:
            self.structure = find_structure(self.model, self.recipe, blocks)
        except UnsupportedModuleError as error:
            self.problems.add(str(error), UnsupportedModuleError)
        # Data that is there but unusable is one problem, not one more for every layer.
        calibrated = self.calibration is not None or bool(self.problems.texts)
        check_model(self.problems, self.model, self.structure, self.recipe, calibrated, out_format)
        if out_dir is not None:
            check_output(self.problems, self.model, self.structure.targets, out_dir, overwrite)
        self.problems.raise_if_any()
        if self.calibration is None:
            return
        targets = self.structure.targets
        self.probe = probe(
            self.model,
            {n: t.module for n, t in targets.items()},
            self.calibration.batches[0],
            {b: self.model.get_submodule(b) for b in self.structure.blocks},
            share_inputs,
        )
        self.late = check_probe(self.problems, self.structure, self.probe)
        self.problems.raise_if_any()

    def choose_schedule(self, schedule: str, budget: int | None) -> None:
        """Choose the schedule, or raise, before anything in the model changes."""
        if self.calibration is not None:
            self.not_one_pass = why_not_one_pass(self, schedule, budget)

    def equalize(self, blocks: tuple[str, ...] | None) -> None:
        """Equalize the float model, where the recipe says so."""
        if self.recipe.equalization is None:
            return
        from ptqkit.hf.equalization.driver import equalize_calibrated

        assert self.calibration is not None
        start = time.perf_counter()
        self.equalization = equalize_calibrated(
            self.model,
            self.calibration,
            self.recipe.equalization,
            self.recipe,
            blocks,
            self.threads,
            self.progress,
        )
        self.report.equalization = self.equalization.to_dict()
        self.report.warnings += [f"equalization: {w}" for w in self.equalization.warnings]
        self.seconds["equalization"] = time.perf_counter() - start

    def execute(self, schedule: str) -> None:
        """Run the schedule and complete the report."""
        setup = time.perf_counter() - self.start - self.seconds.get("equalization", 0.0)
        self.total_work = sum(map(self._work, self.structure.targets.values()))
        try:
            if self.calibration is None:
                self._without_data()
            else:
                self._with_data(schedule)
        except KeyboardInterrupt as error:
            raise QuantizationInterrupted(*self._done_so_far()) from error
        except Exception as error:
            if hasattr(error, "add_note"):
                error.add_note(_partial_text("stopped by an error", *self._done_so_far()))
            raise
        finally:
            if hasattr(self.progress, "close"):
                self.progress.close()
        for name, why in self.structure.skipped.items():
            self.report.layers.append(_skipped_row(self.model, name, why))
        total = time.perf_counter() - self.start
        rest = total - setup - sum(self.seconds.values())
        self.report.seconds = {"total": total, "setup": setup, "forward": rest, **self.seconds}
        device = next(self.model.parameters()).device
        self.report.memory["peak"] = peak_memory(device)

    def _done_so_far(self) -> tuple[list[str], int, int]:
        folds = 0 if self.equalization is None else len(self.equalization.groups)
        return list(self.matrices), len(self.structure.targets), folds

    def _without_data(self) -> None:
        self.report.schedule = "no calibration"
        for name, target in self.structure.targets.items():
            try:
                self._quantize([target], Moments(None), "no calibration")
            except Exception as error:
                self._fail([target], prefix_error(error, name), "no calibration")
            self._notify([target])

    def _with_data(self, schedule: str) -> None:
        assert self.calibration is not None
        data = self.calibration
        self.report.calibration = {
            "source": data.source,
            "samples": data.samples,
            "sequence_length": data.sequence_length,
            "tokens": data.tokens,
            "batches": len(data.batches),
            "start_token": data.start_token,
        }
        run = Run(
            self.model,
            self.structure.targets,
            self.probe.groups,
            data,
            self.probe.blocks,
            self._quantize,
            self._fail,
            self._notify,
            self.propagate,
        )
        reason, used = self.not_one_pass, []
        with calibration_mode(self.model):
            if reason is None:
                used.append("one-pass")
                reason = run_one_pass(run)
                if reason is not None and self.propagate:
                    raise UnsupportedModuleError(only_one_pass(self.recipe, reason))
                if reason is not None and schedule == "one-pass":
                    raise UnsupportedModuleError(f"schedule='one-pass' cannot go on: {reason}")
            if reason is not None:
                used.append("re-forward")
                run_reforward(run)
        self.report.schedule = ", then ".join(used)
        self.report.schedule_reason = reason or ""

    def _work(self, target: Target) -> float:
        """Share of a layer in the run's time, about: forward, H and solving."""
        rows, columns = target.shape
        tokens = self.calibration.tokens if self.calibration is not None else 1
        return float(columns) * (2 * rows + columns) * tokens + float(rows) * columns * columns

    def _quantize(self, members: list[Target], moments: Moments, schedule: str) -> None:
        if moments.hessian is not None and moments.tokens == 0:
            raise CalibrationError(f"{members[0].name} saw no token of the calibration data")
        solved = solve_group(
            members,
            moments.hessian,
            moments.moment,
            moments.ranges,
            threads=self.threads,
            diagnostics=self.diagnostics,
        )
        rows = sum(t.shape[0] for t in members)
        self.seconds["hessian"] += moments.seconds
        for target in members:
            result = solved[target.name]
            self.seconds["solve"] += result.seconds_solve
            self.seconds["diagnostics"] += result.seconds_diagnostics
            started = time.perf_counter()
            target.write(result.dequantized)
            self.seconds["solve"] += time.perf_counter() - started
            self.matrices[target.name] = result.matrix
            if result.bias_shift is not None:
                target.subtract_bias(result.bias_shift)
            self._quantize_activations(target, moments)
            share = target.shape[0] / rows
            result.seconds_propagation += share * moments.seconds_moment
            if self.propagate:
                self.seconds["propagation"] += result.seconds_propagation
            row = layer_report(target, result, moments.tokens, share * moments.seconds, schedule)
            row.shares_input_with = [t.name for t in members if t is not target]
            if row.notes:
                self.report.warnings.append(f"{row.name}: {row.notes}")
            self.report.layers.append(row)

    def _quantize_activations(self, target: Target, moments: Moments) -> None:
        spec = target.options.activations
        if spec is None:
            return
        dtype = target.module.weight.dtype
        quantizer = ActivationQuantizer.calibrate(spec, moments.ranges, dtype)
        install_quantizer(target.module, quantizer)
        self.activations[target.name] = quantizer

    def _fail(self, members: list[Target], error: Exception, schedule: str) -> None:
        if self.on_error == "raise":
            raise error
        for target in members:
            row = LayerReport(target.name, target.shape, f"failed: {error}", schedule=schedule)
            self.report.warnings.append(f"{target.name} is left float: {error}")
            self.report.layers.append(row)

    def _notify(self, members: list[Target]) -> None:
        """Tell the progress callback about layers that are finished."""
        for target in members:
            self.work_done += self._work(target)
            self.rows_told += 1
            if self.progress is None:
                continue
            elapsed = time.perf_counter() - self.start
            left = elapsed * (self.total_work / self.work_done - 1.0)
            loss = self.report[target.name].objective
            total = len(self.structure.targets)
            self.progress(
                ProgressEvent(target.name, self.rows_told, total, loss, elapsed, max(0.0, left))
            )


def _skipped_row(model: nn.Module, name: str, why: str) -> LayerReport:
    shapes = [p.shape for p in model.get_submodule(name).parameters(recurse=False) if p.dim() == 2]
    shape = tuple(shapes[0]) if shapes else (0, 0)
    return LayerReport(name, shape, f"skipped: {why}")  # type: ignore[arg-type]
