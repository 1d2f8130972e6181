"""Train the models of `benchmarks.kinds.run`: minutes on a GPU.

    python -m benchmarks.kinds.train --data ../shared/data --out models

DIR of --data holds the folders `fashion-mnist` and `gutenberg`. Written to --out:
`resnet.safetensors` (0.6 MB), `encoder.safetensors` (2.6 MB), both float16, `windows.npz` and
`authors.json` (the passages of the encoder), `training.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.kinds import encoder, resnet


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--model", action="append", choices=("resnet", "encoder"))
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--epochs", type=int, help="fewer, to see whether it runs")
    p.add_argument("--limit", type=int, help="training samples, to see whether it runs")
    args = p.parse_args()
    options = {"limit": args.limit}
    if args.epochs:
        options["epochs"] = args.epochs
    facts = {"torch": torch.__version__, "device": args.device}
    for name, room, folder in (
        ("resnet", resnet, "fashion-mnist"),
        ("encoder", encoder, "gutenberg"),
    ):
        if args.model and name not in args.model:
            continue
        facts[name] = room.train(args.data / folder, args.out, args.device, **options)
        print(name, facts[name], flush=True)
    path = args.out / "training.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **facts}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
