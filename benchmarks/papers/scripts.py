"""The benchmarks that are scripts of their own, as modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["script"]


def script(name: str) -> ModuleType:
    """Import `benchmarks/NAME.py`, which finds its neighbours as a script does."""
    folder = str(Path(__file__).resolve().parents[1])
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)
