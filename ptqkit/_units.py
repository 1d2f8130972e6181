"""Read and write sizes in bytes as people do."""

from __future__ import annotations

import re
from typing import overload

from ptqkit.errors import UsageError

__all__ = ["parse_bytes", "show_bytes"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@overload
def parse_bytes(value: int | str, option: str = ...) -> int: ...


@overload
def parse_bytes(value: int | str | None, option: str = ...) -> int | None: ...


def parse_bytes(value: int | str | None, option: str = "memory_budget") -> int | None:
    """Return a size in bytes from a number or text such as ``"8GiB"``, ``"500MB"``, ``"2G"``.

    Parameters
    ----------
    value : int, str or None
        None is returned as it is.
    option : str
        What the size is of, for the error message.

    Raises
    ------
    UsageError
        If the value is not a positive number of bytes, or the text has no known unit.
    """
    if value is None:
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", value, re.IGNORECASE)
        if match is None:
            raise UsageError(f"{option} must be bytes or text such as '8GiB', not {value!r}")
        units = _BINARY if match[3] else _UNITS
        value = int(float(match[1]) * units[match[2].upper()])
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UsageError(f"{option} must be a positive number of bytes, not {value!r}")
    return value


def show_bytes(size: int, beside: int | None = None) -> str:
    """Return the text of a size in bytes for a message.

    With two digits more if that of another size ``beside`` it would be the same.
    """
    text = _shown(size, 0)
    same = beside is not None and beside != size and _shown(beside, 0) == text
    return _shown(size, 2) if same else text


def _shown(size: int, digits: int) -> str:
    unit, name = (2**20, "MiB") if size >= 10 * 2**20 else (2**10, "KiB")
    return f"{size / unit:,.{digits}f} {name}"
