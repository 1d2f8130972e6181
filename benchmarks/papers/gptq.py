"""GPTQ (Frantar et al., ICLR 2023): its tables and figures on the models at hand.

python -m benchmarks.papers.gptq --list
python -m benchmarks.papers.gptq table3 --models models --data ../shared/data --out
python -m benchmarks.papers.gptq table3 --model DIR --calibration train.txt --test test.txt
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ptqkit
from benchmarks.accuracy.models import Case, open_case
from benchmarks.papers import measure, published
from benchmarks.papers.elsewhere import RESULTS, read, sweep_rows, sweep_table
from benchmarks.papers.entry import Entry, Records, main
from benchmarks.papers.scripts import script
from benchmarks.papers.table import Published, Table, with_error

__all__ = ["ENTRIES"]

CHANNEL = {"group_size": None}
#: Bits and methods of tables 2 to 4: the paper's, then what this package adds.
METHODS: dict[str, Any] = {
    f"{label} {bits}": (preset, {"bits": bits, **CHANNEL})
    for bits in (4, 3)
    for label, preset in (("RTN", "rtn"), ("GPTQ", "reference"), ("quality", "quality"))
}


def grid_methods(bits: int, groups: Sequence[int], preset: str, label: str) -> dict[str, Any]:
    """Return methods that differ by the size of their groups."""
    return {f"{label} g{g}": (preset, {"bits": bits, "group_size": g}) for g in groups}


def dividing(case: Case, groups: Sequence[int]) -> list[int]:
    """Return the sizes of groups that divide the inputs of every layer."""
    layers = case.model.get_decoder().modules()
    widths = {m.in_features for m in layers if hasattr(m, "in_features")}
    return [g for g in groups if not any(width % g for width in widths)]


# Tables 3 and 4: bits and methods over sizes


def by_size(args: argparse.Namespace) -> Records:
    """Bits and methods on every model, each record with the weights of its linear layers."""
    return sized(measure.opened(args), args)


#: Grids and recipes of `benchmarks.accuracy` by the names that they have here.
ACCURACY = {
    ("4 channel", "reference"): "GPTQ 4",
    ("4 channel", "quality"): "quality 4",
    ("3 g64", "reference"): "GPTQ 3 g64",
    ("3 g64", "quality"): "quality 3 g64",
}


def by_size_llama(args: argparse.Namespace) -> Records:
    """Bits and methods on the models given, or what `benchmarks.accuracy` measured."""
    if args.model:
        return by_size(args)
    losses: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for row in read(RESULTS / "accuracy" / "windows.csv"):
        method = ACCURACY.get((row["grid"], row["recipe"]))
        if row["recipe"] == "float":
            method = "float"
        if method is not None:
            key = (row["model"], method, int(row["draw"]))
            losses[key].append(float(row["nll"]) / float(row["tokens"]))
    order = {method: i for i, method in enumerate(["float", *ACCURACY.values()])}
    found = [{"model": m, "method": r, "draw": d, "losses": x} for (m, r, d), x in losses.items()]
    names = list(measure.LLAMAS)
    kept = [row for row in found if row["model"] in names]
    return sorted(kept, key=lambda r: (names.index(r["model"]), order[r["method"]], r["draw"]))


def llama_tables(records: Records) -> list[Table]:
    note = "± is over calibration draws. `benchmarks/accuracy`; the text of each model is its own."
    return [
        perplexities(records, "Perplexity by size, LLaMA shapes", note=note),
        gains(records, "GPTQ", "quality"),
    ]


def sized(cases: Any, args: argparse.Namespace) -> Records:
    found: Records = []
    for name, case in cases:
        layers = case.model.get_decoder().modules()
        weights = sum(m.weight.numel() for m in layers if hasattr(m, "in_features"))
        facts = {"weights": weights, **measure.training_of(name, args)}
        found += measure.study(name, case, METHODS, args, **facts)
    return found


def perplexities(records: Records, title: str, key: str = "model", note: str = "") -> Table:
    """Rows are methods, columns models; the spread is over the calibration draws."""
    found = measure.losses_of(records, key)
    methods = list(dict.fromkeys(row["method"] for row in records))
    rows = []
    for method in methods:
        cells: list[Any] = [method]
        for losses in found.values():
            known = method in losses
            cells.append(with_error(*measure.perplexity(losses[method])) if known else None)
        rows.append(cells)
    return Table(title, ["", *found], rows, note)


def gains(records: Records, base: str, better: str, key: str = "model") -> Table:
    """What one method gains on another at the same bits, with the error of paired windows."""
    rows = []
    for name, losses in measure.losses_of(records, key).items():
        for first in losses:
            other = first.replace(better, base, 1)
            if first.startswith(better) and other in losses and other != first:
                if not _windows(losses[first]) == _windows(losses[other]) > 1:
                    continue  # of a run that was cut off, only the means are known
                change, error = measure.paired(losses[first], losses[other])
                rows.append([name, first, other, with_error(change, error)])
    return Table(
        f"{better} against {base}: thousandths of a nat per token, paired",
        [key, "method", "against", "difference"],
        rows,
        "The error holds windows and calibration draws. Below 0 the first is better.",
    )


def _windows(draws: measure.Losses | Any) -> int:
    """Fewest windows of a draw."""
    return min(len(losses) for losses in draws.values())


def draws_of(records: Records) -> str:
    """Return how many draws and windows there are, as a sentence."""
    draws = len({row["draw"] for row in records} - {-1})
    windows = max(len(row["losses"]) for row in records)
    return f"± is the standard deviation over {draws} calibration draws; {windows} test windows."


def size_tables(records: Records) -> list[Table]:
    title = "Perplexity by size, one asymmetric grid per output channel"
    read = sorted({row["tokens"] for row in records if "tokens" in row})
    note = draws_of(records)
    if read:
        tokens = " to ".join(f"{1e-6 * n:.3g}" for n in dict.fromkeys((read[0], read[-1])))
        note += f" Each model has read {tokens} million tokens of books; the test text is others."
    compared = [gains(records, "RTN", "GPTQ"), gains(records, "GPTQ", "quality")]
    return [perplexities(records, title, note=note), *(t for t in compared if t.rows)]


def like_ours(figures: dict[str, Any], name: str, model: str) -> Published | None:
    labels = {"full 16": "float"} | {x: x for b in (4, 3) for x in (f"RTN {b}", f"GPTQ {b}")}
    return published.table_of(figures, name, model, labels)


def draw_sizes(records: Records, path: Path) -> None:
    """Figure 1: perplexity over size, a line per method."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    found = measure.losses_of(records)
    sizes = {row["model"]: row["weights"] for row in records}
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
    for axis, bits in zip(axes, ("4", "3"), strict=True):
        for method in ("float", f"RTN {bits}", f"GPTQ {bits}", f"quality {bits}"):
            points = [
                (sizes[m], *measure.perplexity(x[method])) for m, x in found.items() if method in x
            ]
            x, y, spread = map(np.array, zip(*sorted(points), strict=True))
            axis.errorbar(x, y, yerr=np.nan_to_num(spread), label=method, marker="o", capsize=3)
        axis.set_xscale("log")
        axis.set_xticks(list(sizes.values()), [f"{n / 1e6:.2g} M" for n in sizes.values()])
        axis.minorticks_off()
        axis.set_xlabel("weights of the blocks")
        axis.set_title(f"{bits} bits, one grid per output channel")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("perplexity on prose")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# Table 1: ResNet and encoders


