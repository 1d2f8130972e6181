"""Heads and keys behind a quantized softmax: where a correction gives back least, and what it does.

One window of held-out text runs through the float model. For each variant the heads with the most
relative error in their output are shown, and of the worst one some rows with their largest keys and
some sampled ones: the probability, and what it became.

    python benchmarks/softmax_samples.py --data DIR --only "stories260k 512" --bits 8 4
    python benchmarks/softmax_samples.py --bits 4 --variants row_sum before/row_sum --out FILE
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from common import header, show, torch_threads
from softmax_lm import CASES, Case
from transformers.utils import logging

from ptqkit import demo
from ptqkit.hf import SoftmaxCalibration
from ptqkit.hf.models.attention import attention_hooks
from ptqkit.nn.attention import AttentionCall, AttentionHook
from ptqkit.nn.softmax.compare import softmax_hooks
from ptqkit.nn.softmax.variants import LANGUAGE_MODEL_VARIANTS


class HeadErrors(AttentionHook):
    """Keeps probabilities, float and quantized, and the output's error of every head."""

    def __init__(self, quantized: AttentionHook) -> None:
        self.quantized = quantized
        self.p = self.q = torch.empty(0)
        self.decibels: list[float] = []

    def softmax(self, p: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Compare; the float probabilities go on."""
        assert call.value is not None
        value = call.value.repeat_interleave(p.shape[1] // call.value.shape[1], dim=1)
        q = self.quantized.softmax(p, call)
        exact = (p @ value).double()
        noise = ((q @ value).double() - exact).square().sum((0, 2, 3))
        ratios = exact.square().sum((0, 2, 3)) / noise
        self.decibels = [10 * math.log10(r) if r < math.inf else math.inf for r in ratios.tolist()]
        self.p, self.q = p[0].clone(), q[0].clone()
        return p


def sampled_rows(p: torch.Tensor, q: torch.Tensor, rows: int, keys: int) -> list[dict[str, Any]]:
    """Rows (q, k) at equal distances, with their largest keys and sampled others."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for i in torch.linspace(p.shape[0] // rows, p.shape[0] - 1, rows, dtype=torch.float64).long():
        row, rounded = p[i, : i + 1], q[i, : i + 1]
        largest = row.argsort(descending=True)[:keys]
        others = torch.randperm(len(row), generator=draw)[:keys].sort().values
        found.append(
            {
                "query": int(i),
                "row_sum": float(rounded.sum()),
                "largest": pairs(row, rounded, largest),
                "sampled": pairs(row, rounded, others),
            }
        )
    return found


def pairs(p: torch.Tensor, q: torch.Tensor, keys: torch.Tensor) -> list[list[float]]:
    """Key, probability, what it became."""
    return [[int(k), float(p[k]), float(q[k])] for k in keys]


def inspect(case: Case, bits: int, variant: str, rows: int, keys: int) -> dict[str, Any]:
    """Errors of all heads under one variant, and samples of the worst."""
    study = SoftmaxCalibration(case.model, case.calibration, bits=bits)
    hooks = softmax_hooks(study.quantizers(*LANGUAGE_MODEL_VARIANTS[variant]))
    seen = {name: HeadErrors(hook) for name, hook in hooks.items()}
    with attention_hooks(case.model, seen), torch.no_grad():
        case.model(**case.held_out.batches[0], use_cache=False)
    heads = [
        {"layer": name, "head": head, "output_db": value}
        for name, hook in seen.items()
        for head, value in enumerate(hook.decibels)
    ]
    heads.sort(key=lambda h: h["output_db"])
    worst = heads[0]
    hook = seen[worst["layer"]]
    samples = sampled_rows(hook.p[worst["head"]], hook.q[worst["head"]], rows, keys)
    return {"bits": bits, "variant": variant, "heads": heads, "rows": samples}


def print_found(name: str, found: dict[str, Any]) -> None:
    """Print the worst heads, and the sampled keys of the first."""
    title = f"{name}, {found['bits']} bits, {found['variant']}"
    worst = [[h["layer"], h["head"], f"{h['output_db']:.2f}"] for h in found["heads"][:4]]
    show(f"{title}: heads with the most error", ["layer", "head", "output dB"], worst)
    cells = []
    for row in found["rows"]:
        for kind in ("largest", "sampled"):
            shown = "  ".join(f"{k}: {p:.5f} → {q:.5f}" for k, p, q in row[kind])
            cells.append([row["query"], f"{row['row_sum']:.4f}", kind, shown])
    show(f"{title}: rows of the first", ["query", "row sum", "keys", "probability → value"], cells)


def main(argv: list[str] | None = None) -> int:
    """Run the script."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="folder of stories260k, babyllama105, tinystories")
    add("--only", default="embedded 512", choices=[*CASES], metavar="CASE", help=", ".join(CASES))
    add("--bits", type=int, nargs="+", default=[8])
    add(
        "--variants",
        nargs="+",
        choices=[*LANGUAGE_MODEL_VARIANTS],
        default=["row_sum", "before/row_sum"],
    )
    add("--rows", type=int, default=3, help="of the worst head (3)")
    add("--keys", type=int, default=4, help="largest and sampled, of each row (4)")
    add("--out", type=Path, metavar="FILE", help="write JSON there")
    args = parser.parse_args(argv)
    folder, context = CASES[args.only]
    if folder != demo.MODEL_DIR and args.data is None:
        parser.error(f"{args.only} needs --data")
    torch_threads()
    logging.disable_progress_bar()
    # One window of each kind; no guard, no seeds.
    vars(args).update(tokens=context, calibration=context)
    case = Case(args, folder, context)
    found = [
        inspect(case, bits, variant, args.rows, args.keys)
        for bits in args.bits
        for variant in args.variants
    ]
    for one in found:
        print_found(args.only, one)
    if args.out is not None:
        content = {"benchmark": "softmax_samples", "machine": header(), "case": args.only}
        text = json.dumps({**content, "found": found}, indent=1).replace("Infinity", '"inf"')
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
