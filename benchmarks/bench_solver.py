"""The solver, from H to codes, against the published form in PyTorch, per layer shape.

The floor is n^3/3 + rows * n^2 flops at the SGEMM rate of SciPy's BLAS in the same run: the first
term is that of the factor of H, the second that of the sweep over the weights. Both are also run
apart, each against its own term.
"""

from __future__ import annotations

import numpy as np
import torch
from common import ceilings, interleave, medians, parser, save, show, torch_threads
from torch_gptq import gptq as torch_gptq

import ptqkit

SHAPES = ((768, 768), (3072, 768), (768, 3072), (4096, 4096))
QUALITY = {"order": "group-act", "grid": "hessian", "refine_passes": 1}


def layer(rows: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight and the Hessian of correlated inputs."""
    rng = np.random.default_rng(0)
    mix = np.eye(n, dtype=np.float32) + rng.standard_normal((n, n), np.float32) / np.float32(n**0.5)
    H = ptqkit.Hessian(n)
    H.update(rng.standard_normal((2 * n, n), np.float32) @ mix)
    return rng.standard_normal((rows, n), np.float32), H.matrix


def main() -> None:
    p = parser(__doc__.splitlines()[0], repeats=5)
    p.add_argument("--shape", action="append", help="ROWSxINPUTS, may be repeated")
    p.add_argument("--bits", type=int, default=4)
    args = p.parse_args()
    torch_threads()
    rates = ceilings()
    results = {"ceilings": rates, "cases": {}}
    rows_out = []
    shapes = [tuple(map(int, s.split("x"))) for s in args.shape or ()] or SHAPES
    for rows, n in shapes:
        W, H = layer(rows, n)
        Wt, Ht = torch.from_numpy(W), torch.from_numpy(np.array(H))
        options = {"bits": args.bits}
        factor = ptqkit.factorize(H, damping=0.01)
        seconds = interleave(
            {
                "PyTorch, groups of 128": lambda: torch_gptq(Wt, Ht, args.bits, 128),
                "PyTorch, per channel": lambda: torch_gptq(Wt, Ht, args.bits, None),
                "ptqkit, groups of 128": lambda: ptqkit.gptq(W, H, group_size=128, **options),
                "ptqkit, per channel": lambda: ptqkit.gptq(W, H, group_size=None, **options),
                "ptqkit, factor alone": lambda: ptqkit.factorize(H, damping=0.01),
                "ptqkit, sweep alone, groups of 128": lambda: ptqkit.gptq(
                    W, factor, group_size=128, **options
                ),
                "ptqkit quality, groups of 128": lambda: ptqkit.gptq(
                    W, H, group_size=128, **options, **QUALITY
                ),
                "ptqkit quality, per channel": lambda: ptqkit.gptq(
                    W, H, group_size=None, **options, **QUALITY
                ),
            },
            args.repeats,
        )
        wall = medians(seconds)
        rate = rates["sgemm_gflops"] * 1e9
        floors = {"factor": n**3 / 3 / rate, "sweep": rows * n**2 / rate}
        floor = sum(floors.values())
        for name, value in wall.items():
            apart = next((part for part in floors if f" {part} alone" in name), None)
            form = name.split(", ")[-1]
            peer = wall[f"PyTorch, {form}"] if apart is None else None
            rows_out.append(
                [
                    f"{rows} x {n}, {name}",
                    1e3 * value,
                    peer / value if peer else "",
                    value / floors.get(apart, floor),
                    value / wall[f"ptqkit, {form}"] if apart is None else "",
                ]
            )
        results["cases"][f"{rows}x{n}"] = {
            "seconds": seconds,
            "median": wall,
            "floor": floor,
            "floors": floors,
        }
    show(
        f"GPTQ of rows x inputs; SGEMM of SciPy's BLAS {rates['sgemm_gflops']:.0f} GFLOP/s",
        ["case", "ms", "x PyTorch", "/ floor", "/ reference"],
        rows_out,
    )
    save(args.json, "solver", results)


if __name__ == "__main__":
    main()