def kinds(args: argparse.Namespace) -> Records:
    from benchmarks.kinds.tables import lines

    found = []
    for line in lines(RESULTS / "kinds"):
        label = "float" if line["method"] == "float" else f"{line['method']}"
        found.append({**line, "label": label})
    return found


def kinds_tables(records: Records) -> list[Table]:
    tables = []
    for model in dict.fromkeys(row["model"] for row in records):
        own = [row for row in records if row["model"] == model]
        cells: dict[str, dict[int, str]] = {}
        for row in own:
            shown = with_error(row["accuracy"], row["error"])
            cells.setdefault(PAPER_NAMES.get(row["label"], row["label"]), {})[row["bits"]] = shown
        floats = cells.pop("float")[0]
        rows = [[name, bits.get(4), bits.get(3)] for name, bits in cells.items()]
        title = f"Accuracy of {model} in percent, float {floats}"
        tables.append(Table(title, ["", "4 bit", "3 bit"], rows))
    note = "± is the standard error of the paired loss against float (float: of a proportion)."
    order = sorted(tables, key=lambda t: "resnet" not in t.title)
    return [*order[:-1], Table(order[-1].title, order[-1].columns, order[-1].rows, note)]


PAPER_NAMES = {"adaround": "AdaRound", "obq": "OBQ", "gptq": "GPTQ", "rtn": "RTN"}


