"""A model, its texts, and any number of recipes: measured with standard errors."""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ptqkit._defaults import FORWARD_BATCH_SIZE, SAMPLES, SEQUENCE_LENGTH
from ptqkit._repr import summarize
from ptqkit._version import __version__
from ptqkit.demo import DEMO, MODEL_DIR
from ptqkit.errors import UsageError
from ptqkit.hf.data.calibration import CalibrationSet, max_positions, prepare_calibration
from ptqkit.hf.equalization.outliers import Outliers, inject_outliers
from ptqkit.hf.models.structure import find_structure
from ptqkit.hf.progress import Progress, ProgressStage, close_progress, make_progress
from ptqkit.hf.quantization.driver import QuantizationResult
from ptqkit.hf.workbench import Workbench
from ptqkit.recipe import Recipe, as_recipe
from ptqkit.recipe.groups import common_group_size
from ptqkit.study.cells import FAILED, FLOAT, OK, Cell, CellsFailed, CellStore
from ptqkit.study.digests import calibration_digest, module_digest
from ptqkit.study.engine import Engine, Quantized, Work
from ptqkit.study.environment import environment
from ptqkit.study.keys import SCHEMA, key_of, model_digest
from ptqkit.study.making import float_model, quantized_copy
from ptqkit.study.measured import Measured
from ptqkit.study.products import Case, cases_of
from ptqkit.study.result import StudyResult
from ptqkit.study.tasks import TextTask, calibration_source, tasks_of

