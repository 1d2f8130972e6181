"""Write `docs/cost.md` from the results of this folder: what runs cost, checked and extrapolated.

python -m benchmarks.large.page --results benchmarks/results/large --out docs/cost.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import markdown
from benchmarks.large.cost import PARTS, Cost, bytes_of, count, counts_of, fit, seconds_of
from benchmarks.large.memory import WAYS
from benchmarks.large.models import Size

__all__ = ["page"]

#: Shapes that are told: 7 B, 70 B, and a mixture of a trillion (the sizes of Kimi K2, published).
SHAPES = {
    "7 B": Size(),
    "70 B": Size(8192, 28672, 80, 64, 8, 32000),
    "1 T, 384 experts": Size(7168, 2048, 61, 64, 64, 163840, 384, 8),
}
#: Tokens: of the mixture as many as give each expert three times as many as it has inputs.
TOKENS = {"7 B": 262_144, "70 B": 262_144, "1 T, 384 experts": 1_048_576}
LENGTH = 2048
#: Bytes per second, assumed: sums between GPUs of one host and between hosts; the disk.
ASSUMED = {"between GPUs of a host": 100e9, "between hosts": 20e9, "disk": 2e9}
GPUS_OF_A_HOST = 8


def page(results: Path) -> str:
    """Return the text of the page."""
    sizes = _read(results / "sizes.json")
    runs = sizes["runs"]
    cost = fit([run for run in runs if run["for"] == "fit"])
    before, gpu = _read(results / "h200_host.json"), _read(results / "pipeline_7b.json")
    parts = [_intro(), _check(sizes, cost)]
    if (results / "memory.json").exists():
        parts.append(_memory(_read(results / "memory.json")))
    parts += [_equality(_read(results / "equality.json")), _gpu(before, gpu), _extrapolated(gpu)]
    return "\n".join(parts)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _table(columns: list[str], rows: list[list[str]]) -> str:
    return markdown(columns, rows) + "\n"


def _machine(found: Mapping[str, Any]) -> str:
    machine = found["machine"]
    return f"{machine['cpu'].strip()}, {machine['cores']} cores ({machine['cpu_level']})"


def _intro() -> str:
    return """# What a run costs, and what larger ones would

This page is written by `python -m benchmarks.large.page` from the files in
`benchmarks/results/large`; each of them has its command and its machine in it. The model is
`benchmarks/large/cost.py`: every part of a run is a sum of counts, which the shapes give, times
seconds per count, which are fitted.

| part | counts |
|---|---|
| forward | multiplications and additions of layers and attention; tokens x width; calls |
| Hessian | tokens x inputs² of every group of layers with one input; inputs² x batches |
| solving | inputs³ / 3 for the factor of every H; outputs x inputs²; weights |
| diagnostics | outputs x inputs²; weights |

One pass runs a block once; replay, and with it a model that is streamed, runs it up to each group
and once for its outputs. An expert has its share of the tokens, and an H and a factor of its own,
which is why mixtures cost what their parameters cost, whatever is active. Processes share tokens
and rows; each factors every H. Setting a run up (reading, checksums, the probe) is not in the
model.
"""


def _check(sizes: Mapping[str, Any], cost: Cost) -> str:
    rows, worst = [], 0.0
    for run in sizes["runs"]:
        told = seconds_of(counts_of(run), cost)
        measured = {part: run["seconds"][part] for part in PARTS}
        ratio = sum(told.values()) / sum(measured.values())
        if run["for"] == "check":
            worst = max(worst, abs(ratio - 1))
        cells = [f"{measured[p]:.2f} / {told[p]:.2f}" for p in PARTS]
        total = f"{sum(measured.values()):.2f} / {sum(told.values()):.2f}"
        rows.append([run["name"], run["for"], *cells, total, f"{ratio:.2f}"])
    text = f"""
## Checked against runs

`{sizes["command"]}`, {_machine(sizes)}. One thread, CPU seconds: what a quiet core takes. The
model is fitted to the runs marked so and checked against the others, the largest among them; the
name of a run is its width. Measured / told by the model; the last column is their ratio, at most {
        100 * worst:.0f} % from 1 where it was checked.

"""
    return text + _table(["run", "for", *PARTS, "total", "ratio"], rows)


def _memory(found: Mapping[str, Any]) -> str:
    rows = []
    for case in found["cases"]:
        memory = case["found"]["memory"]
        key = WAYS[case["way"]][2]
        estimate, growth = memory[key], memory["growth"]
        files = 4 * case["found"]["parameters"]
        cells = [f"{v / 2**20:,.0f}" for v in (files, estimate, growth)]
        rows.append([case["size"], case["way"], *cells, f"{growth / estimate:.2f}"])
    text = f"""
## Memory: estimates and peaks