# Table 2: runtime, and its growth with the width


def fastest(run: Any, repeats: int) -> float:
    """Return the least CPU seconds of some runs, after one that does not count.

    Time of the processor, not of the clock: other work on the machine does not lengthen it.
    """
    run()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


def runtime(args: argparse.Namespace) -> Records:
    """Seconds of the solver by width, of OBQ where it is not too long; and of whole models."""
    layer = script("bench_solver").layer
    quality = script("bench_solver").QUALITY
    widths = (64, 128) if args.quick else (128, 256, 512, 1024)
    repeats = 1 if args.quick else 3
    found = []
    for n in widths:
        W, H = layer(n, n)
        options = {"bits": 4, **CHANNEL}
        runs = {
            "GPTQ": lambda: ptqkit.gptq(W, H, threads=1, **options),
            "quality": lambda: ptqkit.gptq(W, H, threads=1, **options, **quality),
        }
        if n <= 256:
            runs["OBQ"] = lambda: ptqkit.obq(W, H, threads=1, **options)
        for method, work in runs.items():
            found.append({"method": method, "width": n, "seconds": fastest(work, repeats)})
            print(found[-1], file=sys.stderr, flush=True)
    return found


def runtime_tables(records: Records) -> list[Table]:
    widths = sorted({row["width"] for row in records})
    methods = list(dict.fromkeys(row["method"] for row in records))
    known = {(row["method"], row["width"]): row["seconds"] for row in records}
    rows = [
        [f"{n} x {n}", *(1e3 * known[m, n] if (m, n) in known else None for m in methods)]
        for n in widths
    ]
    growth = []
    for first, second in itertools.pairwise(widths):
        cells = [
            math.log2(known[m, second] / known[m, first]) / math.log2(second / first)
            if (m, first) in known and (m, second) in known
            else None
            for m in methods
        ]
        growth.append([f"{first} to {second}", *cells])
    return [
        Table("From H to 4-bit codes, milliseconds of one CPU core", ["layer", *methods], rows),
        Table(
            "Growth: k, where seconds grow like width to the k",
            ["width", *methods],
            growth,
            "The paper's GPTQ is cubic in the width, OBQ of the fourth power.",
        ),
    ]


def runtime_published(figures: dict[str, Any]) -> Published | None:
    return published.table_of(figures, "runtime_a100", "one A100", columns=["whole model"])


# Table 5: texts


TEXTS = {"prose": "gutenberg/test.txt.gz", "WikiText-2": "wikitext2/wiki.test.raw.gz",
         "web (C4)": "c4/c4_sample_40.jsonl.gz"}  # fmt: skip


def by_text(args: argparse.Namespace) -> Records:
    """The largest model on three texts."""
    if args.models is None or args.data is None:
        raise SystemExit("texts needs --models DIR and --data DIR")
    *_, folder = measure.series_folders(args.models)
    calibration = [measure.read_text(args.data / "gutenberg" / "valid.txt.gz")]
    length = measure.length_of(folder)
    cases = {
        name: open_case(
            folder, calibration, measure.read_text(args.data / path), length, args.windows
        )
        for name, path in TEXTS.items()
    }
    case = next(iter(cases.values()))
    groups = dividing(case, (64, 32))
    methods = {m: METHODS[m] for m in ("RTN 4", "GPTQ 4", "RTN 3", "GPTQ 3")}
    methods |= grid_methods(3, groups, "reference", "GPTQ 3")
    methods |= grid_methods(3, groups[-1:], "quality", "quality 3")
    texts = {name: of.windows for name, of in cases.items()}
    return list(measure.study(folder.name, case, methods, args, texts=texts))


