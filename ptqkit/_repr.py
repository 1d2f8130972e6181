"""One line that says what an object is, however much it holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import MISSING, fields
from typing import Any

__all__ = ["LONGEST", "one_line_repr", "summarize"]

LONGEST = 200
"""Characters of the longest ``repr``."""
# Characters of a value that is shown as it is.
_SHORT = 60


def one_line_repr(self: Any) -> str:
    """Be the ``__repr__`` of a dataclass: its fields in short, without those that have defaults."""
    name, parts = type(self).__name__, []
    for field in fields(self):
        value = getattr(self, field.name, None)
        if field.repr and not _is_default(value, field):
            parts.append(f"{field.name}={summarize(value)}")
    text = f"{name}({', '.join(parts)})"
    while len(text) > LONGEST:
        parts.pop()
        text = f"{name}({', '.join([*parts, '...'])})"
    return text


def summarize(value: Any) -> str:
    """Return a value in at most some 60 characters: of arrays and collections the size alone."""
    kind = type(value).__name__
    if isinstance(value, float):
        return f"{value:.6g}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"<{kind} {dtype} {'x'.join(map(str, value.shape)) or 'scalar'}>"
    if isinstance(value, (Mapping, Sequence, Set)) and not isinstance(value, (str, bytes)):
        if len(value) > 8 or not all(map(_is_plain, _items(value))):
            return f"<{kind} of {len(value)}>"
        short = repr(value)
        return short if len(short) <= _SHORT else f"<{kind} of {len(value)}>"
    if hasattr(value, "named_modules"):
        return f"<{kind}>"
    text = repr(value)
    if len(text) <= _SHORT and "\n" not in text:
        return text
    return f"{text[: _SHORT - 4]}...'" if isinstance(value, str) else f"<{kind}>"


def _items(value: Any) -> list[Any]:
    return [*value, *value.values()] if isinstance(value, Mapping) else list(value)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


def _is_default(value: Any, field: Any) -> bool:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if default is MISSING or type(value) is not type(default):
        return False
    if isinstance(value, float) and math.isnan(value):
        return math.isnan(default)
    return bool(value == default) if _is_plain(value) or not value else False
