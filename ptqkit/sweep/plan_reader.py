"""From the tables of a sweep file to a plan, with every problem noted."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ptqkit._defaults import BATCH_SIZE, FORWARD_BATCH_SIZE
from ptqkit.demo import DEMO
from ptqkit.errors import PreflightError, did_you_mean
from ptqkit.recipe import as_recipe
from ptqkit.study.cells import FLOAT
from ptqkit.study.products import Case, expand_parts, named_cases
from ptqkit.sweep.diffusion_files import is_diffusion_model, read_prompts
from ptqkit.sweep.items import read_items
from ptqkit.sweep.plan import (
    Calibration,
    ModelPlan,
    Plan,
    Published,
    RecipePlan,
    Sampling,
    TaskPlan,
    TextSource,
)
from ptqkit.sweep.reader import REQUIRED, Reader, whole

__all__ = ["read_plan"]

_CORRECTIONS = ("bias", "row_length", "row_sum", "code_sum")
_GRIDS_OF = ("probabilities", "exponentials", "squares")
_RANGES = ("fixed", "calibrated", "search")
_SOFTMAX = {
    "correction": "bias",
    "granularity": "head",
    "grid_range": "fixed",
    "grid_of": "probabilities",
}
_GRANULARITIES = ("head", "tensor", "step", "step_head")
_KINDS = ("perplexity", "zero-shot", "samples")
_DTYPES = ("auto", "float32", "float16", "bfloat16")


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read and check a sweep file.

    Parameters
    ----------
    path : path
        A TOML file.

    Returns
    -------
    Plan

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    PreflightError
        With all problems of the file: syntax, unknown keys, wrong types, names used twice or not
        at all, files that do not exist, recipes that contradict themselves.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no sweep file {str(path)!r}")
    problems: list[str] = []
    plan = _PlanReader(path, _load(path), problems).plan()
    if problems:
        raise PreflightError(problems)
    return plan


def _load(path: Path) -> dict[str, Any]:
    # Python 3.10 has no tomllib.
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    try:
        toml = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a sweep file needs tomli on Python 3.10; install it with: pip install tomli",
            name="tomli",
        ) from error
    try:
        return toml.loads(path.read_text(encoding="utf-8"))
    except (toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PreflightError([f"{path.name} is not valid TOML: {error}"]) from None


class _PlanReader:
    """Builds a plan; whatever is wrong goes to ``problems``."""

    def __init__(self, path: Path, values: dict[str, Any], problems: list[str]) -> None:
        self.path, self.problems = path, problems
        self.top = Reader(values, path.name, problems)

    def plan(self) -> Plan:
        """Read all tables; the plan is whole only if there are no problems."""
        top = self.top
        name = top.take("name", str, self.path.stem)
        output = top.take("output", str, name, lambda v: None if v else "a folder")
        base = top.take("calibration", dict, None)
        tasks = tuple(self._task(r) for r in self._tables("tasks"))
        names = tuple(t.name for t in tasks)
        models = tuple(self._model(r, base, tasks) for r in self._tables("models"))
        chosen = tuple(m.name for m in models)
        recipes = tuple(p for r in self._tables("recipes") for p in self._recipes(r, chosen))
        published = tuple(self._published(r) for r in self._tables("published", needed=False))
        top.done()
        self._fit(models, recipes)
        self._names("tasks", names)
        self._names("models", chosen)
        self._names("recipes", tuple(r.name for r in recipes), reserved=FLOAT)
        for task in names:
            if models and not any(task in m.tasks for m in models):
                self.problems.append(f"{self.path.name}: no model runs task {task!r}")
        return Plan(self.path, name, output, models, tasks, recipes, published)

    def _tables(self, key: str, needed: bool = True) -> list[Reader]:
        found = self.top.take(key, list, REQUIRED if needed else [])
        if found == [] and needed:
            self.top.problem(f"{key} is empty: give at least one [[{key}]]")
        readers = []
        for i, values in enumerate(found or []):
            name = values.get("name") if isinstance(values, dict) else None
            where = f"{self.path.name}: {key}[{i}]" + (f" {name!r}" if name is not None else "")
            readers.append(Reader(values, where, self.problems))
        return readers

    def _names(self, key: str, names: tuple[str, ...], reserved: str | None = None) -> None:
        for name in sorted({n for n in names if names.count(n) > 1 and n}):
            self.problems.append(f"{self.path.name}: {key}: the name {name!r} is used twice")
        if reserved in names:
            self.problems.append(
                f"{self.path.name}: {key}: the name {reserved!r} is that of the model as it is"
            )

    def _source(self, reader: Reader, key: str, optional: bool = False) -> TextSource:
        name = reader.take(key, str)
        documents = reader.take("documents", list, None) if key == "text" else None
        if documents is not None and not (
            len(documents) == 2
            and all(type(d) is int for d in documents)
            and 0 <= documents[0] < documents[1]
        ):
            reader.problem(f"documents must be [first, end] with first < end, not {documents}")
            documents = None
        whitespace = "keep"
        if key == "text":
            whitespace = reader.take("whitespace", str, "keep", choices=("keep", "collapse"))
        if name is None:
            return TextSource("")
        if name == DEMO and key == "text":
            if documents is not None:
                reader.problem("documents are for a .jsonl file, not for the text of the demo")
            return TextSource(DEMO, None, whitespace)
        path = self._path(name)
        if not path.is_file() and not optional:
            reader.problem(f"{key} {name!r}: there is no such file (looked for {path})")
        return TextSource(str(path), tuple(documents) if documents else None, whitespace)

    def _path(self, name: str) -> Path:
        return (self.path.parent / name).resolve()

    def _fit(self, models: tuple[ModelPlan, ...], recipes: tuple[RecipePlan, ...]) -> None:
        """Note recipes that a kind of model does not have."""
        for recipe in recipes:
            for model in (m for m in models if m.name in recipe.models):
                found = _misfit(recipe, model.sampling is not None)
                if found:
                    self.problems.append(
                        f"{self.path.name}: recipe {recipe.name!r}: {found}; leave "
                        f"{model.name!r} out of its models"
                    )

    def _calibration(
        self, values: Mapping[str, Any], where: str, diffusion: bool = False
    ) -> Calibration:
        reader = Reader(values, where, self.problems)
        if diffusion:  # its latents are its own samples
            for key in ("text", "documents", "whitespace"):
                reader.take(key, (str, list), None)
        result = Calibration(
            TextSource(DEMO) if diffusion else self._source(reader, "text"),
            reader.take("samples", int, Calibration.samples, whole(1)),
            reader.take("sequence_length", int, Calibration.sequence_length, whole(2)),
            reader.take("batch_size", int, Calibration.batch_size, whole(1)),
            reader.take("seed", int, Calibration.seed, whole(0)),
            _start_token(reader),
            reader.take("draws", int, Calibration.draws, whole(1)),
        )
        reader.done()
        return result

    def _sampling(self, model: Reader, path: str) -> tuple[Sampling, str | None]:
        """Read how a diffusion model samples, and of a pipeline the file of its prompts."""
        reader = Reader(model.take("sampling", dict, {}), f"{model.where}: sampling", self.problems)
        found = Sampling(
            reader.take("steps", int, Sampling.steps, whole(1)),
            float(reader.take("guidance", float, Sampling.guidance)),
            reader.take("latents", int, Sampling.latents, whole(1)),
            reader.take("batch_size", int, Sampling.batch_size, whole(1)),
        )
        reader.done()
        given = model.take("prompts", str, None)
        if not Path(path, "model_index.json").is_file():
            if given is not None:
                model.problem("prompts are for a pipeline; this UNet has labels")
            return found, None
        prompts = None if given is None else str(self._path(given))
        if prompts is None:
            model.problem("prompts is missing: the file of the prompts, one on each line")
        elif not Path(prompts).is_file() or not read_prompts(prompts):
            model.problem(f"prompts {given!r}: there is no such file, or nothing in it ({prompts})")
        return found, prompts

    def _model(
        self, reader: Reader, base: Mapping[str, Any] | None, tasks: tuple[TaskPlan, ...]
    ) -> ModelPlan:
        name = _name(reader)
        given = reader.take("path", str)
        path = given if given in (None, DEMO) else str(self._path(given))
        optional = reader.take("optional", bool, False)
        change = reader.take("calibration", dict, {})
        missing = path not in (None, DEMO) and not Path(path).is_dir()
        if missing and not optional:
            reader.problem(
                f"path {given!r}: there is no such folder (looked for {path}); optional = true "
                "skips a model that is not there"
            )
        diffusion = path not in (None, DEMO) and is_diffusion_model(path)
        config = path in (None, DEMO) or Path(path, "config.json").is_file()
        if not missing and not diffusion and not config:
            reader.problem(f"path {given!r}: the folder has no config.json, so it is not a model")
        where = f"{self.path.name}: calibration" + (f" of model {name!r}" if change else "")
        fitting = tuple(t.name for t in tasks if (t.kind == "samples") == diffusion)
        if missing:
            fitting = tuple(t.name for t in tasks)
        known = set(fitting) == {t.name for t in tasks}
        chosen = _chosen(
            reader, "tasks", fitting, "not in the file" if known else "no task of its kind"
        )
        if base is None and not change and not diffusion:
            self.top.problem("key 'calibration' is missing")
            base = {"text": DEMO}
        unused = sorted(set(change) - {"seed", "draws"}) if diffusion else []
        if unused:
            reader.problem(
                f"calibration: a diffusion model is fitted to samples of its own, without "
                f"{', '.join(unused)}: give seed and draws alone, and latents in sampling"
            )
        # The texts of a model that is skipped may be missing with it.
        kept = len(self.problems)
        calibration = self._calibration({**(base or {}), **change}, where, diffusion)
        if missing and optional:
            del self.problems[kept:]
        elif where.endswith("calibration"):
            # The same lines for every model without changes of its own: once is enough.
            new = [p for p in self.problems[kept:] if p not in self.problems[:kept]]
            self.problems[kept:] = new
        outliers = None if diffusion else reader.take("outliers", dict, None)
        sampling, prompts = self._sampling(reader, path) if diffusion else (None, None)
        plan = ModelPlan(
            name,
            path or "",
            calibration,
            chosen,
            reader.take("dtype", str, "auto", choices=_DTYPES),
            optional,
            None if outliers is None else _outliers(outliers, reader),
            sampling,
            prompts,
        )
        reader.done()
        return plan

    def _task(self, reader: Reader) -> TaskPlan:
        name, kind = _name(reader), reader.take("kind", str, REQUIRED, choices=_KINDS)
        if kind is None:
            reader.rest()
            return TaskPlan(name, "", TextSource(""), {})
        optional = reader.take("optional", bool, False)
        if kind == "perplexity":
            source = self._source(reader, "text", optional)
            settings = {
                "windows": reader.take("windows", int, None, whole(1)),
                "max_tokens": reader.take("max_tokens", int, None, whole(2)),
                "window": reader.take("window", int, None, whole(2)),
                "stride": reader.take("stride", int, None, whole(1)),
                "start_token": _start_token(reader),
                "batch_size": reader.take("batch_size", int, BATCH_SIZE, whole(1)),
            }
            _check_windows(reader, settings)
        elif kind == "samples":
            source = TextSource("")
            settings = {
                "images": reader.take("images", int, 8, whole(1)),
                "seed": reader.take("seed", int, 0, whole(0)),
            }
        else:
            source = self._source(reader, "file", optional)
            settings = {
                "limit": reader.take("limit", int, None, whole(1)),
                "metric": reader.take("metric", str, "acc", choices=("acc", "acc_norm")),
                "too_long": reader.take("too_long", str, "error", choices=("error", "skip")),
                "batch_size": reader.take("batch_size", int, FORWARD_BATCH_SIZE, whole(1)),
            }
            self._items(reader, source, settings)
        reader.done()
        return TaskPlan(name, kind, source, settings, optional)

    def _items(self, reader: Reader, source: TextSource, settings: dict[str, Any]) -> None:
        """Read the items of a zero-shot task once, for their form alone."""
        if not Path(source.path).is_file():
            return
        try:
            form, _ = read_items(source.path, settings["limit"])
        except (ValueError, OSError, EOFError) as error:
            reader.problem(str(error))
            return
        if settings["metric"] == "acc_norm" and form != "choices":
            reader.problem("metric 'acc_norm' is for items with 'choices' alone")

    def _recipes(self, reader: Reader, models: tuple[str, ...]) -> Iterator[RecipePlan]:
        """Yield the recipe of a table, or every case of its product."""
        name, chosen = _name(reader), _chosen(reader, "models", models)
        softmax = reader.take("softmax", (dict, list, str), FLOAT)
        chosen_softmax = [s for given in _listed(softmax) for s in _spelled(given)]
        axes = {"softmax": [_softmax(reader, s) for s in chosen_softmax]}
        parts = reader.take("parts", list, None)
        if parts is not None:
            reader.done()
            values: list[tuple[dict[str, Any], Any]] = list(expand_parts(parts))
        else:
            value = reader.rest()
            values = [({}, value)]
            if value.get("preset") == FLOAT:
                values = [({}, None)]
                if len(value) > 1:
                    reader.problem(
                        f"float weights take no options, but there is {list(value)[1]!r}"
                    )
            else:
                # A list is an axis, but where the option itself is a list.
                axes |= {k: v for k, v in value.items() if isinstance(v, list) and k != "include"}
                values = [({}, {k: v for k, v in value.items() if k not in axes})]
        for labels, value in values:
            yield from _plans(reader, name, value, labels, axes, chosen)

    def _published(self, reader: Reader) -> Published:
        model, recipe, task = (reader.take(key, str) for key in ("model", "recipe", "task"))
        value, source = reader.take("value", float), reader.take("source", str)
        reader.done()
        return Published(model, recipe, task, value, source)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _spelled(value: Any) -> list[Any]:
    """Spell out the lists among the options of a softmax."""
    if not isinstance(value, dict):
        return [value]
    keys, lists = list(value), [_listed(v) for v in value.values()]
    return [dict(zip(keys, chosen, strict=True)) for chosen in itertools.product(*lists)]


def _softmax(reader: Reader, value: Any) -> dict[str, Any] | None:
    """Options of a quantized softmax; ``"float"`` leaves it as it is."""
    if value == FLOAT:
        return None
    if not isinstance(value, dict):
        reader.problem(f"softmax must be 'float', a table or a list of them, not {value!r}")
        return None
    options = Reader(value, f"{reader.where}: softmax", reader.problems)
    correction = options.take("correction", str, "bias", choices=("none", *_CORRECTIONS))
    found = {
        "bits": options.take("bits", int, 8, whole(2)),
        "correction": None if correction == "none" else correction,
        "granularity": options.take("granularity", str, "head", choices=_GRANULARITIES),
        "grid_range": options.take("range", str, "fixed", choices=_RANGES),
        "grid_of": options.take("grid_of", str, "probabilities", choices=_GRIDS_OF),
    }
    options.done()
    # Tables and keys of cells name what is not the default alone.
    return {k: v for k, v in found.items() if k == "bits" or v != _SOFTMAX[k]}


def _plans(
    reader: Reader,
    name: str,
    value: Any,
    labels: Mapping[str, Any],
    axes: Mapping[str, Any],
    models: tuple[str, ...],
) -> Iterator[RecipePlan]:
    """Yield the cases of one recipe; what is wrong with one is a problem of the table."""
    shown = [f"{k}={v}" for k, v in labels.items()]
    base = ", ".join([name, *shown])
    single = all(len(values) == 1 for values in axes.values()) and list(axes) == ["softmax"]
    try:
        if single and value is None:
            if axes["softmax"] == [None]:
                reader.problem("float weights need a softmax: without, it is the row 'float'")
                return
            found = [Case(base, None, axes["softmax"][0], {})]
        elif single:
            found = [Case(base, as_recipe(value), axes["softmax"][0], {})]
        else:
            found = named_cases({base: value}, axes)
    except PreflightError as error:
        for problem in error.problems:
            reader.problem(problem)
        return
    except (ValueError, TypeError) as error:
        reader.problem(str(error))
        return
    for case in found:
        yield RecipePlan(
            case.name,
            value,
            None if case.recipe is None else case.recipe.to_dict(),
            models,
            case.softmax,
            {"recipe": name, **labels, **case.parameters},
            case.needs_calibration,
        )


def _misfit(recipe: RecipePlan, diffusion: bool) -> str:
    """Return what of a recipe is for the other kind of models; empty if nothing."""
    softmax = recipe.softmax or {}
    if not diffusion:
        step = str(softmax.get("granularity", "")).startswith("step")
        return "corrections per time step are not for language models" if step else ""
    if softmax.get("correction") == "row_length":
        return "row_length is for language models"
    other = "" if recipe.resolved is None else as_recipe(recipe.resolved).beyond_weights
    return f"{other} is for language models" if other else ""


def _check_windows(reader: Reader, settings: Mapping[str, Any]) -> None:
    if settings["windows"] is None:
        return
    if settings["window"] is None:
        reader.problem("windows needs window, their length")
    for key in ("max_tokens", "stride"):
        if settings[key] is not None:
            reader.problem(f"windows and {key} contradict each other: give one of them")


def _name(reader: Reader) -> str:
    # The slash separates the names in --only; a cell of the CSV file is one line.
    return (
        reader.take(
            "name",
            str,
            REQUIRED,
            lambda v: (
                None if v.strip() and v.isprintable() and "/" not in v else "a name without '/'"
            ),
        )
        or ""
    )


def _chosen(
    reader: Reader, key: str, names: tuple[str, ...], else_it_is: str = "not in the file"
) -> tuple[str, ...]:
    chosen = reader.take(key, list, list(names))
    for name in chosen:
        if name not in names:
            hint = did_you_mean(name, names) or f"; there are {', '.join(names) or 'none'}"
            reader.problem(f"{key} names {name!r}, which is {else_it_is}{hint}")
    if not chosen and names:
        reader.problem(f"{key} is empty; leave it out for all of them")
    return tuple(n for n in names if n in chosen)


def _start_token(reader: Reader) -> str | int | None:
    value = reader.take(
        "start_token",
        (str, int),
        "auto",
        lambda v: (
            None
            if v in ("auto", "none") or (type(v) is int and v >= 0)
            else "'auto', 'none' or a token id"
        ),
    )
    return None if value == "none" else value


def _outliers(values: Mapping[str, Any], model: Reader) -> dict[str, Any]:
    reader = Reader(values, f"{model.where}: outliers", model.problems)
    positive = lambda v: None if v > 0 else "above 0"  # noqa: E731
    result = {
        "channels": reader.take("channels", int, 6, whole(1)),
        "factor": float(reader.take("factor", float, 30.0, positive)),
        "seed": reader.take("seed", int, 0, whole(0)),
    }
    reader.done()
    return result