def text_tables(records: Records) -> list[Table]:
    name = records[0]["model"]
    note = (
        f"{draws_of(records)} Calibrated on prose. Perplexities are per piece of the model's own "
        "vocabulary."
    )
    return [
        perplexities(records, f"Perplexity of {name} by text", "text", note),
        gains(records, "RTN", "GPTQ", "text"),
    ]


def text_published(figures: dict[str, Any]) -> Published | None:
    labels = {
        "full 16": "float",
        "GPTQ 4": "GPTQ 4",
        "GPTQ 3": "GPTQ 3",
        "GPTQ 3 g1024": "GPTQ 3 g64",
        "GPTQ 3 g128": "GPTQ 3 g32",
    }
    return published.table_of(figures, "large_models", "OPT and BLOOM (g1024, g128)", labels)


# Table 7: two bits and three levels


def low_bits(args: argparse.Namespace) -> Records:
    """Two bits by group size, and ternary weights in groups of 8, on the largest model given."""
    *_, (name, case) = measure.opened(args)
    groups = dividing(case, (64, 32, 16))
    ternary = {"bits": "ternary", "group_size": 8, "symmetric": True}
    methods = {
        **grid_methods(2, groups, "reference", "GPTQ 2"),
        **grid_methods(2, groups, "quality", "quality 2"),
        "GPTQ 3": METHODS["GPTQ 3"],
        "GPTQ ternary g8": ("reference", ternary),
        "quality ternary g8": ("quality", ternary),
    }
    return list(measure.study(name, case, methods, args))


def low_tables(records: Records) -> list[Table]:
    found = measure.losses_of(records)
    bits = {row["method"]: row.get("bits", 16.0) for row in records}
    rows = [
        [method, bits[method], with_error(*measure.perplexity(draws))]
        for losses in found.values()
        for method, draws in losses.items()
    ]
    title = f"Perplexity of {', '.join(found)} at low bits"
    note = (
        f"Bits per weight count scales and zero points. {draws_of(records)} The model is the "
        "largest of table 3."
    )
    return [Table(title, ["", "bits/weight", "perplexity"], rows, note)]


def low_published(figures: dict[str, Any]) -> Published | None:
    known = figures.get("two_bit")
    if not known:
        return None
    labels = {"FP16": "float", "g128": "GPTQ 2 g64", "g64": "GPTQ 2 g32", "g32": "GPTQ 2 g16",
              "3 bit": "GPTQ 3"}  # fmt: skip
    models = [k for k in known if k != "columns"]
    rows = {labels[c]: [known[m][i] for m in models] for i, c in enumerate(known["columns"])}
    ternary = figures.get("ternary", {}).get("OPT-175B, groups of 8")
    if ternary is not None:
        rows["GPTQ ternary g8"] = [ternary, *[None] * (len(models) - 1)]
    return Published("175B (g128, g64, g32 beside g64, g32, g16)", models, rows)


# Table 6 and section 6: latency and memory


def latency(args: argparse.Namespace) -> Records:
    """Milliseconds per token, from `ptqkit bench` on a model of 1.1 billion random weights."""
    forms = ("float32", "W4", "W3", "W2")
    rows = [r for r in read(RESULTS / "bench_1b_zen1.csv") if r["form"] in forms]
    return [{"form": r["form"], "ms": 1e3 / float(r["generation_rate"]),
             "megabytes": float(r["tensor_bytes"]) / 1e6, "model": r["model"],
             "threads": int(r["threads"])} for r in rows]  # fmt: skip


def latency_tables(records: Records) -> list[Table]:
    floats = next(row for row in records if row["form"] == "float32")
    rows = [
        [f"this CPU, {r['form']}", floats["ms"], r["ms"], floats["ms"] / r["ms"]]
        for r in records
        if r is not floats
    ]
    return [
        Table(
            f"Latency of one token, {floats['model']} weights, {floats['threads']} cores of Zen 1",
            ["", "float32, ms", "packed, ms", "ratio"],
            rows,
            "`ptqkit bench --random-1b`; anew: `python benchmarks/paper_speed.py gptq`.",
        )
    ]


def latency_published(figures: dict[str, Any]) -> Published | None:
    found = published.table_of(figures, "latency_ms_per_token", "OPT-175B, ms")
    return found


