"""Tables of the ablation, from its CSV: every choice of every axis, and what differs.

A difference between two choices is called one where the difference of their means over the seeds is
larger than the spread: the largest distance between two seeds of the same choice, among the two, or
the standard error that the evaluation's own texts leave, where that is larger. Everything else is
"no difference".

Models that learned more lose more when they are quantized. So everything is given twice: as
measured, and at equal loss. For the second a slope of the degradation over the validation loss is
fitted within choices (a constant for each choice, one slope for all; over the early and the late
checkpoints of all seeds), and every checkpoint is moved along it to the loss of the late base.
Degradation grows exponentially as the loss falls, but is noise about zero where it is small: the
fit is of asinh(degradation / noise), which is a logarithm far above the noise and a line within.
The noise is the median standard error of the evaluation. A choice whose loss is far from the
base's is moved farther than its own checkpoints support: believe such a verdict less.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.pretrain.plan import AXES, SCHEMES, choices_of, contrasts

#: Validation loss, nats per token, above which a run is left out: it did not learn.
FAILED = 7.0
MEASURES = {"text": "text loss, percent", "tasks": "mean of tasks, percent"}
#: Share of contrasts of equal choices that two seeds call different (normal noise, simulated).
CHANCE = 0.22
#: Percent: the largest difference that the paper has between positions, and calls none.
NOTHING = 0.06


def read(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Read the CSV; return it without runs that failed, and their names.

    A column "choice" is added: the name of the run without its seed.
    """
    table = pd.read_csv(path)
    loss = table[(table.metric == "validation loss") & (table.stage == "late")]
    failed = sorted(set(loss.loc[~(loss["value"] <= FAILED), "run"]))
    table = table[~table.run.isin(failed)].copy()
    table["choice"] = table["run"].str.replace(r",seed=\d+$", "", regex=True)
    return table, failed


def degradations(table: pd.DataFrame) -> pd.DataFrame:
    """A row per checkpoint, scheme and measure: value, loss, and the value at equal loss."""
    keys = ["choice", "run", "seed", "stage"]
    loss = table[table.metric == "validation loss"].set_index(keys)["value"]
    parts = []
    for scheme in SCHEMES:
        for measure, metric in MEASURES.items():
            part = table[(table.kind == scheme) & (table.metric == metric)]
            part = part[[*keys, "value", "error"]].assign(scheme=scheme, measure=measure)
            part["loss"] = loss.reindex(pd.MultiIndex.from_frame(part[keys])).to_numpy()
            parts.append(at_equal_loss(part))
    return pd.concat(parts, ignore_index=True)


def at_equal_loss(part: pd.DataFrame) -> pd.DataFrame:
    """Add the columns "adjusted", and "slope": of asinh(percent / noise) per nat of the loss."""
    x, noise = part["loss"].to_numpy(), part["error"].median()
    noise = noise if noise > 0 else 1e-3  # not known
    y = np.arcsinh(part["value"].to_numpy() / noise)
    inside = [v - pd.Series(v).groupby(part["choice"].to_numpy()).transform("mean") for v in (x, y)]
    spread = float((inside[0] ** 2).sum())
    slope = float((inside[0] * inside[1]).sum()) / spread if spread > 0 else math.nan
    base = part[(part["choice"] == "base") & (part["stage"] == "late")]["loss"]
    to = base.mean() if len(base) else float(np.median(x))
    moved = y - slope * (x - to)
    return part.assign(adjusted=noise * np.sinh(moved), slope=slope)


