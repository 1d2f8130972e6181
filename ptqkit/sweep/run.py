"""Run a sweep: what is missing, model by model, each finished cell kept at once."""

from __future__ import annotations

import fnmatch
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ptqkit._config import show_config
from ptqkit._version import __version__
from ptqkit.errors import PreflightError, PtqkitError
from ptqkit.hf.workbench import Workbench
from ptqkit.sweep.bench import float_model, open_bench, quantized_copy
from ptqkit.sweep.cells import FAILED, MISSING, OK, Cell, CellStore
from ptqkit.sweep.grid import CellsFailed, SweepInterrupted, SweepResult, plan_cells, recipes_of
from ptqkit.sweep.plan import FLOAT, Plan, RecipePlan
from ptqkit.sweep.tasks import measure
from ptqkit.sweep.zeroshot import INSTALL, has_lm_eval

__all__ = ["run_sweep"]

Log = Callable[[str], None]


def run_sweep(
    plan: Plan,
    out: str | os.PathLike[str] | None = None,
    *,
    only: str | None = None,
    rerun: bool = False,
    fail_fast: bool = False,
    dry: bool = False,
    device: str = "cpu",
    threads: int = 0,
    log: Log | None = None,
) -> SweepResult:
    """Measure the cells of a plan that are missing.

    Parameters
    ----------
    plan : Plan
    out : path, optional
        Folder of the results; by default the plan's, below the current folder.
    only : str, optional
        Glob on ``model/recipe/task``; other cells are reused if they are there, not measured.
        The float model's cells that those are compared with run too.
    rerun : bool
        Measure again what is there already.
    fail_fast : bool
        Raise at the first cell that fails.
    dry : bool
        Only look up what is there.
    device, threads
        Of the models, and of the solver.
    log : callable, optional
        Called with each line of progress.

    Returns
    -------
    SweepResult
        Nothing is written but the cells; see :mod:`ptqkit.sweep.results`.

    Raises
    ------
    PreflightError
        If the folder cannot be written, lm-eval is needed and missing, or ``only`` fits nothing.
    CellsFailed
        With ``fail_fast``.
    SweepInterrupted
        On Ctrl-C (a KeyboardInterrupt), with the result so far.
    """
    folder = Path(plan.output if out is None else out)
    cells, skipped = plan_cells(plan, device.split(":")[0])
    run = _Run(plan, CellStore(folder / "cells"), cells, device, threads, fail_fast, log)
    todo = run.look_up(only, rerun)
    keys = frozenset(cells[i].key for i in todo)
    result = SweepResult(plan, folder, run.cells, skipped, keys, _environment(device))
    if dry:
        return result
    _check(folder, cells, todo, only)
    for line in skipped:
        run.log(f"skipped: {line}")
    again = [run.cells[i].reused for i in todo]
    reused = sum(c.reused for c in run.cells) - sum(again)
    left = len(cells) - reused - len(todo)
    run.log(
        f"{len(cells)} cells: {reused} there from before, {len(todo)} to measure"
        + (f", {left} left out" if left else "")
    )
    started = time.perf_counter()
    try:
        run.execute(todo, result.environment)
    except KeyboardInterrupt as error:
        raise SweepInterrupted(result) from error
    finally:
        result.seconds = time.perf_counter() - started
    return result


def _environment(device: str) -> dict[str, Any]:
    """Versions and machine that a number may depend on, without names of anybody's machine."""
    found: dict[str, Any] = {"device": device, "python": platform.python_version()}
    for name in ("ptqkit", "torch", "transformers", "lm_eval", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "ptqkit": __version__, "cpu_level": str(show_config()["cpu_level"])}


def _check(folder: Path, cells: list[Cell], todo: list[int], only: str | None) -> None:
    problems = []
    if not cells:
        problems.append("no model of the sweep is there, or no task: nothing can be measured")
    elif only is not None and not any(fnmatch.fnmatchcase(c.label, only) for c in cells):
        problems.append(f"--only {only!r} fits no cell; cells are named like {cells[-1].label!r}")
    if any(cells[i].kind == "zero-shot" for i in todo) and not has_lm_eval():
        problems.append(INSTALL)
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        problems.append(f"the folder {folder} cannot be written: {parent} is not a folder for it")
    if problems:
        raise PreflightError(problems)


