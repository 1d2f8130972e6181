"""The models of the comparison, each with the text it is calibrated and measured on."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptqkit import demo
from ptqkit.hf import load_model, prepare_calibration
from ptqkit.hf.data.text import start_token_id

__all__ = ["LEFT_OUT", "MODELS", "TRAINED", "Case", "load_case", "open_case"]


@dataclass(frozen=True)
class Case:
    """A model and its texts as tokens.

    Attributes
    ----------
    model, tokenizer
    stored_dtype : str
    calibration : list of str
    windows : Tensor of int64, shape (windows, positions)
        Of the test text, the start token first if there is one.
    scored : int
        Tokens of a window that are predicted: all but the first.
    """

    model: Any
    tokenizer: Any
    stored_dtype: str
    calibration: list[str]
    windows: torch.Tensor
    sequence_length: int

    def batches(self, samples: int, draw: int) -> list[Any]:
        """Return the calibration batches of a draw."""
        return prepare_calibration(
            self.calibration,
            self.tokenizer,
            samples=samples,
            sequence_length=self.sequence_length,
            seed=draw,
        ).batches

    @property
    def scored(self) -> int:
        return self.windows.shape[1] - 1


def _stories(data: Path) -> list[str]:
    """The stories in one line each: a tokenizer here has no newline."""
    with gzip.open(data / "tinystories" / "train_800.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [next(v for v in row.values() if isinstance(v, str)) for row in rows]
    return [" ".join(text.split()) for text in texts]


def _code(data: Path) -> tuple[list[str], str]:
    calibration = [demo.text("calibration", 800_000, per_file=24_000)]
    return calibration, demo.text("test", 3_000_000, per_file=30_000)


def _books(data: Path) -> tuple[list[str], str]:
    with gzip.open(data / "gutenberg" / "train.txt.gz", "rt", encoding="utf-8") as file:
        left = file.read()[-LEFT_OUT:]
    with gzip.open(data / "gutenberg" / "test.txt.gz", "rt", encoding="utf-8") as file:
        return [left], file.read()


def _tales(data: Path) -> tuple[list[str], str]:
    stories = _stories(data)
    return [" ".join(stories[:550])], " ".join(stories[550:])


#: What `train_opt` trains, in a folder of that name; of the books' last characters it saw none.
TRAINED, LEFT_OUT = "gutenberg-opt", 1_000_000
#: name: folder below the data (None: the embedded model), texts, longest input.
MODELS: dict[str, tuple[str | None, Callable[[Path], tuple[list[str], str]], int]] = {
    "embedded": (None, _code, 512),
    "stories260k": ("stories260k", _tales, 512),
    "babyllama105": ("babyllama105", _tales, 256),
    TRAINED: (TRAINED, _books, 256),
}


def load_case(
    name: str,
    data: Path,
    windows: int,
    device: str = "cpu",
    models: Path | None = None,
    length: int | None = None,
) -> Case:
    """Load a model and cut its test text into windows at equal distances.

    ``models`` is the folder of the models that were trained here, ``length`` the positions of a
    window, by default the longest input.
    """
    folder, texts, longest = MODELS[name]
    if name == TRAINED and models is None:
        raise SystemExit(f"{name}: train it with benchmarks.accuracy.train_opt, and give --models")
    path = (models if name == TRAINED else data) / (folder or ".")
    path = demo.MODEL_DIR if folder is None else path
    calibration, test = texts(data)
    return open_case(path, calibration, test, length or longest, windows, device)


def open_case(
    path: Path, calibration: list[str], test: str, length: int, windows: int, device: str = "cpu"
) -> Case:
    """Load a model with its texts; windows of `length` positions, at equal distances."""
    model, tokenizer, facts = load_model(path, "float32", device)
    start = start_token_id(tokenizer, "auto")
    head = [] if start is None else [start]
    body = length - len(head)
    ids = tokenizer(test, add_special_tokens=False, verbose=False)["input_ids"]
    places = torch.linspace(0, len(ids) // body - 1, windows, dtype=torch.float64).round().long()
    rows = [head + ids[p * body : (p + 1) * body] for p in places.tolist()]
    return Case(model, tokenizer, facts["stored_dtype"], calibration, torch.tensor(rows), length)
