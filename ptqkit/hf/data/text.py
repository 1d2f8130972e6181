"""Text from files and datasets, and its tokens."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ptqkit.errors import CalibrationError, UsageError

__all__ = [
    "DATASET_NAME",
    "CachedTokenizer",
    "MissingTextError",
    "dataset_documents",
    "read_documents",
    "start_token_id",
    "tokenize",
]

#: ``name:config:split``; the config may be empty.
DATASET_NAME = re.compile(r"[\w./-]+:[\w.-]*:\w+")

# Text is tokenized in pieces of about this many characters, cut at line ends: some tokenizers
# take time quadratic in the length of their input.
_PIECE = 1 << 16


class MissingTextError(CalibrationError, FileNotFoundError):
    """A text file that does not exist."""


class CachedTokenizer:
    """A tokenizer that keeps the tokens of every text, for texts that are read again and again.

    Attributes
    ----------
    tokenizer
        The tokenizer itself.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._tokens: dict[tuple[Any, ...], Any] = {}

    def __call__(self, text: str, **options: Any) -> Any:
        """Return the tokens of a text, found once."""
        key = (text, *sorted(options.items()))
        if key not in self._tokens:
            self._tokens[key] = self.tokenizer(text, **options)
        return self._tokens[key]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def start_token_id(tokenizer: Any, start_token: str | int | None) -> int | None:
    """Resolve ``"auto"`` (the tokenizer's bos, if it has one), an id, or None."""
    if start_token is None or isinstance(start_token, int):
        return start_token
    if start_token == "auto":
        return getattr(tokenizer, "bos_token_id", None)
    raise UsageError(f"start_token must be 'auto', a token id or None, not {start_token!r}")


def read_documents(path: str | os.PathLike[str]) -> Iterator[str]:
    """Read a text file (one document) or a ``.jsonl`` file (one per line); ``.gz`` of both.

    A line of a ``.jsonl`` file is a string, or an object whose field ``text``, else its first
    string field, is the document.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingTextError(f"there is no file {str(path)!r}")
    opener = gzip.open if path.suffix == ".gz" else open
    lines = path.name.removesuffix(".gz").endswith((".jsonl", ".json"))
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            if not lines:
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _document(line, f"{path.name}, line {number}")
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise CalibrationError(f"{path.name} is not readable as UTF-8 text: {error}") from error


def _document(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where} is not JSON: {error}") from None
    if isinstance(value, dict):
        text = value.get("text")
        value = (
            text
            if isinstance(text, str)
            else next((v for v in value.values() if isinstance(v, str)), None)
        )
    if not isinstance(value, str):
        raise CalibrationError(f"{where} holds no text: expected a string or an object with one")
    return value


def dataset_documents(name: str) -> Iterator[str]:
    """Documents of ``name:config:split`` of the package ``datasets``, imported only here."""
    try:
        import datasets
    except ImportError:
        raise CalibrationError(
            f"calibration {name!r} names a dataset, but the package 'datasets' is not installed"
        ) from None
    path, config, split = name.split(":")
    try:
        data = datasets.load_dataset(path, config or None, split=split)
    except Exception as error:
        raise CalibrationError(f"cannot load the dataset {name!r}: {error}") from error
    column = "text" if "text" in data.column_names else data.column_names[0]
    for row in data:
        if not isinstance(row[column], str):
            raise CalibrationError(f"column {column!r} of the dataset {name!r} is not text")
        if row[column].strip():
            yield row[column]


def tokenize(tokenizer: Any, documents: Iterable[str], needed: int | None = None) -> list[int]:
    """Tokenize documents without special tokens and join them; stop at ``needed`` tokens."""
    ids: list[int] = []
    for document in documents:
        for piece in _pieces(document):
            ids.extend(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
            if needed is not None and len(ids) >= needed:
                return ids
    return ids


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > _PIECE:
            end = text.rfind("\n", start, start + _PIECE) + 1
            if end <= start:
                end = text.rfind(" ", start + 1, start + _PIECE)
            if end <= start:
                end = start + _PIECE
        yield text[start:end]
        start = end