class _Run:
    """State of a run."""

    def __init__(
        self,
        plan: Plan,
        store: CellStore,
        cells: list[Cell],
        device: str,
        threads: int,
        fail_fast: bool,
        log: Log | None,
    ) -> None:
        self.plan, self.store, self.cells = plan, store, cells
        self.device, self.threads, self.fail_fast = device, threads, fail_fast
        self.log = log or (lambda line: None)
        self._done: dict[str, Cell] = {}
        self._started = time.perf_counter()

    def look_up(self, only: str | None, rerun: bool) -> list[int]:
        """Fill in what is kept; return the places of the cells to measure, in order."""
        wanted = {i for i, c in enumerate(self.cells) if only is None or _fits(c, only)}
        compared = {(self.cells[i].model, self.cells[i].task) for i in wanted}
        todo = []
        for i, cell in enumerate(self.cells):
            found = self.store.find(cell)
            if found is not None:
                self.cells[i] = found
            again = rerun and i in wanted
            needed = i in wanted or (cell.recipe == FLOAT and (cell.model, cell.task) in compared)
            if needed and (found is None or again):
                todo.append(i)
        return todo

    def execute(self, todo: list[int], environment: dict[str, Any]) -> None:
        """Measure, model by model and recipe by recipe."""
        self._left = len(todo)
        for model in self.plan.models:
            mine = [i for i in todo if self.cells[i].model == model.name]
            if not mine:
                continue
            bench = self._attempt(mine, partial(open_bench, model, self.device, self.threads))
            if bench is None:
                continue
            for recipe in recipes_of(self.plan, model):
                name = recipe.name if recipe is not None else FLOAT
                places = [i for i in mine if self.cells[i].recipe == name]
                if places:
                    self._recipe(bench, recipe, places, environment)
            del bench

    def _recipe(
        self,
        bench: Workbench,
        recipe: RecipePlan | None,
        places: list[int],
        environment: dict[str, Any],
    ) -> None:
        """Quantize once and measure every task; a recipe under two names is quantized once."""
        for i in [i for i in places if self.cells[i].key in self._done]:
            cell, done = self.cells[i], self._done[self.cells[i].key]
            self._finish(i, replace(done, model=cell.model, recipe=cell.recipe, task=cell.task))
            places = [p for p in places if p != i]
        if not places:
            return
        quantized = self._attempt(
            places,
            lambda: float_model(bench) if recipe is None else quantized_copy(bench, recipe),
        )
        if quantized is None:
            return
        for i in places:
            cell = replace(
                self.cells[i],
                status=MISSING,
                reused=False,
                bits_per_weight=quantized.bits_per_weight,
                activation_bits=quantized.activation_bits,
                seconds_quantize=quantized.seconds,
                message="; ".join(quantized.warnings),
            )
            self.cells[i] = cell
            task = self.plan.task(cell.task)
            started = time.perf_counter()
            found = self._attempt(
                [i], partial(measure, quantized.model, bench.cached_tokenizer, task)
            )
            if found is not None:
                seconds = time.perf_counter() - started
                cell = replace(cell, status=OK, seconds_eval=seconds, **vars(found))
                self.store.keep(cell, environment)
                self._finish(i, cell)

    def _attempt(self, places: list[int], work: Callable[[], Any]) -> Any:
        """Return the result of some work; None if it failed, and then its cells say why."""
        try:
            return work()
        except Exception as error:
            if self.fail_fast:
                label = self.cells[places[0]].label
                raise CellsFailed(f"{label} failed: {_reason(error)}") from error
            for i in places:
                # What an earlier run found for it is not what this run finds.
                cell = self.cells[i]
                bare = Cell(cell.model, cell.recipe, cell.task, cell.kind, cell.key, cell.inputs)
                self._finish(i, replace(bare, status=FAILED, message=_reason(error)))
            return None

    def _finish(self, place: int, cell: Cell) -> None:
        self.cells[place] = cell
        if cell.status == OK:
            self._done[cell.key] = cell
        self._left -= 1
        spent = time.perf_counter() - self._started
        done = sum(1 for c in self.cells if not c.reused and c.status in (OK, FAILED))
        shown = _shown(cell) if cell.status == OK else f"FAILED: {cell.message}"
        left = f"; about {spent / done * self._left:.0f} s left" if self._left else ""
        self.log(f"{cell.label}  {shown}{left}")


def _fits(cell: Cell, only: str) -> bool:
    return fnmatch.fnmatchcase(cell.label, only)


def _shown(cell: Cell) -> str:
    if cell.metric == "perplexity":
        return f"perplexity {cell.value:.4f}"
    return f"{cell.metric} {100 * cell.value:.1f} %"


def _reason(error: Exception) -> str:
    """One line: the kind of error if it is not one of ours, and its message."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, PreflightError) and error.problems:
        # Layers of one kind have one problem: the first says it for all.
        more = len(error.problems) - 1
        text = error.problems[0] + (f" (and {more} more)" if more else "")
    known = isinstance(error, (PtqkitError, ValueError, ArithmeticError))
    text = text if known else f"{type(error).__name__}: {text}"
    return text if len(text) <= 500 else text[:500] + " ..."