def axis_table(found: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds and the spread between them: a row per axis, choice, stage and measure."""
    rows: list[dict[str, Any]] = []
    for axis in AXES:
        for text, choice in choices_of(axis):
            own = found[found["choice"] == choice]
            for (scheme, measure, stage), part in own.groupby(
                ["scheme", "measure", "stage"], sort=False
            ):
                row = {"axis": axis, "choice": text, "stage": stage, "seeds": len(part)}
                row |= {"scheme": scheme, "measure": measure}
                for name, column in (
                    ("loss", "loss"), ("percent", "value"), ("at equal loss", "adjusted"),
                ):  # fmt: skip
                    row[name] = part[column].mean()
                    row[f"{name} spread"] = np.ptp(part[column])
                row["standard error"] = part["error"].fillna(0).max()
                rows.append(row)
    return pd.DataFrame(rows)


def contrast_table(axes: pd.DataFrame) -> pd.DataFrame:
    """Every contrast: the difference, the spread, what others state, and whether it is found."""
    rows: list[dict[str, Any]] = []
    for axis in AXES:
        names = [text for text, _ in choices_of(axis)]
        for first, second, harder in contrasts(axis):
            pair = [names[first], names[second]]
            both = [axes[(axes["axis"] == axis) & (axes["choice"] == name)] for name in pair]
            keys = ["stage", "scheme", "measure"]
            joined = both[0].merge(both[1], on=keys, suffixes=(" 1", " 2"))
            for _, row in joined.iterrows():
                stated = "no difference" if harder is None else f"more with {pair[harder]}"
                one: dict[str, Any] = {"axis": axis, **{k: row[k] for k in keys}}
                one |= {"first": pair[0], "second": pair[1], "stated": stated}
                for name, end in (("percent", ""), ("at equal loss", " at equal loss")):
                    one |= _judge(row, name, end, pair, stated)
                rows.append(one)
    if rows:
        return pd.DataFrame(rows)
    names = ["axis", "stage", "scheme", "measure", "first", "second"]
    return pd.DataFrame(columns=[*names, "agreement", "agreement at equal loss"])


def _judge(
    row: pd.Series, name: str, end: str, pair: list[str], stated: str
) -> dict[str, float | str]:
    a, b = row[f"{name} 1"], row[f"{name} 2"]
    spread = max(
        row[f"{what} {k}"] for what in (f"{name} spread", "standard error") for k in (1, 2)
    )
    if min(row["seeds 1"], row["seeds 2"]) < 2:
        verdict = "one seed"
    elif not abs(b - a) > spread or (stated == "no difference" and abs(b - a) <= NOTHING):
        verdict = "no difference"
    else:
        verdict = f"more with {pair[int(b > a)]}"
    agreement = verdict
    if verdict != "one seed" and (verdict != "no difference" or stated == verdict):
        agreement = "agrees" if verdict == stated else "disagrees"
    values: dict[str, float | str] = {"first value": a, "second value": b, "difference": b - a}
    values |= {"spread": spread, "verdict": verdict, "agreement": agreement}
    return {f"{k}{end}": v for k, v in values.items()}


def axis_verdicts(judged: pd.DataFrame, end: str = "") -> dict[str, str]:
    """One word per axis, over the schemes and contrasts of the late checkpoints on the text.

    A direction counts that is found in more contrasts than would show any difference by chance.
    """
    found = {}
    late = judged[(judged.stage == "late") & (judged.measure == "text")]
    for axis in AXES:
        counts = late[late.axis == axis][f"agreement{end}"].value_counts()
        known = counts.sum() - counts.get("one seed", 0)
        heard = [w for w in ("agrees", "disagrees") if counts.get(w, 0) > CHANCE * known]
        word = heard[0] if len(heard) == 1 else "mixed" if heard else "no difference"
        word = word if known else "not known: one seed"
        tally = ", ".join(f"{k} {v}" for k, v in counts.sort_index().items())
        found[axis] = f"{word} ({tally})" if len(counts) else "not run"
    return found


def early_and_late(found: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation over choices of the degradation of early and late checkpoints."""
    rows = []
    for scheme in SCHEMES:
        part = found[(found.scheme == scheme) & (found.measure == "text")]
        both = part.pivot_table(index="choice", columns="stage", values="value")
        both = both.dropna() if {"early", "late"} <= set(both) else both.iloc[:0]
        if len(both) > 2:
            rows.append(
                {
                    "scheme": scheme, "choices": len(both),
                    "spearman": both["early"].corr(both["late"], method="spearman"),
                    "early, percent": both["early"].median(),
                    "late, percent": both["late"].median(),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)
