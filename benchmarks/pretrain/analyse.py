"""Tables, rank correlations and figures of the ablation, from its CSV.

    python -m benchmarks.pretrain.analyse benchmarks/results/pretrain/ablation.csv.gz

Writes ``axes.csv`` and ``predictors.csv`` and the figures beside the CSV, and prints the tables.

A difference between two choices is called one where the difference of their means over the seeds
is larger than the spread, the largest distance between two seeds of the same choice among the two;
everything else is "none".
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.pretrain.evaluate import SCHEMES
from benchmarks.pretrain.run import AXES, BASE, name_of

#: Validation loss, nats per token, above which a run is left out: it did not learn.
FAILED = 7.0
#: Columns of the tables.
MEASURES = [(s, m) for s in SCHEMES for m in ("text loss, percent", "mean of tasks, percent")]
SHORT = {"text loss, percent": "text", "mean of tasks, percent": "tasks"}


def label(choices: dict[str, str], axis: str) -> str:
    """Name a choice of an axis as the paper does."""
    words = {
        "weight-decay": "weight decay {}", "clip": "clipping {}", "dropout": "dropout {}",
        "precision": "{}", "positions": "{}", "optimizer": "{}", "gain": "{} gain",
    }  # fmt: skip
    keys = [k for k in BASE if any(k in change for change in AXES[axis])]
    found = []
    for key in keys:
        value = choices[key]
        if key == "clip" and float(value) == 0:
            value = "none"
        found.append(words[key].format(value))
    return ", ".join(found)


def choices_of(axis: str) -> list[tuple[str, str]]:
    """Return (label, run name without its seed) of every choice of an axis."""
    full = [{**BASE, **change} for change in AXES[axis]]
    return [(label(choices, axis), name_of(choices)) for choices in full]


def contrasts(axis: str) -> list[tuple[int, int]]:
    """Return the pairs of an axis that differ in one choice, the reference first."""
    full = [{**BASE, **change} for change in AXES[axis]]
    studied = {
        "gradient clipping": {"clip"}, "half precision": {"precision"},
    }  # fmt: skip
    found = []
    for i, a in enumerate(full):
        for j in range(i + 1, len(full)):
            changed = {k for k in BASE if a[k] != full[j][k]}
            if len(changed) == 1 and (axis not in studied or changed == studied[axis]):
                found.append((i, j))
    return found


def read(path: Path) -> pd.DataFrame:
    """Read the CSV; add the name of a run without its seed."""
    table = pd.read_csv(path)
    loss = table[(table.metric == "validation loss") & (table.stage == "late")]
    failed = set(loss.loc[loss["value"] > FAILED, "run"])
    if failed:
        print("left out, training failed:", ", ".join(sorted(failed)))
    table = table[~table.run.isin(failed)].copy()
    table["choice"] = table["run"].str.replace(r",seed=\d+$", "", regex=True)
    return table


def values_by_seed(table: pd.DataFrame, choice: str, kind: str, metric: str, stage: str) -> Any:
    """One value per seed, by seed."""
    rows = table[
        (table.choice == choice)
        & (table.kind == kind)
        & (table.metric == metric)
        & (table.stage == stage)
    ]
    return rows.sort_values("seed")["value"].to_numpy()


def axis_table(table: pd.DataFrame, axis: str, stage: str = "late") -> pd.DataFrame:
    """Mean over seeds and the spread between them, for every choice and measure of an axis."""
    rows = []
    for text, choice in choices_of(axis):
        row: dict[str, Any] = {"axis": axis, "choice": text, "stage": stage}
        loss = values_by_seed(table, choice, "training", "validation loss", stage)
        row["seeds"] = len(loss)
        if not len(loss):
            continue
        row["validation loss"] = loss.mean()
        row["validation loss spread"] = np.ptp(loss)
        for scheme, metric in MEASURES:
            found = values_by_seed(table, choice, scheme, metric, stage)
            row[f"{scheme}, {SHORT[metric]}"] = found.mean()
            row[f"{scheme}, {SHORT[metric]} spread"] = np.ptp(found)
        rows.append(row)
    return pd.DataFrame(rows)


def verdicts(axis: str, table: pd.DataFrame) -> pd.DataFrame:
    """Every contrast of an axis: the difference, the spread, and which choice degrades more."""
    rows = []
    for first, second in contrasts(axis):
        names = [text for text, _ in choices_of(axis)]
        found = [table[table.choice == names[k]] for k in (first, second)]
        if any(f.empty for f in found):
            continue
        a, b = (f.iloc[0] for f in found)
        for scheme, metric in MEASURES:
            name = f"{scheme}, {SHORT[metric]}"
            difference = b[name] - a[name]
            spread = max(a[f"{name} spread"], b[f"{name} spread"])
            verdict = "none"
            if min(a["seeds"], b["seeds"]) < 2:
                verdict = "one seed"
            elif abs(difference) > spread:
                verdict = f"more with {b['choice'] if difference > 0 else a['choice']}"
            rows.append(
                {
                    "axis": axis,
                    "stage": a["stage"],
                    "first": a["choice"],
                    "second": b["choice"],
                    "scheme": scheme,
                    "measure": SHORT[metric],
                    "first value": a[name],
                    "second value": b[name],
                    "difference": difference,
                    "spread": spread,
                    "verdict": verdict,
                }
            )
    return pd.DataFrame(rows)


def predictors(table: pd.DataFrame, samples: int = 2000) -> pd.DataFrame:
    """Rank correlation of every diagnostic with the degradation on text, over all checkpoints.

    The interval is the 95 % percentile interval of a bootstrap over runs: the early and the late
    checkpoint of a run stay together.
    """
    known = table[table.kind.isin(["diagnostic", "training"])]
    wide = known.pivot_table(index=["run", "stage"], columns="metric", values="value")
    for scheme in SCHEMES:
        part = table[(table.kind == scheme) & (table.metric == "text loss, percent")]
        wide[scheme] = part.set_index(["run", "stage"])["value"]
    wide = wide[np.isfinite(wide[list(SCHEMES)]).all(axis=1)]
    names = [c for c in wide.columns if c not in SCHEMES]
    groups = list(wide.reset_index().groupby("run").indices.values())
    rng = np.random.default_rng(0)
    draws = [
        np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))])
        for _ in range(samples)
    ]
    x, y = wide[names].to_numpy(), wide[list(SCHEMES)].to_numpy()

    def correlation(rows: np.ndarray) -> np.ndarray:
        a = pd.DataFrame(x[rows]).rank().to_numpy()
        b = pd.DataFrame(y[rows]).rank().to_numpy()
        a, b = a - a.mean(0), b - b.mean(0)
        scale = np.outer(np.sqrt((a**2).sum(0)), np.sqrt((b**2).sum(0)))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(scale > 0, a.T @ b / scale, np.nan)

    whole = correlation(np.arange(len(x)))
    boot = np.stack([correlation(d) for d in draws])
    low, high = np.nanpercentile(boot, [2.5, 97.5], axis=0)
    rows = []
    for j, scheme in enumerate(SCHEMES):
        for i, name in enumerate(names):
            if not np.isfinite(whole[i, j]):
                continue
            rows.append(
                {
                    "scheme": scheme, "diagnostic": name, "spearman": whole[i, j],
                    "low": low[i, j], "high": high[i, j], "checkpoints": len(x),
                }
            )  # fmt: skip
    found = pd.DataFrame(rows)
    found["size"] = found.spearman.abs()
    found = found.sort_values(["scheme", "size"], ascending=[True, False], kind="stable")
    return found.drop(columns="size")


def bars(table: pd.DataFrame, axes: list[str], path: Path) -> None:
    """Degradation per axis as bars, a panel per axis and scheme, the seeds as points."""
    from matplotlib import pyplot as plt

    schemes = ["INT8 vector-wise", "INT4 columns", "W4A4"]
    figure, panels = plt.subplots(
        len(axes), len(schemes), figsize=(7.2, 1.75 * len(axes)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, axis in enumerate(axes):
        choices = choices_of(axis)
        names = [text for text, _ in choices]
        for column, scheme in enumerate(schemes):
            panel = panels[row, column]
            at = np.arange(len(choices))
            for k, (metric, colour, word) in enumerate(
                [
                    ("text loss, percent", "#3b6ea5", "text"),
                    ("mean of tasks, percent", "#d98b3a", "mean of 6 tasks"),
                ]
            ):
                found = [values_by_seed(table, c, scheme, metric, "late") for _, c in choices]
                y = at + (k - 0.5) * 0.4
                means = [v.mean() if len(v) else 0 for v in found]
                panel.barh(y, means, 0.38, color=colour, label=word)
                for spot, v in zip(y, found, strict=True):
                    if not len(v):
                        continue
                    panel.plot([v.min(), v.max()], [spot, spot], color="black", lw=1)
                    panel.plot(v, [spot] * len(v), "|", color="black", ms=5)
            panel.set_yticks(at, names if column == 0 else [""] * len(at), fontsize=7)
            panel.invert_yaxis()
            panel.axvline(0, color="black", lw=0.6)
            panel.tick_params(axis="x", labelsize=7)
            panel.margins(x=0.08)
            for side in ("top", "right"):
                panel.spines[side].set_visible(False)
            if row == 0:
                panel.set_title(scheme, fontsize=8)
            if row == len(axes) - 1:
                panel.set_xlabel("increase of the loss (%)", fontsize=7)
    handles, words = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, words, loc="outside upper center", ncols=2, fontsize=7, frameon=False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


#: Runs of the curves over depth (the paper's figure 5), in the order of the legend.
CURVES = {
    "base (bf16, weight decay 0.1)": "base",
    "fp16": "precision=fp16",
    "weight decay 0.001": "weight-decay=0.001",
    "weight decay 0.001, no clipping": "clip=0+weight-decay=0.001",
    "dropout 0.8": "dropout=0.8",
    "Muon, single gain": "gain=single+optimizer=muon",
}


def curves(table: pd.DataFrame, path: Path) -> None:
    """RMSE, STD, STD of the gains and spectral norm over depth at the attention's input."""
    from matplotlib import pyplot as plt

    wanted = [
        ("rmse_token", "RMSE of int8 inputs"),
        ("std", "STD of a token's inputs"),
        ("norm_std", "STD of the norm's gains"),
        ("spectral_norm", "spectral norm of the weights"),
    ]
    colours = ["#222222", "#3b6ea5", "#d98b3a", "#b03a48", "#5a9a5a", "#8e6bb0"]
    figure, panels = plt.subplots(2, 2, figsize=(7.2, 5.2), layout="constrained", sharex=True)
    for panel, (key, words) in zip(panels.flat, wanted, strict=True):
        for colour, (name, choice) in zip(colours, CURVES.items(), strict=True):
            rows = table[
                (table.choice == choice) & (table.kind == "depth") & (table.stage == "late")
            ]
            rows = rows[rows.metric.str.startswith(f"{key}, attention in, ")]
            if rows.empty:
                continue
            depth = rows.metric.str.rsplit(", ", n=1).str[1].astype(int)
            by = rows.assign(depth=depth).groupby("depth")["value"]
            mean, low, high = by.mean(), by.min(), by.max()
            panel.plot(mean.index + 1, mean, color=colour, lw=1.4, marker="o", ms=3, label=name)
            panel.fill_between(mean.index + 1, low, high, color=colour, alpha=0.15, lw=0)
        panel.set_ylabel(words, fontsize=8)
        panel.tick_params(labelsize=7)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    for panel in panels[1]:
        panel.set_xlabel("block (attention input)", fontsize=8)
    handles, words = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, words, loc="outside upper center", ncols=3, fontsize=7, frameon=False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def predictor_picture(found: pd.DataFrame, path: Path, top: int = 10) -> None:
    """Draw the best predictors of each scheme with their intervals."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(7.2, 5.2), layout="constrained", sharex=True)
    for panel, scheme in zip(panels.flat, SCHEMES, strict=True):
        part = found[found.scheme == scheme].head(top)
        at = np.arange(len(part))
        panel.hlines(at, part.low, part.high, color="#3b6ea5", lw=1.5)
        panel.plot(part.spearman, at, "o", color="#3b6ea5", ms=4)
        panel.set_yticks(at, part.diagnostic, fontsize=6.5)
        panel.invert_yaxis()
        panel.axvline(0, color="black", lw=0.6)
        panel.set_xlim(-1.02, 1.02)
        panel.set_title(scheme, fontsize=8)
        panel.tick_params(axis="x", labelsize=7)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    for panel in panels[1]:
        panel.set_xlabel("Spearman's ρ with the text's degradation", fontsize=7)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main() -> None:
    """Print and keep the tables; draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the results (default: the CSV's)")
    parser.add_argument("--stage", choices=("early", "late"), default="late")
    parser.add_argument("--no-figures", action="store_true")
    args = parser.parse_args()
    out = args.out or args.csv.parent
    out.mkdir(parents=True, exist_ok=True)
    table = read(args.csv)
    pd.set_option("display.width", 200, "display.max_columns", 40, "display.max_rows", 500)
    pd.set_option("display.float_format", "{:.3f}".format)
    tables, judged = [], []
    for axis in AXES:
        found = axis_table(table, axis, args.stage)
        tables.append(found)
        judged.append(verdicts(axis, found))
        print(f"\n== {axis} ({args.stage} checkpoints, mean over seeds ± spread between them)")
        for _, row in found.iterrows():
            cells = [f"loss {row['validation loss']:.3f} ± {row['validation loss spread']:.3f}"]
            for scheme, metric in MEASURES:
                name = f"{scheme}, {SHORT[metric]}"
                cells.append(f"{name} {row[name]:.3f} ± {row[f'{name} spread']:.3f}")
            print(f"{row['choice']}: " + "; ".join(cells))
        columns = ["first", "second", "scheme", "measure", "difference", "spread", "verdict"]
        print(judged[-1][columns].to_string(index=False))
    pd.concat(tables).round(5).to_csv(out / "axes.csv", index=False)
    pd.concat(judged).round(5).to_csv(out / "contrasts.csv", index=False)
    best = predictors(table)
    best.round(4).to_csv(out / "predictors.csv", index=False)
    for scheme in SCHEMES:
        print(f"\n== {scheme}: best predictors of the degradation on text")
        print(best[best.scheme == scheme].head(8).to_string(index=False))
        loss = best[(best.scheme == scheme) & (best.diagnostic == "validation loss")]
        print(loss.to_string(index=False, header=False))
    if not args.no_figures:
        import matplotlib

        matplotlib.use("Agg")
        bars(table, ["weight decay", "gradient clipping", "dropout"], out / "figure2.png")
        bars(table, ["half precision", "positions", "optimizer and gain"], out / "figure3.png")
        curves(table, out / "figure5.png")
        predictor_picture(best, out / "predictors.png")


if __name__ == "__main__":
    main()
