"""What an 8-bit softmax costs a language model, and what corrections of its bias give back.

The language-model half of Table 3 of Pandey et al. 2023, "Softmax Bias Correction for Quantized
Generative Models": float, 8-bit weights (round to nearest, one scale per output), 8-bit softmax,
both, and the softmax with corrections: one bias per attention module, one per head (both the
paper's), and the row sum; then the grid before normalising, and other papers' grids. On held-out
text, in windows drawn from all over it.

    python benchmarks/softmax_lm.py                          # the embedded model, 512 and 1,024
    python benchmarks/softmax_lm.py --data DIR               # and the trained models in that folder
    python benchmarks/softmax_lm.py --bits 8 6 4 --only 512 --guard --seeds 3
    python benchmarks/softmax_lm.py --data DIR --longest --bits 8 6 4 3 2 --variants all --out FILE
    python benchmarks/softmax_lm.py --data DIR --longest --bits 8 6 4 --tokens 0 --swap

Perplexity is per token, in float32. "excess" is that above the float model, with the standard error
of the paired difference over windows. "given back" is the share of what the plain grid on [0, 1]
loses, its error that of the jackknife over windows. "gain" is what a correction lowers the loss of
a token by, against the same model without it: mean over the windows and its standard error, in
thousandths of a nat. dB are of the logits, against those of the float model.

"goal" in the file: whether, at 4 bits and more, the best of the row corrections measured gives
back 99 % wherever the plain grid loses more than two standard errors. --swap measures on the text
to calibrate on and calibrates on the other: the grid of squares was picked among sixteen
(`softmax_grids.py`) by its loss on the held-out text, and the row corrections need no calibration.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import header, show, torch_threads
from real_models import stories
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import ptqkit
from ptqkit import demo
from ptqkit._paired import Sample, standard_errors
from ptqkit.hf import SoftmaxCalibration, prepare_calibration
from ptqkit.hf.data.calibration import CalibrationSet
from ptqkit.hf.models.attention import attention_hooks
from ptqkit.nn.softmax.compare import softmax_hooks
from ptqkit.nn.softmax.variants import LANGUAGE_MODEL_VARIANTS

LABELS = {
    "none": "",
    "bias": " + BC per tensor",
    "bias/head": " + BC per head",
    "row_sum": " + row sum",
    "before": " before",
    "before/code_sum": " before + code sum",
    "before/row_sum": " before + row sum",
    "squares": " squares",
    "squares/code_sum": " squares + code sum",
    "squares/row_sum": " squares + row sum",
    "log2": " log2",
    "log2/row_sum": " log2 + row sum",
    "twin": " twin",
    "twin/row_sum": " twin + row sum",
}
"""What the tables call the corrections of ``ptqkit.hf.softmax.table``."""
PAPER = ("none", "bias", "bias/head", "row_sum")
ROW_CORRECTIONS = ("row_sum", "before/row_sum", "squares/row_sum")
CASES = {
    "babyllama105 256": ("babyllama105", 256),
    "stories260k 512": ("stories260k", 512),
    "embedded 512": (demo.MODEL_DIR, 512),
    "embedded 1024": (demo.MODEL_DIR, 1024),
}
LONGEST = [name for name in CASES if name != "embedded 512"]


def texts(args: argparse.Namespace, folder: Path | str) -> tuple[list[str], list[str]]:
    """Calibration and held-out text of a model."""
    if folder == demo.MODEL_DIR:
        return [demo.text("calibration")], [demo.text("test")]
    found = stories(args.data / "tinystories" / "train_800.jsonl.gz")
    # No newlines: one of the tokenizers has none.
    calibration, held_out = (" ".join(" ".join(p).split()) for p in (found[:400], found[400:]))
    return [calibration], [held_out]


class Case:
    """A model with its windows of text, and the float logits of these."""

    def __init__(self, args: argparse.Namespace, folder: Path | str, context: int) -> None:
        path = folder if folder == demo.MODEL_DIR else args.data / folder
        self.args, self.context = args, context
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        both = texts(args, folder)
        self.calibration_text, held_out = reversed(both) if args.swap else both
        self.held_out = self.draw(held_out, args.tokens or self.whole(held_out), 0)
        self.calibration = self.draw(self.calibration_text, args.calibration, 0)
        self.reference = [
            [logits for _, logits in run(self.model, data)]
            for data in (self.calibration, self.held_out)
        ]

    def whole(self, words: list[str]) -> int:
        """Return as many tokens as the windows of a whole text hold."""
        ids = self.tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
        return sum(map(len, ids)) // (self.context - 1) * self.context

    def draw(self, words: list[str], tokens: int, seed: int) -> CalibrationSet:
        """Windows from all over a text, each after the start token."""
        return prepare_calibration(
            words,
            self.tokenizer,
            samples=tokens // self.context,
            sequence_length=self.context,
            batch_size=1,
            seed=seed,
        )

    def measure(self, model: Any, quantizers: dict[str, Any] | None = None) -> dict[str, Any]:
        """Loss of every held-out window, dB of the logits on both texts."""
        losses: list[float] = []
        ratios = []
        hooks = attention_hooks(model, softmax_hooks(quantizers)) if quantizers else None
        with hooks or contextlib.nullcontext():
            for data, reference in zip(
                (self.calibration, self.held_out), self.reference, strict=True
            ):
                meter = ptqkit.SQNR("sample")
                losses.clear()
                for (ids, logits), true in zip(run(model, data), reference, strict=True):
                    meter.update(true.numpy(), logits.numpy())
                    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
                    losses.append(float(loss))
                ratios.append(float(meter.decibel))
        return {"losses": losses, "calibration_db": ratios[0], "held_out_db": ratios[1]}


def run(model: Any, data: CalibrationSet) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and logits of every window."""
    for batch in data.batches:
        with torch.no_grad():
            yield batch["input_ids"], model(**batch, use_cache=False).logits


