"""Write `docs/cost.md` from the results of this folder: what runs cost, checked and extrapolated.

python -m benchmarks.large.page --results benchmarks/results/large --out docs/cost.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import markdown
from benchmarks.large.collect import one_process_of
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
    gpu = _read(results / "pipeline_7b.json")
    parts = [_intro(), _check(sizes, cost)]
    if (results / "memory.json").exists():
        parts.append(_memory(_read(results / "memory.json")))
    parts += [_equality(results), _gpu(results, gpu), _extrapolated(gpu)]
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
in the estimate; in one pass, once it has grown by half of its estimate.

"""
    columns = ["model", "way", "parameters", "estimate", "growth", "growth / estimate"]
    return text + _table(columns, rows)


def _equality(results: Path) -> str:
    text = """
## Equal codes by every way

Under torchrun every batch has sums of its own, added up in float64, so last bits of H are others
than without; why that changes codes of a deep model is in [large.md](large.md).
"""
    names = ("equality.json", "equality_gpu.json", "equality_gpu_0.97M.json")
    return text + "".join(_ways(_read(results / n)) for n in names if (results / n).exists())


def _ways(found: Mapping[str, Any]) -> str:
    rows = []
    for name, way in found["ways"].items():
        if "error" in way:
            rows.append([name, "-", way["error"], "-", "-"])
        if "compared_with" not in way:
            continue
        share = "none"
        if way["different"]:
            share = f"{way['different']:,} of {way['weights']:,}"
        same = "yes" if way["equal_bytes"] else "no"
        rows.append([name, way["compared_with"], same, share, way["first"] or "-"])
    setting, gpus = found["setting"], sorted(set(found["machine"]["gpus"]))
    where = f" and {len(found['machine']['gpus'])} {gpus[0]}" if gpus else ""
    model = "the embedded model" if setting["model"] == "model" else setting["model"]
    note = f"\n{found['note']}" if found.get("note") else ""
    text = f"""
`{found["command"]}`, {_machine(found)}{where}; {model}, `{setting["recipe"]}`,
{setting["bits"]} bits, {setting["samples"]} x {setting["length"]} tokens.{note}

"""
    columns = ["way", "compared with", "same bytes", "other codes", "first in"]
    return text + _table(columns, rows)


def _gpu_cost(gpu: Mapping[str, Any]) -> Cost:
    """Return seconds per count of the GPU host, from a run of all layers in one pass.

    What the products of H and the factors take by themselves was measured after it; the rest of the
    time until H and its factor are there is the forward's.
    """
    run = next(r for r in gpu["runs"] if "pieces" in r["ranks"][0])
    size, tokens, found = _measured(run)
    seconds, counts = found["seconds"], count(size, tokens, run["job"]["length"])
    pieces = run["ranks"][0]["pieces"]
    rest = seconds["forward"] + seconds["hessian"]
    forward = rest - pieces["products of H"] - pieces["factors"]
    return {
        "forward": {"products": forward / counts["products"]},
        "hessian": {"sums": pieces["products of H"] / counts["sums"]},
        "solve": {
            "factors": pieces["factors"] / counts["factors"],
            "rows": seconds["solve"] / counts["rows"],
        },
        "diagnostics": {"rows": seconds["diagnostics"] / counts["rows"]},
    }


def _measured(run: Mapping[str, Any]) -> tuple[Size, int, Any]:
    """Return size, tokens, and what the slowest process measured."""
    job = run["job"]
    slowest = max(run["ranks"], key=lambda rank: rank["seconds"]["total"])
    return Size(**job["size"]), job["samples"] * job["length"], slowest


def _total(run: Mapping[str, Any]) -> float:
    return float(_measured(run)[2]["seconds"]["total"])


def _gib(run: Mapping[str, Any], key: str) -> float:
    return float(max(r["memory"].get(key, 0) for r in run["ranks"])) / 2**30


def _gpu(results: Path, gpu: Mapping[str, Any]) -> str:
    cost, rows, runs = _gpu_cost(gpu), [], gpu["runs"]
    for run in runs:
        size, tokens, found = _measured(run)
        seconds = found["seconds"]
        told = "-"
        if run["recipe"] == "reference":
            schedule = "streamed" if run["job"]["stream"] else found["schedule"]
            counts = count(size, tokens, run["job"]["length"], schedule)
            told = f"{sum(seconds_of(counts, cost, max(1, run['processes'])).values()):.1f}"
        waits = seconds["forward"] + seconds["hessian"] + seconds.get("propagation", 0.0)
        cells = [seconds["total"], waits, seconds["solve"], seconds["diagnostics"]]
        base = one_process_of(run, runs)
        faster = "-" if base is None or base is run else f"{_total(base) / _total(run):.2f}"
        other = run.get("layers_with_other_codes")
        shown = "-" if other is None else f"{other} of {run['layers']}"
        gib = [f"{_gib(run, key):.1f}" for key in ("gpu_allocated", "growth")]
        rows.append([_named(run), *(f"{c:.1f}" for c in cells), told, faster, shown, *gib])
    columns = ["run", "seconds", "until H and its factor", "solve", "diagnostics"]
    columns += ["told by the model", "times as fast", "layers with other codes"]
    columns += ["GPU GiB", "host GiB"]
    kept = max(_gib(run, "gpu_reserved") - _gib(run, "gpu_allocated") for run in runs)
    text = f"""
## On a GPU host

LLaMA-7B's shape (4096/11008, 32 layers), random weights, bfloat16, 128 x 2,048 tokens, W4 g128
symmetric; commit {gpu["commit"]}, one {gpu["machine"]["gpus"][0]} for every process,
{_machine(gpu)}. {gpu["note"]}
GPU and host are peaks: of the GPU what tensors held (torch keeps up to {kept:.0f} GiB more, where a
card has room), of the host what the run added. Work on a GPU is waited for where its result
is needed, so the parts are those of the waits. "Times as fast" and "other codes" compare with one
process under torchrun. The gradients by which `best` couples rows need not repeat to the last bit
on a GPU, so its codes may be others in every run.

"""
    return text + _table([*columns], rows) + _goals(runs) + _rest(gpu) + _before(results)


