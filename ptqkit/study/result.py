"""What a study gives: rows with standard errors, tables, pictures, paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptqkit._files import plain
from ptqkit._frames import Tabular, html_table
from ptqkit._paired import Sample, standard_errors
from ptqkit._repr import one_line_repr
from ptqkit._tables import WIDTH, table_width, text_table, wrap_line
from ptqkit.errors import UsageError, check_choice, did_you_mean
from ptqkit.study.cells import FAILED, FLOAT, OK, Cell
from ptqkit.study.paired import Difference, mean_of

__all__ = ["StudyResult"]


@dataclass
class StudyResult(Tabular):
    """Every case of a study, on every task.

    Attributes
    ----------
    model : str
    cells : list of Cell
        The float model's first, then case by case and draw by draw.
    settings : dict
        How they were measured.
    seconds : float
        Of the run; cells that were there before cost nothing.
    """

    __repr__ = one_line_repr

    model: str
    cells: list[Cell]
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def __str__(self) -> str:
        return self.table()

    @property
    def cases(self) -> list[str]:
        """Names of the cases, without the float model."""
        return [n for n in dict.fromkeys(c.recipe for c in self.cells) if n != FLOAT]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(dict.fromkeys(c.task for c in self.cells))

    @property
    def parameters(self) -> dict[str, list[Any]]:
        """Labels along each axis that varies."""
        found: dict[str, dict[Any, None]] = {}
        for cell in self.cells:
            for name, label in cell.parameters.items():
                found.setdefault(name, {})[label] = None
        return {name: list(labels) for name, labels in found.items() if len(labels) > 1}

    def select(self, **labels: Any) -> StudyResult:
        """Return the cases with these labels alone; a list stands for any of its labels.

        Raises
        ------
        UsageError
            If no case is left.
        """
        chosen = set(self._matching(labels))
        cells = [c for c in self.cells if c.recipe == FLOAT or c.recipe in chosen]
        return StudyResult(self.model, cells, self.settings, self.seconds)

    def losses(self, case: str = FLOAT, task: str | None = None) -> np.ndarray:
        """Return the nats per token of each window (of a metric, the value of each item).

        Parameters
        ----------
        case : str
        task : str, optional
            By default the first.

        Returns
        -------
        ndarray, float64, shape (draws, windows)
        """
        cells = self._cells_of(case, self._task(task))
        return np.array([np.divide(c.losses, c.scored) for c in cells], dtype=np.float64)

    def excess(self, case: Any, task: str | None = None) -> Difference:
        """Return what a case has above the float model; see :meth:`compare`."""
        return self.compare(case, FLOAT, task)

    def compare(self, first: Any, second: Any, task: str | None = None) -> Difference:
        """Return a paired difference with its standard errors, first minus second.

        Parameters
        ----------
        first, second : str or mapping
            Name of a case, ``"float"``, a label of one axis, or labels by axis, such as
            ``{"grid": "hessian"}``. Where several cases have these labels, each of the first is
            paired with the one of the second whose other labels are the same, and the difference
            is the mean over these pairs.
        task : str, optional
            By default the first.

        Raises
        ------
        UsageError
            If there is no such case, or nothing to pair.
        """
        name = self._task(task)
        pairs = self._pairs(self._selected(first), self._selected(second))
        found = [self._sample(a, name) - self._sample(b, name) for a, b in pairs]
        return self._difference(_said(first), _said(second), name, found)

    def _difference(
        self, first: str, second: str, task: str, samples: Sequence[Sample]
    ) -> Difference:
        sample = mean_of(samples)
        windows, draws = standard_errors(sample)
        return Difference(
            first,
            second,
            task,
            float(sample.values.mean()),
            windows,
            draws,
            len(sample.influence),
            len(sample.values),
            len(samples),
        )

    def _sample(self, case: str, task: str) -> Sample:
        cells = self._cells_of(case, task)
        return Sample.of(
            [c.value for c in cells],
            [c.losses for c in cells],
            cells[0].scored,
            cells[0].metric == "perplexity",
        )

    def _own(self, case: str, task: str) -> list[Cell]:
        """Cells of a case, one per draw, measured or not."""
        return [c for c in self.cells if (c.recipe, c.task) == (case, task)]

    def _cells_of(self, case: str, task: str) -> list[Cell]:
        """Cells of a case, one per draw, all of them measured."""
        cells = self._own(case, task)
        if not cells:
            hint = did_you_mean(case, [*self.cases, FLOAT]) or ""
            raise UsageError(f"there is no case {case!r}{hint}")
        for cell in cells:
            if cell.status != OK:
                raise UsageError(f"{cell.label} is {cell.status}: {cell.message or 'not run yet'}")
        return cells

    def _task(self, name: str | None) -> str:
        if name is None:
            return self.tasks[0]
        check_choice("task", name, self.tasks)
        return name

    def _selected(self, given: Any) -> dict[str, Any] | str:
        """Return a case's name, or labels by axis."""
        if isinstance(given, Mapping):
            return dict(given)
        if given == FLOAT or given in self.cases:
            return str(given)
        axes = [name for name, labels in self.parameters.items() if given in labels]
        if len(axes) != 1:
            why = f"a label of {' and '.join(axes)}" if axes else "neither a case nor a label"
            raise UsageError(f"{given!r} is {why}; give a case's name or labels by axis")
        return {axes[0]: given}

    def _matching(self, labels: Mapping[str, Any]) -> list[str]:
        known = {name for cell in self.cells for name in cell.parameters}
        for name in labels:
            if name not in known:
                raise UsageError(f"there is no parameter {name!r}{did_you_mean(name, known) or ''}")
        found = [
            case
            for case, own in self._labels().items()
            if all(own.get(n) in (v if isinstance(v, list) else [v]) for n, v in labels.items())
        ]
        if not found:
            raise UsageError(f"no case has {_said(labels)}")
        return found

    def _labels(self) -> dict[str, dict[str, Any]]:
        return {c.recipe: c.parameters for c in self.cells if c.recipe != FLOAT}

    def _pairs(
        self, first: dict[str, Any] | str, second: dict[str, Any] | str
    ) -> list[tuple[str, str]]:
        """Cases to compare: of labels, those whose other labels are the same."""
        if isinstance(first, str) or isinstance(second, str):
            # A case by its name goes with each of the other's.
            sides = [[s] if isinstance(s, str) else self._matching(s) for s in (first, second)]
            return [(a, b) for a in sides[0] for b in sides[1]]
        labels, skipped = self._labels(), {*first, *second}

        def rest(case: str) -> tuple[Any, ...]:
            return tuple(sorted((n, str(v)) for n, v in labels[case].items() if n not in skipped))

        partners: dict[tuple[Any, ...], list[str]] = {}
        for case in self._matching(second):
            partners.setdefault(rest(case), []).append(case)
        pairs = [(a, b) for a in self._matching(first) for b in partners.get(rest(a), ())]
        if not pairs:
            raise UsageError(
                f"no case with {_said(first)} has the other labels of one with {_said(second)}"
            )
        return pairs

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per case and task, with the mean over the draws and standard errors.

        ``excess`` is the value minus the float model's, ``standard_error`` its standard error: the
        root of the sum of squares of ``se_windows`` and ``se_draws``.
        """
        return [self._row(case, task) for case in [FLOAT, *self.cases] for task in self.tasks]

    def _row(self, case: str, task: str) -> dict[str, Any]:
        cells = self._own(case, task)
        labels = {n: cells[0].parameters.get(n, "") for n in self.parameters}
        row: dict[str, Any] = {"case": case, **labels, "task": task}
        done = [c for c in cells if c.status == OK]
        bad = next((c for c in cells if c.status != OK), None)
        row |= {"metric": done[0].metric if done else "", "value": math.nan, "excess": math.nan}
        row |= dict.fromkeys(("standard_error", "se_windows", "se_draws"), math.nan)
        whole = bad is None
        if whole:
            row["value"] = math.fsum(c.value for c in cells) / len(cells)
        if whole and self.measured(FLOAT, task):
            found = self.compare(case, FLOAT, task)
            row["excess"] = found.difference
            if case != FLOAT:
                row["standard_error"] = found.standard_error
                row["se_windows"], row["se_draws"] = found.se_windows, found.se_draws
        first = done[0] if done else cells[0]
        row |= {
            "bits_per_weight": first.bits_per_weight,
            "activation_bits": first.activation_bits,
            "seconds": first.seconds_quantize,
            "draws": len(cells),
            "windows": len(first.losses),
            "status": OK if bad is None else bad.status,
            "message": first.message if bad is None else bad.message,
        }
        return row

    def measured(self, case: str, task: str) -> bool:
        """Whether all cells of a case on a task are there."""
        cells = self._own(case, task)
        return bool(cells) and all(c.status == OK for c in cells)

    def _rows(self) -> list[dict[str, Any]]:
        return self.rows()

    def _repr_html_(self) -> str:
        hidden = ("se_windows", "se_draws", "status", "message")
        rows = [{k: v for k, v in row.items() if k not in hidden} for row in self.rows()]
        if len(self.tasks) == 1:
            rows = [{k: v for k, v in row.items() if k not in ("task", "metric")} for row in rows]
        return html_table(rows, self.model)

    def table(self) -> str:
        """Plain text: a line per case and task, the excess with its standard errors."""
        rows = self.rows()
        several = len(self.tasks) > 1
        draws = max(r["draws"] for r in rows) > 1
        header = [self.model, *(["task"] if several else []), "bits/weight", _value_name(rows)]
        header += ["excess", "± windows", *(["± draws"] if draws else []), "s"]
        lines = []
        for row in rows:
            line = [row["case"], *([row["task"]] if several else [])]
            line.append(_number(row["bits_per_weight"], ".2f"))
            line.append(_number(row["value"]) if row["status"] == OK else row["status"])
            if row["case"] == FLOAT:
                line += [""] * (4 if draws else 3)
            else:
                line += [_signed(row["excess"]), _number(row["se_windows"])]
                line += [_number(row["se_draws"])] if draws else []
                line.append(_number(row["seconds"], ".1f"))
            lines.append(line)
        if table_width(list(zip(header, *lines, strict=True))) > WIDTH:
            # Where names are to be cut, not what tells them apart.
            first = _shared_parts([line[0] for line in lines if line[0] != FLOAT])
            header[0] += f": {first.removesuffix(', ')}" if first else ""
            for line in lines:
                line[0] = line[0].removeprefix(first)
        text = text_table(header, lines, left=(0, 1) if several else (0,))
        failed = [f"failed: {r['case']}: {r['message']}" for r in rows if r["status"] == FAILED]
        return "\n".join([text, *map(wrap_line, dict.fromkeys(failed))])

    def best(self, task: str | None = None) -> str:
        """Return the name of the case with the best value on a task, by default the first."""
        name = self._task(task)
        found = [c for c in self.cases if self.measured(c, name)]
        if not found:
            raise UsageError("no case was measured")
        sign = -1 if self._cells_of(found[0], name)[0].higher_is_better else 1
        return min(found, key=lambda c: sign * self._sample(c, name).values.mean())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values that are valid JSON."""
        return plain(
            {
                "model": self.model,
                "settings": self.settings,
                "seconds": self.seconds,
                "rows": self.rows(),
            }
        )

    def plot(
        self,
        kind: str = "bars",
        *,
        x: str | None = None,
        by: str | None = None,
        task: str | None = None,
    ) -> Any:
        """Draw the excess over the float model, with standard errors.

        Parameters
        ----------
        kind : {"bars", "lines", "heatmap", "size", "windows"}
            "bars": a bar per case; "lines": over the parameter ``x``; "heatmap": ``x`` by ``by``;
            "size": over the bits per weight; "windows": the difference of each window of text.
        x : str, optional
            Parameter of the horizontal axis, of the heat map's columns, or of the bars' groups; by
            default the first that varies.
        by : str, optional
            Parameter of the colours, or of the heat map's rows; by default the next that varies.
            What varies besides is averaged over, and named in the title.
        task : str, optional
            By default the first.

        Returns
        -------
        matplotlib.figure.Figure
            Shown by notebooks as it is; ``savefig`` writes it. No display is needed.

        Raises
        ------
        UsageError
            If a parameter does not exist, or nothing was measured.
        """
        from ptqkit.study.pictures import draw

        return draw(self, kind, x, by, self._task(task))

    def grouped(self, names: Sequence[str], task: str) -> dict[tuple[Any, ...], Difference]:
        """Return the excess of the cases of each combination of labels, the mean of the others.

        Parameters
        ----------
        names : sequence of str
            Parameters.
        task : str
        """
        groups: dict[tuple[Any, ...], list[str]] = {}
        for case, labels in self._labels().items():
            if self.measured(case, task):
                groups.setdefault(tuple(labels.get(n) for n in names), []).append(case)
        base = self._sample(FLOAT, task)
        return {
            key: self._difference(
                _said(dict(zip(names, key, strict=True))),
                FLOAT,
                task,
                [self._sample(case, task) - base for case in cases],
            )
            for key, cases in groups.items()
        }


def _said(given: Any) -> str:
    if isinstance(given, Mapping):
        return ", ".join(f"{name}={value}" for name, value in given.items())
    return str(given)


def _value_name(rows: Sequence[Mapping[str, Any]]) -> str:
    names = {row["metric"] for row in rows} - {""}
    return names.pop() if len(names) == 1 else "value"


def _number(value: float, form: str = "") -> str:
    """Return a number with about four digits, or in a given form; nothing for NaN."""
    if math.isnan(value):
        return ""
    if form:
        return format(value, form)
    size = abs(value)
    return (
        f"{value:.{3 if size < 100 else 2 if size < 1000 else 1}f}"
        if size < 1e5
        else f"{value:.4g}"
    )


def _shared_parts(names: Sequence[str]) -> str:
    """Return the parts, each with the comma after it, that all of several names begin with."""
    shared = ""
    if len(set(names)) > 1:
        for level in zip(*(name.split(", ")[:-1] for name in names), strict=False):
            if len(set(level)) > 1:
                break
            shared += f"{level[0]}, "
    return shared


def _signed(value: float) -> str:
    return "" if math.isnan(value) else f"{'+' if value >= 0 else ''}{_number(value)}"
