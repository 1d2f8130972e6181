"""The version, in one place: the packaging reads it from here too."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.2.0"
