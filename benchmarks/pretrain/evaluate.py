"""Degradation and diagnostics of every checkpoint of the ablation, as one tidy CSV.

    python -m benchmarks.pretrain.evaluate --runs runs --tasks ../shared/data/zeroshot --out all.csv

A row per checkpoint, metric and value. Losses are nats per token on the test text; tasks are scored
by the loss of the right continuation (models of this size are at chance in accuracy, which is given
too). Degradation is 100 (quantized - float) / float.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.pretrain.train import load

#: How weights and inputs are quantized. "INT8 static" and "W4A4" are the hard cases.
SCHEMES: dict[str, dict[str, Any]] = {
    "INT8 vector-wise": {"preset": "vector-wise"},
    "INT8 static": {
        "preset": "rtn", "bits": 8, "group_size": None, "symmetric": True, "per_tensor": True,
        "activations": {"bits": 8, "granularity": "tensor", "symmetric": False},
    },
    "INT4 columns": {"preset": "rtn", "bits": 4, "group_size": None, "symmetric": True},
    "W4A4": {
        "preset": "rtn", "bits": 4, "group_size": None, "symmetric": True,
        "activations": {"bits": 4, "granularity": "token"},
    },
}  # fmt: skip
TASKS = ("lambada_openai", "hellaswag", "piqa", "arc_easy", "winogrande", "copa")
AXES = ("weight_decay", "clip", "dropout", "precision", "positions", "optimizer", "gain")


@torch.no_grad()
def text_losses(model: torch.nn.Module, rows: torch.Tensor) -> np.ndarray:
    """Loss per window, nats per token."""
    found = []
    for part in rows.split(16):
        logits = model(input_ids=part[:, :-1]).logits.float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"
        )
        found.append(loss.view(len(part), -1).mean(1))
    return torch.cat(found).cpu().numpy()


@torch.no_grad()
def continuation_losses(
    model: torch.nn.Module, pairs: list[tuple[list[int], list[int]]], device: str
) -> np.ndarray:
    """Sum of the losses of each continuation after its context."""
    longest = model.config.max_position_embeddings
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    losses = np.zeros(len(pairs))
    for start in range(0, len(order), 64):
        chunk = order[start : start + 64]
        rows = [(pairs[i][0] + pairs[i][1])[-longest - 1 :] for i in chunk]
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for k, row in enumerate(rows):
            ids[k, : len(row)] = torch.tensor(row)
        ids = ids.to(device)
        logp = model(input_ids=ids[:, :-1]).logits.float().log_softmax(-1)
        picked = logp.gather(-1, ids[:, 1:, None])[..., 0].cpu().numpy()
        for k, i in enumerate(chunk):
            last, length = len(rows[k]) - 1, len(pairs[i][1])
            losses[i] = -picked[k, last - length : last].sum()
    return losses


def read_task(path: Path, tokenizer: Any) -> tuple[list[tuple[list[int], list[int]]], list[Any]]:
    """Return every (context, continuation) of a task, and per item its slice and the right one."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    pairs, items = [], []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            item = json.loads(line)
            if "choices" in item:
                options = [(item["context"], " " + c) for c in item["choices"]]
            elif "contexts" in item:
                options = [(c, " " + item["continuation"]) for c in item["contexts"]]
            else:
                options = [(item["context"], " " + item["continuation"])]
            items.append((slice(len(pairs), len(pairs) + len(options)), item.get("gold", 0)))
            pairs += [([0, *encode(context)], encode(rest)) for context, rest in options]
    return pairs, items


def measure(model: torch.nn.Module, rows: torch.Tensor, tasks: dict[str, Any], device: str) -> dict:
    """Loss on the text and on every task."""
    found = {"text": text_losses(model, rows)}
    for name, (pairs, items) in tasks.items():
        losses = continuation_losses(model, pairs, device)
        lengths = np.array([max(1, len(rest)) for _, rest in pairs])
        per_token = losses / lengths
        found[name] = np.array([per_token[span][gold] for span, gold in items])
        found[f"{name} accuracy"] = np.array(
            [float(np.argmin(losses[span]) == gold) for span, gold in items]
        )
    return found


def summary(report: Any) -> dict[str, float]:
    """Numbers of a diagnosis: medians over depth at the paper's places, and what holds for all."""
    found: dict[str, float] = {
        "attention sinks": report.sink_share,
        "softmax mass lost": report.mass_lost,
        "key-value error": report.cache_error,
        "outlier dimensions": float(len(report.outlier_dimensions)),
        "outlier channels": float(sum(map(len, report.outliers.values()))),
        "norm gain std": float(np.median([row.std for row in report.norms])),
    }
    for part in ("attention in", "mlp in", "mlp out"):
        rows = [row for row in report.inputs if row.part == part]
        for key in (
            "rmse_token",
            "rmse_tensor",
            "relative_error",
            "std",
            "kurtosis",
            "maximum",
            "max_to_median",
        ):
            values = [getattr(row, key) for row in rows]
            found[f"{key}, {part}"] = float(np.median(values)) if values else math.nan
        found[f"largest kurtosis, {part}"] = max((row.kurtosis for row in rows), default=math.nan)
        found[f"largest max_to_median, {part}"] = max(
            (row.max_to_median for row in rows), default=math.nan
        )
    for part in ("attention in", "mlp in"):
        rows = [row for row in report.weights if row.part == part]
        for key in ("spectral_norm", "stable_rank", "std", "kurtosis"):
            found[f"weight {key}, {part}"] = float(np.median([getattr(r, key) for r in rows]))
    return found


