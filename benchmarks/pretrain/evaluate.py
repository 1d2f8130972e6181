"""Degradation and diagnostics of every checkpoint of the ablation, as one tidy CSV.

    python -m benchmarks.pretrain.evaluate --runs runs --tasks ../shared/data/zeroshot --out all.csv

A row per checkpoint, metric and value. Losses are nats per token on the test text; tasks are scored
by the loss of the right continuation (models of this size are at chance in accuracy, which is given
too). Degradation is 100 (quantized - float) / float.

A checkpoint that the CSV holds is left alone, so the command can be run again after it was stopped.
What is known of the training goes to ``training.json`` beside the CSV.
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

from benchmarks.pretrain.plan import SCHEMES, TASKS
from benchmarks.pretrain.train import load

CHOICES = ("weight_decay", "clip", "dropout", "precision", "positions", "optimizer", "gain")


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
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the losses of each continuation after its context; whether it is the likeliest."""
    longest = model.config.max_position_embeddings
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    losses, likeliest = np.zeros(len(pairs)), np.zeros(len(pairs), bool)
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
        best = (logp.argmax(-1) == ids[:, 1:]).cpu().numpy()
        for k, i in enumerate(chunk):
            last, length = len(rows[k]) - 1, len(pairs[i][1])
            losses[i] = -picked[k, last - length : last].sum()
            likeliest[i] = best[k, last - length : last].all()
    return losses, likeliest


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
        losses, likeliest = continuation_losses(model, pairs, device)
        lengths = np.array([max(1, len(rest)) for _, rest in pairs])
        per_token = losses / lengths
        found[name] = np.array([per_token[span][gold] for span, gold in items])
        found[f"{name} accuracy"] = np.array(
            [
                float(
                    np.argmin(losses[span]) == gold if len(losses[span]) > 1 else likeliest[span][0]
                )
                for span, gold in items
            ]
        )
    return found


#: Numbers of every tensor that layers read, of every weight and of every norm's gain.
INPUTS = (
    "rmse_token", "rmse_tensor", "relative_error", "std", "kurtosis", "maximum", "median",
    "max_to_median",
)  # fmt: skip
WEIGHTS = ("spectral_norm", "stable_rank", "std", "absmax", "kurtosis")
GAINS = ("mean", "std", "minimum", "maximum")
PARTS = ("attention in", "attention out", "mlp in", "mlp out")
#: Rules of outlier dimensions: (magnitude, share of layers, share of tokens), the published first.
RULES = ((6.0, 0.25, 0.06), (6.0, 0.25, 0.01), (6.0, 0.0, 0.0), (3.0, 0.25, 0.06))


def dimensions(report: Any) -> dict[str, float]:
    """Counts of outlier dimensions by the rules whose magnitude is the report's."""
    from ptqkit.hf.diagnostics.diagnose import find_outliers

    kept, found = report.options, {}
    for value, layers, tokens in RULES:
        if value == kept["value"]:
            report.options = {**kept, "layers": layers, "tokens": tokens}
            find_outliers(report)
            rule = f"{value:g} in {layers:.0%} of layers, {tokens:.0%} of tokens"
            found[f"outlier dimensions, {rule}"] = float(len(report.outlier_dimensions))
    report.options = kept
    find_outliers(report)
    return found


def summary(report: Any) -> dict[str, float]:
    """Numbers of a diagnosis: medians over depth at every part, and what holds for all."""
    sinks = [value for row in report.attention for value in row.sink]
    found: dict[str, float] = {
        "attention sinks": report.sink_share,
        "largest attention sink": max(sinks, default=math.nan),
        "softmax mass lost": report.mass_lost,
        "key-value error": report.cache_error,
        "outlier channels": float(sum(map(len, report.outliers.values()))),
        **dimensions(report),
    }
    for key in GAINS:
        found[f"norm gain {key}"] = float(np.median([getattr(r, key) for r in report.norms]))
    for part in PARTS:
        rows = [row for row in report.inputs if row.part == part]
        for key in INPUTS:
            found[f"{key}, {part}"] = float(np.median([getattr(row, key) for row in rows]))
        for key in ("kurtosis", "maximum", "max_to_median"):
            found[f"largest {key}, {part}"] = max(getattr(row, key) for row in rows)
        weights = [row for row in report.weights if row.part == part]
        for key in WEIGHTS:
            found[f"weight {key}, {part}"] = float(np.median([getattr(r, key) for r in weights]))
    return found


