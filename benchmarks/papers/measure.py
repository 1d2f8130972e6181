"""Recipes on language models, window by window, over calibration draws."""

from __future__ import annotations

import argparse
import copy
import functools
import gzip
import json
import math
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ptqkit
from benchmarks.accuracy.models import Case, load_case, open_case
from benchmarks.accuracy.windows import window_losses
from ptqkit._paired import Sample, standard_errors
from ptqkit.recipe import as_recipe

__all__ = [
    "Losses",
    "case_of",
    "length_of",
    "llamas",
    "losses_of",
    "opened",
    "paired",
    "perplexity",
    "read_text",
    "series",
    "series_folders",
    "small",
    "study",
    "training_of",
]

LENGTH = 256  # positions of a window, at most
LLAMAS = ("stories260k", "babyllama105", "embedded")  # by size
Losses = dict[str, dict[int, np.ndarray]]  # method: draw: nats per token of each window


def read_text(path: Path, characters: int = 300_000) -> str:
    """Return the head of a text: .txt, or .jsonl of texts, packed or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        if ".jsonl" not in path.name:
            return file.read(characters)
        rows = [json.loads(line) for line in file]
    texts = (next(v for v in row.values() if isinstance(v, str)) for row in rows)
    return "\n\n".join(texts)[:characters]


Cases = Iterator[tuple[str, Case]]


def series_folders(models: Path) -> list[Path]:
    """Return the folders that `benchmarks.papers.size_series` wrote, the smallest model first."""
    return sorted(models.glob("opt-*"), key=lambda p: (p / "model.safetensors").stat().st_size)


def training_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the tokens that a model of the series has read; nothing of other models."""
    path = (args.models or Path()) / name / "training.json"
    if args.model or not path.is_file():
        return {}
    return {"tokens": json.loads(path.read_text(encoding="utf-8"))["tokens"]}


def series(args: argparse.Namespace) -> Cases:
    """Yield the models that `benchmarks.papers.size_series` wrote, the smallest first."""
    if args.models is None or args.data is None:
        raise SystemExit("say which models: --model DIR, or --models DIR and --data DIR")
    books = args.data / "gutenberg"
    for folder in series_folders(args.models):
        yield (
            folder.name,
            case_of(folder, books / "valid.txt.gz", books / "test.txt.gz", args.windows),
        )


def llamas(args: argparse.Namespace, names: Sequence[str] = LLAMAS) -> Cases:
    """Yield the two models of the data and the embedded one."""
    if args.data is None:
        raise SystemExit("say which models: --model DIR, or --data DIR")
    for name in names:
        yield name, load_case(name, args.data, args.windows, length=LENGTH)


def small(args: argparse.Namespace) -> Cases:
    """Yield the two of the data and, if it is there, the size series."""
    yield from llamas(args, LLAMAS[:2])
    if args.models is not None:
        yield from series(args)


def opened(args: argparse.Namespace, otherwise: Callable[..., Cases] = series) -> Cases:
    """Yield the models of a command line with their texts: those given, or a series of ours."""
    if not args.model:
        yield from otherwise(args)
        return
    if args.calibration is None or args.test is None:
        raise SystemExit("--model needs --calibration and --test: texts to draw from")
    for folder in args.model:
        yield folder.name, case_of(folder, args.calibration, args.test, args.windows)


def length_of(folder: Path) -> int:
    """Return the positions of a window: what the model takes, and at most 256."""
    known = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return min(LENGTH, known.get("max_position_embeddings", LENGTH))


def case_of(folder: Path, calibration: Path, test: Path, windows: int) -> Case:
    """Load a model with its texts."""
    length = length_of(folder)
    return open_case(folder, [read_text(calibration)], read_text(test), length, windows)


