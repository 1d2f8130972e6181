"""IPQS (Ahmadian et al. 2023, Intriguing Properties of Quantization at Scale): tables and figures.

    python -m benchmarks.papers.ipqs --list
    python -m benchmarks.papers.ipqs table1

Read from what `ptqkit sweep benchmarks/sweeps/ipqs_w8a8.toml`, `benchmarks/pretrain` and `ptqkit
bench --random-1b` measured.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import math
import sys
from collections import defaultdict
from typing import Any

from benchmarks.papers import published
from benchmarks.papers.elsewhere import RESULTS, read, sweep_rows
from benchmarks.papers.entry import Entry, Records, main
from benchmarks.papers.table import Published, Table, with_error

__all__ = ["ENTRIES"]

PRETRAIN = "`benchmarks/pretrain`; the whole page: benchmarks/results/pretrain/README.md."


def axes(args: argparse.Namespace) -> Records:
    """The late checkpoints on text, by choice and scheme."""
    rows = read(RESULTS / "pretrain" / "axes.csv")
    fields = ("axis", "choice", "scheme", "percent", "percent spread", "loss", "seeds")
    kept = [r for r in rows if r["stage"] == "late" and r["measure"] == "text"]
    return [{k: r[k] for k in fields} for r in kept]


def axes_tables(records: Records) -> list[Table]:
    schemes = list(dict.fromkeys(r["scheme"] for r in records))
    labels = list(dict.fromkeys((r["axis"], r["choice"]) for r in records))
    known = {(r["axis"], r["choice"], r["scheme"]): r for r in records}
    rows = []
    for axis, choice in labels:
        own = [known.get((axis, choice, scheme)) for scheme in schemes]
        cells = [
            None if r is None else with_error(float(r["percent"]), float(r["percent spread"]))
            for r in own
        ]
        loss = next(float(r["loss"]) for r in own if r is not None)
        rows.append([f"{axis}: {choice}" if axis != choice.split(" ")[0] else choice, loss, *cells])
    title = "Pre-training choices: degradation of the loss on text, percent, mean over seeds"
    return [Table(title, ["", "loss", *schemes], rows, f"± is the spread of seeds. {PRETRAIN}")]


def axes_published(figures: dict[str, Any]) -> Published | None:
    known = figures.get("degradation")
    if not known:
        return None
    rows = {f"stated: {k}": [v] for k, v in known.items()}
    return Published("6B and others", ["degradation, percent of 8 tasks"], rows)


def verdicts(args: argparse.Namespace) -> Records:
    rows = read(RESULTS / "pretrain" / "contrasts.csv")
    kept = [r for r in rows if r["stage"] == "late" and r["measure"] == "text"]
    fields = ("axis", "first", "second", "stated", "scheme", "agreement",
              "agreement at equal loss")  # fmt: skip
    return [{k: r[k] for k in fields} for r in kept]


def verdicts_tables(records: Records) -> list[Table]:
    rows = []
    for key in dict.fromkeys((r["first"], r["second"], r["stated"]) for r in records):
        own = [r for r in records if (r["first"], r["second"], r["stated"]) == key]
        counts = [
            ", ".join(
                f"{word} {sum(r[column] == word for r in own)}"
                for word in dict.fromkeys(r[column] for r in own)
            )
            for column in ("agreement", "agreement at equal loss")
        ]
        rows.append([f"{key[0]} / {key[1]}", key[2], *counts])
    columns = ["contrast", "stated", "as measured, of 4 schemes", "at equal loss"]
    return [Table("What is stated, and what was found", columns, rows, PRETRAIN)]


def sizes(args: argparse.Namespace) -> Records:
    texts = sweep_rows("ipqs_w8a8.csv", "perplexity")
    return texts + sweep_rows("ipqs_w8a8.csv", "zero-shot")


def sizes_tables(records: Records) -> list[Table]:
    floats = {(r["model"], r["task"]): r["value"] for r in records if r["recipe"] == "float"}
    texts = [r for r in records if r["value"] > 1]
    models = list(dict.fromkeys(r["model"] for r in texts))
    rows = []
    for recipe in dict.fromkeys(r["recipe"] for r in texts):
        own = {r["model"]: r for r in texts if r["recipe"] == recipe}
        cells = [100 * (own[m]["value"] / floats[m, own[m]["task"]] - 1) for m in models]
        if recipe != "float":
            rows.append([recipe, *(f"{value:.2f}" for value in cells)])
    note = "`ptqkit sweep benchmarks/sweeps/ipqs_w8a8.toml`; rounding to nearest."
    return [Table("Rise of the perplexity, percent", ["", *models], rows, note)]


def sizes_published(figures: dict[str, Any]) -> Published | None:
    labels = {"52B, W8A8": "vector-wise W8A8", "52B, INT4 columns, mean of 8 tasks": "INT4 weights"}
    return published.table_of(figures, "degradation", "52B", labels, ["8 tasks, percent"])


def picture(name: str, title: str) -> Entry:
    """An entry that is a picture of the pre-training ablation."""
    file = f"pretrain/{name}.png"

    def tables(records: Records) -> list[Table]:
        return [Table(title, ["file"], [[row["picture"]] for row in records], PRETRAIN)]

    return Entry(name, title, lambda args: [{"picture": file}], tables, source="pretrain",
                 pictures=(file,))  # fmt: skip


#: Our diagnostics, as the paper's text calls the ratios of its figure 5.
DIAGNOSTICS = {
    "rmse_token, attention in": "RMSE fp16 / bf16",
    "std, attention in": "STD fp16 / bf16",
    "norm gain std": "STD(g) fp16 / bf16",
    "weight spectral_norm, attention in": "spectral norm fp16 / bf16",
}


def ratios(args: argparse.Namespace) -> Records:
    """Return what fp16 does to RMSE, STD, gains and spectral norm, mean over the seeds."""
    with gzip.open(RESULTS / "pretrain" / "ablation.csv.gz", "rt", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["stage"] == "late"]
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        if row["metric"] in DIAGNOSTICS:
            values[row["run"].partition(",seed=")[0], row["metric"]].append(float(row["value"]))
    pair = ("precision=fp16", "base")
    means = {m: [math.fsum(v := values[c, m]) / len(v) for c in pair] for m in DIAGNOSTICS}
    return [{"metric": m, "fp16": fp16, "bf16": bf16} for m, (fp16, bf16) in means.items()]


def ratios_tables(records: Records) -> list[Table]:
    rows = [[DIAGNOSTICS[r["metric"]], f"{r['fp16'] / r['bf16']:.2f}"] for r in records]
    note = "All blocks, attention projections; weight decay 0.1 in both. The curves are below. "
    title = "What half precision in training does to the layers"
    return [Table(title, ["", "fp16 / bf16"], rows, note + PRETRAIN)]


def ratios_published(figures: dict[str, Any]) -> Published | None:
    return published.table_of(figures, "figure_5_ratios", "6B, block 14", None, ["ratio"])


def speed(args: argparse.Namespace) -> Records:
    rows = read(RESULTS / "bench_1b_zen1.csv")
    keep = [r for r in rows if r["form"] in ("float32", "W8A8")]
    fields = ("form", "prompt_rate", "generation_rate", "tensor_bytes")
    return [{k: r[k] if k == "form" else float(r[k]) for k in fields} for r in keep]


def speed_tables(records: Records) -> list[Table]:
    floats, quantized = records
    times = [f"{quantized[k] / floats[k]:.2f}" for k in ("prompt_rate", "generation_rate")]
    saved = 100 * (1 - quantized["tensor_bytes"] / floats["tensor_bytes"])
    row = ["W8A8", *times, f"{saved:.0f} %"]
    return [
        Table(
            "W8A8 against float32, two cores of an AMD Zen 1, 1.1 billion random weights",
            ["", "prompt, x", "one token, x", "memory saved"],
            [row],
            "`ptqkit bench --random-1b`; anew: `python benchmarks/paper_speed.py ipqs`.",
        )
    ]


def speed_published(figures: dict[str, Any]) -> Published | None:
    known = figures.get("speed")
    if not known:
        return None
    low, high = known["speed-up"]
    saved = f"{100 * known['memory saved']:.0f} %"
    return Published("52B, against half precision", ["speed-up", "memory saved"],
                     {"W8A8": [f"{low} to {high} x", saved]})  # fmt: skip


ENTRIES = (
    Entry("table1", "pre-training choices and their degradation", axes, axes_tables,
          axes_published, "pretrain/axes.csv"),
    Entry("verdicts", "what the paper states, contrast by contrast", verdicts, verdicts_tables,
          source="pretrain/contrasts.csv"),
    Entry("figure1", "degradation by model", sizes, sizes_tables, sizes_published,
          "ipqs_w8a8.csv"),
    picture("figure2", "Weight decay, clipping, dropout"),
    picture("figure3", "Half precision, positions, optimizer and gain"),
    picture("figure4", "Weights of the attention projection and gains before it"),
    Entry("figure5", "RMSE, STD, STD of the gains and spectral norm", ratios, ratios_tables,
          ratios_published, "pretrain/ablation.csv.gz", ("pretrain/figure5.png",)),
    Entry("speed", "speed and memory of W8A8", speed, speed_tables, speed_published,
          "bench_1b_zen1.csv"),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main("ipqs", ENTRIES, __doc__, None))
