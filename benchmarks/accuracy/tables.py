"""Tables of `windows.csv` and `runs.csv` in Markdown.

    python -m benchmarks.accuracy.tables benchmarks/results/accuracy [--picture FILE.png]

Excess is perplexity above the float model's, of the mean loss over draws and windows; its standard
deviation is over draws. Its change relative to published GPTQ has a standard error by the
jackknife: one test window is left out at a time, of all recipes and of the float model. The paired
standard error is of the difference in loss to `quality`, window by window, each window's mean over
the draws. A second table has the mean of the changes over the models. The picture shows the excess
against the bits that are stored per quantized weight.

With `peers.csv` a last table has other libraries beside ours, grid by grid: how far the perplexity
is above that of our recipes, of the same draws, with its jackknife standard error.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

Losses = dict[str, dict[int, dict[int, float]]]  # recipe, draw, window: nats per token
BASE = "quality"
OURS = ("quality", "best", "best, codes learned")  # beside other libraries


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def losses(rows: list[dict[str, str]]) -> dict[tuple[str, str], Losses]:
    """Return the loss per token of every model and grid."""
    found: dict[tuple[str, str], Losses] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        into = found[row["model"], row["grid"]][row["recipe"]]
        into.setdefault(int(row["draw"]), {})[int(row["window"])] = float(row["nll"]) / float(
            row["tokens"]
        )
    return found


def whole(draws: dict[int, dict[int, float]], count: int) -> dict[int, dict[int, float]]:
    """Return the draws of which every window is there."""
    return {draw: windows for draw, windows in draws.items() if len(windows) == count}


def paired(first: dict[int, dict[int, float]], other: dict[int, dict[int, float]]) -> list[float]:
    """Return per window the mean difference over the draws that both have."""
    draws = first.keys() & other.keys()
    return [
        statistics.fmean(first[d][w] - other[d][w] for d in draws)
        for w in next(iter(first.values()))
    ]


def jackknife(of: Callable[[int | None], float], windows: Iterable[int]) -> tuple[float, float]:
    """Return the value of all windows, and its standard error by leaving out one at a time.

    Parameters
    ----------
    of : callable
        The value without a window, of all of them for None.
    windows : iterable of int
    """
    each = [of(window) for window in windows]
    centre, count = statistics.fmean(each), len(each)
    variance = (count - 1) / count * math.fsum((x - centre) ** 2 for x in each)
    return of(None), math.sqrt(variance)


def change(
    recipe: dict[int, float], reference: dict[int, float], floats: dict[int, float]
) -> tuple[float, float]:
    """Return the excess relative to the reference's, less 1, and its jackknife standard error.

    Losses per window; the same windows are in all three.
    """

    def ratio(left_out: int | None) -> float:
        kept = [w for w in floats if w != left_out]
        of = [math.exp(statistics.fmean(x[w] for w in kept)) for x in (recipe, reference, floats)]
        return (of[0] - of[2]) / (of[1] - of[2]) - 1

    return jackknife(ratio, floats)


def mean_windows(draws: dict[int, dict[int, float]]) -> dict[int, float]:
    """Return each window's mean over the draws."""
    return {w: statistics.fmean(d[w] for d in draws.values()) for w in next(iter(draws.values()))}


