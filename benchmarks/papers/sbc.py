"""SBC (Pandey et al. 2023, Softmax Bias Correction): its tables and figures.

    python -m benchmarks.papers.sbc --list
    python -m benchmarks.papers.sbc table3

All are read from what `benchmarks/softmax_unet.py` and `benchmarks/softmax_lm.py` measured; these
take other models and write the files anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from benchmarks.papers import published
from benchmarks.papers.elsewhere import RESULTS
from benchmarks.papers.entry import Entry, Records, main
from benchmarks.papers.table import Published, Table, with_error

__all__ = ["ENTRIES"]

UNET = (
    "A UNet of 4.7 million parameters (Fashion-MNIST), against the float model's samples: "
    "`python benchmarks/softmax_unet.py --{} --out benchmarks/results/softmax_unet`."
)
LANGUAGE = "`python benchmarks/softmax_lm.py --data ../shared/data --out {}`."


def unet_rows(name: str) -> Records:
    content = json.loads((RESULTS / "softmax_unet" / f"{name}.json").read_text(encoding="utf-8"))
    return content.get("rows") or content["points"]


def decibel(value: Any) -> Any:
    """Return a number, and nothing for the infinity of the float model."""
    return None if isinstance(value, str) else round(float(value), 2)


def sensitivity(args: argparse.Namespace) -> Records:
    return unet_rows("table1")


def sensitivity_tables(records: Records) -> list[Table]:
    rows = [[row["quantized"], decibel(row["sqnr_db"])] for row in records]
    title = "SQNR with one kind of tensor of attention in 8 bits, dB"
    return [Table(title, ["", "final samples"], rows, UNET.format("table 1"))]


def granularity(args: argparse.Namespace) -> Records:
    return unet_rows("table2")


def granularity_tables(records: Records) -> list[Table]:
    fields = ("sqnr_db", "calibration_db", "held_out_db")
    rows = []
    for row in records:
        bits = "" if row["bits"] == 8 else f", {row['bits']} bits"
        label = f"{row['correction']}{bits}"
        if row.get("range", "fixed") != "fixed":
            label += f", range {row['range']}"
        rows.append([label, *(decibel(row[f]) for f in fields)])
    columns = ["", "final samples", "calibration latents", "held-out latents"]
    title = "SQNR of the 8-bit softmax by granularity of the correction, dB"
    return [Table(title, columns, rows, UNET.format("table 2"))]


def granularity_published(figures: dict[str, Any]) -> Published | None:
    labels = {
        "none": "none",
        "per tensor": "per tensor",
        "per head": "per head",
        "per step, per tensor": "per step",
        "per step, per head": "per step and head",
    }
    return published.table_of(figures, "granularity_db", "Stable Diffusion", labels, ["dB"])


def total(args: argparse.Namespace) -> Records:
    found = [{"kind": "unet", **row} for row in unet_rows("table3")]
    for name in ("softmax_lm", "softmax_lm_low_bits"):
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        for model, case in content["models"].items():
            found += [{"kind": name, "of": model, **row} for row in case["rows"]]
    return found


#: Rows of the UNet as the language models' are called.
NAMES = {"SM8": "FP32-SM8", "SM8 + correction": "FP32-SM8 + BC", "SM8 + row sum":
         "FP32-SM8 + row sum", "W8A16-SM8 + correction": "W8A16-SM8 + BC"}  # fmt: skip


def total_tables(records: Records) -> list[Table]:
    rows = [
        [NAMES.get(r["model"], r["model"]), decibel(r["sqnr_db"])]
        for r in records
        if r["kind"] == "unet"
    ]
    tables = [Table("All together: UNet, dB", ["", "UNet, dB"], rows, UNET.format("table 3"))]
    for kind in ("softmax_lm", "softmax_lm_low_bits"):
        own = [r for r in records if r["kind"] == kind]
        if not own:
            continue
        models = list(dict.fromkeys(r["of"] for r in own))
        labels = list(dict.fromkeys(r["model"] for r in own))
        known = {(r["of"], r["model"]): r for r in own}
        cells = [[label, *(language(known.get((m, label))) for m in models)] for label in labels]
        columns = ["", *models]
        note = "In brackets thousandths of a nat gained by the correction, ± its standard error. "
        file = f"benchmarks/results/{kind}.json"
        title = "Language models, perplexity by model and context"
        tables.append(Table(title, columns, cells, note + LANGUAGE.format(file)))
    return tables


def language(row: dict[str, Any] | None) -> str | None:
    """Return a perplexity and what the correction gained."""
    if row is None:
        return None
    text = f"{row['perplexity']:.4f}"
    return text + f" ({row['gain']:+.1f} ± {row['gain_error']:.1f})" if "gain" in row else text


def total_published(figures: dict[str, Any]) -> Published | None:
    return published.table_of(figures, "main", "Stable Diffusion and OPT-125M")


SQUARES = RESULTS / "softmax_squares.json"
ROW_SUMS = {
    "row_sum": "row sum",
    "before/row_sum": "before + row sum",
    "squares/row_sum": "squares + row sum",
}
GOAL = 0.99


def before(args: argparse.Namespace) -> Records:
    """Corrections by row at 4 to 8 bits, on text that no grid was picked on."""
    content = json.loads(SQUARES.read_text(encoding="utf-8"))
    return [
        {"of": model, **row}
        for model, case in content["models"].items()
        for row in case["rows"]
        if row.get("bits", 0) > 3
    ]


def before_tables(records: Records) -> list[Table]:
    """What is given back, and what is left, where the paper's grid loses two standard errors."""
    cases: dict[str, dict[str, Any]] = {}
    for row in records:
        name = f"{row['of']}, {row['label'].rstrip('-') or 'float'}, {row['bits']} bits"
        cases.setdefault(name, {})[row["variant"]] = row
    lossy = {n: c for n, c in cases.items() if c["none"]["lost"] > 2 * c["none"]["lost_error"]}
    shares, left = [], []
    for name, case in lossy.items():
        lost = with_error(case["none"]["lost"], case["none"]["lost_error"])
        known = [case.get(variant) for variant in ROW_SUMS]
        shares.append([name, lost, *(share(row) for row in known)])
        left.append(
            [name, *(None if r is None else with_error(r["lost"], r["lost_error"]) for r in known)]
        )
    columns = ["", *ROW_SUMS.values()]
    what = "the loss of the paper's grid"
    return [
        Table(f"Share of {what} given back, percent", ["", "lost", *columns[1:]], shares,
              f"{goal_note(lossy)} ± is the jackknife over windows. {SWAPPED}"),
        Table("What is left: perplexity above the float softmax", columns, left,
              "Paired over windows."),
    ]  # fmt: skip