def memory(args: argparse.Namespace) -> Records:
    from ptqkit.hf.speed.shapes import SHAPES

    shape = SHAPES["OPT-175B"]
    weights, cache = shape.weight_bytes(3) / 1e9, shape.cache_bytes(2048) / 1e9
    rows = {"weights": weights, "kv_cache_2048": cache, "total": weights + cache}
    return [{"what": LABELS[k], "gigabytes": v} for k, v in rows.items()]


LABELS = {
    "weights": "weights, 3 bits per channel",
    "kv_cache_2048": "keys and values, 2,048 tokens",
    "total": "together",
}


def memory_tables(records: Records) -> list[Table]:
    rows = [[row["what"], row["gigabytes"]] for row in records]
    title = "Memory of OPT-175B, by arithmetic"
    return [Table(title, ["", "GB"], rows)]


def memory_published(figures: dict[str, Any]) -> Published | None:
    return published.table_of(figures, "memory_gb", "the paper", LABELS, ["GB"])


# Zero-shot tasks


SWEPT = ("float", "RTN INT3", "GPTQ INT3", "RTN INT4", "GPTQ INT4")
SWEEPS = {"aweq_weights": "small models", "gptq_sizes": "the size series"}


def tasks(args: argparse.Namespace) -> Records:
    """Accuracies of the sweeps over weights and over sizes."""
    return [
        {**row, "sweep": sweep}
        for sweep in SWEEPS
        if (RESULTS / f"{sweep}.csv").exists()
        for row in sweep_rows(f"{sweep}.csv", "zero-shot")
        if row["recipe"] in SWEPT
    ]


def task_tables(records: Records) -> list[Table]:
    tables = []
    for sweep, models in SWEEPS.items():
        note = f"`ptqkit sweep benchmarks/sweeps/{sweep}.toml`; ± is of a proportion."
        own = [row for row in records if row["sweep"] == sweep]
        if not own:
            continue
        recipes = [r for r in SWEPT if any(row["recipe"] == r for row in own)]
        tables.append(sweep_table(own, f"Zero-shot accuracy of {models}, percent", recipes, note))
    return [*tables, chances(records)]


def chances(records: Records) -> Table:
    """How far the float models are above chance, in standard errors."""
    rows = []
    for row in (r for r in records if r["recipe"] == "float"):
        chance = float(row["chance"] or 0)
        error = math.sqrt(chance * (1 - chance) / int(row["count"]))
        distance = (row["value"] - chance) / error if error else math.nan
        rows.append([f"{row['model']}, {row['task']}", 100 * row["value"], 100 * chance, distance])
    return Table(
        "Float models and chance",
        ["", "accuracy, %", "chance, %", "above, in standard errors"],
        rows,
        "Of LAMBADA, which wants one word of thousands, chance is nothing. Within two standard "
        "errors a task says nothing about a recipe.",
    )


ENTRIES = (
    Entry("table1", "solvers on a ResNet, with two encoders", kinds, kinds_tables,
          lambda f: published.table_of(f, "resnet_top1", "ImageNet"), "kinds"),
    Entry("table2", "runtime, and its growth with the width", runtime, runtime_tables,
          runtime_published),
    Entry("table3", "perplexity by size, bits and methods; figure 1", by_size, size_tables,
          lambda f: like_ours(f, "opt_wikitext2", "OPT"), draw=draw_sizes),
    Entry("table4", "the same on another family (LLaMA shapes)", by_size_llama, llama_tables,
          lambda f: like_ours(f, "bloom_wikitext2", "BLOOM"), "accuracy/windows.csv"),
    Entry("table5", "the largest model on three texts, by group size", by_text, text_tables,
          text_published),
    Entry("table6", "latency of one token at low bits", latency, latency_tables,
          latency_published, "bench_1b_zen1.csv"),
    Entry("memory", "weights, keys and values of OPT-175B", memory, memory_tables,
          memory_published, "ptqkit.hf.speed.shapes"),
    Entry("table7", "two bits by group size, and ternary", low_bits, low_tables, low_published),
    Entry("zero-shot", "zero-shot tasks", tasks, task_tables, lambda f: None, "aweq_weights.csv"),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main("gptq", ENTRIES, __doc__, None))
