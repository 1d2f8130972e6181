"""Levels of a softmax grid before normalising, and where a row's missing mass goes.

What `softmax_lm.py` calls "before + row sum" rounds exponentials on even steps and spreads the mass
that a row lost over all its keys. Here are other levels, and other keys to give the mass to:

uniform, power1.5, squares, squares-mid
    Values (c / c_max)**k of code c, with k = 1, 1.5 and 2: codes are rounded in the k-th root, or
    (-mid) to the nearest value.
all, zeros, zeros-capped, scale
    The missing mass goes to all keys; to those with code 0 alone; to these up to half a step, and
    the rest to all; or the row is divided by its sum.

    python benchmarks/softmax_grids.py --data DIR --case "stories260k 512" --bits 4 --out FILE

"lost" is the perplexity above the same weights with a float softmax, paired over windows, "back"
the share given back of what the plain grid on [0, 1] loses. The file is written after each row.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from common import torch_threads
from softmax_lm import CASES, Case, paired

import ptqkit
from ptqkit.hf import SoftmaxCalibration
from ptqkit.nn.softmax.quantizer import row_largest
from ptqkit.nn.softmax.variants import LANGUAGE_MODEL_VARIANTS

POWERS = {"uniform": 1.0, "power1.5": 1.5, "squares": 2.0, "squares-mid": 2.0}
SHARES = ("all", "zeros", "zeros-capped", "scale")
GRIDS = tuple(f"{levels}/{share}" for levels in POWERS for share in SHARES)
KNOWN = ("none", "row_sum", "before/row_sum")


class Grid:
    """Quantizes probabilities (batch, heads, q, k) of one attention module."""

    bias = None
    heads = None

    def __init__(self, bits: int, name: str) -> None:
        self.levels, self.share = name.split("/")
        self.power, self.most = POWERS[self.levels], (1 << bits) - 1

    def rounded(self, e: torch.Tensor) -> torch.Tensor:
        """Return exponentials from 0 to 1 on their levels."""
        root = e ** (1 / self.power) * self.most
        if not self.levels.endswith("-mid"):
            return (root.round_() / self.most) ** self.power
        code = root.floor_()
        low, high = ((code + i).div_(self.most) ** self.power for i in (0, 1))
        return torch.where(e - low < high - e, low, high)

    @torch.no_grad()
    def __call__(self, p: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        seen = torch.ones_like(p, dtype=torch.bool) if allowed is None else allowed.expand_as(p)
        largest = row_largest(p, allowed)
        y = self.rounded((p.float() / largest).clamp_(max=1)) * largest
        y = y.masked_fill_(~seen, 0.0)
        if self.share == "scale":
            return (y / y.sum(-1, keepdim=True)).to(p.dtype)
        missing = 1.0 - y.sum(-1, keepdim=True, dtype=torch.float64)
        zeros, takers = seen & (y == 0), seen
        count = zeros.sum(-1, keepdim=True)
        if self.share == "zeros":
            takers = torch.where((count > 0) & (missing > 0), zeros, seen)
        elif self.share == "zeros-capped":
            half = (0.5 / self.most) ** self.power * largest.double()
            each = torch.minimum((missing / count.clamp(min=1)).clamp_(min=0), half)
            y = y + torch.where(zeros, each.float(), 0.0)
            missing = 1.0 - y.sum(-1, keepdim=True, dtype=torch.float64)
        each = (missing / takers.sum(-1, keepdim=True).clamp_(min=1)).float()
        return (y + torch.where(takers, each, 0.0)).to(p.dtype)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, metavar="DIR", help="as for softmax_lm.py")
    p.add_argument("--case", choices=CASES, required=True)
    p.add_argument("--bits", type=int, required=True)
    p.add_argument("--weights", type=int, metavar="BITS", help="of weights rounded to nearest")
    p.add_argument("--tokens", type=int, default=16384, help="of held-out windows (0: the text)")
    p.add_argument("--calibration", type=int, default=6144)
    p.add_argument("--only", nargs="+", choices=GRIDS, default=GRIDS)
    p.add_argument("--out", type=Path, metavar="FILE")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch_threads()
    case = Case(args, *CASES[args.case])
    model = case.model
    if args.weights:
        model = copy.deepcopy(model)
        ptqkit.quantize(
            model, "rtn", bits=args.weights, group_size=None, progress=False, diagnostics=False
        )
    base = case.measure(model)
    study = SoftmaxCalibration(case.model, case.calibration, bits=args.bits)
    names = list(study.quantizers(None, "tensor"))
    variants: dict[str, Any] = {
        **{name: study.quantizers(*LANGUAGE_MODEL_VARIANTS[name]) for name in KNOWN},
        **{name: dict.fromkeys(names, Grid(args.bits, name)) for name in args.only},
    }
    rows: list[dict[str, Any]] = []
    for name, quantizers in variants.items():
        found = case.measure(model, quantizers)
        lost, error = paired(found, base)
        plain = rows[0]["lost"] if rows else lost
        row = {"case": args.case, "weights": args.weights, "bits": args.bits, "grid": name}
        row |= {"windows": len(found["losses"]), "lost": lost, "error": error}
        rows.append(row | {"back": 1 - lost / plain, "held_out_db": found["held_out_db"]})
        print(f"{name:24} {lost:+.4f} ± {error:.4f}  {100 * rows[-1]['back']:.2f} %", flush=True)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