SWAPPED = (
    "Squares were picked among sixteen grids by their loss on other text (`softmax_grids.py`): "
    '"swapped" cases are of the text that is for calibration otherwise; row sums need none. '
    "`python benchmarks/softmax_lm.py --data ../shared/data --longest --bits 4 6 8 --tokens 0 "
    "--swap --variants none row_sum before/row_sum squares/row_sum --out FILE`."
)


def share(row: dict[str, Any] | None) -> str | None:
    """Return the share given back in percent, with its standard error."""
    if row is None:
        return None
    return with_error(100 * row["given_back"], 100 * row["given_back_error"])


def goal_note(cases: dict[str, dict[str, Any]]) -> str:
    """Say in how many cases the best row correction, and each alone, reaches the goal."""

    def reached(names: Any) -> int:
        return sum(
            max((c[n]["given_back"] for n in names if n in c), default=0.0) >= GOAL
            for c in cases.values()
        )

    each = ", ".join(f"{label} {reached([name])}" for name, label in ROW_SUMS.items())
    return (
        f"Of {len(cases)} cases in which the paper's grid loses more than two standard errors, "
        f"{100 * GOAL:.0f} % are reached in {reached(ROW_SUMS)} ({each})."
    )


def row_sums(args: argparse.Namespace) -> Records:
    return unet_rows("figure1")


def row_sums_tables(records: Records) -> list[Table]:
    def row_sum(row: dict[str, Any]) -> float:
        return row["mean_row_sum"] if "mean_row_sum" in row else row["row_sum"]

    def to_zero(row: dict[str, Any]) -> float:
        return row["zero_fraction"] if "zero_fraction" in row else row["share_zero"]

    rows = [
        [row["layer"].removesuffix(".transformer_blocks.0"), row["keys"],
         f"{100 * to_zero(row):.0f} %", round(row_sum(row), 3), decibel(row["sqnr_db"])]
        for row in sorted(records, key=row_sum)
        if not row["cross"]
    ]  # fmt: skip
    columns = ["self-attention", "keys", "rounded to zero", "expected row sum", "SQNR, dB"]
    return [Table("Expected row sum and SQNR by layer", columns, rows, UNET.format("figure 1"))]


def row_sums_published(figures: dict[str, Any]) -> Published | None:
    known = figures.get("text")
    if known is None:
        return None
    cells = [None, f"{100 * known['largest share rounded to zero']:.0f} %",
             known["smallest expected row sum"]]  # fmt: skip
    return Published("Stable Diffusion", ["keys", "to zero", "row sum"], {"extremes": cells})


def samples(args: argparse.Namespace) -> Records:
    return [{"picture": "softmax_unet/samples.png"}]


def samples_tables(records: Records) -> list[Table]:
    rows = [[row["picture"]] for row in records]
    title = "The same samples, float and with an 8-bit softmax"
    return [Table(title, ["file"], rows, UNET.format("picture"))]


ENTRIES = (
    Entry("table1", "which tensor of attention is sensitive", sensitivity, sensitivity_tables,
          lambda f: published.table_of(f, "sensitivity_db", "Stable Diffusion", None, ["dB"]),
          "softmax_unet"),
    Entry("table2", "corrections by granularity", granularity, granularity_tables,
          granularity_published, "softmax_unet"),
    Entry("table3", "softmax and weights, UNet and language models", total, total_tables,
          total_published, "softmax_unet, softmax_lm.json"),
    Entry("before", "before normalising, and squares, against the paper's grid", before,
          before_tables, source="softmax_squares.json"),
    Entry("figure1", "expected row sum against SQNR", row_sums, row_sums_tables,
          row_sums_published, "softmax_unet", ("softmax_unet/figure1.png",)),
    Entry("figure2", "samples side by side", samples, samples_tables, source="softmax_unet",
          pictures=("softmax_unet/samples.png",)),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main("sbc", ENTRIES, __doc__, None))
