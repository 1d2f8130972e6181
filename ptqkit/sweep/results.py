"""Results of a sweep as rows, files and text."""

from __future__ import annotations

import csv
import io
import itertools
import math
from typing import Any

from ptqkit._files import plain, write_atomically
from ptqkit._tables import WIDTH, table_width, text_table, wrap_line
from ptqkit.study.cells import FAILED, FLOAT, MISSING, OK, Cell, write_json
from ptqkit.study.result import StudyResult
from ptqkit.sweep.diffusion_files import SAMPLES_METRIC
from ptqkit.sweep.grid import SweepResult

__all__ = [
    "COLUMNS",
    "degradation",
    "published_rows",
    "rows",
    "summary",
    "table",
    "to_dict",
    "write_results",
]

SCHEMA = 2
"""Version of ``results.json`` and of the columns of ``results.csv``."""

#: Columns of ``results.csv``.
COLUMNS = (
    "model",
    "recipe",
    "draw",
    "task",
    "kind",
    "metric",
    "value",
    "higher_is_better",
    "float_value",
    "degradation_percent",
    "excess",
    "excess_se",
    "chance",
    "count",
    "left_out",
    "truncated",
    "bits_per_weight",
    "activation_bits",
    "seconds_quantize",
    "seconds_eval",
    "status",
    "message",
    "cell",
)

_PUBLISHED = ("model", "recipe", "task", "value", "ours", "source")


def degradation(quantized: float, original: float) -> float:
    """``100 (quantized - original) / original``, in percent [IPQS]; NaN if the second is 0."""
    return 100 * (quantized - original) / original if original else math.nan


def rows(result: SweepResult) -> list[dict[str, Any]]:
    """One dict per cell, with the columns of ``results.csv``.

    ``excess_se`` is the standard error of ``excess`` over the windows of the text.
    """
    base = {(c.model, c.task): c for c in result.cells if c.recipe == FLOAT and c.status == OK}
    return [_row(cell, base.get((cell.model, cell.task))) for cell in result.cells]


def _row(cell: Cell, base: Cell | None) -> dict[str, Any]:
    original = base.value if base is not None else math.nan
    measured = cell.status == OK
    found = {name: getattr(cell, name) for name in COLUMNS if hasattr(cell, name)}
    if not measured:
        found |= dict.fromkeys(("count", "left_out", "truncated", "higher_is_better"))
    return {name: found.get(name) for name in COLUMNS} | {
        "float_value": original,
        "degradation_percent": degradation(cell.value, original) if measured else math.nan,
        "excess": cell.value - original if measured else math.nan,
        "excess_se": _error(cell, base) if measured else math.nan,
        "cell": cell.key,
    }


def _error(cell: Cell, base: Cell | None) -> float:
    if base is None or cell.recipe == FLOAT:
        return math.nan
    return StudyResult(cell.model, [base, cell]).compare(cell.recipe, FLOAT, cell.task).se_windows


def summary(result: SweepResult) -> list[dict[str, Any]]:
    """One dict per model, recipe and task: the mean over the draws, with its standard errors.

    Columns are those of :func:`rows`, with ``draws`` instead of ``draw``, ``se_windows``,
    ``se_draws``, and as ``excess_se`` what both give together.
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows(result):
        groups.setdefault((row["model"], row["recipe"], row["task"]), []).append(row)
    return [_merged(result, members) for members in groups.values()]


def _merged(result: SweepResult, members: list[dict[str, Any]]) -> dict[str, Any]:
    bad = next((m for m in members if m["status"] != OK), None)
    row = {**(members[0] if bad is None else bad), "draws": len(members)}
    del row["draw"], row["cell"]
    row |= {"se_windows": row["excess_se"], "se_draws": math.nan}
    if bad is None and len(members) > 1:
        for name in ("value", "degradation_percent", "excess"):
            row[name] = math.fsum(m[name] for m in members) / len(members)
        if not math.isnan(row["float_value"]):
            study = result.study(row["model"])
            found = study.compare(row["recipe"], FLOAT, row["task"])
            row |= {"se_windows": found.se_windows, "se_draws": found.se_draws}
            row["excess_se"] = found.standard_error
    return row


def means(result: SweepResult) -> list[dict[str, Any]]:
    """Mean degradation per model, recipe and kind of task; of tasks that were all measured.

    Accuracies and perplexities are never averaged together: they grow in opposite directions.
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in summary(result):
        groups.setdefault((row["model"], row["recipe"], row["kind"]), []).append(row)
    found = []
    for (model, recipe, kind), members in groups.items():
        values = [m["degradation_percent"] for m in members]
        if recipe != FLOAT and not any(math.isnan(v) for v in values):
            mean = math.fsum(values) / len(values)
            found.append(
                {
                    "model": model,
                    "recipe": recipe,
                    "kind": kind,
                    "tasks": len(values),
                    "degradation_percent": mean,
                }
            )
    return found


