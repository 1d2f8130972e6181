"""Excess perplexity of solver variants on the embedded model, at several bit widths.

Perplexity on the standard library's test files (window 512, no overlap), 32 k calibration tokens.
This is the study behind the `quality` recipe; --device cuda makes it a matter of minutes.
"""

from __future__ import annotations

import time

from common import parser, save, show

from ptqkit import demo
from ptqkit.hf import Workbench, load_model

GRIDS = ((4, 64), (3, 64), (2, 64), (3, 128), (4, None), (3, None))
VARIANTS = {
    "rtn": ("rtn", {}),
    "reference": ("reference", {}),
    "act-order, static groups, min-max": ("reference", {"order": "act", "static_groups": True}),
    "act-order, static groups, hessian, 1 sweep": (
        "quality",
        {"order": "act", "static_groups": True},
    ),
    "act-order, g_idx, hessian, 1 sweep": ("quality", {"order": "act"}),
    "natural order, hessian, 1 sweep": ("quality", {"order": "natural"}),
    "group order, hessian, no sweep": ("quality", {"refine_passes": 0}),
    "quality: group order, hessian, 1 sweep": ("quality", {}),
    "group order, hessian, 2 sweeps": ("quality", {"refine_passes": 2}),
    "group order, mse, 1 sweep": ("quality", {"grid": "mse"}),
    "reference, propagated errors 0.5": ("reference", {"error_propagation": 0.5}),
    "quality, propagated errors 0.5": ("quality", {"error_propagation": 0.5}),
    "quality, propagated errors 0.75": ("quality", {"error_propagation": 0.75}),
}


def main() -> None:
    p = parser(__doc__.splitlines()[0], repeats=1)
    p.add_argument("--device", default="cpu")
    p.add_argument("--tokens", type=int, default=100_000, help="test tokens")
    p.add_argument("--seeds", type=int, default=1, help="calibration draws to average over")
    p.add_argument("--only", action="append", help="variants whose name contains this")
    p.add_argument("--bits", type=int, action="append")
    args = p.parse_args()
    model, tokenizer, _ = load_model(demo.MODEL_DIR, "float32", args.device)
    bench = Workbench(
        model,
        tokenizer,
        calibration=[demo.text("calibration", 400_000, per_file=24_000)],
        calibration_options={"samples": 64, "batch_size": 4},
        test=demo.text("test", 12 * args.tokens, per_file=30_000),
        test_options={"window": 512, "max_tokens": args.tokens, "batch_size": 16},
    )
    base = bench.float_result.perplexity
    rows, results = [], {"float": base, "cells": []}
    for bits, group in GRIDS:
        if args.bits and bits not in args.bits:
            continue
        reference = None
        for name, (recipe, changes) in VARIANTS.items():
            if args.only and not any(part in name for part in (*args.only,)):
                continue
            excess, objective, start = 0.0, 0.0, time.perf_counter()
            for seed in range(args.seeds):
                bench.calibrate(seed=seed)
                result = bench.quantize(recipe, bits=bits, group_size=group, **changes)
                objective += (
                    sum(r.objective for r in result.report.layers if r.objective == r.objective)
                    / args.seeds
                )
                excess += (bench.perplexity_of(result.model).perplexity - base) / args.seeds
            reference = excess if name == "reference" else reference
            cut = float("nan") if reference is None else 100 * (1 - excess / reference)
            rows.append([f"{bits} bit, {group or 'channel'}: {name}", excess, cut, objective])
            print(
                *(f"{v:.4g}" if isinstance(v, float) else v for v in rows[-1]),
                f"{time.perf_counter() - start:.1f} s",
                flush=True,
            )
            results["cells"].append(
                {
                    "bits": bits,
                    "group_size": group,
                    "variant": name,
                    "excess": excess,
                    "cut_percent": cut,
                    "objective": objective,
                }
            )
    show(
        f"embedded model, float perplexity {base:.3f}",
        ["variant", "excess perplexity", "% below reference", "objective"],
        rows,
    )
    save(args.json, "quality", results)


if __name__ == "__main__":
    main()
