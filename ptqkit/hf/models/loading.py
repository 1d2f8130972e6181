"""Folders of models: where they are, how they are stored, and what they run on."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from ptqkit.errors import UsageError
from ptqkit.hf.models.dtypes import slow_on_cpu

__all__ = [
    "compute_dtype",
    "load_tokenizer",
    "model_folder",
    "pick_device",
    "read_config",
    "stored_dtype",
]

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def model_folder(name: str | os.PathLike[str]) -> Path:
    """Find the folder of a model: a path, or a name on the Hugging Face Hub, which is downloaded.

    Raises
    ------
    UsageError
        If there is no such folder, or it is not a model's.
    """
    path, name = Path(name), os.fspath(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{name}: the folder has no config.json, so it is not a model")
        return path
    if path.exists() or name.count("/") > 1 or not _HUB_NAME.fullmatch(name):
        raise UsageError(f"{name}: there is no such folder")
    from huggingface_hub import snapshot_download

    print(f"fetching {name} from the Hugging Face Hub", file=sys.stderr, flush=True)
    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{name}: there is no such folder, and it could not be downloaded from the Hugging "
            f"Face Hub ({type(error).__name__}: {reason})"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a model's folder.

    Raises
    ------
    UsageError
        If the file is not valid JSON.
    """
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{folder / 'config.json'} is not valid JSON: {error}") from None


def stored_dtype(folder: Path) -> str:
    """Return the dtype that the configuration of a model states."""
    config = read_config(folder)
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def compute_dtype(asked: str, stored: str, device: str, *, room: bool = True) -> str:
    """Choose the arithmetic: ``"auto"`` is that of the files, or float32 if that is slow here.

    On a CPU float16, and bfloat16 without instructions for it, take several times as long as
    float32. Without ``room`` for the wider model the stored type is kept.
    """
    if asked != "auto":
        return asked
    dtype = getattr(torch, stored, None)
    return "float32" if device == "cpu" and room and slow_on_cpu(dtype) else stored


def pick_device(asked: str) -> str:
    """Resolve ``"auto"``, a GPU if there is one.

    Raises
    ------
    UsageError
        If the device cannot be used.
    """
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, dtype=torch.float32, device=asked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {asked} cannot be used here: {reason}") from None
    return asked


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model's folder; None if it holds none.

    Without any file, transformers makes up an empty tokenizer for some model types.
    """
    from transformers import AutoTokenizer

    found = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    return AutoTokenizer.from_pretrained(folder) if found else None
