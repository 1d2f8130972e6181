"""Keys of cells: a hash of everything that decides a measurement."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from ptqkit.demo import DEMO, MODEL_DIR, text

__all__ = [
    "SCHEMA",
    "demo_text_digest",
    "file_digest",
    "key_of",
    "model_digest",
]

#: Raised when the same settings come to mean another measurement, or a cell holds something new.
SCHEMA = 2

# Bigger files are told apart by size and time of change: reading them would take minutes.
_READ_LIMIT = 256 << 20


def key_of(inputs: dict[str, Any]) -> str:
    """Hash of plain values, the same for the same values in any order of keys."""
    text = json.dumps(inputs, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def model_digest(path: str, subfolders: bool = False) -> str:
    """Hash of the files of a model's folder, hidden ones and, as a rule, subfolders left out."""
    folder = MODEL_DIR if path == DEMO else Path(path)
    found = folder.rglob("*") if subfolders else folder.iterdir()
    files = {p.relative_to(folder).as_posix(): p for p in found if p.is_file()}
    kept = sorted(name for name in files if not any(n[0] == "." for n in name.split("/")))
    return key_of({name: file_digest(str(files[name])) for name in kept})


def file_digest(path: str) -> str:
    """Hash of a file's content, or of size and time of change where it is large."""
    stat = Path(path).stat()
    return _file_digest(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _file_digest(path: str, size: int, changed: int) -> str:
    if size > _READ_LIMIT:
        return f"{size}-{changed}"
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@lru_cache(maxsize=1)
def demo_text_digest() -> str:
    """Hash of the texts of the demo, which are those of the Python that runs."""
    found = hashlib.sha256()
    for split in ("calibration", "test"):
        found.update(text(split).encode())
    return found.hexdigest()