def evaluate(folder: str, data: str, tasks_dir: str | None, device: str) -> list[dict[str, Any]]:
    """All rows of one checkpoint."""
    import tokenizers

    from ptqkit.hf import diagnose, prepare_calibration, quantize
    from ptqkit.nn import remove_quantizers

    torch.set_num_threads(1)
    facts = json.loads(Path(folder, "training.json").read_text())
    tokens = np.load(data)
    tokenizer = tokenizers.Tokenizer.from_file(str(Path(data).with_name("tokenizer.json")))
    tasks = {}
    if tasks_dir:
        tasks = {t: read_task(Path(tasks_dir, f"{t}.jsonl.gz"), tokenizer) for t in TASKS}
    length = facts["length"]
    test = tokens["test"]
    starts = np.linspace(0, len(test) - length - 1, 96).astype(int)
    rows = torch.from_numpy(np.stack([test[s : s + length + 1] for s in starts]).astype(np.int64))
    rows = rows.to(device)
    train = tokens["train"]
    picks = np.random.default_rng(0).integers(0, len(train) - length, 16)
    windows = torch.from_numpy(np.stack([train[p : p + length] for p in picks]).astype(np.int64))
    base = {k: facts[k] for k in (*AXES, "seed", "step", "tokens", "skipped_steps")}
    base |= {"run": Path(folder).parent.name, "stage": Path(folder).name}
    found: list[dict[str, Any]] = []

    def note(kind: str, metric: str, value: float, error: float = math.nan) -> None:
        found.append({**base, "kind": kind, "metric": metric, "value": value, "error": error})

    note("training", "validation loss", facts["validation_loss"])
    model = load(folder).to(device)
    float_values = measure(model, rows, tasks, device)
    for name, values in float_values.items():
        note("float", name, float(values.mean()), float(values.std() / math.sqrt(len(values))))
    report = diagnose(model, prepare_calibration(windows, batch_size=8), sensitivity=False)
    for metric, value in summary(report).items():
        note("diagnostic", metric, float(value))
    for row in report.inputs:
        for key in ("rmse_token", "std", "kurtosis", "maximum", "max_to_median", "norm_std"):
            note("depth", f"{key}, {row.part}, {row.depth}", float(getattr(row, key)))
    for row in report.weights:
        note("depth", f"spectral_norm, {row.part}, {row.depth}", row.spectral_norm)
    for scheme, recipe in SCHEMES.items():
        model = load(folder).to(device)
        needs = windows if "static" in scheme else None
        quantize(model, recipe, needs, batch_size=8, progress=False, diagnostics=False)
        values = measure(model, rows, tasks, device)
        remove_quantizers(model)
        changes = []
        for name, ours in values.items():
            reference = float_values[name]
            difference = ours - reference
            if name.endswith("accuracy"):
                note(scheme, f"{name} change", float(difference.mean()))
                continue
            percent = 100 * float(difference.mean() / reference.mean())
            error = 100 * float(difference.std() / math.sqrt(len(ours)) / reference.mean())
            note(scheme, f"{name} loss, percent", percent, error)
            if name != "text":
                changes.append(percent)
        if changes:
            note(scheme, "mean of tasks, percent", float(np.mean(changes)))
    return found


def main() -> None:
    """Evaluate every checkpoint, several at a time."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", required=True, type=Path)
    parser.add_argument("--tasks", help="folder of the zero-shot files")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    folders = sorted(str(p.parent) for p in args.runs.glob("*/*/training.json"))
    folders.sort(key=lambda f: f.endswith("early"))  # the late ones first
    data = str(args.runs / "tokens.npz")
    fields = [*AXES, "seed", "step", "tokens", "skipped_steps", "run", "stage"]
    fields += ["kind", "metric", "value", "error"]
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    pool = ProcessPoolExecutor(args.processes, context)
    with open(args.out, "w", newline="") as file, pool:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        jobs = {pool.submit(evaluate, f, data, args.tasks, args.device): f for f in folders}
        for number, job in enumerate(as_completed(jobs), 1):
            try:
                writer.writerows(job.result())
                file.flush()
                print(f"{number}/{len(jobs)} {jobs[job]}", flush=True)
            except Exception as error:
                print(f"{number}/{len(jobs)} {jobs[job]}: FAILED {error!r}", flush=True)


if __name__ == "__main__":
    main()