def published_rows(result: SweepResult) -> list[dict[str, Any]]:
    """Return published figures, each with ours if model, recipe and task have the same names."""
    found = summary(result)
    ours = {(r["model"], r["recipe"], r["task"]): r["value"] for r in found if r["status"] == OK}
    return [
        {
            "model": p.model,
            "recipe": p.recipe,
            "task": p.task,
            "value": p.value,
            "ours": ours.get((p.model, p.recipe, p.task), math.nan),
            "source": p.source,
        }
        for p in result.plan.published
    ]


def to_dict(result: SweepResult) -> dict[str, Any]:
    """Everything, as it goes to ``results.json``."""
    return plain(
        {
            "schema": SCHEMA,
            "sweep": result.plan.name,
            "plan": result.plan.to_dict(),
            "environment": result.environment,
            "seconds": result.seconds,
            "skipped": result.skipped,
            "rows": rows(result),
            "summary": summary(result),
            "means": means(result),
            "published": published_rows(result),
        }
    )


def write_results(result: SweepResult) -> list[str]:
    """Write ``results.csv``, ``results.json`` and, with published figures, ``published.csv``.

    Returns
    -------
    list of str
        Paths of the files.
    """
    result.out.mkdir(parents=True, exist_ok=True)
    tables: dict[str, tuple[tuple[str, ...], list[dict[str, Any]]]] = {
        "results.csv": (COLUMNS, rows(result))
    }
    if result.plan.published:
        tables["published.csv"] = (_PUBLISHED, published_rows(result))
    for name, (columns, values) in tables.items():
        write_atomically(result.out / name, _csv(columns, values))
    write_json(result.out / "results.json", to_dict(result))
    return [str(result.out / name) for name in (*tables, "results.json")]


def _csv(columns: tuple[str, ...], values: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _field(v) for k, v in row.items()} for row in values)
    return text.getvalue()


