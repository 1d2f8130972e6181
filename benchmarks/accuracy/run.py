"""Perplexity of recipes on small models, window by window, over several calibration draws.

    python -m benchmarks.accuracy.run --data ../shared/data --out benchmarks/results/accuracy

Writes `windows.csv`, a row per model, grid, recipe, draw and test window with the summed negative
log-likelihood (draw -1: the float model), `runs.csv` with times and objectives, and `tuned.csv`
with what tuning did. Cells that are in the first two already are left alone; with `--processes`
several are measured at once, each on `--threads`. All of a draw comes before the next, the most
telling grids first, tuned recipes last. Where codes learn, the text that the float model writes is
kept in `--own` for all grids of a draw, and `--tune-device cuda` tunes on GPUs what a CPU has
quantized. `--models` is the folder of the model that `benchmarks.accuracy.train_opt` trains.
`benchmarks.accuracy.tables` makes the tables.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy.models import MODELS, TRAINED, Case, load_case
from benchmarks.accuracy.prototypes.rotation import rotated
from benchmarks.accuracy.windows import window_losses
from ptqkit._defaults import FORWARD_BATCH_SIZE
from ptqkit.hf import FloatWeights, own_text, quantize, tune
from ptqkit.hf.quantization.float_logits import split_windows

#: The most telling ones first.
GRIDS: dict[str, dict[str, Any]] = {
    "4 channel": {"bits": 4, "group_size": None},
    "3 g64": {"bits": 3, "group_size": 64},
    "2 g64": {"bits": 2, "group_size": 64},
    "3 channel": {"bits": 3, "group_size": None},
    "4 g128": {"bits": 4, "group_size": 128},
    "3 g128": {"bits": 3, "group_size": 128},
    "2 g128": {"bits": 2, "group_size": 128},
    "4 g64": {"bits": 4, "group_size": 64},
    "4 g32": {"bits": 4, "group_size": 32},
    "3 g32": {"bits": 3, "group_size": 32},
    "2 g32": {"bits": 2, "group_size": 32},
    "ternary g8": {"bits": "ternary", "group_size": 8},
    "2 channel": {"bits": 2, "group_size": None},
}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "reference": ("reference", {}),
    "quality": ("quality", {}),
    "quality, QEP 0.5": ("quality", {"error_propagation": 0.5}),
    "quality, refit": ("quality", {"refit_rounds": 2}),
    "best": ("best", {}),
    "best, rows apart": ("best", {"row_coupling": 0}),
    "best, rotated": ("best", {}),
    "best, average bits": ("best", {}),
    "best, average bits, beam 16": ("best", {"beam_width": 16}),
    "best, tuned": ("best", {"tune": 150}),
    "quality, tuned": ("quality", {"tune": 150}),
    "best, codes learned": ("best", {"tune": 2000, "tune_codes": 0.01, "tune_own_text": 8192}),
    "best, codes learned, 300 steps": ("best", {"tune": 300, "tune_codes": 0.03,
                                                "tune_own_text": 2048}),
    "best, average bits, codes learned": ("best", {"tune": 2000, "tune_codes": 0.01,
                                                   "tune_own_text": 8192}),
    "best, rows apart, tuned": ("best", {"row_coupling": 0, "tune": 150}),
    "best, rows apart, alpha 0.75": ("best", {"row_coupling": 0, "error_propagation": 0.75,
                                              "residual_propagation": 0.75}),
    "qronos": ("reference", {"error_propagation": 1.0, "target": "qronos", "order": "act",
                             "static_groups": True}),
    "gptaq": ("reference", {"error_propagation": 0.25, "target": "gptaq", "order": "act",
                            "static_groups": True}),
}  # fmt: skip
#: Rounding to nearest needs no calibration.
ONE_DRAW = ("rtn",)
#: The most for a model whose codes are 28 times those of stories260k: each step is dearer.
LARGE = {"embedded": {"tune": 1500, "tune_own_text": 2048, "tune_options": {"windows": 8}}}
#: The grid's bits are an average over the layers, some of which have more and some fewer.
AVERAGE = ("best, average bits", "best, average bits, beam 16", "best, average bits, codes learned")
#: Of LLaMA shapes: residual stream and values are rotated beforehand, as prototypes do it.
ROTATED = ("best, rotated",)
WINDOWS = ("model", "grid", "recipe", "draw", "window", "nll", "tokens")
RUNS = ("model", "grid", "recipe", "draw", "seconds", "seconds_solve", "objective", "bits")
TUNED = ("model", "grid", "recipe", "draw", "steps", "kept", "loss_before", "loss_after", "windows",
         "held_out", "codes_changed", "recorded", "seconds")  # fmt: skip
#: Windows of own text that are written at once.
AT_ONCE = {"cpu": 64, "cuda": 8192}


def recipe_options(model: nn.Module, recipe: str, grid: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a recipe on a grid."""
    options = {**grid_options(model, grid), **RECIPES[recipe][1]}
    return options | ({"bits": float(grid["bits"])} if recipe in AVERAGE else {})