def table_row(name: str, found: dict[str, Any], plain: Any, base: Any, full: Any) -> dict[str, Any]:
    """One line: ``base`` has the same weights and a float softmax, ``plain`` no correction."""
    losses = np.array(found["losses"])
    perplexity = math.exp(losses.mean())
    row = {"model": name, "perplexity": perplexity}
    row["excess"], row["excess_error"] = paired(found, full)
    row["calibration_db"], row["held_out_db"] = found["calibration_db"], found["held_out_db"]
    if plain is not None:
        gain = np.array(plain["losses"]) - losses
        row["gain"] = 1e3 * float(gain.mean())
        row["gain_error"] = 1e3 * float(gain.std(ddof=1)) / math.sqrt(len(gain))
        lost, kept = (math.exp(np.mean(x["losses"])) for x in (plain, base))
        row["given_back"] = (lost - perplexity) / (lost - kept)
        row["given_back_error"] = share_error(plain, found, base)
    return row


def share_error(plain: dict[str, Any], found: dict[str, Any], base: dict[str, Any]) -> float:
    """Standard error of the share given back: jackknife over the windows, which all three share."""
    losses = np.array([x["losses"] for x in (plain, found, base)])
    n = losses.shape[1]
    lost, left, kept = np.exp((losses.sum(1, keepdims=True) - losses) / (n - 1))
    shares = (lost - left) / (lost - kept)
    return float(np.sqrt((n - 1) / n * np.square(shares - shares.mean()).sum()))


