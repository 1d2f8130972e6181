"""Figures of the ablation, in the form of the paper's 2 to 5, for a page 7.2 inches wide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

from benchmarks.pretrain.plan import AXES, SCHEMES, choices_of

WIDTH, DPI = 7.2, 120
MEASURE_COLOURS = {"text": "#3b6ea5", "tasks": "#d98b3a"}
MEASURE_NAMES = {"text": "text", "tasks": "mean of 6 tasks"}
#: Runs of figures 4 and 5, in the order of the legend: the paper's, then what later work changed.
VARIANTS = {
    "base": "base",
    "fp16": "precision=fp16",
    "weight decay 0.001": "weight-decay=0.001",
    "weight decay 0.001, no clipping": "clip=0+weight-decay=0.001",
    "dropout 0.8": "dropout=0.8",
    "Muon, single gain": "gain=single+optimizer=muon",
}
VARIANT_COLOURS = ["#222222", "#3b6ea5", "#d98b3a", "#b03a48", "#5a9a5a", "#8e6bb0"]


def _bare(panel: Any) -> None:
    panel.tick_params(labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def bars(found: pd.DataFrame, axes: list[str], path: Path) -> None:
    """Degradation of every choice as bars, a row per axis, a column per scheme; lines: seeds."""
    late = found[found.stage == "late"]
    heights = [len(AXES[axis]) + 1.2 for axis in axes]
    figure, panels = plt.subplots(
        len(axes), len(SCHEMES), figsize=(WIDTH, 0.29 * sum(heights) + 0.5), squeeze=False,
        layout="constrained", gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for row, axis in enumerate(axes):
        choices = choices_of(axis)
        at = np.arange(len(choices))
        for panel, scheme in zip(panels[row], SCHEMES, strict=True):
            part = late[late.scheme == scheme]
            for k, (measure, colour) in enumerate(MEASURE_COLOURS.items()):
                for spot, (_, choice) in zip(at + (k - 0.5) * 0.38, choices, strict=True):
                    own = part[(part.choice == choice) & (part.measure == measure)]["value"]
                    if own.empty:
                        continue
                    panel.barh(spot, own.mean(), 0.36, color=colour, label=MEASURE_NAMES[measure])
                    if len(own) > 1:
                        ends = [own.min(), own.max()]
                        panel.plot(ends, [spot, spot], "|-", color="black", lw=0.8)
            panel.set_ylim(len(at) - 0.4, -0.6)
            names = [text for text, _ in choices] if panel is panels[row, 0] else [""] * len(at)
            panel.set_yticks(at, names)
            panel.axvline(0, color="black", lw=0.6)
            panel.locator_params(axis="x", nbins=3)
            _bare(panel)
            if row == 0:
                panel.set_title(scheme, fontsize=8)
    figure.supxlabel("increase of the loss by quantization (%)", fontsize=8)
    seen = {
        t: h
        for panel in panels.flat
        for h, t in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        seen.values(), seen.keys(), loc="outside upper center", ncols=2, fontsize=7, frameon=False
    )
    _save(figure, path)


def distributions(table: pd.DataFrame, path: Path) -> None:
    """Weights of the attention projection and gains before it: quantiles over depth [figure 4]."""
    rows = table[(table.kind == "distribution") & (table.stage == "late")]
    parts = rows.metric.str.split(", ", expand=True)
    if rows.empty:
        return
    rows = rows.assign(tensor=parts[0], block=parts[1].astype(int) + 1, q=parts[2].astype(float))
    shown = {name: c for name, c in VARIANTS.items() if c in set(rows.choice)}
    figure, panels = plt.subplots(
        2, len(shown), figsize=(WIDTH, 3.4), sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, (name, choice) in enumerate(shown.items()):
        for panel, tensor in zip(panels[:, column], ("weight", "gain"), strict=True):
            own = rows[(rows.choice == choice) & (rows.tensor == tensor)]
            wide = own.pivot_table(index="block", columns="q", values="value")
            at, values = wide.index.to_numpy(), wide.to_numpy()
            colour = VARIANT_COLOURS[list(VARIANTS).index(name)]
            middle = values.shape[1] // 2
            for i in range(middle):
                panel.fill_between(
                    at, values[:, i], values[:, -1 - i], color=colour, alpha=0.15 + 0.1 * i, lw=0
                )
            panel.plot(at, values[:, middle], color="black", lw=0.8)
            panel.locator_params(axis="x", integer=True, nbins=5)
            _bare(panel)
        panels[0, column].set_title(name.replace(", ", ",\n"), fontsize=7)
    panels[0, 0].set_ylabel("weights of q, k, v", fontsize=8)
    panels[1, 0].set_ylabel("gains of the norm", fontsize=8)
    figure.supxlabel(
        "block (bands between quantiles 0 and 1, 0.001 and 0.999, 0.01 and 0.99, 0.25 and 0.75; "
        "line: median)",
        fontsize=7,
    )
    _save(figure, path)


def curves(table: pd.DataFrame, path: Path) -> None:
    """RMSE, STD, STD of the gains and spectral norm at the attention's input [figure 5]."""
    wanted = {
        "rmse_token": "RMSE of the int8 input",
        "std": "STD of a token's input",
        "norm_std": "STD of the norm's gains",
        "spectral_norm": "spectral norm of the weights",
    }
    figure, panels = plt.subplots(2, 2, figsize=(WIDTH, 4.6), layout="constrained", sharex=True)
    late = table[(table.kind == "depth") & (table.stage == "late")]
    for panel, (key, words) in zip(panels.flat, wanted.items(), strict=True):
        for colour, (name, choice) in zip(VARIANT_COLOURS, VARIANTS.items(), strict=True):
            rows = late[late.choice == choice]
            rows = rows[rows.metric.str.startswith(f"{key}, attention in, ")]
            if rows.empty:
                continue
            block = rows.metric.str.rsplit(", ", n=1).str[1].astype(int) + 1
            by = rows.assign(block=block).groupby("block")["value"]
            mean = by.mean()
            panel.plot(mean.index, mean, "o-", color=colour, lw=1.3, ms=2.5, label=name)
            panel.fill_between(mean.index, by.min(), by.max(), color=colour, alpha=0.15, lw=0)
        panel.set_title(words, fontsize=8)
        panel.locator_params(axis="x", integer=True)
        _bare(panel)
    figure.supxlabel("block (input of the attention; bands: seeds)", fontsize=8)
    handles, words = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, words, loc="outside upper center", ncols=3, fontsize=7, frameon=False)
    _save(figure, path)