@torch.no_grad()
def log_probabilities(model: Any, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the log-probabilities of the next token in each window, (positions, pieces)."""
    for row in windows:
        yield model(input_ids=row[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)


def divergences(model: Any, case: Case) -> np.ndarray:
    """Return the Kullback-Leibler divergence from the float model, nats per token of each window.

    Unlike the loss it has no term that is linear in the error of the weights: rounding cannot gain
    by luck, so small differences between recipes show in it first.
    """
    pairs = zip(
        log_probabilities(case.model, case.windows),
        log_probabilities(model, case.windows),
        strict=True,
    )
    return np.array([float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs])


def losses_on(model: Any, case: Case, windows: torch.Tensor) -> list[float]:
    """Return the nats per token of each window, to four digits."""
    return [round(float(x) / case.scored, 4) for x in window_losses(model, windows)]


@dataclass(frozen=True)
class Cell:
    """A recipe on a model and a draw of calibration windows: what one process measures at a time.

    Attributes
    ----------
    case : Case
    recipe : Any
        A recipe, or a pair of a recipe and its options.
    draw, samples : int
        Of the calibration windows.
    tests : dict of str to Tensor
        Windows of text to measure on, by name.
    divergence : bool
        Whether that from the float model is measured too.
    """

    case: Case
    recipe: Any
    draw: int
    samples: int
    tests: Mapping[str, torch.Tensor]
    divergence: bool

    def measure(self) -> dict[str, Any]:
        """Return bits, seconds to quantize and measure, losses by text, and the divergence."""
        case = self.case
        recipe, options = self.recipe if isinstance(self.recipe, tuple) else (self.recipe, {})
        batches = case.batches(self.samples, self.draw)
        start = time.perf_counter()
        model = copy.deepcopy(case.model)
        result = ptqkit.quantize(
            model,
            recipe,
            batches,
            tokenizer=case.tokenizer,
            progress=False,
            diagnostics=False,
            stored_dtype=case.stored_dtype,
            **options,
        )
        losses = {name: losses_on(model, case, text) for name, text in self.tests.items()}
        facts = {
            "bits": round(float(result.report.totals()["bits_per_weight"]), 3),
            "seconds": round(time.perf_counter() - start, 2),
        }
        if self.divergence:
            facts["kl"] = [round(float(x), 5) for x in divergences(model, case)]
        return {"facts": facts, "losses": losses}


def calibrated(recipe: Any) -> bool:
    """Return whether a recipe, or one with its options, depends on calibration windows."""
    given, options = recipe if isinstance(recipe, tuple) else (recipe, {})
    return bool(replace(as_recipe(given), **options).needs_calibration())


@functools.cache
def workers(jobs: int) -> ProcessPoolExecutor:
    """Return processes that measure cells, the same for all studies of a command."""
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def study(
    name: str,
    case: Case,
    methods: Mapping[str, Any],
    args: argparse.Namespace,
    *,
    divergence: bool = False,
    texts: Mapping[str, torch.Tensor] | None = None,
    **facts: Any,
) -> Iterator[dict[str, Any]]:
    """Yield a record per method and draw, the float model (method "float") first.

    `methods` are recipes, or pairs of a recipe and its options, by name. With `divergence` a record
    has that from the float model beside the losses. `texts`, windows by name, are measured in the
    place of the case's own, and make a record each. What needs no calibration is measured once, and
    is the same for all draws. `args.jobs` processes share the work.
    """

    def records(method: str, draw: int, losses: Any, more: Any) -> Iterator[dict[str, Any]]:
        for text, values in losses.items():
            own = {**facts, "text": text} if texts is not None else facts
            row = {"model": name, **own, "method": method, "draw": draw, **more}
            yield {**row, "losses": values}

    tests = {"": case.windows} if texts is None else texts
    floats = {text: losses_on(case.model, case, windows) for text, windows in tests.items()}
    yield from records("float", -1, floats, {})
    places = [
        (draw, method)
        for draw in range(args.draws)
        for method, recipe in methods.items()
        if draw == 0 or calibrated(recipe)
    ]
    cells = [Cell(case, methods[m], d, args.samples, tests, divergence) for d, m in places]
    each = map if args.jobs == 1 else workers(args.jobs).map
    for (draw, method), found in zip(places, each(Cell.measure, cells), strict=True):
        for same in (draw,) if calibrated(methods[method]) else range(args.draws):
            yield from records(method, same, found["losses"], found["facts"])
        means = [f"{math.exp(np.mean(x)):.4g}" for x in found["losses"].values()]
        print(f"{name} {method} {draw}: {', '.join(means)}", flush=True)


def losses_of(
    records: Iterable[Mapping[str, Any]], key: str = "model", values: str = "losses"
) -> dict[str, Losses]:
    """Return the losses (or other values) by model (or another key), method and draw."""
    found: dict[str, Losses] = defaultdict(lambda: defaultdict(dict))
    for row in records:
        if values in row:
            found[row[key]][row["method"]][row["draw"]] = np.array(row[values])
    return found


def perplexity(draws: Mapping[int, np.ndarray]) -> tuple[float, float]:
    """Return the mean over the draws, and its standard deviation over them (NaN for one)."""
    values = [math.exp(x.mean()) for x in draws.values()]
    if len(values) == 1 or len(set(values)) == 1:  # an exact 0 where all draws are one measurement
        return values[0], 0.0 if len(values) > 1 else math.nan
    return float(np.mean(values)), float(np.std(values, ddof=1))


def paired(first: Mapping[int, np.ndarray], other: Mapping[int, np.ndarray]) -> tuple[float, float]:
    """Return the difference of two losses and its standard error, in thousandths of a nat.

    Over the draws that both have (a float model counts for all of them). The error holds that over
    windows and that over draws of :mod:`ptqkit._paired`: the root of the sum of both squares.
    """
    draws: Sequence[int] = sorted(first.keys() & other.keys()) or sorted({*first, *other} - {-1})

    def of(losses: Mapping[int, np.ndarray]) -> Sample:
        chosen = [losses.get(draw, losses.get(-1)) for draw in draws]
        means = [float(x.mean()) for x in chosen]
        return Sample.of(means, chosen, np.ones(len(chosen[0])), False)

    difference = of(first) - of(other)
    known = [e for e in standard_errors(difference) if not math.isnan(e)]
    return 1e3 * float(difference.values.mean()), 1e3 * math.hypot(*known)