`{found["command"]}`, {_machine(found)}. MiB; the growth is of resident memory that belongs to no
file, at its peak. A run in memory has the parameters in addition; of a streamed one, the block is
in both. Free pages go back once they are an eighth of what the run needs, at most 32 MiB, which is
in the estimate.

"""
    columns = ["model", "way", "parameters", "estimate", "growth", "growth / estimate"]
    return text + _table(columns, rows)


def _equality(found: Mapping[str, Any]) -> str:
    rows = []
    for name, way in found["ways"].items():
        if "compared_with" not in way:
            continue
        share = f"{100 * way['codes']:.2f} %" if way["codes"] else "none"
        rows.append([name, way["compared_with"], "yes" if way["equal_bytes"] else "no", share])
    setting = found["setting"]
    text = f"""
## Equal codes by every way

`{found["command"]}`, {_machine(found)}; the embedded model, `{setting["recipe"]}`,
{setting["bits"]} bits, {setting["samples"]} x {setting["length"]} tokens. Under torchrun the
batches are added up in float64, so last bits of H are others than without; why that changes codes
of a deep model is in [large.md](large.md).

"""
    return text + _table(["way", "compared with", "same bytes", "other codes"], rows)


def _run(gpu: Mapping[str, Any], name: str) -> Any:
    return next(run for run in gpu["runs"] if run["name"] == name)


def _gpu_cost(gpu: Mapping[str, Any]) -> Cost:
    """Return seconds per count of the GPU host, from its run in one pass.

    What the float forward does not take of the time until H is there are products of H and factors,
    which a profile tells apart; the solver and the diagnostics have times of their own.
    """
    run = _run(gpu, "reference, all layers")
    size, tokens, found = _measured(run)
    seconds, counts = found["seconds"], count(size, tokens, run["job"]["length"])
    rest = seconds["forward"] + seconds["hessian"] - found["float_forward"]
    profile, few = gpu["profile"]["gpu_seconds"], _run(gpu, gpu["profile"]["of"])
    products = profile["products of H"] * size.layers / few["job"]["size"]["layers"]
    return {
        "forward": {"products": found["float_forward"] / counts["products"]},
        "hessian": {"sums": products / counts["sums"]},
        "solve": {
            "factors": (rest - products) / counts["factors"],
            "rows": seconds["solve"] / counts["rows"],
        },
        "diagnostics": {"rows": seconds["diagnostics"] / counts["rows"]},
    }


def _measured(run: Mapping[str, Any]) -> tuple[Size, int, Any]:
    """Return size, tokens, and what the slowest process measured."""
    job, ranks = run["job"], run["ranks"]
    slowest = max(ranks, key=lambda rank: rank["seconds"]["total"])
    first = next((r["float_forward"] for r in ranks if "float_forward" in r), None)
    return (
        Size(**job["size"]),
        job["samples"] * job["length"],
        {**slowest, "float_forward": first},
    )


def _gpu(before: Mapping[str, Any], gpu: Mapping[str, Any]) -> str:
    cost, rows = _gpu_cost(gpu), []
    for run in gpu["runs"]:
        size, tokens, found = _measured(run)
        seconds = found["seconds"]
        told = "-"
        if run["recipe"] == "reference":
            schedule = "streamed" if run["job"]["stream"] else found["schedule"]
            counts = count(size, tokens, run["job"]["length"], schedule)
            told = f"{sum(seconds_of(counts, cost, max(1, run['processes'])).values()):.1f}"
        waits = seconds["forward"] + seconds["hessian"] + seconds.get("propagation", 0.0)
        cells = [seconds["total"], waits, seconds["solve"], seconds["diagnostics"]]
        gib = (found["memory"]["gpu_allocated"] / 2**30, found["memory"]["growth"] / 2**30)
        rows.append([run["name"], *(f"{c:.1f}" for c in cells), told, *(f"{g:.1f}" for g in gib)])
    unfinished = "".join(
        f"- {r['name']} (commit {r['commit']}): more than {r['seconds']} s\n"
        for r in gpu["not_finished"]
    )
    profile = gpu["profile"]["gpu_seconds"]
    columns = ["run", "seconds", "until H and its factor", "solve", "diagnostics"]
    columns += ["told by the model", "GPU GiB", "host GiB"]
    text = f"""
## On a GPU host

{gpu["what"]}; commit {gpu["commit"]}, one {gpu["machine"]["gpus"][0]} for every process,
{_machine(gpu)}. {gpu["note"]} At commit {before["commit"]}, on another host of this kind, a
layer took {before["seconds"]["layer"]} s, so all {32 * before["seconds"]["layer"]:.0f} s. GPU and
host are peaks, of the host what the run added.

"""
    return (
        text
        + _table(columns, rows)
        + f"""
Stopped before they were over, at a limit of the time there was:

