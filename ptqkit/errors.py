"""Exceptions of ptqkit; each is also the builtin exception that a caller expects."""

from __future__ import annotations

__all__ = [
    "CalibrationError",
    "NotPositiveDefiniteError",
    "PreflightError",
    "PtqkitError",
    "UnsupportedModuleError",
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


class UnsupportedModuleError(PtqkitError, NotImplementedError):
    """A module of the model cannot be quantized; the message names it."""


class PreflightError(PtqkitError, ValueError):
    """Problems were found before the first forward pass; ``problems`` lists all of them."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = list(problems)
        lines = "\n".join(f"  - {p}" for p in self.problems)
        super().__init__(f"cannot start, {len(self.problems)} problem(s) found:\n{lines}")


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
