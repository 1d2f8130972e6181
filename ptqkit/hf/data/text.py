"""Text from files and datasets, and its tokens."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ptqkit._defaults import LONGEST_LINE
from ptqkit.errors import CalibrationError, UsageError

__all__ = [
    "DATASET_NAME",
    "CachedTokenizer",
    "MissingTextError",
    "TextFile",
    "dataset_documents",
    "open_documents",
    "read_beginning",
    "read_documents",
    "start_token_id",
    "text_pieces",
    "tokenize",
    "whole_documents",
]

#: ``name:config:split``; the config may be empty.
DATASET_NAME = re.compile(r"[\w./-]+:[\w.-]*:\w+")

# Text is tokenized in pieces of about this many characters, cut at line ends: some tokenizers
# take time quadratic in the length of their input.
_PIECE = 1 << 16
# Characters of the first look into a text.
_LEAST = 1 << 12


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
        # A copy asks before it has attributes of its own.
        if name == "tokenizer":
            raise AttributeError(name)
        return getattr(self.tokenizer, name)


def start_token_id(tokenizer: Any, start_token: str | int | None) -> int | None:
    """Resolve ``"auto"`` (the tokenizer's bos, if it has one), an id, or None."""
    if start_token is None or isinstance(start_token, int):
        return start_token
    if start_token == "auto":
        return getattr(tokenizer, "bos_token_id", None)
    raise UsageError(f"start_token must be 'auto', a token id or None, not {start_token!r}")


class TextFile:
    """A text file that is read as far as it is asked for, even if it expands without end.

    Attributes
    ----------
    path : Path
    collapse : bool
        Whether :meth:`read` gives every run of white space as one blank, and none at the ends.
    """

    def __init__(self, path: Path, collapse: bool = False) -> None:
        self.path, self.collapse = path, collapse
        self._ready, self._begun, self._gap = "", False, False
        opener = gzip.open if path.suffix == ".gz" else open
        self._file: Any = opener(path, "rt", encoding="utf-8")

    def __enter__(self) -> TextFile:
        return self

    def __exit__(self, *args: object) -> None:
        self._file.close()

    def read(self, size: int = -1) -> str:
        """Return the next characters, at most so many."""
        with self._explained():
            return self._collapsed(size) if self.collapse else self._file.read(size)

    def _collapsed(self, size: int) -> str:
        """Return the next characters of ``" ".join(text.split())``."""
        while size < 0 or len(self._ready) < size:
            piece = self._file.read(_PIECE)
            if not piece:
                break
            words = " ".join(piece.split())
            self._gap |= piece[0].isspace()
            if words:
                self._ready += " " + words if self._begun and self._gap else words
                self._begun, self._gap = True, piece[-1].isspace()
        end = len(self._ready) if size < 0 else size
        found, self._ready = self._ready[:end], self._ready[end:]
        return found

    def readline(self, size: int = -1) -> str:
        """Return the next line, at most so many characters of it."""
        with self._explained():
            return self._file.readline(size)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise CalibrationError(
                f"{self.path.name} is not readable as UTF-8 text: {error}"
            ) from error


def open_documents(
    path: str | os.PathLike[str], *, collapse: bool = False
) -> Iterator[str | TextFile]:
    """Read a text file (one document) or a ``.jsonl`` file (one per line); ``.gz`` of both.

    A line of a ``.jsonl`` file is a string, or an object whose field ``text``, else its first
    string field, is the document. A text file is given open, to be read before the next step.
    With ``collapse`` every run of white space becomes one blank.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingTextError(f"there is no file {str(path)!r}")
    with TextFile(path, collapse) as file:
        if not path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
            yield file
            return
        for number in itertools.count(1):
            line = file.readline(LONGEST_LINE)
            if not line:
                return
            if len(line) == LONGEST_LINE:
                raise CalibrationError(
                    f"{path.name}, line {number} is longer than {LONGEST_LINE:,} characters; "
                    "give the text as .txt, or a line per document"
                )
            if line.strip():
                document = _document(line, f"{path.name}, line {number}")
                yield " ".join(document.split()) if collapse else document


def read_documents(path: str | os.PathLike[str]) -> Iterator[str]:
    """Read the documents of a file as :func:`open_documents` does, each as a whole."""
    return whole_documents(open_documents(path))


def whole_documents(documents: Iterable[str | TextFile]) -> Iterator[str]:
    """Read every document to its end."""
    for document in documents:
        yield document if isinstance(document, str) else document.read()


def read_beginning(opened: Iterable[str | TextFile], tokenizer: Any, needed: int) -> list[str]:
    """Read no more of documents than their first ``needed`` tokens come from.

    A text is tokenized as a whole, so its end may change tokens before it: twice as much text must
    begin with the same tokens.
    """
    documents: list[str] = []
    for document in opened:
        text = ""
        ids: list[int] | None = None
        size = max(_LEAST, 8 * needed)
        while isinstance(document, TextFile):
            more = document.read(size)
            text += more
            before, ids = ids, _tokens(tokenizer, text)[:needed]
            if len(more) < size or (len(ids) == needed and ids == before):
                break
            size = len(text)
        documents.append(text if isinstance(document, TextFile) else document)
        needed -= len(ids if ids is not None else _tokens(tokenizer, documents[-1]))
        if needed <= 0:
            break
    return documents


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


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


def tokenize(
    tokenizer: Any, documents: Iterable[str | TextFile], needed: int | None = None
) -> list[int]:
    """Tokenize documents without special tokens and join them; stop at ``needed`` tokens."""
    ids: list[int] = []
    for document in documents:
        for piece in text_pieces(document):
            ids.extend(_tokens(tokenizer, piece))
            if needed is not None and len(ids) >= needed:
                return ids
    return ids


def text_pieces(document: str | TextFile) -> Iterator[str]:
    """Cut a document at line ends into the pieces that are tokenized."""
    file = io.StringIO(document) if isinstance(document, str) else document
    text = file.read(_PIECE + 1)
    while text:
        end = len(text)
        if end > _PIECE:
            end = text.rfind("\n", 0, _PIECE) + 1
            if end <= 0:
                end = text.rfind(" ", 1, _PIECE)
            if end <= 0:
                end = _PIECE
        yield text[:end]
        text = text[end:] + file.read(end)