{unfinished}
The whole of the run of 2 layers kept the GPU busy for {profile["all"]:.1f} s
({profile["products of H"]:.2f} of them products of H, {profile["Cholesky factors"]:.2f} factors):
the host's solver is what takes the time. So since commit 7ec18e2 the products of the passes after
the solve, of the fits of scales and of row coupling are the GPU's too, which **was not timed**: the
figures of `quality` and `best` are of before. `quality` missed its goal of 150 s, and `best` its
250 s in both forms. Several processes missed theirs (1.8 and 3.2 times as fast with two and four):
the rows of a matrix are shared out, but {Size().hidden:,} rows are too few panels for the threads
of four processes, each of which reads the whole factor, and every process makes all factors.

The model's seconds per count are those of the first run, so the others check it; several processes
are slower than told for the reason above, and a streamed run writes its state to the disk, which
the model does not count.
"""
    )


def _extrapolated(gpu: Mapping[str, Any]) -> str:
    cost = _gpu_cost(gpu)
    rows = []
    for name, size in SHAPES.items():
        for processes in (1, 8, 64):
            rows.append(_row(name, size, processes, cost))
            if size.experts and processes > 1:
                rows.append(_row(name, size, processes, cost, True))
    columns = ["model", "GPUs", "forward", "Hessian", "sums", "factors", "rows", "diagnostics"]
    columns += ["files", "total", "bottleneck"]
    assumed = "; ".join(f"{k} {v / 1e9:g} GB/s" for k, v in ASSUMED.items())
    text = f"""
## Extrapolated

**Not measured.** Seconds for all layers, bfloat16, `reference` in 4 bits, with 16 cores of that
host for every GPU; {TOKENS["7 B"]:,} tokens, {TOKENS["1 T, 384 experts"]:,} for the mixture (at
top 8 of 384 some 22,000 per expert, three times its inputs). Assumed: {assumed}. "Sums" is the
adding up of H in float64 over the processes, "files" the reading of all parameters once, by all
hosts together; the parts are added up as if none overlapped another.

"""
    memory = []
    for name, size in SHAPES.items():
        found = bytes_of(size, TOKENS[name])
        keys = ("model", "block", "outputs", "moments", "solver", "reduced")
        memory.append([name, *(_size(found[k]) for k in keys)])
    heads = ["model", "parameters", "largest block", "outputs of a block, twice", "largest H"]
    heads += ["solver (host)", "sums, all layers"]
    return (
        text
        + _table(columns, rows)
        + "\nBytes (outputs of a block are shared out over the processes):\n\n"
        + _table(heads, memory)
        + """
What the figures say:

- 7 B: the host's solver is the bottleneck on up to eight GPUs (its products of whole blocks of
  columns could be the GPU's, as those of the passes after it are); with more of them the factors,
  which every process computes for itself.
- 70 B: the same, and the parameters do not fit one GPU: they need the streamed form, which is for
  one process today.
- 1 T: the solver again, and on 64 GPUs the adding up of H. Experts are independent, so processes
  should share out whole experts instead of the rows of each: then factors are divided too, as in
  the rows "shared out", and sums of an expert's H would go to one process alone (half of what is
  told). Mixtures with calibration are for one process today.
"""
    )


def _row(
    name: str, size: Size, processes: int, cost: Cost, share_factors: bool = False
) -> list[str]:
    seconds = _seconds(size, TOKENS[name], processes, cost, share_factors)
    largest = max(seconds, key=lambda key: seconds[key])
    shown = [f"{value:,.0f}" for value in seconds.values()]
    how = f"{name}, shared out" if share_factors else name
    return [how, str(processes), *shown, f"{sum(seconds.values()):,.0f}", largest]


def _seconds(
    size: Size, tokens: int, processes: int, cost: Cost, share_factors: bool = False
) -> dict[str, float]:
    counts = count(size, tokens, LENGTH)
    told = seconds_of(counts, cost, processes, share_factors=share_factors)
    factors = counts["factors"] * cost["solve"]["factors"] / (processes if share_factors else 1)
    found = bytes_of(size, tokens)
    within = processes <= GPUS_OF_A_HOST
    rate = ASSUMED["between GPUs of a host" if within else "between hosts"]
    sums = 2 * (processes - 1) / processes * found["reduced"] / rate
    hosts = -(-processes // GPUS_OF_A_HOST)
    return {
        "forward": told["forward"],
        "Hessian": told["hessian"],
        "sums": sums,
        "factors": factors,
        "rows": told["solve"] - factors,
        "diagnostics": told["diagnostics"],
        "files": found["model"] / ASSUMED["disk"] / hosts,
    }


def _size(value: float) -> str:
    return f"{value / 1e9:,.1f} GB" if value < 1e12 else f"{value / 1e12:,.1f} TB"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--results", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    args.out.write_text(page(args.results), encoding="utf-8")


if __name__ == "__main__":
    main()
