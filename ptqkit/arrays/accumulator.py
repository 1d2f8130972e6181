"""What all accumulators share: a lock per object, and no batch that is added in part unnoticed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from ptqkit.errors import CalibrationError

__all__ = ["Accumulator", "MatrixSum"]


class Accumulator:
    """Base of the objects that add up batches; several threads may share one.

    Methods hold ``_lock`` while they change the state, or read one that is written in place. A
    state that one assignment replaces is whole at any time. Where a sum is written in place,
    ``_torn`` is true meanwhile: an exception of any kind (a signal handler may raise its own)
    leaves it so, and every later use says so.
    """

    _quantity: ClassVar[str] = "sum"

    def __init__(self) -> None:
        # Reentrant: a signal handler that asks gets the answer of _check_whole, not a deadlock.
        self._lock = threading.RLock()
        self._torn = False

    def _check_whole(self) -> None:
        if self._torn:
            raise CalibrationError(
                f"an update of the {self._quantity} was interrupted and part of its batch is in "
                "the sum; accumulate into a new one"
            )

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()


class MatrixSum(Accumulator):
    """Base of the accumulators that write a matrix of float32 sums in place.

    Attributes
    ----------
    tokens : int
        How many have been added.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.tokens = 0
        self._sum = np.zeros((rows, columns), np.float32)

    def _add_batch(
        self, write: Callable[[], None], tokens: int, not_finite: str, too_large: str
    ) -> None:
        """Let ``write`` add a batch of so many tokens to the sum.

        The core refuses values that are not finite or too large before it adds anything: then the
        sum is whole, and a ValueError says which with the text given.
        """
        with self._lock:
            self._check_whole()
            self._torn = True
            try:
                write()
            except FloatingPointError:
                self._torn = False
                raise ValueError(not_finite) from None
            except OverflowError:
                self._torn = False
                raise ValueError(too_large) from None
            self.tokens += tokens
            self._torn = False

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {**super().__getstate__(), "_sum": self._sum.copy()}
