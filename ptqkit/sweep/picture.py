"""The picture of a sweep: a panel per task, a bar per recipe."""

from __future__ import annotations

import io
import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ptqkit._files import write_atomically
from ptqkit.study.cells import FLOAT, OK
from ptqkit.sweep.grid import SweepResult
from ptqkit.sweep.results import summary

__all__ = ["draw"]

_COLOURS = ("#4c78a8", "#e45756", "#54a24b", "#b279a2", "#eeca3b", "#9a9a9a")
# Values further apart than this are drawn on a logarithmic axis.
_SPREAD = 5.0
_ACROSS = 3


def draw(result: SweepResult) -> str:
    """Draw the measured cells to ``results.png``; published figures are never in it.

    Perplexities of one task have a panel per model, since they compare only within one tokenizer;
    accuracies of all models share one.

    Parameters
    ----------
    result : SweepResult

    Returns
    -------
    str
        Path of the picture.
    """
    panels = _panels(result)
    across = min(_ACROSS, len(panels))
    down = math.ceil(len(panels) / across)
    bars = max(
        len({r["recipe"] for r in p}) * (1 + 0.45 * (len({r["model"] for r in p}) - 1))
        for p in panels.values()
    )
    size = (4.4 * across + 0.4, (0.9 + 0.26 * bars) * down + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    models = list(dict.fromkeys(c.model for c in result.cells))
    colours = {m: _COLOURS[i % len(_COLOURS)] for i, m in enumerate(models)}
    for place, (title, members) in zip(axes, panels.items(), strict=False):
        _panel(place, title, members, colours)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    figure.suptitle(result.plan.name, fontsize=10)
    content = io.BytesIO()
    figure.savefig(content, dpi=130, format="png")
    path = result.out / "results.png"
    write_atomically(path, content.getvalue())
    return str(path)


def _panels(result: SweepResult) -> dict[str, list[dict[str, Any]]]:
    """Rows of each panel by its title."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in summary(result):
        one = row["kind"] == "zero-shot"
        title = row["task"] if one else f"{row['task']}: {row['model']}"
        panels.setdefault(title, []).append(row)
    return {t: p for t, p in panels.items() if any(r["status"] == OK for r in p)}


def _panel(axes: Any, title: str, members: list[dict[str, Any]], colours: dict[str, str]) -> None:
    recipes = [n for n in dict.fromkeys(r["recipe"] for r in members) if n != FLOAT]
    models = list(dict.fromkeys(r["model"] for r in members))
    width = 0.8 / len(models)
    logarithmic = _limits(axes, [r for r in members if r["status"] == OK])
    for k, model in enumerate(models):
        mine = {r["recipe"]: r for r in members if r["model"] == model}
        base = mine.get(FLOAT)
        for i, name in enumerate(recipes):
            if name in mine:
                place = i + (k - (len(models) - 1) / 2) * width
                _bar(axes, mine[name], place, width, colours[model], logarithmic)
        if base is not None and base["status"] == OK:
            value = _scale(base) * base["value"]
            label = f"{model}, float: {value:.4g}"
            axes.axvline(value, linestyle="--", linewidth=1, label=label, color=colours[model])
            if base["chance"] > 0:
                axes.axvline(100 * base["chance"], linestyle=":", linewidth=0.8, color="black")
    axes.set_yticks(range(len(recipes)), recipes)
    axes.set_ylim(len(recipes) - 0.4, -0.6)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        # Above the axes, wherever these end: a distance below would grow with their height.
        axes.legend(
            title=title,
            fontsize=6,
            title_fontsize=8,
            frameon=False,
            loc="lower center",
            bbox_to_anchor=(0.5, 0.99),
        )
    else:
        axes.set_title(title, fontsize=8)


def _scale(row: dict[str, Any]) -> float:
    return 100.0 if row["kind"] == "zero-shot" else 1.0


def _bar(
    axes: Any, row: dict[str, Any], place: float, width: float, colour: str, logarithmic: bool
) -> None:
    if row["status"] != OK:
        axes.text(
            0.01,
            place,
            row["status"],
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=6,
            color="#b00000",
        )
        return
    value, error = _scale(row) * row["value"], _scale(row) * row["excess_se"]
    error = 0.0 if math.isnan(error) else error
    # What a recipe costs is the length of a bar: perplexities begin at the float model's. On a
    # logarithmic axis lengths say nothing, and there are points.
    begin = row["float_value"] if row["kind"] == "perplexity" else 0.0
    if math.isnan(begin) or logarithmic:
        axes.plot(value, place, "o", color=colour, markersize=4)
        begin = value
    else:
        axes.barh(place, value - begin, width, left=begin, color=colour)
    if error:
        low = min(error, 0.9 * value) if logarithmic else error
        style = {"color": "black", "elinewidth": 0.8, "capsize": 1.5}
        axes.errorbar(value, place, xerr=[[low], [error]], fmt="none", **style)
    axes.annotate(
        f"{value:.4g}",
        (max(value, begin) + error, place),
        (3, 0),
        textcoords="offset points",
        va="center",
        fontsize=6,
    )


def _limits(axes: Any, measured: list[dict[str, Any]]) -> bool:
    """Set scale, limits and label of the values; return whether they are logarithmic."""
    values = [_scale(r) * (r["value"] + s) for r in measured for s in _ends(r)]
    if measured and measured[0]["kind"] == "zero-shot":
        axes.set_xlabel("accuracy, % (dotted: chance)", fontsize=7)
        axes.set_xlim(0, min(118, max(1.0, 1.2 * max(values))))
        return False
    errors = any(not math.isnan(r["excess_se"]) for r in measured)
    label = "perplexity, from the float model's"
    if measured and measured[0]["kind"] == "samples":
        label = "noise by signal of final samples"
    axes.set_xlabel(f"{label} (± standard error)" if errors else label, fontsize=7)
    if not values:
        return False
    low, high = min(values), max(values)
    if high > _SPREAD * low > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        room = (high / low) ** 0.25
        axes.set_xlim(low / room**0.2, high * room)
        return True
    span = max(high - low, 0.001 * high)
    axes.set_xlim(low - 0.1 * span, high + 0.25 * span)
    return False


def _ends(row: dict[str, Any]) -> tuple[float, ...]:
    """Where a value and its error bar end, from the value; the lower one counts for bars alone."""
    error = row["excess_se"]
    return (0.0,) if math.isnan(error) else (0.0, error)
