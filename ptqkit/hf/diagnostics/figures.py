"""Figures of diagnoses, in the form of [IPQS]: curves over depth, distributions, heat maps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ptqkit.errors import check_choice
from ptqkit.hf.diagnostics.curves import METRICS, curve
from ptqkit.hf.diagnostics.rows import PARTS, Diagnosis, NormRow, WeightRow

__all__ = ["FIGURES", "draw"]

FIGURES = ("depth", "distributions", "channels", "magnitudes")

_TITLES = {
    "rmse_token": "RMSE(X, X̂), a grid per token",
    "rmse_tensor": "RMSE(X, X̂), a grid per tensor",
    "std": "STD of X, mean of tokens",
    "kurtosis": "excess kurtosis of X",
    "max_to_median": "largest by median |X|",
    "norm_std": "STD of the norm's gain",
    "spectral_norm": "spectral norm of W",
    "stable_rank": "stable rank of W",
}
_PIXELS = 256
_LOGARITHMIC = ("rmse_token", "rmse_tensor", "max_to_median")
_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2")


def draw(
    reports: Sequence[Diagnosis],
    path: str | os.PathLike[str],
    figure: str = "depth",
    *,
    part: str | None = None,
) -> None:
    """Draw into a file; all figures but "depth" show the first report.

    Parameters
    ----------
    reports : sequence of DiagnosisReport
        Several make one curve each, over relative depth.
    path : str or path
    figure : str
        Of :data:`FIGURES`.
    part : str, optional
        For "depth" of one report: this part of the blocks alone, instead of all of them.
    """
    from matplotlib.figure import Figure

    check_choice("figure", figure, FIGURES)
    picture = Figure(figsize=(9.5, 5.2), layout="constrained")
    if figure == "depth":
        _depth(picture, reports, part)
    else:
        {"distributions": _distributions, "channels": _channels, "magnitudes": _magnitudes}[figure](
            picture, reports[0]
        )
    picture.savefig(path, dpi=130)


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=8)
    axes.tick_params(which="both", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _whole_numbers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _depth(picture: Any, reports: Sequence[Diagnosis], part: str | None) -> None:
    """Draw a panel per metric, a curve per model or, for one model, per part of its blocks."""
    several = len(reports) > 1
    parts = (part or PARTS[0],) if several or part else PARTS
    panels = picture.subplots(2, 4)
    for axes, metric in zip(panels.flat, METRICS, strict=True):
        lowest = np.inf
        for i, (report, place) in enumerate((r, p) for r in reports for p in parts):
            depths, values = curve(report, metric, place)
            if len(values) == 0:
                continue
            at = depths / max(1, report.depth - 1) if several else depths
            label = report.model if several else place
            color = _COLORS[i % len(_COLORS)]
            axes.plot(at, values, "o-", color=color, ms=2.5, lw=1.2, label=label)
            lowest = min(lowest, values.min())
        _style(axes, _TITLES[metric])
        if metric in _LOGARITHMIC and 0 < lowest < np.inf:
            axes.set_yscale("log")
        if not several:
            _whole_numbers(axes)
        if lowest == np.inf:
            axes.text(0.5, 0.5, "not measured", ha="center", fontsize=7, transform=axes.transAxes)
    found: dict[str, Any] = {}
    for axes in panels.flat:
        found |= {
            label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
    for axes in panels[1]:
        axes.set_xlabel("relative depth" if several else "block", fontsize=8)
    title = reports[0].model if len(parts) > 1 else f"{parts[0]}put of the blocks"
    picture.suptitle(title, fontsize=9)
    picture.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=6, fontsize=7, frameon=False
    )


def _distributions(picture: Any, report: Diagnosis) -> None:
    """Draw bands between quantiles of weights and gains over depth."""
    kinds: dict[str, list[WeightRow | NormRow]] = {}
    every: list[WeightRow | NormRow] = [*report.weights, *report.norms]
    for row in every:
        kinds.setdefault(row.name[len(row.block) + 1 :], []).append(row)
    columns = min(5, len(kinds))
    panels = picture.subplots(-(-len(kinds) // columns), columns, squeeze=False)
    for axes in panels.flat[len(kinds) :]:
        axes.set_axis_off()
    middle = len(report.quantiles) // 2
    for axes, (kind, rows) in zip(panels.flat, kinds.items(), strict=False):
        depths = [float(row.depth) for row in rows]
        table = np.array([row.quantiles for row in rows])
        if len(rows) == 1:  # a band needs a width to be seen
            depths, table = [depths[0] - 0.2, depths[0] + 0.2], table[[0, 0]]
        for i in range(middle):
            color, alpha = _COLORS[0], 0.15 + 0.12 * i
            axes.fill_between(depths, table[:, i], table[:, -1 - i], color=color, alpha=alpha, lw=0)
        axes.plot(depths, table[:, middle], color="black", lw=0.8)
        _style(axes, kind)
        _whole_numbers(axes)
    picture.supxlabel("block", fontsize=8)
    shown = ", ".join(f"{q:g}" for q in report.quantiles)
    picture.suptitle(f"{report.model}: weights and gains, quantiles {shown}", fontsize=9)


def _channels(picture: Any, report: Diagnosis) -> None:
    """Draw heat maps of every channel's largest magnitude by the median channel's.

    If there are more channels than can be seen, the largest of neighbours is shown.
    """
    parts = [p for p in PARTS if any(r.part == p for r in report.inputs)]
    panels = picture.subplots(1, len(parts), squeeze=False)[0]
    image = None
    for axes, part in zip(panels, parts, strict=True):
        first = {r.depth: r for r in reversed(report.inputs) if r.part == part}
        rows = [first[depth] for depth in sorted(first)]
        width = max(r.channels for r in rows)
        together = -(-width // _PIXELS)
        table = np.full((len(rows), -(-width // together) * together), np.nan)
        for i, row in enumerate(rows):
            absmax = np.asarray(row.channel_absmax)
            median = np.median(absmax)
            table[i, : row.channels] = absmax / median if median > 0 else np.nan
        table = np.fmax.reduce(table.reshape(len(rows), -1, together), axis=2)
        image = axes.imshow(
            np.log2(np.maximum(table.T, 2.0**-3)),
            aspect="auto",
            interpolation="nearest",
            cmap="magma",
            vmin=-3,
            vmax=6,
            extent=(-0.5, len(rows) - 0.5, width, 0),
        )
        step = max(1, len(rows) // 8)
        axes.set_xticks(range(0, len(rows), step), [str(r.depth) for r in rows][::step])
        axes.set_title(part, fontsize=8)
        axes.tick_params(labelsize=7)
    panels[0].set_ylabel("channel", fontsize=8)
    picture.supxlabel("block", fontsize=8)
    bar = picture.colorbar(image, ax=panels, ticks=[-3, 0, 3, 6])
    bar.ax.set_yticklabels(["1/8", "1", "8", "64"], fontsize=7)
    bar.set_label("largest |x| of a channel by that of the median channel", fontsize=8)
    picture.suptitle(report.model, fontsize=9)


def _magnitudes(picture: Any, report: Diagnosis) -> None:
    """Draw the three largest and the median magnitude over depth."""
    parts = [p for p in PARTS if any(r.part == p for r in report.inputs)]
    panels = picture.subplots(1, len(parts), squeeze=False, sharey=True)[0]
    for axes, part in zip(panels, parts, strict=True):
        rows = [r for r in report.inputs if r.part == part]
        depths = [r.depth for r in rows]
        for rank, label in enumerate(("largest", "second", "third")):
            values = [r.largest[rank][0] if len(r.largest) > rank else np.nan for r in rows]
            axes.plot(depths, values, "o-", ms=2.5, lw=1, color=_COLORS[rank], label=label)
        medians = [r.median for r in rows]
        axes.plot(depths, medians, "o-", ms=2.5, lw=1, color="gray", label="median")
        axes.set_yscale("log")
        _style(axes, part)
        _whole_numbers(axes)
    panels[0].set_ylabel("|x|", fontsize=8)
    panels[0].legend(fontsize=7, frameon=False)
    picture.supxlabel("block", fontsize=8)
    picture.suptitle(report.model, fontsize=9)
