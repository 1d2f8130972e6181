"""All runs of the ablation, several at a time on one GPU.

    python -m benchmarks.pretrain.run --texts ../shared/data/gutenberg --out runs --processes 6

Writes the token file first (a byte-level BPE trained on the text), then one folder per run.
A run that is there already is left alone.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.pretrain.plan import runs


def write_tokens(texts: Path, out: Path, vocabulary: int) -> None:
    """Train a tokenizer on the training text and write ``train`` and ``valid`` as token arrays."""
    import tokenizers

    def read(split: str) -> str:
        with gzip.open(texts / f"{split}.txt.gz", "rt", encoding="utf-8") as file:
            return file.read()

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    train = read("train")
    tokenizer.train_from_iterator(
        train.split("\n\n\n"), vocab_size=vocabulary, special_tokens=["<s>"], show_progress=False
    )

    def encode(text: str) -> np.ndarray:
        works = text.split("\n\n\n")
        found = [tokenizer.token_to_id("<s>")]
        for encoded in tokenizer.encode_batch(works):
            found += [*encoded.ids, found[0]]
        return np.array(found, dtype=np.uint16)

    arrays = {"train": encode(train)} | {s: encode(read(s)) for s in ("valid", "test")}
    np.savez(out / "tokens.npz", **arrays)
    tokenizer.save(str(out / "tokenizer.json"))


def one(name: str, choices: dict[str, str], out: Path, extra: list[str]) -> str:
    """Train one run in a process of its own; return a line about it."""
    folder = out / name
    if (folder / "late" / "model.safetensors").exists():
        return f"{name}: there already"
    command = [sys.executable, "-m", "benchmarks.pretrain.train", "--data", str(out / "tokens.npz")]
    command += ["--out", str(folder), *extra]
    for option, value in choices.items():
        command += [f"--{option}", value]
    # graphs from the compiler's shared cache trained to nonsense (loss 8.5 for 4.6): none is used
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return f"{name}: FAILED\n{done.stderr[-2000:]}"
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    return f"{name}: loss {facts['validation_loss']:.4f}, {facts['seconds']:.0f} s"


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--only", nargs="*", help="names of runs")
    args, extra = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokens.npz").exists():
        write_tokens(args.texts, args.out, args.vocab_size)
    wanted = {k: v for k, v in runs(args.seeds).items() if not args.only or k in args.only}
    started = time.time()
    with concurrent.futures.ThreadPoolExecutor(args.processes) as pool:
        jobs = [pool.submit(one, k, v, args.out, extra) for k, v in wanted.items()]
        for number, job in enumerate(concurrent.futures.as_completed(jobs), 1):
            print(
                f"{time.time() - started:6.0f} s  {number}/{len(jobs)}  {job.result()}", flush=True
            )


if __name__ == "__main__":
    main()
