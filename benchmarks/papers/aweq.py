"""AWEQ (Li et al. 2023): its tables, equations and figure on the models at hand.

python -m benchmarks.papers.aweq --list
python -m benchmarks.papers.aweq equations --model DIR --calibration train.txt --test test.txt
python -m benchmarks.papers.aweq search --data ../shared/data --out
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from benchmarks.papers import measure, published
from benchmarks.papers.elsewhere import sweep_rows, sweep_table
from benchmarks.papers.entry import Entry, Records, main
from benchmarks.papers.table import Published, Table, with_error

__all__ = ["ENTRIES"]

Parts = list[dict[str, Any] | str]


# Tables 1 to 4

CHANCE = "Accuracies of models this small are at or near chance: compare the perplexities."
WEIGHTS = ("float", "RTN INT3", "GPTQ INT3", "AWEQ INT3", "AWE + GPTQ INT3", "RTN INT4",
           "GPTQ INT4", "AWEQ INT4", "AWE + GPTQ INT4")  # fmt: skip
STATIC = ("float", "W8A8", "W8A8 +BC", "W8A8 +AWE", "W8A8 +AWE search", "W8A8 +AWE+BC",
          "W8A8 +AWE search+BC", "SmoothQuant 0.5", "vector-wise W8A8", "LLM.int8()")  # fmt: skip


def weights(args: argparse.Namespace) -> Records:
    perplexities = sweep_rows("aweq_weights.csv", "perplexity")
    return perplexities + sweep_rows("aweq_weights.csv", "zero-shot")


def weights_tables(records: Records) -> list[Table]:
    tasks = [row for row in records if row["value"] <= 1]
    texts = [row for row in records if row["value"] > 1]
    return [
        sweep_table(tasks, "Weights alone: zero-shot accuracy, percent", WEIGHTS, CHANCE),
        sweep_table(texts, "Weights alone: perplexity", WEIGHTS, SWEEP.format("aweq_weights")),
    ]


SWEEP = "`ptqkit sweep benchmarks/sweeps/{}.toml`."


def weights_published(figures: dict[str, Any]) -> Published | None:
    labels = {"FP16": "float"}
    for bits in (3, 4):
        labels |= {f"INT{bits} {m}": f"{m} INT{bits}" for m in ("RTN", "GPTQ", "AWEQ")}
    return published.table_of(figures, "llama_7b", "LLaMA-7B, percent", labels)


def channel(bits: int, solver: str = "RTN", **options: Any) -> Parts:
    return [{"part": solver, "bits": bits, "group_size": None, **options}]


def tensor(weight_bits: int, activation_bits: int) -> Parts:
    solver = {"part": "RTN", "bits": weight_bits, "symmetric": True, "per_tensor": True}
    inputs = {"part": "ActivationQuantization", "bits": activation_bits, "granularity": "tensor"}
    return [solver, inputs]


def awe(alpha: float | str) -> Parts:
    return [{"part": "AWE", "alpha": alpha}]


def sizes(args: argparse.Namespace) -> Records:
    """Three bits on every model of a size series."""
    methods: dict[str, Any] = {
        "RTN": channel(3),
        "GPTQ": channel(3, "GPTQ", preset="reference"),
        "AWEQ": awe(0.5) + channel(3),
        "AWE + GPTQ": awe(0.5) + channel(3, "GPTQ", preset="reference"),
    }
    return studied(measure.opened(args), methods, args)


def studied(
    cases: Any, methods: dict[str, Parts], args: argparse.Namespace, **facts: Any
) -> Records:
    return [
        row for name, case in cases for row in measure.study(name, case, methods, args, **facts)
    ]


def sizes_tables(records: Records) -> list[Table]:
    found = measure.losses_of(records)
    methods = list(dict.fromkeys(row["method"] for row in records))
    rows = [
        [method, *(with_error(*measure.perplexity(x[method])) for x in found.values())]
        for method in methods
    ]
    note = "One grid per output channel; ± is over calibration draws."
    return [Table("INT3 weights, perplexity by size", ["", *found], rows, note)]


def sizes_published(figures: dict[str, Any]) -> Published | None:
    labels = {"FP16": "float", "RTN": "RTN", "GPTQ": "GPTQ", "AWEQ": "AWEQ"}
    return published.table_of(figures, "llama_average", "LLaMA, accuracy", labels)


def static(args: argparse.Namespace) -> Records:
    return sweep_rows("aweq_w8a8.csv", "perplexity") + sweep_rows("aweq_w8a8.csv", "zero-shot")


def static_tables(records: Records) -> list[Table]:
    texts = [row for row in records if row["value"] > 1]
    tasks = [row for row in records if row["value"] <= 1]
    return [
        sweep_table(tasks, "W8A8: zero-shot accuracy, percent", STATIC, CHANCE),
        sweep_table(texts, "W8A8: perplexity", STATIC, SWEEP.format("aweq_w8a8")),
    ]


def static_published(figures: dict[str, Any]) -> Published | None:
    labels = {"FP16": "float", "W8A8": "W8A8", "ZeroQuant": "ZeroQuant", "LLM.int8()": "LLM.int8()",
              "SmoothQuant": "SmoothQuant 0.5", "AWEQ": "W8A8 +AWE+BC"}  # fmt: skip
    return published.table_of(figures, "opt_175b_w8a8", "OPT-175B, percent", labels)


def ablation(args: argparse.Namespace) -> Records:
    return sweep_rows("aweq_hard.csv", "perplexity")


def ablation_tables(records: Records) -> list[Table]:
    return [
        sweep_table(records, "Ablation: perplexity", STATIC[:7], SWEEP.format("aweq_hard")),
    ]


def ablation_published(figures: dict[str, Any]) -> Published | None:
    labels = {"FP16": "float", "W8A8": "W8A8", "W8A8 + BC": "W8A8 +BC", "W8A8 + AWE": "W8A8 +AWE",
              "AWEQ": "W8A8 +AWE+BC"}  # fmt: skip
    return published.table_of(figures, "opt_175b_ablation", "OPT-175B, percent", labels)


# Equations 4 to 10 and figure 1


def equations(args: argparse.Namespace) -> Records:
    """Precision per channel, before and after, for every group of every model."""
    from ptqkit.hf import equalization_channels

    found: Records = []
    for name, case in measure.opened(args, measure.llamas):
        batches = case.batches(args.samples, 0)
        for alpha in (0.0, 0.5, 1.0):
            for row in equalization_channels(case.model, batches, alpha=alpha).to_dicts():
                known = {k: round(row[k], 4) for k in ("before", "after", "bound")}
                found.append({"model": name, "alpha": alpha, "group": row["consumers"][0],
                              "kind": row["kind"], **known})  # fmt: skip
    return found


def equations_tables(records: Records) -> list[Table]:
    rows = []
    for name in dict.fromkeys(row["model"] for row in records):
        for kind in dict.fromkeys(row["kind"] for row in records if row["model"] == name):
            own = [r for r in records if (r["model"], r["kind"]) == (name, kind)]
            closed = [r for r in own if r["alpha"] == 0.5]
            shares = [np.mean([r["before"] / r["bound"] for r in closed])]
            shares += [
                np.mean([r["after"] / r["bound"] for r in own if r["alpha"] == alpha])
                for alpha in (0.0, 0.5, 1.0)
            ]
            bound = float(np.mean([r["bound"] for r in closed]))
            cells = [f"{100 * share:.1f} %" for share in shares]
            rows.append([f"{name}, {kind}", len(closed), *cells, bound])
    return [
        Table(
            "Σ pˣ pʷ over the channels (eqs. 4-8), mean share of its bound",
            ["", "groups", "before", "alpha 0", "alpha 0.5 (eq. 10)", "alpha 1", "bound"],
            rows,
            "Every exponent reaches the bound that max(rˣ rʷ) sets: this sum does not choose among "
            "them, and eq. 10 is the one that treats inputs and weights alike. `value` groups of "
            "grouped-query attention tie channels together, which keeps them below it.",
        )
    ]


def figure1(args: argparse.Namespace) -> Records:
    """Draw the channels of the last model; with --out, into that folder."""
    from ptqkit.hf import equalization_channels

    found: Records = []
    for name, case in measure.opened(args, measure.llamas):
        channels = equalization_channels(case.model, case.batches(args.samples, 0))
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            channels.draw(args.out / f"aweq_figure1_{name}.png")
        for group in channels:
            spans = (group.activation_span, group.activation_span / group.scales,
                     group.weight_span, group.weight_span * group.scales)  # fmt: skip
            wide = [round(float(x.max() / np.median(x[x > 0])), 2) for x in spans]
            found.append({"model": name, "group": group.consumers[0], "widest": wide})
    return found


def figure1_tables(records: Records) -> list[Table]:
    rows = []
    for name in dict.fromkeys(row["model"] for row in records):
        wide = np.array([row["widest"] for row in records if row["model"] == name])
        rows.append([name, *(float(x) for x in np.median(wide, axis=0))])
    return [
        Table(
            "Widest channel by the median one, median over the groups",
            ["", "inputs before", "after", "weights before", "after"],
            rows,
        )
    ]


# Search against the closed form

SCHEMES: dict[str, Parts] = {
    "W4, channel": channel(4),
    "W3, channel": channel(3),
    "W6A6, tensor": tensor(6, 6),
}
WAYS: dict[str, Parts] = {"none": [], "eq. 10": awe(0.5), "search": awe("search")}


def search(args: argparse.Namespace) -> Records:
    """No equalization, eq. 10 and the search, on small LLaMA shapes and the size series."""
    found: Records = []
    for scheme, parts in SCHEMES.items():
        methods = {way: first + parts for way, first in WAYS.items()}
        cases = measure.opened(args, measure.small)
        found += studied(cases, methods, args, scheme=scheme, divergence=True)
    return found


def search_tables(records: Records) -> list[Table]:
    tables = []
    for values, title, note in (
        ("kl", "Divergence from the float model", KL_NOTE),
        ("losses", "Loss above the float model's", LOSS_NOTE),
    ):
        rows = []
        for scheme in dict.fromkeys(row["scheme"] for row in records):
            own = [row for row in records if row["scheme"] == scheme]
            for name, found in measure.losses_of(own, values=values).items():
                floats = found.get("float") or {
                    -1: np.zeros_like(next(iter(found["none"].values())))
                }
                above = [with_error(*measure.paired(found[way], floats)) for way in WAYS]
                against = with_error(*measure.paired(found["search"], found["eq. 10"]))
                rows.append([f"{name}, {scheme}", *above, against])
        columns = ["", *WAYS, "search - eq. 10"]
        heading = f"Search against the closed form, held-out text. {title}, mnat per token"
        tables.append(Table(heading, columns, rows, note))
    return tables


KL_NOTE = (
    "Paired; the errors hold windows and calibration draws. The divergence has no term that is "
    "linear in the error of the weights."
)
LOSS_NOTE = (
    "The loss has one, which is as often a gain as a loss and is the same luck for every window "
    "and nearly for every draw: the errors do not hold it. Where the loss moves by less than a few "
    "mnat it says nothing about a recipe."
)


ENTRIES = (
    Entry("table1", "INT3 and INT4 weights: RTN, GPTQ, AWEQ", weights, weights_tables,
          weights_published, "aweq_weights.csv"),
    Entry("table2", "INT3 weights over sizes", sizes, sizes_tables, sizes_published),
    Entry("table3", "W8A8: AWEQ and other methods", static, static_tables, static_published,
          "aweq_w8a8.csv"),
    Entry("table4", "ablation of AWE and bias correction", ablation, ablation_tables,
          ablation_published, "aweq_hard.csv"),
    Entry("equations", "precision per channel, eqs. 4-10", equations, equations_tables),
    Entry("figure1", "channels before and after", figure1, figure1_tables),
    Entry("search", "where the search beats eq. 10, and where not", search, search_tables),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main("aweq", ENTRIES, __doc__, None))
