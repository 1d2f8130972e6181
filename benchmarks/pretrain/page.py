"""The page of the ablation's results: what was run, the verdicts, and the tables behind them."""

from __future__ import annotations

from typing import Any

import pandas as pd

from benchmarks.common import markdown
from benchmarks.pretrain.plan import AXES, SCHEMES, choices_of
from benchmarks.pretrain.predictors import LOSS, overall
from benchmarks.pretrain.tables import axis_verdicts

FIGURES = {
    "figure2.png": "Degradation by weight decay, clipping and dropout, as in the paper's figure 2: "
    "late checkpoints, mean over the seeds; the lines reach from seed to seed.",
    "figure3.png": "The same for half precision (the paper's figure 3), positions, and what later "
    "work found decisive.",
    "figure4.png": "Weights of the attention projection and gains before it, as in figure 4.",
    "figure5.png": "RMSE, STD, STD of the gains and spectral norm over depth, as in figure 5.",
    "losses.png": "Degradation over the validation loss, all checkpoints.",
    "predictors.png": "The ten best predictors of each scheme.",
}
STATED = {
    "weight decay": "more degradation with less weight decay",
    "gradient clipping": "more without clipping",
    "dropout": "more with more dropout",
    "half precision": "more with fp16",
    "positions": "no difference (at most 0.06 percent)",
    "optimizer and gain": "(later work, of outliers) more with Adam, and with a gain per channel",
}


def _number(value: float, digits: int = 3) -> str:
    return "" if value != value else f"{value:.{digits}g}"


def setting(facts: dict[str, dict[str, Any]], failed: list[str]) -> str:
    """What was trained, from what the runs noted."""
    late = {k: v for k, v in facts.items() if k.endswith("/late")}
    if not late:
        return "(no training.json beside the CSV)"
    first = late.get("base,seed=0/late") or next(iter(late.values()))
    early = facts.get("base,seed=0/early", {}).get("step")
    sizes = sorted({v["parameters"] / 1e6 for v in late.values()})
    seconds = sum(v["seconds"] for v in late.values())
    shape = f"{sizes[-1]:.1f} million parameters"
    if "layers" in first:
        shape += f" ({first['layers']} layers, width {first['hidden_size']}, "
        shape += f"vocabulary {first['vocab_size']})"
    text = (
        f"{len(late)} runs of {shape}, {first['steps']} steps of {first['batch']} windows of "
        f"{first['length']} tokens ({first['tokens'] / 1e6:.1f} million tokens), learning rate "
        f"{first['lr']:g}"
    )
    if early:
        text += f"; early checkpoints after {early} steps"
    text += f". {seconds / 3600:.1f} hours of training in all, several runs at a time"
    text += f" on {first['device']}." if "device" in first else "."
    text += " Checkpoints are not kept: see benchmarks/README.md."
    if failed:
        text += f" Left out, for they did not learn: {', '.join(failed)}."
    return text


def commands(facts: dict[str, dict[str, Any]]) -> str:
    """Return the commands that repeat everything."""
    first = next(iter(facts.values()), {})
    names = {
        "steps": "steps", "batch": "batch", "length": "length", "lr": "lr", "warmup": "warmup",
        "hidden-size": "hidden_size", "layers": "layers", "vocab-size": "vocab_size",
    }  # fmt: skip
    known = {k: first[v] for k, v in names.items() if v in first}
    options = " ".join(f"--{k} {v:g}" for k, v in known.items())
    seeds = 1 + max((v["seed"] for v in facts.values()), default=1)
    return (
        "```sh\n"
        "python -m benchmarks.pretrain.run --texts ../shared/data/gutenberg --out runs \\\n"
        f"    --seeds {seeds} --processes 6 --compile {options}\n"
        "python -m benchmarks.pretrain.evaluate --runs runs --tasks ../shared/data/zeroshot \\\n"
        "    --out runs/ablation.csv\n"
        "python -m benchmarks.pretrain.analyse runs\n"
        "```"
    )


def verdict_table(judged: pd.DataFrame) -> str:
    """One line per axis: what is stated, and what was found."""
    plain, matched = axis_verdicts(judged), axis_verdicts(judged, " at equal loss")
    rows = [[axis, STATED[axis], plain[axis], matched[axis]] for axis in AXES]
    return markdown(["axis", "stated", "as measured", "at equal loss"], rows)


def contrast_lines(judged: pd.DataFrame) -> str:
    """Every contrast on the text: values, spread and verdict per scheme."""
    late = judged[(judged.stage == "late") & (judged.measure == "text")]
    rows = []
    for (_, first, second), part in late.groupby(["axis", "first", "second"], sort=False):
        cells = [f"{first} / {second}"]
        for scheme in SCHEMES:
            own = part[part.scheme == scheme]
            if own.empty:
                cells.append("")
                continue
            row = own.iloc[0]
            values = f"{_number(row['first value'])} / {_number(row['second value'])}"
            words = [row["agreement"], row["agreement at equal loss"]]
            cells.append(f"{values} ± {_number(row['spread'], 2)}: {'; '.join(words)}")
        rows.append(cells)
    return markdown(["contrast", *SCHEMES], rows)


