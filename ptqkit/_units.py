"""Read and write sizes in bytes as people do."""

from __future__ import annotations

import re

from ptqkit.errors import UsageError

__all__ = ["parse_bytes", "show_bytes"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(value: int | str | None) -> int | None:
    """Return a size in bytes from a number or text such as ``"8GiB"``, ``"500MB"``, ``"2G"``."""
    if value is None:
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", value, re.IGNORECASE)
        if match is None:
            raise UsageError(f"memory_budget must be bytes or text such as '8GiB', not {value!r}")
        units = _BINARY if match[3] else _UNITS
        value = int(float(match[1]) * units[match[2].upper()])
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UsageError(f"memory_budget must be a positive number of bytes, not {value!r}")
    return value


def show_bytes(size: int) -> str:
    """Return the text of a size in bytes for a message."""
    return f"{size / 2**20:,.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**10:,.0f} KiB"
