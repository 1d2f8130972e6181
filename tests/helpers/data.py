"""Data that tests may use: the repository's own, and real models and texts beside the checkout."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


def shared(name: str) -> Path:
    """Return a file or folder of the data beside the checkout; skip the test where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} of the data folder beside the checkout")
    return path
