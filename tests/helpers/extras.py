"""Leave out a folder of tests whose packages are not installed; the report's header says so."""

from __future__ import annotations

import importlib.util

HF = (
    "torch",
    "transformers",
    "safetensors",
    "compressed_tensors",
    "greenlet",
    "accelerate",
    "huggingface_hub",
    "psutil",
)


def missing(packages: tuple[str, ...]) -> list[str]:
    """Return the packages that cannot be imported here."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def left_out(packages: tuple[str, ...]) -> list[str]:
    """Return the patterns for ``collect_ignore_glob``: every file if a package is missing."""
    return ["*"] if missing(packages) else []