def _field(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return str(value).lower() if isinstance(value, bool) else value


def table(result: SweepResult) -> str:
    """Plain text: a table per model, then what was published, then what failed.

    Degradation has the standard error that is known: over the windows of the text and the draws.
    """
    found, averages = summary(result), means(result)
    parts = []
    for model in dict.fromkeys(r["model"] for r in found):
        mine = [r for r in found if r["model"] == model]
        # With --only, whole models and tasks have nothing to show.
        shown = {r["task"] for r in mine if r["status"] != MISSING}
        mine = [r for r in mine if r["task"] in shown]
        if not mine:
            continue
        parts.append(_model_table(model, mine, averages))
    if result.plan.published:
        cells = [
            [
                r["model"],
                r["recipe"],
                r["task"],
                f"{r['value']:g}",
                "-" if math.isnan(r["ours"]) else f"{r['ours']:.4g}",
                r["source"],
            ]
            for r in published_rows(result)
        ]
        title = "published by others, on their models: not measured here"
        parts.append(f"{title}\n{_align([list(_PUBLISHED), *cells])}")
    failed = _failures(found)
    if failed:
        parts.append("\n".join(["failed:", *failed]))
    return "\n\n".join(parts)


def _failures(found: list[dict[str, Any]]) -> list[str]:
    """Return a line per recipe and reason, with the tasks that it holds for."""
    tasks: dict[tuple[str, str], list[str]] = {}
    for row in found:
        if row["status"] == FAILED:
            where = f"{row['model']}/{row['recipe']}"
            tasks.setdefault((where, row["message"]), []).append(row["task"])
    return [
        wrap_line(f"  {where} ({', '.join(names)}): {why}") for (where, why), names in tasks.items()
    ]


def _model_table(model: str, found: list[dict[str, Any]], averages: list[dict[str, Any]]) -> str:
    tasks = list(dict.fromkeys(r["task"] for r in found))
    kinds = {
        r["kind"]: sum(q["kind"] == r["kind"] and q["recipe"] == FLOAT for q in found)
        for r in found
    }
    # A mean of one value says nothing new.
    kinds = {k: n for k, n in kinds.items() if n > 1}
    head = [f"{model}", "W bits", "A bits"]
    for task in tasks:
        head += [task, "%"]
    head += [f"mean % {kind}" for kind in kinds]
    lines = [head]
    for recipe in dict.fromkeys(r["recipe"] for r in found):
        mine = {r["task"]: r for r in found if r["recipe"] == recipe}
        first = next((r for r in mine.values() if r["status"] == OK), None)
        line = [recipe, _number(first, "bits_per_weight", ".2f")]
        line.append(_number(first, "activation_bits", ".0f"))
        for task in tasks:
            line += _value(mine.get(task), recipe)
        for kind in kinds:
            mean = next(
                (
                    a["degradation_percent"]
                    for a in averages
                    if (a["model"], a["recipe"], a["kind"]) == (model, recipe, kind)
                ),
                math.nan,
            )
            line.append("" if math.isnan(mean) else f"{mean:+.2f}")
        lines.append(line)
    return _in_parts(lines, [3, *[2] * len(tasks), *[1] * len(kinds)])


def _in_parts(lines: list[list[str]], sizes: list[int]) -> str:
    """Return a table, or several if it is too wide, each with the first block of columns.

    Parameters
    ----------
    lines : list of list of str
    sizes : list of int
        Columns of each block; a block is never divided.
    """
    columns = [list(column) for column in zip(*lines, strict=True)]
    ends = list(itertools.accumulate(sizes))
    first = columns[: ends[0]]
    parts = [list(first)]
    for start, end in itertools.pairwise(ends):
        if len(parts[-1]) > len(first) and table_width(parts[-1] + columns[start:end]) > WIDTH:
            parts.append(list(first))
        parts[-1] += columns[start:end]
    return "\n\n".join(_align([list(line) for line in zip(*p, strict=True)]) for p in parts)


def _number(row: dict[str, Any] | None, name: str, form: str) -> str:
    return "" if row is None or math.isnan(row[name]) else format(row[name], form)


def _value(row: dict[str, Any] | None, recipe: str) -> list[str]:
    if row is None:
        return ["", ""]
    if row["status"] != OK:
        return [row["status"], ""]
    if row["metric"] == SAMPLES_METRIC:
        return [_decibel(row), ""]
    accuracy = row["higher_is_better"]
    shown = f"{100 * row['value']:.1f}" if accuracy else f"{row['value']:.4g}"
    if not accuracy and row["value"] < 1000:
        shown = f"{row['value']:.3f}"
    change = row["degradation_percent"]
    if recipe == FLOAT or math.isnan(change):
        return [shown, ""]
    # The float model's own value is as it is: what is uncertain is the excess.
    error = degradation(row["float_value"] + row["excess_se"], row["float_value"])
    return [shown, f"{change:+.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")]


def _decibel(row: dict[str, Any]) -> str:
    """Signal to noise of samples, with its standard error; of the float model there is no noise."""
    value, error = row["value"], row["excess_se"]
    if not value:
        return "float"
    shown = f"{-10 * math.log10(value):.2f} dB"
    return shown if math.isnan(error) else f"{shown} ± {10 / math.log(10) * error / value:.2f}"


def _align(lines: list[list[str]]) -> str:
    """Return a table with columns of words to the left and columns of numbers to the right."""
    header, *rest = lines
    words = {
        k
        for k, (name, *column) in enumerate(zip(*lines, strict=True))
        # A cell that failed says so among numbers.
        if any(c and c[0] not in "+-0123456789" for c in column)
        and not {"failed", "missing"} & {name, *column}
    }
    return text_table(header, rest, left={0, *words})
