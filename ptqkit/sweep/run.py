"""Run a sweep: what is missing, model by model, each finished cell kept at once."""

from __future__ import annotations

import fnmatch
import os
import time
from collections.abc import Callable
from pathlib import Path

from ptqkit.errors import PreflightError
from ptqkit.hf.workbench import Workbench
from ptqkit.study.cells import FLOAT, Cell, CellStore
from ptqkit.study.engine import Engine, Quantized, Work
from ptqkit.study.environment import environment
from ptqkit.study.making import float_model
from ptqkit.study.measured import Measured
from ptqkit.sweep.bench import open_bench, quantized_copy
from ptqkit.sweep.diffusion import UNetBench, open_unet
from ptqkit.sweep.grid import SweepInterrupted, SweepResult, plan_cells
from ptqkit.sweep.plan import Plan
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
    engine = Engine(
        cells,
        CellStore(folder / "cells"),
        _work(plan, device, threads),
        environment=environment(device),
        fail_fast=fail_fast,
        log=log,
    )
    todo = engine.look_up(None if only is None else lambda cell: _fits(cell, only), rerun)
    keys = frozenset(cells[i].key for i in todo)
    result = SweepResult(plan, folder, cells, skipped, keys, engine.environment)
    if dry:
        return result
    _check(folder, cells, todo, only)
    for line in skipped:
        engine.log(f"skipped: {line}")
    again = [cells[i].reused for i in todo]
    reused = sum(c.reused for c in cells) - sum(again)
    left = len(cells) - reused - len(todo)
    engine.log(
        f"{len(cells)} cells: {reused} there from before, {len(todo)} to measure"
        + (f", {left} left out" if left else "")
    )
    started = time.perf_counter()
    try:
        engine.execute(todo)
    except KeyboardInterrupt as error:
        raise SweepInterrupted(result) from error
    finally:
        result.seconds = time.perf_counter() - started
    return result


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


def _work(plan: Plan, device: str, threads: int) -> Work:
    """Return what the engine needs of a plan."""
    models = {m.name: m for m in plan.models}
    recipes = {r.name: r for r in plan.recipes}

    def opened(name: str) -> Workbench | UNetBench:
        if models[name].sampling is not None:
            return open_unet(models[name], device, threads)
        return open_bench(models[name], device, threads)

    def make(bench: Workbench | UNetBench, cell: Cell) -> Quantized:
        if isinstance(bench, UNetBench):
            return bench.make(recipes.get(cell.recipe), cell.draw)
        if cell.recipe == FLOAT:
            return float_model(bench)
        seed = models[cell.model].calibration.seed + cell.draw
        return quantized_copy(bench, recipes[cell.recipe], seed)

    def measured(bench: Workbench | UNetBench, made: Quantized, cell: Cell) -> Measured:
        task = plan.task(cell.task)
        if isinstance(bench, UNetBench):
            return bench.measure(made.model, task)
        return measure(made.model, bench.cached_tokenizer, task)

    return Work(opened, make, measured)


def _fits(cell: Cell, only: str) -> bool:
    return fnmatch.fnmatchcase(cell.label, only)