def table(model: str, grid: str, cells: Losses, base: dict[int, float]) -> list[str]:
    """Return the lines of one model and grid."""
    whole_cells = {recipe: whole(draws, len(base)) for recipe, draws in cells.items()}
    floats = math.exp(statistics.fmean(base.values()))
    excess: dict[str, list[float]] = {
        recipe: [math.exp(statistics.fmean(w.values())) - floats for w in draws.values()]
        for recipe, draws in whole_cells.items()
        if draws
    }
    published = mean_windows(whole_cells["reference"]) if "reference" in excess else None
    lines = []
    for recipe, values in excess.items():
        mean = statistics.fmean(values)
        spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
        against = ""
        if recipe != BASE and BASE in excess:
            d = paired(whole_cells[recipe], whole_cells[BASE])
            error = statistics.stdev(d) / math.sqrt(len(d))
            against = f"{1e3 * statistics.fmean(d):+.1f} ± {1e3 * error:.1f}"
        moved = ""
        if published is not None and recipe != "reference":
            less, error = change(mean_windows(whole_cells[recipe]), published, base)
            moved = f"{100 * less:+.0f} ± {100 * error:.0f} %"
        lines.append(
            f"| {model} | {grid} | {recipe} | {len(values)} | {mean:.4g}{spread} | {moved} "
            f"| {against} |"
        )
    return lines


def means(found: dict[tuple[str, str], Losses]) -> list[str]:
    """Return the lines of the mean over the models of the change to published GPTQ, grid by grid.

    Below zero excess counts as -100 %: no recipe is better than the float model.
    """
    changes: dict[tuple[str, str], dict[str, tuple[float, int]]] = defaultdict(dict)
    for (model, grid), cells in found.items():
        base = found[model, ""]["float"][-1]
        kept = {recipe: whole(draws, len(base)) for recipe, draws in cells.items()}
        for recipe, draws in kept.items():
            if grid and draws and kept.get("reference") and recipe != "reference":
                value, _ = change(mean_windows(draws), mean_windows(kept["reference"]), base)
                changes[grid, recipe][model] = max(-1.0, value), len(draws)
    lines = []
    for (grid, recipe), models in changes.items():
        each = ", ".join(f"{model} {100 * v:+.0f} ({n})" for model, (v, n) in models.items())
        mean = statistics.fmean(v for v, _ in models.values())
        lines.append(f"| {grid} | {recipe} | {100 * mean:+.0f} % | {each} |")
    return lines


def above(
    first: dict[int, dict[int, float]], other: dict[int, dict[int, float]]
) -> tuple[float, float] | None:
    """Return how far perplexity is above another's, and its jackknife standard error.

    Of the draws that both have: the mean of their differences, window for window the same ones;
    None if they share none.
    """
    draws = sorted(first.keys() & other.keys())
    if not draws:
        return None

    def difference(left_out: int | None) -> float:
        kept = [w for w in first[draws[0]] if w != left_out]
        return statistics.fmean(
            math.exp(statistics.fmean(first[d][w] for w in kept))
            - math.exp(statistics.fmean(other[d][w] for w in kept))
            for d in draws
        )

    return jackknife(difference, first[draws[0]])


def beside(found: dict[tuple[str, str], Losses], peers: dict[tuple[str, str], Losses]) -> list[str]:
    """Return the lines of other libraries beside our recipes.

    Ours come from ``found`` for models whose float losses are the same there and in ``peers``, on
    every window; otherwise the text is another one, and only what is in ``peers`` is beside them.
    """
    lines = []
    for (model, grid), cells in peers.items():
        if not grid:
            continue
        base, known = peers[model, ""]["float"][-1], found.get((model, ""), {})
        same = "float" in known and all(
            math.isclose(base[w], value, abs_tol=1e-5) for w, value in known["float"][-1].items()
        )
        ours = found.get((model, grid), {}) if same else {}
        kept = {
            recipe: whole(draws, len(base))
            for recipe, draws in (
                *((r, ours[r]) for r in OURS if r in ours and r not in cells),
                *cells.items(),
            )
        }
        floats = math.exp(statistics.fmean(base.values()))
        for recipe, draws in kept.items():
            values = [math.exp(statistics.fmean(w.values())) - floats for w in draws.values()]
            if not values:
                continue
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            against = []
            for our in OURS:
                told = above(draws, kept.get(our, {})) if recipe not in OURS else None
                against.append("" if told is None else f"{told[0]:+.3g} ± {told[1]:.2g}")
            lines.append(
                f"| {model} | {grid} | {recipe} | {len(values)} "
                f"| {statistics.fmean(values):.4g}{spread} | {' | '.join(against)} |"
            )
    return lines


