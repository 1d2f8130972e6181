"""Items of a zero-shot task: three forms of JSON lines."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from pathlib import Path
from typing import Any

from ptqkit._defaults import LONGEST_LINE

__all__ = ["FORMS", "chance", "read_items"]

_CHOICES = ("context", "choices", "gold")
_CONTEXTS = ("contexts", "continuation", "gold")
_CONTINUATION = ("context", "continuation")

#: Form of the items by the fields they have; the longest match counts.
FORMS = {"choices": _CHOICES, "contexts": _CONTEXTS, "continuation": _CONTINUATION}


def read_items(
    path: str | os.PathLike[str], limit: int | None = None
) -> tuple[str, list[dict[str, Any]]]:
    """Read a file of items.

    Parameters
    ----------
    path : path
        ``.jsonl``, or ``.jsonl.gz``.
    limit : int, optional
        The first so many.

    Returns
    -------
    form : {"choices", "contexts", "continuation"}
        Of all items.
    items : list of dict
        The fields of the form alone.

    Raises
    ------
    ValueError
        With file, line and field, if a line is not an item or has another form than the first.
    """
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    form = ""
    items: list[dict[str, Any]] = []
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            lines = iter(lambda: file.readline(LONGEST_LINE), "")
            for number, line in enumerate(lines, 1):
                where = f"{path.name}, line {number}"
                if len(line) == LONGEST_LINE:
                    raise ValueError(f"{where} is longer than {LONGEST_LINE:,} characters")
                if line.strip():
                    form = _add(items, line, form, where)
                if len(items) == limit:
                    break
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path.name} is not readable as UTF-8 text: {error}") from error
    if not items:
        raise ValueError(f"{path.name} holds no item")
    return form, items


def chance(form: str, items: list[dict[str, Any]]) -> float:
    """Share of right answers that guessing gives; 0 if there is nothing to choose from."""
    if form == "continuation":
        return 0.0
    return sum(1 / len(item[form]) for item in items) / len(items)


def _add(items: list[dict[str, Any]], line: str, form: str, where: str) -> str:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(item, dict):
        raise ValueError(f"{where} is not an object")
    found = next((name for name, keys in FORMS.items() if all(k in item for k in keys)), None)
    if found is None:
        known = "; ".join(", ".join(keys) for keys in FORMS.values())
        raise ValueError(f"{where} has none of the forms ({known})")
    if form and found != form:
        raise ValueError(
            f"{where} has the fields {FORMS[found]}, the lines before it {FORMS[form]}"
        )
    _check(item, found, where)
    items.append({key: item[key] for key in FORMS[found]})
    return found


def _check(item: dict[str, Any], form: str, where: str) -> None:
    for key in FORMS[form]:
        value = item[key]
        if key in ("choices", "contexts"):
            if not isinstance(value, list) or len(value) < 2:
                raise ValueError(f"{where}: {key} must be a list of at least two strings")
            if not all(isinstance(v, str) and v for v in value):
                raise ValueError(f"{where}: {key} must hold strings that are not empty")
        elif key != "gold" and (not isinstance(value, str) or not value):
            raise ValueError(f"{where}: {key} must be a string that is not empty")
    if form != "continuation":
        gold = item["gold"]
        if type(gold) is not int or not 0 <= gold < len(item[form]):
            raise ValueError(f"{where}: gold must be from 0 to {len(item[form]) - 1}, not {gold!r}")