def by_depth(report: Any) -> dict[str, float]:
    """Everything that a figure over depth shows: "number, part, block"."""
    found: dict[str, float] = {}
    for row in report.inputs:
        for key in (*INPUTS, "norm_std"):
            value = float(getattr(row, key))
            if math.isfinite(value):
                found[f"{key}, {row.part}, {row.depth}"] = value
    for row in report.weights:
        for key in ("spectral_norm", "stable_rank"):
            found[f"{key}, {row.part}, {row.depth}"] = getattr(row, key)
    for row in report.attention:
        for key in ("sink", "mass_lost", "zero_fraction", "key_error", "value_error"):
            found[f"{key}, attention, {row.depth}"] = float(np.mean(getattr(row, key)))
    return found


def distributions(report: Any) -> dict[str, float]:
    """Quantiles of the attention projection's weights and of the gains before it, by block."""
    places = {row.norm: row for row in report.inputs if row.part == "attention in"}
    rows = [("weight", row) for row in report.weights if row.part == "attention in"]
    rows += [("gain", row) for row in report.norms if row.name in places]
    return {
        f"{kind}, {row.depth}, {q:g}": value
        for kind, row in rows
        for q, value in zip(report.quantiles, row.quantiles, strict=True)
    }


def costs(report: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Signal-to-noise ratios of the logits in decibels: the whole model's, and by depth."""
    whole = {f"sensitivity of {r.kind}, dB": r.sqnr_db for r in report.sensitivity["kind"].rows}
    alone, together = (report.sensitivity[k].rows for k in ("layer", "depth"))
    whole["sensitivity of the worst block, dB"] = min(row.sqnr_db for row in alone)
    whole["sensitivity of all blocks, dB"] = together[-1].sqnr_db
    depth = {}
    for name, rows in (("one block quantized, dB", alone), ("blocks up to one, dB", together)):
        for row in rows:
            depth[f"{name}, block, {row.layer.rpartition('.')[2]}"] = row.sqnr_db
    return whole, depth


def diagnostics(model: torch.nn.Module, windows: torch.Tensor) -> dict[str, dict[str, float]]:
    """Everything that ``ptqkit diagnose`` measures, by kind of row.

    Sensitivity runs the data once per case: four windows, which also count with the other magnitude
    of outlier dimensions.
    """
    from ptqkit.hf import diagnose, prepare_calibration

    report = diagnose(model, prepare_calibration(windows, batch_size=8), sensitivity=False)
    few = prepare_calibration(windows[:4], batch_size=4)
    hard = diagnose(model, few, value=RULES[-1][0])
    whole, depth = costs(hard)
    return {
        "diagnostic": {**summary(report), **dimensions(hard), **whole},
        "depth": {**by_depth(report), **depth},
        "distribution": distributions(report),
    }


def degradation(
    values: dict[str, np.ndarray], reference: dict[str, np.ndarray]
) -> dict[str, tuple[float, float]]:
    """Percent of degradation with its standard error, or NaN, per metric."""
    found: dict[str, tuple[float, float]] = {}
    changes: list[tuple[float, float]] = []
    for name, ours in values.items():
        difference, base = ours - reference[name], reference[name].mean()
        if name.endswith("accuracy"):
            found[f"{name} change"] = (float(difference.mean()), math.nan)
            continue
        percent = 100 * float(difference.mean() / base)
        error = 100 * float(difference.std() / math.sqrt(len(ours)) / base)
        found[f"{name} loss, percent"] = (percent, error)
        if name == "text":
            found["text perplexity, percent"] = (
                100 * math.expm1(float(difference.mean())),
                math.nan,
            )
        else:
            changes.append((percent, error))
    if changes:
        each, errors = np.array(changes).T
        error = float(np.linalg.norm(errors)) / len(errors)
        found["mean of tasks, percent"] = (float(each.mean()), error)
    return found


def evaluate(folder: str, data: str, tasks_dir: str | None, device: str) -> list[dict[str, Any]]:
    """All rows of one checkpoint."""
    import tokenizers

    from ptqkit.hf import quantize
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
    base = {k: facts[k] for k in (*CHOICES, "seed", "step", "tokens", "skipped_steps")}
    base |= {"run": Path(folder).parent.name, "stage": Path(folder).name}
    found: list[dict[str, Any]] = []

    def note(kind: str, metric: str, value: float, error: float = math.nan) -> None:
        found.append({**base, "kind": kind, "metric": metric, "value": value, "error": error})

    note("training", "validation loss", facts["validation_loss"])
    model = load(folder).to(device)
    float_values = measure(model, rows, tasks, device)
    for name, values in float_values.items():
        note("float", name, float(values.mean()), float(values.std() / math.sqrt(len(values))))
    note("float", "text perplexity", float(np.exp(float_values["text"].mean())))
    for kind, values in diagnostics(model, windows).items():
        for metric, value in values.items():
            note(kind, metric, float(value))
    for scheme, recipe in SCHEMES.items():
        model = load(folder).to(device)
        needs = windows if "static" in scheme else None
        quantize(model, recipe, needs, batch_size=8, progress=False, diagnostics=False)
        values = measure(model, rows, tasks, device)
        remove_quantizers(model)
        for metric, row in degradation(values, float_values).items():
            note(scheme, metric, *row)
    return found


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to the CSV, numbers with six digits; an empty field is "not known"."""
    fields = [*CHOICES, "seed", "step", "tokens", "skipped_steps", "run", "stage"]
    fields += ["kind", "metric", "value", "error"]
    fresh = not out.exists()
    with open(out, "a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for row in rows:
            digits = {k: "" if math.isnan(row[k]) else f"{row[k]:.6g}" for k in ("value", "error")}
            writer.writerow({**row, **digits})


def done_already(out: Path) -> set[tuple[str, str]]:
    """(run, stage) of every checkpoint in the CSV: all rows of one are written at once."""
    if not out.exists():
        return set()
    with open(out, newline="") as file:
        return {(row["run"], row["stage"]) for row in csv.DictReader(file)}


def main() -> None:
    """Evaluate every checkpoint that the CSV does not hold yet, several at a time."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", required=True, type=Path)
    parser.add_argument("--tasks", help="folder of the zero-shot files")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    folders = sorted(p.parent for p in args.runs.glob("*/*/training.json"))
    known = {f"{f.parent.name}/{f.name}": (f / "training.json").read_text() for f in folders}
    facts = {name: json.loads(text) for name, text in known.items()}
    args.out.with_name("training.json").write_text(json.dumps(facts) + "\n")
    there = done_already(args.out)
    folders = [f for f in folders if (f.parent.name, f.name) not in there]
    folders.sort(key=lambda f: f.name == "early")  # the late ones first
    data = str(args.runs / "tokens.npz")
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(args.processes, context) as pool:
        jobs = {pool.submit(evaluate, str(f), data, args.tasks, args.device): f for f in folders}
        for number, job in enumerate(as_completed(jobs), 1):
            try:
                write(args.out, job.result())
                print(f"{number}/{len(jobs)} {jobs[job]}", flush=True)
            except Exception as error:
                print(f"{number}/{len(jobs)} {jobs[job]}: FAILED {error!r}", flush=True)


if __name__ == "__main__":
    main()