def _named(run: Mapping[str, Any]) -> str:
    """Return a run's name, with its commit if that is not the file's."""
    return run["name"] + (f" (commit {run['commit']})" if "commit" in run else "")


#: Seconds of all layers on one GPU, and how many times as fast several are to be.
GOALS, FASTER = {"reference": 100.0, "quality": 150.0, "best": 250.0}, {2: 1.8, 4: 3.2}


def _goals(runs: Sequence[Mapping[str, Any]]) -> str:
    """Compare what was measured with what it was to be."""
    rows, whole = [], [r for r in runs if r["job"]["size"]["layers"] == Size().layers]
    for recipe, limit in GOALS.items():
        own = [r for r in whole if r["recipe"] == recipe and r["processes"] == 0]
        if own:
            best = min(own, key=_total)
            rows.append(_goal(f"`{recipe}`, one GPU, seconds", limit, _total(best), _named(best)))
            least = min(own, key=lambda r: _gib(r, "gpu_allocated"))
            found = _gib(least, "gpu_allocated")
            rows.append(_goal(f"`{recipe}`, GiB of the GPU", 24.0, found, _named(least)))
    for run in runs:
        base, limit = one_process_of(run, runs), FASTER.get(run["processes"])
        if limit is not None and base is not None:
            found = _total(base) / _total(run)
            what = f"times as fast with {run['processes']} GPUs"
            rows.append(_goal(what, limit, found, _named(run), least=True))
    for processes in sorted(FASTER.keys() - {run["processes"] for run in runs}):
        what = f"times as fast with {processes} GPUs"
        rows.append([what, f"{FASTER[processes]:g}", "-", "not run", "**no**"])
    text = "\nWhat was asked for, and the best that was measured:\n\n"
    return text + _table(["goal", "limit", "measured", "in", "met"], rows)


def _goal(what: str, limit: float, found: float, name: str, least: bool = False) -> list[str]:
    met = found >= limit if least else found <= limit
    return [what, f"{limit:g}", f"{found:.2f}", name, "yes" if met else "**no**"]


def _rest(gpu: Mapping[str, Any]) -> str:
    """Say what runs were stopped, and how far the model is off."""
    text = ""
    if gpu.get("not_finished"):
        lines = (
            f"- {r['name']} (commit {r['commit']}): more than {r['seconds']} s\n"
            for r in gpu["not_finished"]
        )
        text += "\nStopped before they were over, at a limit of the time there was:\n\n"
        text += "".join(lines)
    run = next(r for r in gpu["runs"] if "pieces" in r["ranks"][0])
    pieces = run["ranks"][0]["pieces"]
    return (
        text
        + f"""
The model's seconds per count are those of the run `{run["name"]}`, whose products of H take
{pieces["products of H"]:.1f} s and whose factors take {pieces["factors"]:.1f} s by themselves; so
the other runs check it. It takes a solve's time to follow its rows, but the columns of few rows
follow each other as those of many do; nor does it count what every process does for itself but
factors (sums are checked, whole matrices put together and written, and processes tell each other
what they met), or the disk, to which a streamed run writes its state.
"""
    )


def _before(results: Path) -> str:
    first, path = _read(results / "h200_host.json"), results / "pipeline_7b_before.json"
    layer = first["seconds"]["layer"]
    text = f"At commit {first['commit']} a layer took {layer} s, so all {32 * layer:.0f} s."
    if path.exists():
        before = _read(path)
        shown = "; ".join(f"{r['name']}: {_total(r):.1f} s" for r in before["runs"])
        text += f" At commit {before['commit']}: {shown}."
    return f"\nBefore, on hosts of this kind: {text}\n"


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

**Not measured.** Seconds for all layers, bfloat16, `reference` in 4 bits, on that
host; {TOKENS["7 B"]:,} tokens, {TOKENS["1 T, 384 experts"]:,} for the mixture (at
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
    heads += ["copies for the solve", "sums, all layers"]
    return (
        text
        + _table(columns, rows)
        + "\nBytes (outputs of a block are shared out over the processes):\n\n"
        + _table(heads, memory)
        + """
What the figures say:

"""
        + _bottlenecks(cost)
        + """
The parameters of 70 B and 1 T do not fit one GPU: they need the streamed form, which is for one
process today. Experts are independent, so processes should share out whole experts instead of the
rows of each: then factors are divided too, as in the rows "shared out", and sums of an expert's H
would go to one process alone (half of what is told). Mixtures with calibration are for one process
today.
"""
    )


def _bottlenecks(cost: Cost) -> str:
    """Name what takes longest of each model, by numbers of processes."""
    lines = []
    for name, size in SHAPES.items():
        found = []
        for processes in (1, 8, 64):
            seconds = _seconds(size, TOKENS[name], processes, cost)
            part = max(seconds, key=lambda key: seconds[key])
            share = 100 * seconds[part] / sum(seconds.values())
            found.append(f"{part} on {processes} ({share:.0f} %)")
        lines.append(f"- {name}: {', '.join(found)}\n")
    return "".join(lines)


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
