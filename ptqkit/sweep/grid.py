"""The cells of a sweep, and its result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptqkit._frames import Tabular
from ptqkit._repr import one_line_repr
from ptqkit.errors import check_choice
from ptqkit.study.cells import FLOAT, OK, Cell
from ptqkit.study.keys import key_of
from ptqkit.study.result import StudyResult
from ptqkit.sweep.digest import cell_inputs
from ptqkit.sweep.plan import ModelPlan, Plan, RecipePlan, TaskPlan

__all__ = ["SweepInterrupted", "SweepResult", "plan_cells", "recipes_of"]


@dataclass
class SweepResult(Tabular):
    """All cells of a sweep and what is known about the run.

    Attributes
    ----------
    plan : Plan
    out : Path
    cells : list of Cell
        In the order of the file; those not measured yet have status ``"missing"``.
    skipped : list of str
        Models and tasks whose files are not there.
    todo : frozenset of str
        Keys of the cells that were missing when the run began.
    environment : dict
    seconds : float
    """

    __repr__ = one_line_repr

    plan: Plan
    out: Path
    cells: list[Cell]
    skipped: list[str] = field(default_factory=list)
    todo: frozenset[str] = frozenset()
    environment: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def count(self, status: str) -> int:
        """Cells with a status."""
        return sum(c.status == status for c in self.cells)

    def study(self, model: str | None = None) -> StudyResult:
        """Return what was measured of one model (by default the first) as a study gives it.

        Its rows are means over the draws, with standard errors; it compares recipes and draws
        pictures.
        """
        names = list(dict.fromkeys(c.model for c in self.cells))
        name = names[0] if model is None else model
        check_choice("model", name, names)
        cells = [c for c in self.cells if c.model == name]
        return StudyResult(name, cells, {}, self.seconds)

    def _rows(self) -> list[dict[str, Any]]:
        names = dict.fromkeys(c.model for c in self.cells)
        return [{"model": n, **row} for n in names for row in self.study(n).rows()]


class SweepInterrupted(KeyboardInterrupt):
    """Ctrl-C during a sweep; ``result`` has what was finished."""

    def __init__(self, result: SweepResult) -> None:
        self.result = result
        super().__init__(
            f"interrupted; {result.count(OK)} finished cells are kept in {result.out}, and the "
            "same command goes on from there"
        )


def plan_cells(plan: Plan, device: str = "cpu") -> tuple[list[Cell], list[str]]:
    """Cells of a plan, not measured, and a line for everything that has to be skipped.

    Parameters
    ----------
    plan : Plan
    device : str
        Type of the device, part of every key.
    """
    cells, skipped = [], []
    for task in plan.tasks:
        if task.missing:
            skipped.append(f"task {task.name}: there is no {task.source.path}")
    for model in plan.models:
        if model.missing:
            skipped.append(f"model {model.name}: there is no {model.path}")
            continue
        for recipe in recipes_of(plan, model):
            fitted = recipe is not None and recipe.fitted
            for draw in range(model.calibration.draws if fitted else 1):
                for task in (plan.task(name) for name in model.tasks):
                    if not task.missing:
                        cells.append(_cell(model, recipe, task, device, draw))
    return cells, skipped


def _cell(
    model: ModelPlan, recipe: RecipePlan | None, task: TaskPlan, device: str, draw: int
) -> Cell:
    inputs = cell_inputs(model, recipe, task, device, draw)
    name = recipe.name if recipe is not None else FLOAT
    labels = dict(recipe.parameters) if recipe is not None else {}
    return Cell(
        model.name,
        name,
        task.name,
        task.kind,
        key_of(inputs),
        inputs,
        draw=draw,
        parameters=labels,
    )


def recipes_of(plan: Plan, model: ModelPlan) -> Iterator[RecipePlan | None]:
    """Yield None, for the model as it is, and the recipes of a model."""
    yield None
    yield from (r for r in plan.recipes if model.name in r.models)
