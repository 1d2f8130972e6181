"""Versions and machine that a number may depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ptqkit._config import show_config
from ptqkit._version import __version__

__all__ = ["environment"]


def environment(device: str) -> dict[str, Any]:
    """Versions and machine that a number may depend on, without names of anybody's machine."""
    found: dict[str, Any] = {"device": device, "python": platform.python_version()}
    for name in ("ptqkit", "torch", "transformers", "lm_eval", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "ptqkit": __version__, "cpu_level": str(show_config()["cpu_level"])}
