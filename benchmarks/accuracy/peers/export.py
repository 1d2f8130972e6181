"""Write what the other libraries need: models, calibration draws and test windows as arrays.

    python -m benchmarks.accuracy.peers.export --data ../shared/data --out peers

The scripts beside this one run in environments of their own, without ptqkit, on the folders that
this one writes: `model` (float32), `windows.npy`, `calibration-DRAW.npy` (samples, positions).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.accuracy.models import MODELS, load_case


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True, help="folder of the models and texts")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--model", action="append", choices=MODELS)
    p.add_argument("--draws", type=int, default=3)
    p.add_argument("--samples", type=int, default=64)
    p.add_argument("--windows", type=int, default=48)
    args = p.parse_args()
    for name in args.model or MODELS:
        case = load_case(name, args.data, args.windows)
        out = args.out / name
        case.model.save_pretrained(out / "model")
        case.tokenizer.save_pretrained(out / "model")
        np.save(out / "windows.npy", case.windows.numpy())
        for draw in range(args.draws):
            batches = case.batches(args.samples, draw)
            rows = np.concatenate([batch["input_ids"].numpy() for batch in batches])
            np.save(out / f"calibration-{draw}.npy", rows)


if __name__ == "__main__":
    main()
