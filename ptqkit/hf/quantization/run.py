"""Go through a plan: solve a group, write it into the model, report it, ask for the next."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

import ptqkit._core as _core
from ptqkit._repr import one_line_repr
from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.errors import (
    LAYER_FAILURES,
    CalibrationError,
    UnsupportedModuleError,
    prefix_error,
)
from ptqkit.hf.data.calibration import CalibrationSet
from ptqkit.hf.equalization.report import EqualizationReport
from ptqkit.hf.models.structure import Structure, Target
from ptqkit.hf.progress import Progress, ProgressStage, close_progress
from ptqkit.hf.quantization.expert_moments import solved_together
from ptqkit.hf.quantization.inspection import Inspection
from ptqkit.hf.quantization.memory import peak_memory
from ptqkit.hf.quantization.moments import Moments
from ptqkit.hf.quantization.one_pass import one_pass_groups
from ptqkit.hf.quantization.overlap import Begin, each_group, helpers
from ptqkit.hf.quantization.plan import Plan
from ptqkit.hf.quantization.processes import Processes
from ptqkit.hf.quantization.replay import replay_groups
from ptqkit.hf.quantization.report import LayerReport, Report, layer_report
from ptqkit.hf.quantization.solve import LayerResult, solve_group
from ptqkit.hf.quantization.work import Step, Steps, Work
from ptqkit.nn.activations import ActivationQuantizer, install_quantizer
from ptqkit.nn.forward import calibration_mode, device_of
from ptqkit.nn.on_grid import dequantize_on
from ptqkit.nn.output_moments import OutputMoments
from ptqkit.nn.quantized_mark import mark_quantized
from ptqkit.nn.transfer import HostCopies
from ptqkit.recipe.recipe import Recipe

__all__ = ["QuantizationInterrupted", "QuantizationRun", "RunOptions", "describe_data"]


class QuantizationInterrupted(KeyboardInterrupt):
    """Ctrl-C in the middle of a run; the message says what had been quantized.

    Attributes
    ----------
    quantized : list of str
        Layers whose weights had been replaced in the model.
    """

    def __init__(
        self, quantized: list[str], total: int, folds: int = 0, text: str | None = None
    ) -> None:
        self.quantized = quantized
        super().__init__(text or _partial_text("interrupted", quantized, total, folds))


def _partial_text(what: str, quantized: list[str], total: int, folds: int = 0) -> str:
    """Say what an unfinished run has left in the model."""
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


@dataclass(frozen=True)
class RunOptions:
    """How a run works, other than the recipe; see :func:`ptqkit.quantize`."""

    threads: int = 0
    diagnostics: bool = True
    on_error: str = "raise"
    progress: Progress | None = None
    processes: Processes | None = None
    outputs: OutputMoments | None = None  # for row_coupling
    start: float = field(default_factory=time.perf_counter)


@dataclass
class _Begun:
    """A group that is being solved: its parts with what waits for each, or an error."""

    __repr__ = one_line_repr

    members: list[Target]
    moments: Moments
    calls: list[tuple[list[Target], Callable[[], dict[str, LayerResult]]]] = field(
        default_factory=list
    )
    error: Exception | None = None


class QuantizationRun:
    """What a run has done so far, and the loop that does it.

    Attributes
    ----------
    matrices : dict of str to QuantizedMatrix
    activations : dict of str to ActivationQuantizer
    report : Report
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        inspection: Inspection,
        plan: Plan,
        options: RunOptions,
        equalization: EqualizationReport | None = None,
    ) -> None:
        self.model, self.recipe, self.plan, self.options = model, recipe, plan, options
        self.inspection, self.equalization = inspection, equalization
        self.matrices: dict[str, QuantizedMatrix] = {}
        # With calibrate_on="float": what is written once all inputs of the float model are seen.
        self._held: list[tuple[Target, LayerResult, Moments]] = []
        self.activations: dict[str, ActivationQuantizer] = {}
        self.report = Report(
            recipe=recipe.to_dict(), memory=dict(plan.estimate), warnings=list(plan.warnings)
        )
        if equalization is not None:
            self.report.equalization = equalization.to_dict()
            self.report.warnings += [f"equalization: {w}" for w in equalization.warnings]
        self.propagate = bool(recipe.propagation)
        self.report.warnings += _stream_warnings(recipe, inspection)
        steps = ("hessian", "solve", "diagnostics", *(["propagation"] if self.propagate else []))
        self.seconds = dict.fromkeys(steps, 0.0)
        targets = inspection.structure.targets
        # Processes wait for each other, which only the calling thread may do.
        most = 0 if options.processes is not None else options.threads or plan.solved_at_once
        self._at_once = min(plan.solved_at_once, most)
        self.costs = {n: _cost(t, inspection.calibration) for n, t in targets.items()}
        self._copies = HostCopies()
        self.stage = ProgressStage(
            options.progress,
            "quantizing",
            len(targets),
            cost=sum(self.costs.values()),
            start=options.start,
        )

    def execute(self) -> None:
        """Quantize every group, and complete the report."""
        setup = time.perf_counter() - self.options.start
        if self.equalization is not None:
            self.seconds["equalization"] = self.equalization.seconds["total"]
            setup -= self.seconds["equalization"]
        setup -= self.seconds.get("rounding_losses", 0.0) + self.seconds.get("row_coupling", 0.0)
        with self._telling_what_is_done():
            self._all_groups()
            self._copies.wait()
            self._write_held()
        self.report.warnings += _expert_warnings(self.report.layers, self._uncorrected())
        self.report.layers += _skipped_rows(self.model, self.inspection.structure)
        total = time.perf_counter() - self.options.start
        rest = total - setup - sum(self.seconds.values())
        self.report.seconds = {"total": total, "setup": setup, "forward": rest, **self.seconds}
        self.report.memory["peak"] = peak_memory(device_of(self.model))

    @contextlib.contextmanager
    def _telling_what_is_done(self) -> Iterator[None]:
        """Say of an error, or of Ctrl-C, what has been quantized by then."""
        folds = 0 if self.equalization is None else len(self.equalization.groups)
        total = len(self.inspection.structure.targets)
        try:
            yield
        except QuantizationInterrupted:
            raise
        except KeyboardInterrupt as error:
            raise QuantizationInterrupted(list(self.matrices), total, folds) from error
        except Exception as error:
            if hasattr(error, "add_note"):
                text = _partial_text("stopped by an error", list(self.matrices), total, folds)
                error.add_note(text)
            raise
        finally:
            close_progress(self.options.progress)

    def _all_groups(self) -> None:
        """Go through all groups as planned; replay takes over if one pass cannot go on."""
        data, found = self.inspection.calibration, self.inspection
        self.report.schedule = self.plan.schedule
        if data is None:
            self._each(_without_data(found.structure), "no calibration")
            return
        self.report.calibration = describe_data(data)
        work = Work(
            self.model,
            found.structure.targets,
            found.probe.groups,
            found.probe.blocks,
            data,
            self.propagate,
            found.stream.writers,
            found.experts,
            self.plan.experts_at_once,
            self.plan.ahead,
            self.recipe.calibrate_on == "float",
            processes=self.options.processes,
            spare=self.plan.spare,
            expected=self.plan.expected,
            on_host=self.plan.on_host,
        )
        reason: str | None = self.plan.reason
        with work.places.moving(), calibration_mode(self.model):
            if self.plan.schedule == "one-pass":
                reason = self._each(one_pass_groups(work), "one-pass")
                if reason is None:
                    return
                if self.plan.strict:
                    raise UnsupportedModuleError(f"schedule='one-pass' cannot go on: {reason}")
                if self.propagate and work.done:
                    raise UnsupportedModuleError(_too_late(self.recipe.propagation, reason))
                self.report.schedule = "one-pass, then replay"
            self._each(replay_groups(work), "replay")
        self.report.schedule_reason = reason or ""

    def _each(self, steps: Steps, schedule: str) -> str | None:
        """Quantize the groups that a schedule yields; return why it leaves the rest."""
        with helpers(self._at_once) as begin:
            return each_group(
                steps,
                partial(self._begin_group, begin=begin),
                partial(self._finish_group, schedule=schedule),
                self._at_once,
            )

    def _uncorrected(self) -> bool:
        """Whether there are layers of experts that error propagation does not reach."""
        if not self.propagate:
            return False
        names = {name.rsplit(".", 2)[0] for name in self.matrices}
        found = [m for n, m in self.inspection.experts.items() if n in names]
        return any(not m.every_token or m.shape.scores_first for m in found)

    def _begin_group(self, step: Step, begin: Begin) -> _Begun:
        """Begin to solve a group, where it is one matrix; nothing is written to the model."""
        members, moments = step.members, step.moments
        if isinstance(moments, Exception):
            return _Begun(members, Moments(), error=moments)
        if moments.hessian is not None and moments.hessian.tokens == 0:
            text = f"{members[0].name} saw no token of the calibration data"
            return _Begun(members, Moments(), error=CalibrationError(text))
        by_name = {t.name: t for t in members}
        shapes = {t.name: t.view.shape for t in members}
        parts = solved_together(list(by_name), shapes, self.inspection.experts)
        threads, calls = self.options.threads, []
        if self._at_once > 1 and len(parts) == 1 and step.independent:  # which changes no bit
            threads = max(1, (threads or int(_core.config()[2])) // self._at_once)
        for names in parts:
            part = [by_name[n] for n in names]
            call = partial(
                solve_group,
                part,
                moments,
                threads=threads,
                diagnostics=self.options.diagnostics,
                processes=self.options.processes,
                outputs=self.options.outputs,
                copies=self._copies,
            )
            # What must be taken at once, and parts of one group, which are large, one by one: by
            # the caller, when their turn comes.
            alone = len(parts) > 1 or not step.independent
            calls.append((part, call if alone else begin(call)))
        return _Begun(members, moments, calls)

    def _finish_group(self, begun: _Begun, schedule: str) -> None:
        """Wait for a group, write it or leave it float, and report it."""
        members = begun.members
        try:
            if begun.error is not None:
                raise begun.error
            self.seconds["hessian"] += begun.moments.seconds
            while begun.calls:
                self._finish_part(*begun.calls.pop(0), begun, schedule)
        except LAYER_FAILURES as error:
            error = prefix_error(error, ", ".join(t.name for t in members))
            if self.options.on_error == "raise":
                raise error
            for target in members:
                self.report.warnings.append(f"{target.name} is left float: {error}")
                self.report.layers.append(
                    LayerReport(
                        target.name, target.view.shape, f"failed: {error}", schedule=schedule
                    )
                )
        losses = {row.name: row.objective for row in self.report.layers[-len(members) :]}
        for target in members:
            loss = losses[target.name]
            self.stage.step(target.name, loss, self.costs[target.name])

    def _finish_part(
        self,
        part: list[Target],
        result_of: Callable[[], dict[str, LayerResult]],
        begun: _Begun,
        schedule: str,
    ) -> None:
        """Write and report some of the layers that share an input."""
        moments = begun.moments
        started = time.perf_counter()
        solved = result_of()
        waited = time.perf_counter() - started
        spent = sum(r.seconds_solve + r.seconds_diagnostics for r in solved.values())
        # What threads did meanwhile took no time of the run's own.
        own = min(1.0, waited / spent) if spent and self._at_once else 1.0
        rows = sum(t.view.shape[0] for t in begun.members)
        for target in part:
            result, share = solved[target.name], target.view.shape[0] / rows
            if self.recipe.calibrate_on == "float":
                self._hold(target, result, moments)
            else:
                self._write(target, result, moments)
            result.seconds_propagation += share * moments.seconds_drift
            self.seconds["solve"] += own * result.seconds_solve
            self.seconds["diagnostics"] += own * result.seconds_diagnostics
            if self.propagate:
                self.seconds["propagation"] += result.seconds_propagation
            row = layer_report(
                target, result, moments.tokens, share * moments.seconds, schedule, moments.rule
            )
            row.shares_input_with = [t.name for t in part if t is not target]
            if row.notes and not row.rule:
                self.report.warnings.append(f"{row.name}: {row.notes}")
            self.report.layers.append(row)

    def _hold(self, target: Target, result: LayerResult, moments: Moments) -> None:
        """Keep a layer's result, in codes, until the layers after it have been calibrated too."""
        codes = replace(result, dequantized=torch.empty(0, dtype=torch.float32))
        self._held.append((target, codes, Moments(ranges=moments.ranges)))

    def _write_held(self) -> None:
        """Write what was kept; nothing before has changed the model."""
        for target, result, moments in self._held:
            found = dequantize_on(target.view.weight.device, result.matrix)
            self._write(target, replace(result, dequantized=found), moments)
        self._held.clear()

    def _write(self, target: Target, result: LayerResult, moments: Moments) -> None:
        """Put a layer's result into the model: weight, bias, and what quantizes its inputs."""
        started = time.perf_counter()
        target.view.write(result.dequantized)
        mark_quantized(target.module)
        self.seconds["solve"] += time.perf_counter() - started
        self.matrices[target.name] = result.matrix
        if result.bias_shift is not None:
            target.view.subtract_bias(result.bias_shift)
        spec = target.options.activations
        if spec is not None:
            dtype = target.view.weight.dtype
            quantizer = ActivationQuantizer.calibrate(spec, moments.ranges, dtype)
            install_quantizer(target.module, quantizer)
            self.activations[target.name] = quantizer


def _too_late(propagation: str, reason: str) -> str:
    """Return the message of one pass that stops where the first layers are no longer float."""
    return (
        f"{propagation}: one pass cannot go on: {reason}; replay would need the float weights of "
        "the layers that are quantized already: load the model again and use schedule='replay'"
    )


def _stream_warnings(recipe: Recipe, inspection: Inspection) -> list[str]:
    """Say which blocks' writers cannot answer for the errors of the stream, and why."""
    unproven = inspection.stream.unproven
    if not unproven:
        return []
    name, why = next(iter(unproven.items()))
    return [
        f"residual_propagation={recipe.residual_propagation:g} does not reach {len(unproven)} of "
        f"{len(inspection.probe.blocks)} blocks ({name}: {why}); their layers have "
        f"error_propagation={recipe.error_propagation:g}"
    ]


def _expert_warnings(rows: list[LayerReport], uncorrected: bool) -> list[str]:
    """Say how many layers of experts had too few tokens, once for all of them."""
    short = [row for row in rows if row.rule]
    found = []
    if short:
        none = sum(row.tokens == 0 for row in short)
        found.append(
            f"{len(short)} layers of experts ({short[0].name}, ...) were routed fewer tokens than "
            f"they have inputs, {none} of them none: the moments of all tokens of their mixture "
            "fill them up, as their rows say; give more data, or calibrate_all_experts=True"
        )
    if uncorrected:
        found.append(
            "the layers of experts are not corrected for the errors before them: which tokens come "
            "to an expert differs between the float and the quantized model"
        )
    return found


def _without_data(structure: Structure) -> Steps:
    """Yield every layer alone, without moments."""
    for target in structure.targets.values():
        yield Step([target], Moments())
    return None


def _cost(target: Target, calibration: CalibrationSet | None) -> float:
    """Estimate the cost of a layer (multiply-adds of forward, Hessian and solve)."""
    rows, columns = target.view.shape
    tokens = calibration.tokens if calibration is not None else 1
    return float(columns) * (2 * rows + columns) * tokens + float(rows) * columns * columns


def describe_data(data: CalibrationSet) -> dict[str, object]:
    """Return what the report says of the calibration data."""
    return {
        "source": data.source,
        "samples": data.samples,
        "sequence_length": data.sequence_length,
        "tokens": data.tokens,
        "batches": len(data.batches),
        "start_token": data.start_token,
    }


def _skipped_rows(model: nn.Module, structure: Structure) -> list[LayerReport]:
    """Return the rows of the modules left alone, with the shape of their first matrix."""
    rows = []
    for name, why in structure.skipped.items():
        parameters = model.get_submodule(name).parameters(recurse=False)
        shapes = [(p.shape[0], p.shape[1]) for p in parameters if p.dim() == 2]
        shape = shapes[0] if shapes else (0, 0)
        rows.append(LayerReport(name, shape, f"skipped: {why}"))
    return rows