def grid_options(model: nn.Module, grid: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a grid: where a group does not divide the inputs, the nearest does."""
    size = grid["group_size"]
    if size is None:
        return dict(grid)
    found = {}
    for name, layer in model.named_modules():
        inputs = getattr(layer, "in_features", size)
        if name.endswith("lm_head") or inputs % size == 0:
            continue
        divisors = (d for d in range(2, inputs + 1) if inputs % d == 0)
        found[name] = {"group_size": min(divisors, key=lambda d: (abs(d - size), d))}
    return {**grid, "overrides": found}


class Table:
    """A CSV file that grows row by row."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path, self.columns = path, columns
        self.seen: set[tuple[str, ...]] = set()
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.seen = {tuple(row[c] for c in columns[:4]) for row in csv.DictReader(file)}
        else:
            self.add([columns])

    def add(self, rows: Any) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


@dataclass(frozen=True)
class Learning:
    """How codes learn, apart from quantization.

    Attributes
    ----------
    case : Case
        The float model, on the device of tuning.
    device : str
    text : list of dict
        What it wrote.
    options : dict
        Of a recipe: ``tune``, ``tune_codes``, and in ``tune_options`` what else tuning takes.
    """

    case: Case
    device: str
    text: list[Any]
    options: dict[str, Any]

    def __call__(self, result: Any, batches: Any) -> None:
        """Tune a result, and leave its model on the device."""
        result.model.to(self.device)
        tune(
            result,
            batches,
            self.options["tune"],
            float_model=self.case.model,
            own_text=self.text,
            code_rate=self.options["tune_codes"],
            batch_size=2 * FORWARD_BATCH_SIZE,
            progress=False,
            **self.options.get("tune_options", {}),
        )


def measure(
    case: Case,
    floats: FloatWeights,
    batches: Any,
    recipe: str,
    options: dict[str, Any],
    learning: Learning | None = None,
) -> tuple[list[Any], list[float], list[Any]]:
    """Quantize the model; return what that took, each window's loss, and what tuning did."""
    device = next(case.model.parameters()).device
    floats.restore()
    start = time.perf_counter()
    try:
        result = quantize(
            case.model,
            recipe,
            batches,
            tokenizer=case.tokenizer,
            progress=False,
            diagnostics=False,
            requantize=True,
            batch_size=FORWARD_BATCH_SIZE,
            stored_dtype=case.stored_dtype,
            threads=torch.get_num_threads(),
            **options,
        )
        if learning is not None:
            learning(result, batches)
        seconds = time.perf_counter() - start
        losses = window_losses(case.model, case.windows)
    finally:
        case.model.to(device)
    totals = result.report.totals()
    facts = [
        f"{seconds:.3f}",
        f"{result.report.seconds['solve']:.3f}",
        f"{totals['objective']:.6g}",
        f"{totals['bits_per_weight']:.4f}",
    ]
    told = result.tuning
    if told is None:
        return facts, losses, []
    tuned = [told.steps, told.kept, f"{told.loss_before:.6f}", f"{told.loss_after:.6f}",
             told.windows, told.held_out, told.codes_changed, int(told.recorded),
             f"{told.seconds:.1f}"]  # fmt: skip
    return facts, losses, tuned


def written(case: Case, batches: Any, count: int, seed: int, path: Path) -> list[Any]:
    """Return what the float model writes, from a file if it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait for the same text
        if not path.exists():
            at_once = AT_ONCE[case.model.device.type]
            text = own_text(
                case.model, split_windows(batches), count, batch_size=at_once, seed=seed
            )
            torch.save(torch.cat([w["input_ids"] for w in text]), path)
            torch.cuda.empty_cache()  # for the other processes
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row)}
        for row in torch.load(path).split(1)
    ]


@dataclass(frozen=True)
class Cells:
    """Recipes to measure on one model, grid and draw; draw -1 is the float model."""

    model: str
    grid: str
    draw: int
    recipes: tuple[str, ...]
    data: Path
    samples: int
    windows: int
    device: str
    models: Path | None
    tune_device: str
    own: Path | None

    def load(self, device: str | None = None) -> Case:
        """Load the model anew."""
        return load_case(self.model, self.data, self.windows, device or self.device, self.models)

    @property
    def alone(self) -> Cells:
        """What is the same for all cells of a model."""
        return replace(self, grid="", draw=0, recipes=())


@cache
def prepared(cells: Cells) -> tuple[Case, FloatWeights]:
    """Load a model once per process."""
    case = cells.load()
    return case, FloatWeights(case.model)


@cache
def prepared_teacher(cells: Cells) -> Case:
    """Load a float model once per process, to learn from."""
    return cells.load(cells.tune_device)


def learning(cells: Cells, batches: Any, options: dict[str, Any]) -> Learning | None:
    """Take the options of learning codes out of a recipe's."""
    if "tune_codes" not in options or cells.own is None:
        return None
    teacher = prepared_teacher(cells.alone)
    for key, most in LARGE.get(cells.model, {}).items():
        given = options.get(key, {})
        options[key] = given | most if isinstance(most, dict) else min(given, most)
    count = options.pop("tune_own_text")
    path = cells.own / f"{cells.model}-{cells.draw}-{count}.pt"
    text = written(teacher, batches, count, cells.draw, path)
    taken = {k: options.pop(k) for k in ("tune", "tune_codes", "tune_options") if k in options}
    return Learning(teacher, cells.tune_device, text, taken)


def study(cells: Cells) -> list[tuple[tuple[str, ...], list[Any], list[float], list[Any], int]]:
    """Measure cells; returns key, facts, losses, what tuning did and scored tokens of each."""
    case, floats = prepared(cells.alone)
    if cells.draw < 0:
        key = (cells.model, "", "float", "-1")
        floats.restore()
        return [(key, [], window_losses(case.model, case.windows), [], case.scored)]
    batches = case.batches(cells.samples, cells.draw)
    found = []
    for recipe in cells.recipes:
        preset = RECIPES[recipe][0]
        options = recipe_options(case.model, recipe, GRIDS[cells.grid])
        learn = learning(cells, batches, options)
        if recipe in ROTATED:  # which changes the structure, for good
            own = cells.load()
            with rotated(own.model):
                told = measure(own, FloatWeights(own.model), batches, preset, options)
        else:
            told = measure(case, floats, batches, preset, options, learn)
        found.append(((cells.model, cells.grid, recipe, str(cells.draw)), *told, case.scored))
    return found


def missing(args: argparse.Namespace, windows: Table, runs: Table) -> Iterator[Cells]:
    """Yield what is not there yet: all models draw by draw, grid by grid; tuned recipes last."""
    common = (
        args.data, args.samples, args.windows, args.device, args.models,
        args.tune_device or args.device, args.own,
    )  # fmt: skip
    names = args.model or [m for m in MODELS if m != TRAINED or args.models]
    for name in names:
        if (name, "", "float", "-1") not in windows.seen:
            yield Cells(name, "", -1, (), *common)
    chosen = args.recipe or list(RECIPES)
    parts = [[r for r in chosen if ("tune" in RECIPES[r][1]) == tuned] for tuned in (False, True)]
    for part, draw, grid, name in product(parts, range(args.draws), args.grid or GRIDS, names):
        recipes = tuple(
            r
            for r in part
            if not (r in ONE_DRAW and draw)
            and not (r in ROTATED and name == TRAINED)
            and not (r in AVERAGE and isinstance(GRIDS[grid]["bits"], str))
            and not all((name, grid, r, str(draw)) in table.seen for table in (windows, runs))
        )
        if args.processes == 1 and recipes:
            yield Cells(name, grid, draw, recipes, *common)
        elif recipes:
            yield from (Cells(name, grid, draw, (r,), *common) for r in recipes)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True, help="folder of the models and texts")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--model", action="append", choices=MODELS)
    p.add_argument("--recipe", action="append", choices=RECIPES)
    p.add_argument("--grid", action="append", choices=GRIDS)
    p.add_argument("--draws", type=int, default=3, help="calibration seeds")
    p.add_argument("--samples", type=int, default=64, help="calibration windows")
    p.add_argument("--windows", type=int, default=48, help="test windows")
    p.add_argument("--processes", type=int, default=1, help="cells at once")
    p.add_argument("--threads", type=int, default=1, help="of each of several processes")
    p.add_argument("--device", default="cpu")
    p.add_argument("--tune-device", help="cuda: all GPUs in turn; by default the device")
    p.add_argument("--own", type=Path, help="folder that keeps the float models' own text")
    p.add_argument("--models", type=Path, help="folder of the model that was trained here")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    windows, runs, tuned = (
        Table(args.out / f"{n}.csv", c)
        for n, c in (("windows", WINDOWS), ("runs", RUNS), ("tuned", TUNED))
    )
    todo = list(missing(args, windows, runs))
    if args.processes == 1:
        note(map(study, todo), windows, runs, tuned)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.processes, begin, (args.threads, context.Value("i", 0))) as pool:
        note(pool.imap_unordered(study, todo), windows, runs, tuned)


def begin(threads: int, begun: Any) -> None:
    """Set a process's threads, and its GPU if there are several."""
    torch.set_num_threads(threads)
    with begun.get_lock():
        place, begun.value = begun.value, begun.value + 1
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(place % torch.cuda.device_count())


def note(found: Any, windows: Table, runs: Table, tuned: Table) -> None:
    """Write cells as they come."""
    for cells in found:
        for key, facts, losses, learned, scored in cells:
            if facts:
                runs.add([(*key, *facts)])
            if learned:
                tuned.add([(*key, *learned)])
            windows.add((*key, i, f"{v:.4f}", scored) for i, v in enumerate(losses))
            value = torch.tensor(losses).sum() / (len(losses) * scored)
            print(*key, *facts, f"{value.exp():.4f}", sep=" | ", flush=True)


if __name__ == "__main__":
    main()
