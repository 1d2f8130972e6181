"""The demo's picture: excess perplexity by bits, and what it costs in size."""

from __future__ import annotations

import os

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ptqkit.demo.result import METHODS, DemoResult

__all__ = ["draw"]

_COLOURS = {"rtn": "#9a9a9a", "reference": "#4c78a8", "quality": "#e45756"}


def draw(result: DemoResult, path: str | os.PathLike[str]) -> None:
    """Draw the rows of a demo into a file (type by its suffix); no display is needed.

    Parameters
    ----------
    result : DemoResult
    path : path
    """
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    points, sizes = figure.subplots(1, 2)
    widths = sorted({row.bits for row in result.rows if row.recipe != "float"}, reverse=True)
    for k, (recipe, label) in enumerate(METHODS.items()):
        style = {"label": label, "color": _COLOURS[recipe]}
        rows = [result.row(recipe, bits) for bits in widths]
        # Points: on a logarithmic axis the length of a bar would say nothing.
        places = [i + 0.2 * (k - 1) for i in range(len(widths))]
        points.plot(places, [r.excess for r in rows], "o", **style)
        for place, row in zip(places, rows, strict=True):
            points.annotate(
                f"{row.excess:.2f}",
                (place, row.excess),
                (0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
        sizes.plot([r.megabytes for r in rows], [r.perplexity for r in rows], "o-", **style)
    reference = result.rows[0]
    sizes.axhline(reference.perplexity, color="black", linewidth=0.8, linestyle="--")
    sizes.annotate(
        f"float16, {reference.megabytes:.1f} MB",
        (0.02, reference.perplexity),
        xycoords=("axes fraction", "data"),
        ha="left",
        va="top",
        fontsize=7,
    )
    smallest = min(row.excess for row in result.rows[1:])
    points.set_yscale("log" if smallest > 0 else "linear")
    points.margins(x=0.15, y=0.15)
    sizes.set_yscale("log")
    for axes in (points, sizes):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.tick_params(which="both", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    sizes.yaxis.set_minor_formatter(FuncFormatter(_minor))
    points.yaxis.set_minor_formatter(NullFormatter())
    points.set_xticks(range(len(widths)), [f"{bits} bit" for bits in widths])
    points.set_ylabel("perplexity above the float model's")
    points.legend(fontsize=7, frameon=False)
    sizes.set_xlabel("size of all tensors, MB")
    sizes.set_ylabel("perplexity on unseen text")
    figure.savefig(path, dpi=130)


def _minor(value: float, _: int) -> str:
    """Label few enough of the ticks of a decade to be read."""
    text = f"{value:g}"
    return text if text.strip("0.")[0] in "235" else ""
