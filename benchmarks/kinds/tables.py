"""The table of `benchmarks.kinds.run` in Markdown, and its picture.

    python -m benchmarks.kinds.tables benchmarks/results/kinds [--picture FILE.png]

Accuracy is the mean over the draws with its standard deviation over them; the loss against the
float model has the standard error of the paired difference, item by item (each item's mean over the
draws). The float model's own standard error is that of a proportion.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kinds.cases import METHODS

__all__ = ["Line", "lines", "read"]

Line = dict[str, Any]


def read(folder: Path) -> tuple[list[dict[str, str]], dict[tuple[str, str, str], list[np.ndarray]]]:
    """Return the rows, and per model, bits and method the items of each draw."""
    with (folder / "runs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    right = np.load(folder / "items.npz")
    found: dict[tuple[str, str, str], list[np.ndarray]] = defaultdict(list)
    for row in rows:
        key = (row["model"], row["bits"], row["method"])
        found[key].append(right["|".join([*key, row["draw"]])].astype(np.float64))
    return rows, found


def lines(folder: Path) -> list[Line]:
    """Return one line per model, bits and method, in percent."""
    rows, items = read(folder)
    result: list[Line] = []
    for (model, bits, method), draws in items.items():
        own = [r for r in rows if (r["model"], r["bits"], r["method"]) == (model, bits, method)]
        accuracies = [float(r["accuracy"]) for r in own]
        (floats,) = items[model, "0", "float"]
        change, count = np.mean(draws, axis=0) - floats, len(floats)
        cosines = [float(r["cosine"]) for r in own if r["cosine"]]
        value = float(np.mean(accuracies))
        error = math.sqrt(value * (1 - value) / count)
        if method != "float":
            error = float(change.std(ddof=1)) / math.sqrt(count)
        result.append(
            {
                "model": model,
                "bits": int(bits),
                "method": method,
                "draws": len(draws),
                "accuracy": 100 * value,
                "spread": 100 * float(np.std(accuracies, ddof=1)) if len(own) > 1 else math.nan,
                "loss": -100 * float(change.mean()),
                "error": 100 * error,
                "cosine": float(np.mean(cosines)) if cosines else math.nan,
                "seconds": float(np.median([float(r["seconds"]) for r in own])),
            }
        )
    order = ["float", *METHODS]
    return sorted(result, key=lambda x: (x["model"], -(x["bits"] or 99), order.index(x["method"])))


def table(found: list[Line]) -> str:
    """Return the lines as a table in Markdown."""
    text = [
        "| model | bits | method | draws | accuracy | loss to float | cosine | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for x in found:
        spread = "" if math.isnan(x["spread"]) else f" ± {x['spread']:.2f}"
        cosine = "" if math.isnan(x["cosine"]) else f"{x['cosine']:.4f}"
        loss = (
            f"± {x['error']:.2f}"
            if x["method"] == "float"
            else f"{x['loss']:.2f} ± {x['error']:.2f}"
        )
        text.append(
            f"| {x['model']} | {x['bits'] or ''} | {x['method']} | {x['draws']} "
            f"| {x['accuracy']:.2f}{spread} | {loss} | {cosine} | {x['seconds']:.0f} |"
        )
    return "\n".join(text)


def draw(found: list[Line], path: Path) -> None:
    """Draw the loss of each method with its standard error, a panel per model and bits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted(
        {(x["model"], x["bits"]) for x in found if x["bits"]}, key=lambda p: (p[0], -p[1])
    )
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.6 * len(panels), 3.2), squeeze=False, layout="constrained"
    )
    for axis, (model, bits) in zip(axes[0], panels, strict=True):
        own = [x for x in found if (x["model"], x["bits"]) == (model, bits)][::-1]
        axis.errorbar(
            [x["loss"] for x in own],
            [x["method"] for x in own],
            xerr=[x["error"] for x in own],
            fmt="o",
            capsize=3,
        )
        axis.axvline(0, color="0.6", lw=1)
        axis.set_title(f"{model}, {bits} bits", fontsize=9)
        axis.set_xlabel("accuracy lost, points", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.savefig(path, dpi=130)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder", type=Path)
    p.add_argument("--picture", type=Path)
    args = p.parse_args()
    found = lines(args.folder)
    print(table(found))
    if args.picture:
        draw(found, args.picture)


if __name__ == "__main__":
    main()
