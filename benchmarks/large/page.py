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
    gpu = _read(results / "h200_host.json")
    parts = [_intro(), _check(sizes, cost)]
    if (results / "memory.json").exists():
        parts.append(_memory(_read(results / "memory.json")))
    parts += [_equality(_read(results / "equality.json")), _gpu(gpu), _extrapolated(gpu)]
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
in both. The schedules let up to 32 MiB of free pages be before they give them back, and reports
and codes are Python objects too: at sizes as small as these that may be why growth exceeds the
estimate.

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


def _gpu_cost(gpu: Mapping[str, Any], measured_paths: bool) -> Cost:
    """Return seconds per count of the GPU host, from its measured layer.

    With ``measured_paths`` H and diagnostics are what was measured; otherwise what they would be by
    tensor cores, at half the rate of the forward pass, and by the GPU at its float32 rate.
    """
    size, tokens = Size(**gpu["size"]), gpu["samples"] * gpu["length"]
    seconds = gpu["seconds"]
    counts = count(size, tokens, gpu["length"], "one-pass")
    inputs, outputs = size.intermediate, size.hidden
    forward = seconds["float_forward_per_layer"] * size.layers / counts["products"]
    fp32 = seconds["down_proj_hessian"] / (2 * tokens * inputs**2)
    solve = seconds["down_proj_solve"] / (inputs**3 / 3 + outputs * inputs**2)
    diagnostics = seconds["down_proj_diagnostics"] / (outputs * inputs**2)
    if not measured_paths:
        diagnostics = 2 * 2 * fp32
    return {
        "forward": {"products": forward},
        # The whole square is computed: two operations per token and entry.
        "hessian": {"sums": 2 * fp32 if measured_paths else 2 * 2 * forward},
        "solve": {"factors": solve, "rows": solve},
        "diagnostics": {"rows": diagnostics},
    }


def _gpu(gpu: Mapping[str, Any]) -> str:
    size, tokens = Size(**gpu["size"]), gpu["samples"] * gpu["length"]
    told = seconds_of(count(size, tokens, gpu["length"]), _gpu_cost(gpu, True))
    layer = sum(told.values()) / size.layers
    cells = ", ".join(f"{part} {value / size.layers:.2f}" for part, value in told.items())
    return f"""
## On a GPU host

Measured at commit {gpu["commit"]} ({gpu["machine"]}; {gpu["what"]}): {gpu["seconds"]["layer"]} s
per layer. The forward pass and the down projection alone give the seconds per count; from these
the model makes {layer:.1f} s of a whole layer ({cells}).

Since then bfloat16 and float16 inputs are multiplied by tensor cores without widening, the
products of the diagnostics are the GPU's, and experts that do not depend on each other are solved
at once while the GPU goes on. **None of this was timed on a GPU yet**: below, H is taken at half
the rate of the measured forward pass, and the diagnostics at the measured float32 rate. The
solver is the host's, as measured.
"""


def _extrapolated(gpu: Mapping[str, Any]) -> str:
    cost = _gpu_cost(gpu, False)
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

- 7 B: the host's solver is the bottleneck on one GPU, and factors, which every process computes for
  itself, from eight on. More cores per GPU, or a factorization that is shared out, are what helps.
- 70 B: the same, and the parameters do not fit one GPU: they need the streamed form, which is for
  one process today.
- 1 T: factors again, by far: every expert has two. Experts are independent, so processes should
  share out whole experts instead of the rows of each: then factors are divided too, as in the
  rows "shared out", and sums of an expert's H would go to one process alone (half of what is
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
