"""Pictures of studies: excess over the float model with its standard errors.

Bars begin at zero on a linear axis; where values are so far apart that most bars would vanish,
there are points on a logarithmic axis instead, since a bar has no length there.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ptqkit.errors import UsageError, check_choice
from ptqkit.study.cells import FLOAT, OK, Cell
from ptqkit.study.paired import Difference

__all__ = ["KINDS", "Picture", "draw"]

KINDS = ("bars", "lines", "heatmap", "size", "windows")

_COLOURS = ("#4c78a8", "#e45756", "#54a24b", "#b279a2", "#eeca3b", "#72b7b2", "#f58518", "#9a9a9a")
# Values further apart than this are drawn on a logarithmic axis.
_SPREAD = 20.0
_SMALL = {"fontsize": 8}


class Drawn(Protocol):
    """What pictures need of a :class:`ptqkit.StudyResult`."""

    model: str
    cells: list[Cell]

    @property
    def cases(self) -> list[str]:
        """Names of the cases."""

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""

    @property
    def parameters(self) -> dict[str, list[Any]]:
        """Labels along each axis that varies."""

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per case and task."""

    def measured(self, case: str, task: str) -> bool:
        """Whether all cells of a case are there."""

    def excess(self, case: Any, task: str | None = None) -> Difference:
        """Return what a case has above the float model."""

    def losses(self, case: str, task: str | None = None) -> np.ndarray:
        """Return the value of each draw and window."""

    def grouped(self, names: Sequence[str], task: str) -> dict[tuple[Any, ...], Difference]:
        """Return the excess of each combination of labels."""


class Picture(Figure):
    """A figure that notebooks show as it is."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=90)
        return content.getvalue()


def draw(result: Drawn, kind: str, x: str | None, by: str | None, task: str) -> Picture:
    """Draw a study; see :meth:`ptqkit.StudyResult.plot`."""
    check_choice("kind", kind, KINDS)
    known = list(result.parameters)
    for name, value in (("x", x), ("by", by)):
        if value is not None:
            check_choice(name, value, known)
    if x is not None and x == by:
        raise UsageError(f"x and by are both {x!r}: give two parameters")
    if not any(c.status == OK and c.recipe != FLOAT for c in result.cells if c.task == task):
        raise UsageError("nothing to draw: no case was measured")
    functions = {
        "bars": _bars,
        "lines": _lines,
        "heatmap": _heatmap,
        "size": _size,
        "windows": _windows,
    }
    picture, averaged = functions[kind](result, x, by, task)
    picture.axes[0].set_title(_title(result, task, averaged), fontsize=9, loc="left")
    return picture


def _title(result: Drawn, task: str, averaged: Sequence[str]) -> str:
    """Model, bits and, where there are several tasks, the task."""
    parts = [result.model]
    found = dict.fromkeys(_bits(c) for c in result.cells if c.recipe != FLOAT)
    for what in dict.fromkeys(w for w, _ in found):
        bits = dict.fromkeys(b for w, b in found if w == what and b)
        if bits:
            parts.append(f"{what}{', '.join(bits)} bits")
    if len(result.tasks) > 1:
        parts.append(task)
    title = ": ".join([parts[0], ", ".join(parts[1:])]) if len(parts) > 1 else parts[0]
    return f"{title}\nmean over {', '.join(averaged)}" if averaged else title


def _bits(cell: Cell) -> tuple[str, str]:
    """Return what has the bits, the softmax if it is not the weights, and the bits."""
    recipe, softmax = cell.inputs.get("recipe"), cell.inputs.get("softmax")
    if recipe is None:
        return "softmax ", str(softmax.get("bits", 8)) if softmax else ""
    return "", str(recipe["bits"])


def _excess_label(result: Drawn, task: str, found: Sequence[Difference]) -> str:
    """Label of the axis of values, with what the error bars are."""
    name, value = _metric(result, task)
    text = f"{name} above the float model's {value:.4g}"
    drawn = []
    if any(not math.isnan(d.se_windows) for d in found):
        drawn.append(f"{max(d.windows for d in found)} windows")
    if any(not math.isnan(d.se_draws) for d in found):
        drawn.append(f"{max(d.draws for d in found)} draws")
    return f"{text}\n(± standard error over {' and '.join(drawn)})" if drawn else text


def _short(value: float) -> str:
    """Return a number for a label: three digits, never a power of ten."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _metric(result: Drawn, task: str) -> tuple[str, float]:
    cell = next(c for c in result.cells if (c.recipe, c.task) == (FLOAT, task))
    return cell.metric, cell.value


def _picture(width: float, height: float) -> tuple[Picture, Any]:
    picture = Picture(figsize=(width, height), layout="constrained")
    axes = picture.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return picture, axes


def _error_of(found: Difference) -> float:
    error = found.standard_error
    return 0.0 if math.isnan(error) else error


def _logarithmic(found: Sequence[Difference]) -> bool:
    """Whether values are so far apart that a linear axis would hide most of them."""
    values = [d.difference for d in found]
    return min(values) > 0 and max(values) > _SPREAD * min(values)


