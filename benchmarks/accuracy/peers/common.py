"""What the scripts of all libraries share; it needs PyTorch, transformers and NumPy."""

from __future__ import annotations

import argparse
import csv
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.accuracy.windows import window_losses

__all__ = ["GRIDS", "divisor", "main"]

#: Of the comparison; see `divisor` for the layers whose inputs 64 does not divide.
GRIDS: dict[str, tuple[int, int | None]] = {
    "4 channel": (4, None),
    "4 g64": (4, 64),
    "3 channel": (3, None),
    "3 g64": (3, 64),
    "2 g64": (2, 64),
}
COLUMNS = ("model", "grid", "recipe", "draw", "window", "nll", "tokens")


def divisor(inputs: int, size: int) -> int:
    """Return the width of groups: the divisor of `inputs` that is nearest to `size`."""
    divisors = (d for d in range(1, inputs + 1) if inputs % d == 0)
    return min(divisors, key=lambda d: (abs(d - size), d))


def main(
    peer: str, quantize: dict[str, Callable[[Path, torch.Tensor, int, int | None], Any]]
) -> None:
    """Run a library's methods over models, grids and draws, and append to a CSV file of windows.

    Every model's own losses come first, as `float` of draw -1: whether it is the one that ours were
    measured on.

    Parameters
    ----------
    peer : str
    quantize : dict of str to callable
        By the name of the method: ``(folder, calibration, bits, group_size)`` to a model whose
        logits are those of the quantized one. A grid that it refuses is printed and left out.
    """
    p = argparse.ArgumentParser(description=f"{peer} on the models of the comparison")
    p.add_argument("--peers", type=Path, required=True, help="what export.py wrote")
    p.add_argument("--out", type=Path, required=True, help="CSV file, appended to")
    p.add_argument("--model", action="append")
    p.add_argument("--grid", action="append", choices=GRIDS)
    p.add_argument("--draws", type=int, default=3)
    args = p.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    seen = set()
    if args.out.exists():
        with args.out.open(newline="", encoding="utf-8") as file:
            seen = {tuple(row[c] for c in COLUMNS[:4]) for row in csv.DictReader(file)}
    with args.out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not seen:
            writer.writerow(COLUMNS)

        def note(key: tuple[str, ...], model: Any, windows: torch.Tensor) -> float:
            losses, count = window_losses(model, windows), windows.shape[1] - 1
            writer.writerows((*key, i, f"{v:.4f}", count) for i, v in enumerate(losses))
            file.flush()
            return float(np.exp(sum(losses) / len(losses) / count))

        for name in args.model or sorted(f.name for f in args.peers.iterdir()):
            windows = torch.from_numpy(np.load(args.peers / name / "windows.npy"))
            base = (name, "", "float", "-1")
            if base not in seen:
                folder = args.peers / name / "model"
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
                print(*base, f"perplexity {note(base, model.eval(), windows):.4f}", flush=True)
            for grid in args.grid or GRIDS:
                for method, run in quantize.items():
                    for draw in range(args.draws):
                        key = (name, grid, f"{peer}, {method}", str(draw))
                        if key in seen:
                            continue
                        tokens = np.load(args.peers / name / f"calibration-{draw}.npy")
                        torch.manual_seed(draw)
                        start = time.perf_counter()
                        try:
                            model = run(
                                args.peers / name / "model", torch.from_numpy(tokens), *GRIDS[grid]
                            )
                        except Exception as error:
                            traceback.print_exc()
                            print(*key, f"{type(error).__name__}: {error}"[:300], flush=True)
                            break
                        seconds = time.perf_counter() - start
                        mean = note(key, model, windows)
                        print(*key, f"{seconds:.1f} s, perplexity {mean:.4f}", flush=True)