__all__ = ["Study", "StudyInterrupted"]


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C during a study; ``result`` has what was finished."""

    def __init__(self, result: StudyResult) -> None:
        self.result = result
        done = sum(c.status == OK for c in result.cells)
        super().__init__(
            f"interrupted; {done} of {len(result.cells)} cells are finished and kept: the same "
            "call goes on from there"
        )


class Study:
    """One model, measured under any number of recipes.

    The model is loaded once and never changed: every recipe gets a fresh float copy. What was
    measured is kept for the life of the study, and, with a path, beyond it, so that no case is
    measured twice.

    Parameters
    ----------
    model : str, path or nn.Module
        Folder, name on the Hub, ``"demo"`` (the embedded model), or a float model in memory.
    calibration : optional
        What recipes are fitted to: anything that :func:`ptqkit.hf.prepare_calibration` takes, or
        ``"demo"``, text of the standard library.
    test : optional
        What is measured: a text file, a list of texts, a tensor of tokens or ``"demo"``; or a
        mapping of names to several. By default ``"demo"``, if there is no metric.
    tokenizer : optional
        Of a model in memory.
    metric : callable or mapping of names to callables, optional
        ``metric(model)`` gives a number, or an array with one per item: then differences have
        standard errors over the items. Higher is better.
    samples, sequence_length : int
        Calibration windows, and tokens of each.
    window, windows, stride, max_tokens, start_token, batch_size
        Of the test; see :func:`ptqkit.hf.perplexity`.
    dtype, device : str
        See :func:`ptqkit.hf.load_model`.
    threads : int
        Of the solver; 0 is its own policy.
    outliers : mapping, optional
        Inject outliers first, which leaves the float model the same: options of
        :func:`ptqkit.hf.inject_outliers`.
    name : str, optional
        What pictures call the model.

    Raises
    ------
    UsageError
        If the model cannot be loaded, or there is nothing to measure.
    CalibrationError
        If the test text is not there.

    Examples
    --------
    >>> study = Study("path/to/model", "train.txt", "test.txt")
    >>> result = study.run(bits=[2, 3, 4], group_size=[32, 64], draws=3)
    >>> print(result.table())
    >>> result.plot("lines", x="bits").savefig("bits.png")
    """

    def __init__(
        self,
        model: Any,
        calibration: Any = None,
        test: Any = None,
        *,
        tokenizer: Any = None,
        metric: Any = None,
        samples: int = SAMPLES,
        sequence_length: int = SEQUENCE_LENGTH,
        window: int | None = None,
        windows: int | None = None,
        stride: int | None = None,
        max_tokens: int | None = None,
        start_token: str | int | None = "auto",
        batch_size: int = FORWARD_BATCH_SIZE,
        dtype: str = "auto",
        device: str = "auto",
        threads: int = 0,
        outliers: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        self._source = DEMO if calibration is None else calibration
        self._options: dict[str, Any] = {
            "samples": samples,
            "sequence_length": sequence_length,
            "batch_size": batch_size,
            "start_token": start_token,
        }
        settings: dict[str, Any] = {
            "window": window,
            "windows": windows,
            "stride": stride,
            "max_tokens": max_tokens,
            "start_token": start_token,
            "batch_size": batch_size,
        }
        self._digest: str | None = None
        if isinstance(model, nn.Module):
            self.bench = Workbench(model, tokenizer, threads=threads)
        else:
            folder = MODEL_DIR if model == DEMO else model
            self.bench = Workbench.load(folder, dtype=dtype, device=device, threads=threads)
            if Path(folder).is_dir() and outliers is None:
                self._digest = model_digest(str(folder))
        #: What pictures call the model.
        self.name = name or _model_name(model, self.bench.model)
        self._options["max_length"] = max_positions(self.bench.model)
        self._sets: dict[int, CalibrationSet] = {}
        self._digests: dict[int, str] = {}
        #: What was injected, a :class:`ptqkit.hf.equalization.outliers.Outliers` per norm.
        self.outliers: list[Outliers] = []
        if outliers is not None:
            self.outliers = inject_outliers(self.bench.model, self.calibration(0), **outliers)
        if test is None and metric is None:
            test = DEMO
        #: By name, what is measured.
        self.tasks = tasks_of(test, metric, self.bench.cached_tokenizer, settings)
        self._kept: dict[str, Cell] = {}

    def __repr__(self) -> str:
        tasks = ", ".join(self.tasks)
        return f"Study({self.name}, {summarize(self.bench.model)}, tasks: {tasks[:80]})"

    def calibration(self, draw: int = 0) -> CalibrationSet:
        """Return the calibration windows of a draw; the draw is the seed that chooses them.

        Raises
        ------
        CalibrationError
            If the text is missing or too short.
        UsageError
            For a second draw of what is not text: tokens are used as given.
        """
        if draw not in self._sets:
            found = prepare_calibration(
                calibration_source(self._source),
                self.bench.cached_tokenizer,
                seed=draw,
                **self._options,
            )
            if found.start_token == "as given" and self._sets:
                raise UsageError(
                    "draws need calibration text to draw windows from; tokens are used as given"
                )
            self._sets[draw] = found
        return self._sets[draw]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; None for a model in memory without one."""
        return self.bench.tokenizer

    def group_size(self, largest: int = 128) -> int | None:
        """Return the largest group size up to ``largest`` that all layers can have.

        It divides the inputs of every layer that recipes quantize by default; None, one scale per
        output channel, if only 1 does.
        """
        targets = find_structure(self.bench.model, Recipe()).targets.values()
        return common_group_size([t.view.shape[1] for t in targets], largest)

    def float_model(self) -> nn.Module:
        """Return a fresh copy of the float model, to be changed at will."""
        return copy.deepcopy(self.bench.model)

    def quantize(
        self, recipe: Any, *, draw: int = 0, diagnostics: bool = False, **changes: Any
    ) -> QuantizationResult:
        """Quantize a fresh copy, as the study does it; for its report or its model.

        Parameters
        ----------
        recipe, **changes
            As :func:`ptqkit.quantize` takes them.
        draw : int
            Of the calibration windows.
        diagnostics : bool
            Compute what the report compares with, which costs time.
        """
        chosen = replace(as_recipe(recipe), **changes)
        data = self.calibration(draw) if chosen.needs_calibration() else None
        return self.bench.quantize(chosen, diagnostics=diagnostics, calibration=data)

    def measure(self, model: nn.Module, task: str | None = None) -> Measured:
        """Measure any model on a task of the study, by default the first."""
        name = next(iter(self.tasks)) if task is None else task
        return self.tasks[name].measure(model, self.bench.cached_tokenizer)

    def run(
        self,
        recipes: Any = "quality",
        *,
        draws: int | Iterable[int] = 1,
        path: str | os.PathLike[str] | None = None,
        where: Callable[[Mapping[str, Any]], bool] | None = None,
        rerun: bool = False,
        fail_fast: bool = False,
        progress: bool | Progress | None = None,
        **products: Any,
    ) -> StudyResult:
        """Measure the float model and every case that is not measured yet.

        Parameters
        ----------
        recipes : Recipe, preset name, mapping of options, list of parts; or several
            Several are a mapping of names to recipes, or a list of presets' names and Recipe
            objects. None leaves weights and activations float, for a study of the softmax.
        draws : int or iterable of int
            So many drawings of the calibration windows (or these seeds): each recipe that needs
            calibration runs on all of them, which gives standard errors over draws.
        path : path, optional
            Folder that keeps every finished cell at once. A study that was interrupted goes on
            from there; so does another process.
        where : callable, optional
            ``where(labels)`` says False of combinations to leave out.
        rerun : bool
            Measure again what is there already.
        fail_fast : bool
            Raise CellsFailed at the first case that fails; by default the others go on, and a
            warning names the reason.
        progress : bool or callable, optional
            An event per measured cell, with the time left; see
            :func:`ptqkit.hf.progress.make_progress`.
        **products
            Options of recipes; a list is an axis of the product, such as ``bits=[2, 3, 4]``. Under
            another name a mapping of labels to options is an axis of options that change together.
            ``softmax`` takes options of :func:`ptqkit.quantize_softmax`, each of which may be a
            list, or a list of such mappings (or None).

        Returns
        -------
        StudyResult

        Raises
        ------
        PreflightError
            With all problems of recipes and products, before anything runs.
        CellsFailed
            If every case fails; with ``fail_fast`` at the first that does.
        StudyInterrupted
            On Ctrl-C (a KeyboardInterrupt), with the result so far.
        """
        cases = cases_of(recipes, products, where)
        seeds = list(range(draws)) if isinstance(draws, int) else list(draws)
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise UsageError(f"draws must be at least 1, or different seeds, not {draws!r}")
        cells = self._cells(cases, seeds)
        by_name = {case.name: case for case in cases}
        store = CellStore(None if path is None else Path(path) / "cells", self._kept)
        reported = make_progress(progress)

        def make(bench: Workbench, cell: Cell) -> Quantized:
            if cell.recipe == FLOAT:
                return float_model(bench)
            case = by_name[cell.recipe]
            data = self.calibration(cell.draw) if case.needs_calibration else None
            return quantized_copy(bench, case.recipe, case.softmax, data)

        engine = Engine(
            cells,
            store,
            Work(
                lambda name: self.bench,
                make,
                lambda bench, made, cell: self.measure(made.model, cell.task),
            ),
            environment=environment(str(next(self.bench.model.parameters()).device)),
            fail_fast=fail_fast,
        )
        started = time.perf_counter()
        todo = engine.look_up(rerun=rerun)
        stage = ProgressStage(reported, "measuring", len(todo))
        result = StudyResult(self.name, cells, self._settings(seeds))
        try:
            engine.execute(todo, lambda cell: stage.step(cell.label))
        except KeyboardInterrupt as error:
            raise StudyInterrupted(result) from error
        finally:
            close_progress(reported)
            result.seconds = time.perf_counter() - started
        _tell_failures(cells)
        return result

    def _cells(self, cases: list[Case], seeds: list[int]) -> list[Cell]:
        """Cells in order: the float model's, then case by case, draw by draw."""
        base = {
            "schema": SCHEMA,
            "version": __version__,
            "device": next(self.bench.model.parameters()).device.type,
            "model": self._model_digest(),
            "dtype": str(next(self.bench.model.parameters()).dtype),
            "stored_dtype": self.bench.stored_dtype,
            "tokenizer": _tokenizer_digest(self.bench.tokenizer),
        }
        tasks = {name: task.inputs for name, task in self.tasks.items()}
        cells = []
        for name, task in tasks.items():
            inputs = {**base, "task": task}
            cells.append(self._cell(FLOAT, name, inputs, 0, {}))
        for case in cases:
            for draw in seeds:
                known = {**base, "recipe": None, "softmax": case.softmax and dict(case.softmax)}
                if case.recipe is not None:
                    known["recipe"] = case.recipe.to_dict()
                if case.needs_calibration:
                    known["calibration"] = self._calibration_digest(draw)
                for name, task in tasks.items():
                    inputs = {**known, "task": task}
                    cells.append(self._cell(case.name, name, inputs, draw, dict(case.parameters)))
        return cells

    def _cell(
        self, recipe: str, task: str, inputs: dict[str, Any], draw: int, labels: dict[str, Any]
    ) -> Cell:
        kind = self.tasks[task].kind
        return Cell(
            self.name, recipe, task, kind, key_of(inputs), inputs, draw=draw, parameters=labels
        )

    def _model_digest(self) -> str:
        if self._digest is None:
            self._digest = module_digest(self.bench.model)
        return self._digest

    def _calibration_digest(self, draw: int) -> str:
        if draw not in self._digests:
            self._digests[draw] = calibration_digest(self.calibration(draw))
        return self._digests[draw]

    def _settings(self, seeds: list[int]) -> dict[str, Any]:
        """How the cells were measured."""
        settings = {
            name: {k: v for k, v in task.settings.items() if v is not None}
            for name, task in self.tasks.items()
            if isinstance(task, TextTask)
        }
        weights = sum(p.numel() for p in self.bench.model.parameters())
        return {"parameters": weights, "draws": seeds, "tasks": settings}


def _model_name(given: Any, model: nn.Module) -> str:
    if isinstance(given, (str, os.PathLike)):
        return Path(given).name or str(given)
    return type(model).__name__


def _tokenizer_digest(tokenizer: Any) -> str:
    vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    return key_of({"class": type(tokenizer).__name__, "vocabulary": vocabulary})


def _tell_failures(cells: list[Cell]) -> None:
    """Warn of cells that failed; raise CellsFailed if nothing but the float model is left."""
    failed = [c for c in cells if c.status == FAILED]
    if not failed:
        return
    first = failed[0]
    why = f"{first.label}: {first.message}"
    if not any(c.status == OK and c.recipe != FLOAT for c in cells):
        raise CellsFailed(f"every case failed; {why}")
    warnings.warn(
        f"{len(failed)} of {len(cells)} cells failed; {why}", RuntimeWarning, stacklevel=3
    )