def _set_log(axes: Any, which: str, found: Sequence[Difference]) -> None:
    """Make an axis logarithmic, with room for the points and plain numbers."""
    low = min(max(d.difference - _error_of(d), 0.4 * d.difference) for d in found)
    high = max(d.difference + _error_of(d) for d in found)
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low / 1.3, high * 2.2)
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _clipped(found: Difference, logarithmic: bool) -> list[list[float]]:
    """Return an error bar, which on a logarithmic axis ends above zero."""
    error = _error_of(found)
    low = min(error, 0.6 * found.difference) if logarithmic else error
    return [[low], [error]]


def _groups(
    result: Drawn, names: Sequence[str], task: str
) -> tuple[dict[tuple[Any, ...], Difference], list[str]]:
    """Excess by the labels of these parameters, and the parameters that are averaged over."""
    return result.grouped(names, task), [n for n in result.parameters if n not in names]


def _bars(result: Drawn, x: str | None, by: str | None, task: str) -> tuple[Picture, list[str]]:
    """Draw a bar per case, or per label of x (groups) and by (colours)."""
    names, shared = [n for n in (x, by) if n is not None], ""
    if names:
        found, averaged = _groups(result, names, task)
        labels = {
            key: ", ".join(f"{n}={v}" for n, v in zip(names, key, strict=True)) for key in found
        }
    else:
        measured = [c for c in result.cases if result.measured(c, task)]
        found, averaged = {(c,): result.excess(c, task) for c in measured}, []
        start = _shared(measured)
        labels = {(c,): c[len(start) :] for c in measured}
        shared = start.removesuffix(", ")
    colours = _colours([key[names.index(by)] if by else "" for key in found])
    values = list(found.values())
    logarithmic = _logarithmic(values)
    picture, axes = _picture(6.6, 1.3 + 0.24 * len(found))
    for place, (key, one) in enumerate(found.items()):
        colour = colours[key[names.index(by)] if by else ""]
        bar = _clipped(one, logarithmic)
        if logarithmic:
            axes.errorbar(one.difference, place, xerr=bar, fmt="o", color=colour, ms=5, capsize=2)
        else:
            axes.barh(place, one.difference, 0.72, color=colour)
            axes.errorbar(one.difference, place, xerr=bar, fmt="none", color="black", capsize=2)
        end = max(one.difference, 0.0) + bar[1][0]
        axes.annotate(
            _short(one.difference), (end, place), (4, 0), textcoords="offset points",
            va="center", fontsize=7,
        )  # fmt: skip
    if logarithmic:
        _set_log(axes, "x", values)
        axes.grid(axis="x", linewidth=0.3)
    else:
        axes.axvline(0, color="black", linewidth=0.8)
        axes.margins(x=0.14)
    axes.set_yticks(range(len(found)), [labels[key] for key in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlabel(_excess_label(result, task, values), **_SMALL)
    axes.set_title(shared, fontsize=9, loc="right")
    return picture, averaged


def _shared(names: Sequence[str]) -> str:
    """Return the beginning, up to a comma, that all of several names have."""
    parts = [name.split(", ")[:-1] for name in names] if len(names) > 1 else []
    same = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    return "".join(f"{level[0]}, " for level in same)


def _colours(labels: Sequence[Any]) -> dict[Any, str]:
    return {v: _COLOURS[i % len(_COLOURS)] for i, v in enumerate(dict.fromkeys(labels))}


def _axis_names(result: Drawn, x: str | None, by: str | None, kind: str) -> tuple[str, str | None]:
    """Return the parameters of both directions, by default the first two that vary."""
    known = list(result.parameters)
    if not known:
        raise UsageError(f"{kind} need a parameter that varies; draw bars instead")
    numeric = [n for n in known if all(map(_is_number, result.parameters[n]))]
    x = x if x is not None else next((n for n in numeric if n != by), known[0])
    return x, by if by is not None else next((n for n in known if n != x), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _lines(result: Drawn, x: str | None, by: str | None, task: str) -> tuple[Picture, list[str]]:
    """Draw the excess over one parameter, a line per label of another."""
    x, by = _axis_names(result, x, by, "lines")
    names = [x] if by is None else [x, by]
    found, averaged = _groups(result, names, task)
    labels = result.parameters[x]
    numeric = all(map(_is_number, labels))
    ticks = sorted(labels) if numeric else labels
    picture, axes = _picture(5.6, 3.4)
    logarithmic = _logarithmic(list(found.values()))
    for line, colour in _colours([key[1] if by else "" for key in found]).items():
        mine = {key[0]: d for key, d in found.items() if not by or key[1] == line}
        points = [(k, mine[v]) for k, v in enumerate(ticks) if v in mine]
        places = [float(ticks[k]) if numeric else float(k) for k, _ in points]
        bars = np.hstack([_clipped(d, logarithmic) for _, d in points])
        axes.errorbar(
            places,
            [d.difference for _, d in points],
            yerr=bars,
            fmt="o-",
            ms=4,
            capsize=2,
            color=colour,
            label=f"{line}" if by else None,
        )
    if logarithmic:
        _set_log(axes, "y", list(found.values()))
    else:
        axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(ticks if numeric else range(len(ticks)), [str(t) for t in ticks])
    axes.set_xlabel(_named(x), **_SMALL)
    axes.set_ylabel(_excess_label(result, task, list(found.values())), **_SMALL)
    if by:
        axes.legend(title=_named(by), frameon=False, fontsize=7, title_fontsize=7)
    return picture, averaged


def _named(parameter: str) -> str:
    units = {"bits": "bits per code", "group_size": "group size, inputs per scale"}
    return units.get(parameter, parameter)


def _heatmap(result: Drawn, x: str | None, by: str | None, task: str) -> tuple[Picture, list[str]]:
    """Draw the excess by two parameters, with its standard error in each field."""
    x, by = _axis_names(result, x, by, "heat maps")
    if by is None:
        raise UsageError("a heat map needs two parameters that vary; draw lines or bars instead")
    found, averaged = _groups(result, [by, x], task)
    rows, columns = result.parameters[by], result.parameters[x]
    grid = np.full((len(rows), len(columns)), np.nan, dtype=np.float64)
    for (row, column), one in found.items():
        grid[rows.index(row), columns.index(column)] = one.difference
    picture, axes = _picture(1.9 + 0.95 * len(columns), 1.5 + 0.45 * len(rows))
    logarithmic = _logarithmic(list(found.values()))
    image = axes.imshow(
        grid, aspect="auto", cmap="viridis_r", norm="log" if logarithmic else "linear"
    )
    for (row, column), one in found.items():
        place = rows.index(row), columns.index(column)
        error = one.standard_error
        text = _short(one.difference) + ("" if math.isnan(error) else f"\n± {_short(error)}")
        dark = image.norm(one.difference) > 0.55
        axes.text(
            place[1], place[0], text, ha="center", va="center", fontsize=7,
            color="white" if dark else "black",
        )  # fmt: skip
    axes.set_xticks(range(len(columns)), [str(c) for c in columns])
    axes.set_yticks(range(len(rows)), [str(r) for r in rows])
    value, _, errors = _excess_label(result, task, list(found.values())).partition("\n")
    axes.set_xlabel(f"{_named(x)}\n{errors}".strip(), **_SMALL)
    axes.set_ylabel(_named(by), **_SMALL)
    axes.spines[:].set_visible(False)
    bar = picture.colorbar(image, ax=axes)
    bar.set_label(value.replace(" above", "\nabove"), fontsize=7)
    bar.ax.tick_params(labelsize=7)
    return picture, averaged


def _size(result: Drawn, x: str | None, by: str | None, task: str) -> tuple[Picture, list[str]]:
    """Draw the excess over the bits per weight, a colour per label of ``by``."""
    known = list(result.parameters)
    by = by if by is not None else next(iter(known), None)
    rows = [r for r in result.rows() if r["task"] == task and r["case"] != FLOAT]
    rows = [r for r in rows if r["status"] == OK]
    found = {r["case"]: result.excess(r["case"], task) for r in rows}
    colours = _colours([r[by] if by else "" for r in rows])
    picture, axes = _picture(5.6, 3.4)
    logarithmic = _logarithmic(list(found.values()))
    for label, colour in colours.items():
        mine = [r for r in rows if not by or r[by] == label]
        mine.sort(key=lambda r: r["bits_per_weight"])
        bars = np.hstack([_clipped(found[r["case"]], logarithmic) for r in mine])
        axes.errorbar(
            [r["bits_per_weight"] for r in mine],
            [r["excess"] for r in mine],
            yerr=bars,
            fmt="o",
            ms=4,
            capsize=2,
            color=colour,
            label=str(label) if by else None,
        )
    if logarithmic:
        _set_log(axes, "y", list(found.values()))
    axes.set_xlabel("bits per weight, with scales and zero-points", **_SMALL)
    axes.set_ylabel(_excess_label(result, task, list(found.values())), **_SMALL)
    if by:
        axes.legend(title=_named(by), frameon=False, fontsize=7, title_fontsize=7)
    return picture, []


def _windows(result: Drawn, x: str | None, by: str | None, task: str) -> tuple[Picture, list[str]]:
    """Draw what each window of text loses, a row of points per case."""
    cases = [c for c in result.cases if result.measured(c, task)]
    base = result.losses(FLOAT, task)
    if base.shape[1] == 0:
        raise UsageError(f"task {task!r} has no values of windows to draw")
    picture, axes = _picture(6.6, 1.3 + 0.24 * len(cases))
    for place, case in enumerate(cases):
        each = (result.losses(case, task) - base).mean(axis=0)
        axes.plot(each, np.full(len(each), place), "|", ms=9, color=_COLOURS[0], alpha=0.8)
        axes.plot(each.mean(), place, "o", ms=4, color=_COLOURS[1])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), cases)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    name, _ = _metric(result, task)
    unit = "nats per token" if name == "perplexity" else name
    axes.set_xlabel(
        f"{unit} above the float model's, a mark per window (dot: their mean)", **_SMALL
    )
    return picture, []