def losses(found: pd.DataFrame, path: Path) -> None:
    """Degradation of every checkpoint over its validation loss, a panel per scheme."""
    text = found[found.measure == "text"]
    figure, panels = plt.subplots(
        1, len(SCHEMES), figsize=(WIDTH, 2.5), layout="constrained", sharex=True
    )
    colours = dict(zip(VARIANTS.values(), VARIANT_COLOURS, strict=True))
    names = {choice: name for name, choice in VARIANTS.items()}
    for panel, scheme in zip(panels, SCHEMES, strict=True):
        part = text[text.scheme == scheme]
        for choice, own in part.groupby("choice"):
            colour, order = colours.get(choice, "#b8b8b8"), 2 + (choice in colours)
            for stage, face in (("early", "white"), ("late", colour)):
                points = own[own.stage == stage]
                panel.plot(
                    points["loss"], points["value"], "o", ms=3.2, mfc=face, mec=colour, mew=0.9,
                    label=names.get(choice, "other") if stage == "late" else None, zorder=order,
                )  # fmt: skip
        panel.set_title(scheme, fontsize=8)
        if len(part) and (part["value"] > 0).all():
            panel.set_yscale("log")
        _bare(panel)
    panels[0].set_ylabel("increase of the loss (%)", fontsize=8)
    figure.supxlabel("validation loss, nats per token (open: early checkpoints)", fontsize=8)
    seen = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    order = [name for name in (*VARIANTS, "other") if name in seen]
    handles = [seen[name] for name in order]
    figure.legend(handles, order, loc="outside upper center", ncols=4, fontsize=7, frameon=False)
    _save(figure, path)


def best(found: pd.DataFrame, path: Path, top: int = 10) -> None:
    """Draw the best predictors of each scheme with their intervals; open: given the loss."""
    figure, panels = plt.subplots(2, 2, figsize=(WIDTH, 5.0), layout="constrained", sharex=True)
    for panel, scheme in zip(panels.flat, SCHEMES, strict=True):
        part = found[found.scheme == scheme].head(top)
        at = np.arange(len(part))
        for end, shift, face in (("", -0.17, "#3b6ea5"), (" given the loss", 0.17, "white")):
            y = at + shift
            panel.hlines(y, part[f"low{end}"], part[f"high{end}"], color="#3b6ea5", lw=1)
            panel.plot(part[f"spearman{end}"], y, "o", mec="#3b6ea5", mfc=face, ms=3.5)
        panel.set_yticks(at, part.diagnostic)
        panel.invert_yaxis()
        panel.axvline(0, color="black", lw=0.6)
        panel.set_xlim(-1.02, 1.02)
        panel.set_title(scheme, fontsize=8)
        _bare(panel)
        panel.tick_params(axis="y", labelsize=6.5)
    figure.supxlabel(
        "Spearman's ρ with the degradation on text, 95 % interval (open: given the loss)",
        fontsize=8,
    )
    _save(figure, path)


def draw_all(
    table: pd.DataFrame, found: pd.DataFrame, ranked: pd.DataFrame, folder: Path
) -> list[str]:
    """Draw every figure into a folder; return the names of the files."""
    bars(found, ["weight decay", "gradient clipping", "dropout"], folder / "figure2.png")
    bars(found, ["half precision", "positions", "optimizer and gain"], folder / "figure3.png")
    distributions(table, folder / "figure4.png")
    curves(table, folder / "figure5.png")
    losses(found, folder / "losses.png")
    best(ranked, folder / "predictors.png")
    return sorted(path.name for path in folder.glob("*.png"))
