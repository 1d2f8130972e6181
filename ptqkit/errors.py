"""Exceptions of ptqkit; each is also the builtin exception that a caller expects."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Collection, Container, Iterable, Iterator
from typing import Any

__all__ = [
    "LAYER_FAILURES",
    "CalibrationError",
    "NotFiniteError",
    "NotPositiveDefiniteError",
    "PreflightError",
    "Problem",
    "Problems",
    "PtqkitError",
    "UnsupportedModuleError",
    "UsageError",
    "by_cause",
    "check_choice",
    "did_you_mean",
    "prefix_error",
]


class PtqkitError(Exception):
    """Base class: ``except ptqkit.PtqkitError`` catches everything ptqkit raises on purpose."""


class NotPositiveDefiniteError(PtqkitError, ValueError):
    """The Hessian could not be factorized with any damping in the allowed range.

    Attributes
    ----------
    index : int
        Input whose pivot was not positive in the last attempt (original column order).
    damping : float
        Largest damping that was tried, as a fraction of the mean diagonal.
    """

    def __init__(self, message: str, index: int, damping: float) -> None:
        super().__init__(message)
        self.index = index
        self.damping = damping


class CalibrationError(PtqkitError, ValueError):
    """Calibration data is missing, empty, too small or not finite."""


class NotFiniteError(PtqkitError, ArithmeticError):
    """A result is NaN or infinite: the model is damaged, or its arithmetic overflows."""


class UsageError(PtqkitError, ValueError):
    """An argument or option is wrong by itself; the message names it."""


class UnsupportedModuleError(PtqkitError, NotImplementedError):
    """A module of the model cannot be quantized; the message names it."""


class Problem(str):
    """One reason why a run cannot start: a message, and the kind of error that it is.

    Attributes
    ----------
    kind : type of Exception
        Such as CalibrationError or UnsupportedModuleError; ValueError if there is nothing closer.
    """

    kind: type[Exception]

    def __new__(cls, text: str, kind: type[Exception] = ValueError) -> Problem:
        """Make a problem from its message."""
        problem = super().__new__(cls, text)
        problem.kind = kind
        return problem


class PreflightError(PtqkitError, ValueError):
    """Problems were found before the first forward pass.

    Attributes
    ----------
    problems : list of Problem
        All of them; each is a str with a ``kind``.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = [p if isinstance(p, Problem) else Problem(p) for p in problems]
        lines = "\n".join(f"  - {p}" for p in self.problems)
        super().__init__(f"cannot start, {len(self.problems)} problem(s) found:\n{lines}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)

    def has(self, kind: type[Exception]) -> bool:
        """Whether a problem is of this kind of error."""
        return any(issubclass(problem.kind, kind) for problem in self.problems)


class Problems:
    """Collects problems and raises them together."""

    def __init__(self) -> None:
        self.found: list[Problem] = []
        self._alone: dict[int, Exception] = {}

    def add(self, text: str, kind: type[Exception] = ValueError) -> None:
        """Note a problem; ``kind`` is the class of error that it is."""
        self.found.append(Problem(text, kind))

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Note an error that the block raises, and go on; alone it is raised as it was."""
        try:
            yield
        except (PtqkitError, ValueError) as error:
            self._alone[len(self.found)] = error
            if isinstance(error, PreflightError):
                self.found += error.problems
            else:
                self.add(str(error), type(error))

    def raise_if_any(self, layers: Container[str] = ()) -> None:
        """Raise PreflightError with all problems; those of many layers are one each.

        Raises
        ------
        PreflightError
            Or the error that :meth:`noting` noted, if there is no other problem.
        """
        if len(self.found) == 1 and self._alone:
            raise self._alone[0]
        if self.found:
            raise PreflightError(by_cause(self.found, layers))


#: What can be wrong with a layer. An exception of another kind, such as the TimeoutError of a
#: signal handler, says nothing about the layer that it met: it is passed on as it is.
LAYER_FAILURES: tuple[type[Exception], ...] = (
    PtqkitError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
)


def by_cause(problems: Iterable[str], layers: Container[str]) -> list[Problem]:
    """Join what is said of several layers in the same words, ``"layer: words"``, into one line."""
    groups: dict[tuple[bool, str, type[Exception]], list[str]] = {}
    for problem in problems:
        kind = problem.kind if isinstance(problem, Problem) else ValueError
        # Words that stand before the name, such as an option's, are words too.
        parts = problem.split(": ")
        place = next((i for i, part in enumerate(parts[:-1]) if part in layers), None)
        if place is None:
            groups[False, problem, kind] = [problem]
            continue
        name, parts[place] = parts[place], "{}"
        groups.setdefault((True, ": ".join(parts), kind), []).append(name)
    found = []
    for (named, words, kind), names in groups.items():
        more = f" (and {len(names) - 1} more layers)" if len(names) > 2 else ""
        more = f" (and {names[1]})" if len(names) == 2 else more
        found.append(Problem(words.replace("{}", names[0], 1) + more if named else words, kind))
    return found


def check_choice(name: str, value: Any, allowed: Collection[str | None]) -> None:
    """Raise UsageError, in one line, unless the value is one of those allowed.

    Parameters
    ----------
    name : str
        Of the argument or option.
    value
        Of any type: only strings, and None, are choices.
    allowed : collection of str, or of str and None
    """
    if (value is None or isinstance(value, str)) and value in allowed:
        return
    known, shown = ", ".join(map(repr, allowed)), " ".join(repr(value).split())
    shown = shown if len(shown) <= 80 else f"{shown[:80]} ..."
    raise UsageError(f"{name} must be one of {known}, not {shown}{did_you_mean(value, allowed)}")


def did_you_mean(value: Any, allowed: Iterable[str | None]) -> str:
    """Return `` (did you mean 'x'?)`` for the allowed word that is closest; '' if none is close."""
    words = {word.lower().replace("_", "-"): word for word in allowed if word is not None}
    near = difflib.get_close_matches(str(value).lower().replace("_", "-"), words, 1)
    return f" (did you mean {words[near[0]]!r}?)" if near else ""


def prefix_error(error: Exception, name: str) -> Exception:
    """Return the error with the layer's name in its message, added if it is not there yet."""
    if name in str(error):
        return error
    if isinstance(error, PtqkitError) or type(error) in (ValueError, TypeError, RuntimeError):
        if error.args and isinstance(error.args[0], str):
            error.args = (f"{name}: {error.args[0]}", *error.args[1:])
            return error
    wrapped = RuntimeError(f"{name}: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
