"""Hessian accumulation against PyTorch's fp32 addmm_, and its share of the machine's rates."""

from __future__ import annotations

import numpy as np
import torch
from common import ceilings, interleave, medians, parser, save, show, torch_threads
from peaks import peak_loops

import ptqkit


def main() -> None:
    p = parser(__doc__.splitlines()[0], repeats=7)
    p.add_argument("--inputs", type=int, action="append", help="layer inputs (default 768, 4096)")
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--quick", action="store_true", help="3 runs each")
    args = p.parse_args()
    torch_threads()
    rates, loops = ceilings(), peak_loops()
    print(", ".join(f"{k} {v:.4g}" for k, v in rates.items()))
    level = str(ptqkit.show_config()["cpu_level"])
    fma = next((k for k in ("fma avx512", "fma avx2") if k in loops and k[4:] in level), None)
    pairs = next((k for k, n in (("amx bf16", "amx"), ("bf16 dot", "bf16")) if n in level), fma)
    used = {k: loops[k] for k in (fma, pairs) if k in loops}
    results = {"ceilings": rates, "cases": {}}
    rows = []
    for n in args.inputs or (768, 4096):
        X = torch.from_numpy(np.random.default_rng(0).standard_normal((args.tokens, n), np.float32))
        bf16, fp16 = X.bfloat16(), X.half()
        peer = torch.zeros(n, n)
        ours = {d: ptqkit.Hessian(n) for d in ("fp32", "bf16", "fp16")}
        seconds = interleave(
            {
                "PyTorch fp32": lambda: peer.addmm_(X.T, X),
                "PyTorch bf16 widened": lambda: peer.addmm_(bf16.float().T, bf16.float()),
                "ptqkit fp32": lambda: ours["fp32"].update(X),
                "ptqkit bf16": lambda: ours["bf16"].update(bf16),
                "ptqkit fp16": lambda: ours["fp16"].update(fp16),
                # in turn with the others: the clock falls where wide registers multiply
                **{f"peak {k}": loop for k, loop in used.items()},
            },
            min(args.repeats, 3) if args.quick else args.repeats,
        )
        wall = medians(seconds)
        work = args.tokens * n * n / 1e9
        peak = {k: loop.operations / wall.pop(f"peak {k}") / 1e9 for k, loop in used.items()}
        print(f"{n} inputs:", ", ".join(f"peak {k} {v:.4g} GFLOP/s" for k, v in peak.items()))
        for name, value in wall.items():
            own = peak.get(pairs if name == "ptqkit bf16" else fma, float("nan"))
            rows.append(
                [
                    f"{n} inputs, {name}",
                    1e3 * value,
                    work / value,
                    wall["PyTorch fp32"] / value,
                    work / value / rates["ssyrk_gflops"],
                    work / value / own,
                ]
            )
        results["cases"][str(n)] = {"seconds": seconds, "median": wall, "peaks": peak}
    show(
        f"Hessian of {args.tokens} tokens; flops of one triangle; "
        f"SSYRK of SciPy's BLAS {rates['ssyrk_gflops']:.0f} GFLOP/s",
        ["case", "ms", "GFLOP/s", "x PyTorch fp32", "/ SSYRK rate", "/ peak"],
        rows,
    )
    save(args.json, "hessian", results)


if __name__ == "__main__":
    main()