def choice_lines(axes: pd.DataFrame) -> str:
    """Every choice: seeds, loss, and the degradation on text and tasks."""
    late = axes[axes.stage == "late"]
    seen, rows = set(), []
    for axis in AXES:
        for text, choice in choices_of(axis):
            own = late[(late.axis == axis) & (late.choice == text)]
            if own.empty or choice in seen:
                continue
            seen.add(choice)
            one = own.iloc[0]
            cells = [choice, str(one.seeds), f"{one.loss:.3f} ± {one['loss spread']:.3f}"]
            for scheme in SCHEMES:
                found = own[own.scheme == scheme].set_index("measure")
                cells.append(
                    ", ".join(
                        f"{_number(found.loc[m, 'percent'])} ± "
                        f"{_number(found.loc[m, 'percent spread'], 2)}"
                        for m in ("text", "tasks")
                        if m in found.index
                    )
                )
            rows.append(cells)
    return markdown(
        ["run", "seeds", "validation loss", *(f"{s}: text, tasks" for s in SCHEMES)], rows
    )


def predictor_lines(ranked: pd.DataFrame, top: int = 6) -> str:
    """Return the best diagnostics of each scheme, and the loss itself."""
    rows = []
    for scheme in SCHEMES:
        part = ranked[ranked.scheme == scheme]
        loss = part[part.diagnostic == LOSS]
        for _, row in pd.concat([part[part.diagnostic != LOSS].head(top), loss]).iterrows():
            cells = [scheme, row.diagnostic]
            for end in ("", " given the loss"):
                value, low, high = (row[f"{name}{end}"] for name in ("spearman", "low", "high"))
                known = f" ({low:+.2f} to {high:+.2f})" if low == low else ""
                cells.append(f"{value:+.2f}{known}" if value == value else "")
            rows.append(cells)
    return markdown(["scheme", "diagnostic", "ρ (95 %)", "ρ given the loss (95 %)"], rows)


def stage_lines(stages: pd.DataFrame) -> str:
    """Do early checkpoints rank choices as late ones do?"""
    if stages.empty:
        return "There are too few early checkpoints to say."
    rows = [
        [
            row.scheme, str(row.choices), f"{row.spearman:+.2f}",
            _number(row["early, percent"]), _number(row["late, percent"]),
        ]
        for _, row in stages.iterrows()
    ]  # fmt: skip
    header = ["scheme", "choices", "ρ of early and late", "early, median %", "late, median %"]
    return markdown(header, rows)


def page(
    facts: dict[str, dict[str, Any]],
    failed: list[str],
    axes: pd.DataFrame,
    judged: pd.DataFrame,
    ranked: pd.DataFrame,
    stages: pd.DataFrame,
    figures: list[str],
) -> str:
    """Return the page as Markdown text."""
    best, given = overall(ranked), overall(ranked, " given the loss")
    named = [f"*{name}* ({value:.2f})" for name, value in best.head(3).items()]
    rest = [f"*{name}* ({value:.2f})" for name, value in given.dropna().head(3).items()]
    slopes = (
        "At equal loss means: moved along a slope fitted within choices to the loss of the late "
        "base (benchmarks/pretrain/tables.py); of a choice whose loss is far from it, such as "
        "dropout 0.8, this is an extrapolation."
    )
    parts = [
        "# The pre-training ablation\n\nThe experiment of *Intriguing Properties of Quantization "
        "at Scale* (Ahmadian et al. 2023, arXiv:2305.19268), small. This page and the files beside "
        "it are written by `benchmarks.pretrain.analyse`; why the runs are as they are is in "
        "[benchmarks/README.md](../../README.md#the-pre-training-ablation).",
        f"{setting(facts, failed)}\n\n{commands(facts)}",
        "Degradation is the increase of the loss in percent. A difference is called one where the "
        "means over the seeds differ by more than the spread, the largest distance between two "
        "seeds of a choice, or the standard error of the evaluation where that is larger; "
        f"everything else is no difference. {slopes}",
        f"## Axis by axis\n\n{verdict_table(judged)}\n\nLate checkpoints, loss on the text; in "
        "brackets the number of contrasts, over all four schemes. Two seeds call 22 % of equal "
        "choices different by chance: an axis gets a word only where more contrasts than that "
        "say it.",
        f"## Which diagnostic predicts the degradation?\n\nOver {int(ranked.checkpoints.max())} "
        "checkpoints, Spearman's ρ with the loss on text, its interval from a bootstrap over "
        "choices. Largest mean of |ρ| over the four schemes: " + ", ".join(named) + "; given the "
        f"loss: {', '.join(rest)}.\n\n{predictor_lines(ranked)}\n\nAll of them are in "
        "`predictors.csv`.",
        f"## Early and late checkpoints\n\n{stage_lines(stages)}",
        "## Figures\n\n"
        + "\n\n".join(f"{FIGURES[f]}\n\n![{f}]({f})" for f in FIGURES if f in figures),
        "## Every contrast\n\nDegradation on text in percent, first / second ± spread, then the "
        f"verdict as measured; and at equal loss.\n\n{contrast_lines(judged)}",
        f"## Every choice\n\nMean over the seeds ± spread.\n\n{choice_lines(axes)}",
    ]
    return "\n\n".join(parts) + "\n"
