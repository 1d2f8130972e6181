"""Tables of a sweep file, read key by key, with every problem kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ptqkit.errors import UsageError, check_choice, did_you_mean

__all__ = ["REQUIRED", "Reader", "whole"]

REQUIRED = object()
"""Default of a key that must be there."""

_NAMES = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}


class Reader:
    """One table: takes keys out, notes what is wrong, and at the end what is left over.

    Parameters
    ----------
    values : object
        What the file holds there.
    where : str
        File and table, as problems name them.
    problems : list of str
        Gets a line per problem.
    """

    def __init__(self, values: Any, where: str, problems: list[str]) -> None:
        self.where = where
        self.problems = problems
        self._known: list[str] = []
        if not isinstance(values, Mapping):
            problems.append(f"{where} must be a table, not {_describe(values)}")
            values = {}
            # Its keys cannot be missing as well.
            self._broken = True
        else:
            self._broken = False
        self._left = dict(values)

    def problem(self, text: str) -> None:
        """Note a problem of this table."""
        self.problems.append(f"{self.where}: {text}")

    def take(
        self,
        key: str,
        kind: type | tuple[type, ...],
        default: Any = REQUIRED,
        check: Callable[[Any], str | None] | None = None,
        choices: Collection[str] = (),
    ) -> Any:
        """Value of a key; the default where it is missing or wrong.

        ``check`` returns what the value must be where it is not.
        """
        self._known.append(key)
        fallback = None if default is REQUIRED else default
        if key not in self._left:
            if default is REQUIRED and not self._broken:
                self.problem(f"key {key!r} is missing")
            return fallback
        value = self._left.pop(key)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        # A bool is an int to Python, and 30 is a number in a file that could say 30.0.
        fits = (isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))) or (
            float in kinds and isinstance(value, int) and not isinstance(value, bool)
        )
        if not fits:
            wanted = " or ".join(_NAMES[k] for k in kinds)
            self.problem(f"{key} must be {wanted}, not {_describe(value)}")
            return fallback
        try:
            if choices:
                check_choice(key, value, choices)
        except UsageError as error:
            self.problem(str(error))
            return fallback
        wrong = check(value) if check is not None else None
        if wrong is not None:
            self.problem(f"{key} must be {wrong}, not {value!r}")
            return fallback
        return value

    def rest(self) -> dict[str, Any]:
        """Keys not taken yet, for a reader of their own."""
        values, self._left = self._left, {}
        return values

    def done(self) -> None:
        """Note the keys that nobody has taken."""
        for key in self._left:
            hint = did_you_mean(key, self._known) or f" (keys are {', '.join(self._known)})"
            self.problem(f"unknown key {key!r}{hint}")


def whole(low: int) -> Callable[[Any], str | None]:
    """Check for an integer of at least ``low``."""
    return lambda value: None if value >= low else f"at least {low}"


def _describe(value: Any) -> str:
    name = next((n for k, n in _NAMES.items() if type(value) is k), type(value).__name__)
    return f"{name} ({value!r})" if isinstance(value, (str, int, float)) else name
