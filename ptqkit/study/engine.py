"""The engine of studies and sweeps: measure the cells that are missing, keep each at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ptqkit._repr import one_line_repr
from ptqkit.errors import PreflightError, PtqkitError
from ptqkit.study.cells import FAILED, FLOAT, OK, Cell, CellsFailed, CellStore
from ptqkit.study.measured import Measured

__all__ = ["Engine", "Quantized", "Work"]

Log = Callable[[str], None]


@dataclass(frozen=True)
class Quantized:
    """A model to measure, and what it took.

    Attributes
    ----------
    model : nn.Module
    bits_per_weight, activation_bits : float
        Of the quantized layers; 16 is float.
    seconds : float
    warnings : tuple of str
    """

    __repr__ = one_line_repr

    model: Any
    bits_per_weight: float
    activation_bits: float
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """What the engine asks for.

    Attributes
    ----------
    open : callable
        ``open(model)`` loads a model by its name.
    make : callable
        ``make(opened, cell)`` returns what the cell is measured on, a :class:`Quantized`.
    measure : callable
        ``measure(opened, quantized, cell)`` returns a :class:`Measured`.
    """

    __repr__ = one_line_repr

    open: Callable[[str], Any]
    make: Callable[[Any, Cell], Quantized]
    measure: Callable[[Any, Quantized, Cell], Measured]


class Engine:
    """Measures cells model by model and recipe by recipe.

    A model is loaded once, a recipe quantized once for all its tasks; cells of one key, under
    whatever names, are measured once. A cell that fails says why, and the others go on.

    Parameters
    ----------
    cells : list of Cell
        Filled in place.
    store : CellStore
    work : Work
    environment : dict
        Kept with every cell.
    fail_fast : bool
        Raise CellsFailed at the first cell that fails.
    log : callable, optional
        Called with each line of progress.
    """

    def __init__(
        self,
        cells: list[Cell],
        store: CellStore,
        work: Work,
        *,
        environment: dict[str, Any] | None = None,
        fail_fast: bool = False,
        log: Log | None = None,
    ) -> None:
        self.cells, self.store, self.work = cells, store, work
        self.environment, self.fail_fast = environment or {}, fail_fast
        self.log = log or (lambda line: None)
        self._finished: Callable[[Cell], None] | None = None
        self._done: dict[str, Cell] = {}
        self._left = 0
        self._started = time.perf_counter()

    def look_up(
        self, wanted: Callable[[Cell], bool] | None = None, rerun: bool = False
    ) -> list[int]:
        """Fill in what is kept; return the places of the cells to measure, in order.

        Parameters
        ----------
        wanted : callable, optional
            Which cells to measure; the float model's that those are compared with count too.
        rerun : bool
            Measure again what is there already.
        """
        chosen = {i for i, c in enumerate(self.cells) if wanted is None or wanted(c)}
        compared = {(self.cells[i].model, self.cells[i].task) for i in chosen}
        todo = []
        for i, cell in enumerate(self.cells):
            found = self.store.find(cell)
            if found is not None:
                self.cells[i] = found
            again = rerun and i in chosen
            needed = i in chosen or (cell.recipe == FLOAT and (cell.model, cell.task) in compared)
            if needed and (found is None or again):
                todo.append(i)
        return todo

    def execute(self, todo: list[int], finished: Callable[[Cell], None] | None = None) -> None:
        """Measure the cells at these places; ``finished`` gets each, measured or failed."""
        self._finished = finished
        self._left, self._started = len(todo), time.perf_counter()
        for model, mine in _grouped(todo, lambda i: self.cells[i].model):
            opened = self._attempt(mine, partial(self.work.open, model))
            if opened is None:
                continue
            for _, places in _grouped(mine, lambda i: (self.cells[i].recipe, self.cells[i].draw)):
                self._recipe(opened, places)
            del opened

    def _recipe(self, opened: Any, places: list[int]) -> None:
        """Quantize once and measure every task; a recipe under two names is quantized once."""
        for i in [i for i in places if self.cells[i].key in self._done]:
            self._finish(i, self.cells[i].filled(self._done[self.cells[i].key]))
            places = [p for p in places if p != i]
        if not places:
            return
        quantized = self._attempt(places, partial(self.work.make, opened, self.cells[places[0]]))
        if quantized is None:
            return
        for i in places:
            cell = replace(
                self.cells[i].bare(),
                bits_per_weight=quantized.bits_per_weight,
                activation_bits=quantized.activation_bits,
                seconds_quantize=quantized.seconds,
                message="; ".join(quantized.warnings),
            )
            started = time.perf_counter()
            found = self._attempt([i], partial(self.work.measure, opened, quantized, cell))
            if found is not None:
                seconds = time.perf_counter() - started
                cell = replace(cell, status=OK, seconds_eval=seconds, **vars(found))
                self.store.keep(cell, self.environment)
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
                bare = self.cells[i].bare()
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
        if self._finished is not None:
            self._finished(cell)


def _grouped(places: list[int], key: Callable[[int], Any]) -> list[tuple[Any, list[int]]]:
    groups: dict[Any, list[int]] = {}
    for i in places:
        groups.setdefault(key(i), []).append(i)
    return list(groups.items())


def _shown(cell: Cell) -> str:
    if cell.metric == "perplexity":
        return f"perplexity {cell.value:.4f}"
    if cell.higher_is_better and 0 <= cell.value <= 1:
        return f"{cell.metric} {100 * cell.value:.1f} %"
    return f"{cell.metric} {cell.value:.4g}"


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
