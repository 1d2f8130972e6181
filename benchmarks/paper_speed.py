"""The tables of speed and memory of two papers, next to what packed products reach on this CPU.

``gptq``: latency per token and memory at 3 bits [GPTQ, tables 5 and 6: A6000 and A100, OPT-175B].
``ipqs``: W8A8 against half precision [Intriguing Properties of Quantization at Scale, 52B].

Published figures come from a file given with ``--published`` (``gptq.toml``, ``ipqs.toml``), keep a
column of their own and are of other machines and larger models: ratios compare, numbers do not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from common import save, show

from ptqkit.hf.speed.run import measure_speed, random_cases
from ptqkit.hf.speed.shapes import ONE_B, SHAPES, ModelShape

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

SMALL = ModelShape(512, 1408, 4, 8, 8, 4096)
GROUP = 128


def published(args: argparse.Namespace) -> dict[str, Any]:
    """The file's tables; empty if there is none."""
    if args.published is None or not args.published.is_file():
        print("no published figures: give their file with --published", file=sys.stderr)
        return {}
    return tomllib.loads(args.published.read_text(encoding="utf-8"))


def measured(args: argparse.Namespace, variants: list[str]) -> dict[str, Any]:
    """Rows by form, of a shape of 1.1 billion weights, or of a small one."""
    shape, name = (SMALL, "random 17M") if args.quick else (ONE_B, "random 1.1B")
    cases = random_cases(name, shape, variants, args.dtype)
    report = measure_speed(
        cases,
        prompt=64 if args.quick else 512,
        tokens=4 if args.quick else 32,
        repeat=1 if args.quick else 3,
        threads=args.threads,
        tell=lambda line: print(line, file=sys.stderr),
    )
    print(report.table())
    return {row.form: row for row in report.rows}


def memory_table(bits: float) -> list[list[Any]]:
    """Gigabytes of weights and of keys and values for 2,048 tokens, by arithmetic."""
    rows = []
    for name, shape in SHAPES.items():
        half = shape.weight_bytes(16) / 1e9
        packed = shape.weight_bytes(bits, GROUP) / 1e9
        cache = shape.cache_bytes(2048) / 1e9
        small = shape.cache_bytes(2048, bits=8, scale_bits=32) / 1e9
        rows.append([name, half, packed, cache, small, (packed + small) / (half + cache)])
    return rows


MEMORY = ["shape", "fp16, GB", "packed, GB", "cache fp16", "cache int8", "ratio"]


def gptq(args: argparse.Namespace) -> dict[str, Any]:
    """Latency of a token and memory at 3 bits."""
    paper = published(args)
    rows = measured(args, ["W3"])
    base = {form: 1e3 / rows[form].generation_rate for form in ("float32", "bfloat16", "W3")}
    out = [
        [f"this CPU, against {form}", base[form], base["W3"], base[form] / base["W3"], "-"]
        for form in ("float32", "bfloat16")
    ]
    for machine, values in paper.get("latency_ms_per_token", {}).items():
        if machine != "columns":
            out.append([machine, "-", "-", "-", f"{values[0]} -> {values[1]}: {values[2]} x"])
    columns = ["ms per token", "float", "3 bits", "ratio", "published, OPT-175B, FP16"]
    show("Latency of one token", columns, out)
    print("random weights in the shape above, groups of 128, the head packed too")
    show(
        "Memory at 3 bits, by arithmetic (groups of 128, the rest in 16 bits)",
        MEMORY,
        memory_table(3),
    )
    opt = SHAPES["OPT-175B"]
    weights, cache = opt.weight_bytes(3) / 1e9, opt.cache_bytes(2048) / 1e9
    told = paper.get("memory_gb", {})
    show(
        "OPT-175B at 3 bits per channel, GB",
        ["what", "by arithmetic", "published"],
        [
            ["weights", weights, told.get("weights", "-")],
            ["keys and values, 2,048 tokens", cache, told.get("kv_cache_2048", "-")],
            ["together", weights + cache, told.get("total", "-")],
        ],
    )
    return {"rows": {k: vars(v) for k, v in rows.items()}, "memory": memory_table(3)}


def ipqs(args: argparse.Namespace) -> dict[str, Any]:
    """W8A8 against float."""
    paper = published(args).get("speed", {})
    rows = measured(args, ["W8A8"])
    quantized, out = rows["W8A8"], []
    for form in ("float32", "bfloat16"):
        row = rows[form]
        prompt = quantized.prompt_rate / row.prompt_rate
        step = quantized.generation_rate / row.generation_rate
        saved = 1 - quantized.tensor_bytes / row.tensor_bytes
        out.append([f"against {form}", prompt, step, 100 * saved, "-"])
    if paper:
        low, high = paper["speed-up"]
        out.append(
            [
                "published, half precision",
                "-",
                "-",
                "-",
                f"{low} to {high} x, {100 * paper['memory saved']:.0f} %",
            ]
        )
    columns = ["W8A8", "prompt, x", "one token, x", "memory saved, %", "published"]
    show("W8A8 on this CPU", columns, out)
    show(
        "Memory at 8 bits, by arithmetic (groups of 128, the rest in 16 bits)",
        MEMORY,
        memory_table(8),
    )
    return {"rows": {k: vars(v) for k, v in rows.items()}, "memory": memory_table(8)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("paper", choices=("gptq", "ipqs"))
    p.add_argument("--published", type=Path, metavar="FILE", help="TOML file of the figures")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--quick", action="store_true", help="a small shape, to see that it runs")
    p.add_argument("--json", type=Path, help="write the results to this file")
    args = p.parse_args()
    results = {"gptq": gptq, "ipqs": ipqs}[args.paper](args)
    save(args.json, f"paper_speed {args.paper}", results)


if __name__ == "__main__":
    main()