def paired(found: dict[str, Any], reference: dict[str, Any]) -> tuple[float, float]:
    """Difference of two perplexities and its standard error over windows of equal length."""

    def of(losses: list[float]) -> Sample:
        return Sample.of([math.exp(np.mean(losses))], [losses], np.ones(len(losses)), True)

    gap = of(found["losses"]) - of(reference["losses"])
    return float(gap.values[0]), standard_errors(gap)[0]


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether the better row correction gives back 99 % where the plain grid loses two errors."""
    found = []
    for label, bits in dict.fromkeys((r["label"], r["bits"]) for r in rows if r.get("bits", 0) > 3):
        these = {r["variant"]: r for r in rows if (r.get("label"), r.get("bits")) == (label, bits)}
        measured = [name for name in ROW_CORRECTIONS if name in these]
        if "none" not in these or len(measured) < 2:
            continue
        # With rounded weights the loss is that above the same weights; so is what is left.
        loss, error = (these["none"][name] for name in ("lost", "lost_error"))
        best = max(measured, key=lambda name: these[name]["given_back"])
        goal = {
            "weights": label.rstrip("-") or "float",
            "bits": bits,
            "lost": loss,
            "lost_error": error,
        }
        goal |= {"applies": loss > 2 * error, "best": best}
        goal |= {name: these[best][name] for name in ("given_back", "given_back_error")}
        goal |= {"left": these[best]["lost"], "left_error": these[best]["lost_error"]}
        found.append(goal | {"reached": goal["given_back"] >= 0.99})
    return found


def softmax_rows(
    case: Case, model: Any, label: str, base: Any, full: Any, bits: int
) -> Iterator[dict[str, Any]]:
    """Lines of one bit width on one state of the weights."""
    study = SoftmaxCalibration(model, case.calibration, bits=bits)
    zero, mass = (
        np.mean([float(getattr(s.bias, n)) for s in study.statistics.values()])
        for n in ("zero_fraction", "mean_row_sum")
    )
    plain = None
    chosen = case.args.weights_variants if label else case.args.variants
    for name in dict.fromkeys(["none", *chosen]):
        choice, ending = LANGUAGE_MODEL_VARIANTS[name], LABELS[name]
        found = case.measure(model, study.quantizers(*choice))
        row = table_row(f"{label}SM{bits}{ending}", found, plain, base, full)
        row |= {"bits": bits, "variant": name, "label": label}
        if choice[2] == "probabilities":
            row |= {"zero_fraction": float(zero), "mean_row_sum": float(mass)}
        row["lost"], row["lost_error"] = paired(found, base)
        if plain is not None and choice[0] == "bias":
            row["seeds"] = [row["perplexity"], *other_seeds(case, model, bits, choice)]
        if plain is not None and case.args.guard and not label:
            row["guard"] = guarded(case, study, choice)
        plain = plain or found
        yield row


def other_seeds(case: Case, model: Any, bits: int, choice: tuple[Any, str]) -> Iterator[float]:
    """Perplexities with the correction from other calibration windows."""
    for seed in range(1, case.args.seeds):
        drawn = case.draw(case.calibration_text, case.args.calibration, seed)
        study = SoftmaxCalibration(model, drawn, bits=bits)
        yield math.exp(np.mean(case.measure(model, study.quantizers(*choice))["losses"]))


def guarded(case: Case, study: SoftmaxCalibration, choice: tuple[Any, str]) -> dict[str, Any]:
    """What the guard of ``quantize_softmax`` leaves out, and what is measured then."""
    quantizers = study.quantizers(*choice)
    report = study.compare(quantizers)
    left = [row.name for row in report.layers if row.notes]
    values: dict[str, Any] = {"left_out": left, "layers": len(report.layers), "note": report.notes}
    if left:
        found = case.measure(case.model, quantizers)
        values |= {"perplexity": math.exp(np.mean(found["losses"]))}
        values |= {name: found[name] for name in ("calibration_db", "held_out_db")}
    return values


def study(args: argparse.Namespace, folder: Path | str, context: int) -> dict[str, Any]:
    """All lines of one model at one context."""
    started = time.perf_counter()
    case = Case(args, folder, context)
    full = case.measure(case.model)
    models = [("FP32", "", case.model)]
    if args.weights_variants:
        rounded = copy.deepcopy(case.model)
        ptqkit.quantize(rounded, "rtn", bits=8, group_size=None, progress=False, diagnostics=False)
        models.append(("W8A16", "W8A16-", rounded))
    rows = []
    for name, label, model in models:
        base = case.measure(model)
        rows.append(table_row(name, base, None, base, full))
        for bits in args.bits:
            for row in softmax_rows(case, model, label, base, full, bits):
                rows.append(row)
                done = time.perf_counter() - started
                print(f"[{done:6.0f} s] {row['model']}", file=sys.stderr, flush=True)
    windows = case.held_out.samples
    return {
        "context": context,
        "held_out": {"windows": windows, "tokens": windows * (context - 1)},
        "calibration": {"windows": case.calibration.samples, "tokens": case.calibration.tokens},
        "start_token": case.calibration.start_token,
        "swapped": args.swap,
        "rows": rows,
        "goal": goals(rows),
        "seconds": time.perf_counter() - started,
    }


def print_case(name: str, found: dict[str, Any]) -> None:
    """Print a table."""
    cells = []
    for row in found["rows"]:
        corrected, quantized = "gain" in row, "zero_fraction" in row
        guard = row.get("guard")
        cells.append(
            [
                row["model"],
                f"{row['perplexity']:.4f}",
                f"{row['excess']:+.4f} ± {row['excess_error']:.4f}",
                f"{100 * row['given_back']:.1f} ± {100 * row['given_back_error']:.1f} %"
                if corrected
                else "",
                f"{row['gain']:+.2f} ± {row['gain_error']:.2f}" if corrected else "",
                f"{100 * row['zero_fraction']:.1f}%" if quantized else "",
                f"{row['mean_row_sum']:.4f}" if quantized else "",
                f"{row['calibration_db']:.2f}",
                f"{row['held_out_db']:.2f}",
                f"{len(guard['left_out'])} of {guard['layers']}" if guard else "",
            ]
        )
    columns = ["", "perplexity", "excess", "given back", "gain", "to zero", "row sum"]
    columns += ["calibration dB", "held-out dB", "left out"]
    tokens = (found["held_out"]["tokens"], found["calibration"]["tokens"])
    for goal in found["goal"]:
        if goal["applies"]:
            print(
                f"{goal['weights']} weights, {goal['bits']} bits: {goal['best']} gives back "
                f"{100 * goal['given_back']:.1f} ± {100 * goal['given_back_error']:.1f} % of "
                f"{goal['lost']:.4f} ± {goal['lost_error']:.4f}"
            )
    show(f"{name}: {tokens[0]:,} held-out tokens, {tokens[1]:,} to calibrate on", columns, cells)


def write(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write what there is so far, where a file was asked for; keep other models' results in it."""
    if args.out is None:
        return
    known = json.loads(args.out.read_text())["models"] if args.out.exists() else {}
    content = {"benchmark": "softmax_lm", "machine": header(), "models": {**known, **results}}
    text = json.dumps(content, indent=1).replace("Infinity", '"inf"')
    args.out.write_text(text + "\n", encoding="utf-8")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="folder of stories260k, babyllama105, tinystories")
    add("--bits", type=int, nargs="+", default=[8], help="of the softmax (8)")
    add("--tokens", type=int, default=16384, help="of held-out windows (16,384; 0: the text)")
    add("--calibration", type=int, default=6144, help="of calibration windows together (6,144)")
    add("--seeds", type=int, default=1, help="calibration sets for the biases (1)")
    add("--guard", action="store_true", help="also what quantize_softmax would leave out")
    add("--only", default="", metavar="TEXT", help=f"of {', '.join(CASES)}: those with this text")
    add("--swap", action="store_true", help="measure on the text to calibrate on, and reversed")
    add("--longest", action="store_true", help="each model at its longest context alone")
    add("--variants", nargs="+", default=list(PAPER), help=f"of {', '.join(LABELS)}, or all")
    add("--weights-variants", nargs="*", default=[*PAPER, "before/row_sum"],
        help="with W8A16; none: float weights alone")  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="write JSON there")
    args = parser.parse_args(argv)
    for name in ("variants", "weights_variants"):
        if getattr(args, name) == ["all"]:
            setattr(args, name, list(LABELS))
        wrong = set(getattr(args, name)) - set(LABELS)
        if wrong:
            parser.error(f"{sorted(wrong)[0]!r} is not one of {', '.join(LABELS)}, all")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the script."""
    args = parse(argv)
    torch_threads()
    logging.disable_progress_bar()
    results = {}
    for name, (folder, context) in CASES.items():
        if args.only not in name or (args.longest and name not in LONGEST):
            continue
        if folder != demo.MODEL_DIR and args.data is None:
            continue
        label = f"{name}, swapped" if args.swap else name
        results[label] = study(args, folder, context)
        print_case(label, results[label])
        write(args, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