def points(folder: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return (bits per weight, excess perplexity, mean over draws) by model and recipe.

    Without ternary codes in groups of 8, most of whose bits are scales: on a line with the others
    they would be a spike.
    """
    stored = {
        (r["model"], r["grid"], r["recipe"]): float(r["bits"]) for r in read(folder / "runs.csv")
    }
    found = losses(read(folder / "windows.csv"))
    out: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for (model, grid), cells in found.items():
        base = found[model, ""]["float"][-1]
        floats = math.exp(statistics.fmean(base.values()))
        for recipe, draws in cells.items():
            full = whole(draws, len(base))
            if grid and "ternary" not in grid and full and (model, grid, recipe) in stored:
                value = math.exp(statistics.fmean(mean_windows(full).values())) - floats
                out[model][recipe].append((stored[model, grid, recipe], value))
    return out


def draw(found: dict[str, dict[str, list[tuple[float, float]]]], path: Path) -> None:
    """Draw a panel per model: excess perplexity, on a logarithmic axis, over bits per weight."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    high = -(-len(found) // 2)
    figure, panels = plt.subplots(high, 2, figsize=(11, 4 * high + 0.8), squeeze=False)
    places = list(panels.flat)
    for empty in places[len(found) :]:
        empty.set_axis_off()
    names = list(dict.fromkeys(recipe for recipes in found.values() for recipe in recipes))
    colors = plt.colormaps["tab20"].colors  # ten strong ones, and a pale one after each
    for panel, (model, recipes) in zip(places, found.items(), strict=False):
        for recipe, pairs in recipes.items():
            kept = sorted(p for p in pairs if p[1] > 0)
            turn, place = divmod(names.index(recipe), 10)
            color = colors[(2 * place + turn % 2) % 20]
            style = {"color": color, "marker": "os^"[turn % 3], "label": recipe}
            panel.plot(*zip(*kept, strict=True), lw=0.6, alpha=0.8, markersize=4, **style)
        panel.set(yscale="log", title=model, xlabel="bits per quantized weight")
    for row in panels:
        row[0].set_ylabel("excess perplexity")
    lines = {line.get_label(): line for panel in places for line in panel.lines}
    figure.tight_layout(rect=(0, 0.14 if high == 1 else 0.08, 1, 1))
    figure.legend(handles=[lines[n] for n in names], fontsize=8, ncols=6, loc="lower center")
    figure.savefig(path, dpi=110)


def main(folder: Path) -> None:
    found = losses(read(folder / "windows.csv"))
    print("| model | grid | recipe | draws | excess perplexity | to reference | mnats to quality |")
    print("|---|---|---|---|---|---|---|")
    for (model, grid), cells in found.items():
        if grid:
            base = found[model, ""]["float"][-1]
            print(*table(model, grid, cells, base), sep="\n")
    print()
    print("| grid | recipe | mean | models, percent (draws) |\n|---|---|---|---|")
    print(*means(found), sep="\n")
    print()
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in read(folder / "runs.csv"):
        seconds[row["model"], row["recipe"]].append(float(row["seconds"]))
    print("| model | recipe | median seconds |\n|---|---|---|")
    for (model, recipe), values in seconds.items():
        print(f"| {model} | {recipe} | {statistics.median(values):.1f} |")
    if (folder / "peers.csv").exists():
        print()
        print("| model | grid | recipe | draws | excess perplexity |", end="")
        print(*(f" above {our} " for our in OURS), "", sep="|")
        print("|---|---|---|---|---|---|---|---|")
        print(*beside(found, losses(read(folder / "peers.csv"))), sep="\n")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder", type=Path)
    p.add_argument("--picture", type=Path)
    args = p.parse_args()
    main(args.folder)
    if args.picture:
        draw(points(args.folder), args.picture)
