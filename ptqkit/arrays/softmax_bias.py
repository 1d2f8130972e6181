"""Estimate the bias that rounding gives a softmax from probabilities, in one pass."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

import ptqkit._core as _core
from ptqkit.arrays._attention import allowed_entries, as_allowed, as_attention, as_queries
from ptqkit.arrays._inputs import check_count, check_threads
from ptqkit.arrays.accumulator import Accumulator
from ptqkit.arrays.softmax import SoftmaxGrid
from ptqkit.errors import CalibrationError, check_choice

__all__ = ["HALF_SUM_TOLERANCE", "SUM_TOLERANCE", "SoftmaxBias", "length_class"]

# How far the sum of a row may be from 1. A float32 softmax is within 1e-5; halves round each entry.
SUM_TOLERANCE, HALF_SUM_TOLERANCE = 1e-3, 2e-2

GRANULARITIES = {"tensor": (0, 1), "head": (0,), "step": (1,), "step_head": ()}  # axes summed
LENGTH_CLASSES = 240
ROWS, ENTRIES, CODES, ZEROS = range(4)


class SoftmaxBias(Accumulator):
    """Accumulate the bias of a softmax on a grid, ``beta = E[p] - E[q(p)]`` [SBC, eq. 4].

    Both are means over the allowed entries: E[p] that of 1 / (allowed keys of the row), E[q(p)] is
    measured. Added to every allowed entry, or subtracted from the grid's offset
    (``grid.offset(beta)``), beta makes the mean error on the data seen zero. Only integers are
    kept, so neither the order of batches nor threads change anything. An update that fails or is
    interrupted leaves everything as it was. Several threads may update one object.

    Parameters
    ----------
    heads : int
    grid : SoftmaxGrid
        Of probabilities.
    steps : int, optional
        Number of time steps of a diffusion model that are kept apart.
    threads : int
        0 means automatic. No result depends on it.

    Examples
    --------
    >>> import numpy as np, ptqkit
    >>> bias = ptqkit.SoftmaxBias(2, grid=ptqkit.softmax_grid(8))
    >>> bias.update(np.full((1, 2, 600, 600), 1 / 600))  # all of them round to 0
    >>> bias.zero_fraction, bias.mean_row_sum, float(bias.bias()) == 1 / 600
    (1.0, 0.0, True)
    """

    def __init__(
        self, heads: int, *, grid: SoftmaxGrid, steps: int | None = None, threads: int = 0
    ) -> None:
        super().__init__()
        self.heads = check_count(heads, "heads", 1, 1 << 16)
        if not isinstance(grid, SoftmaxGrid):
            raise TypeError(f"grid must be a SoftmaxGrid, see softmax_grid(); not {grid!r}")
        if grid.of != "probabilities":
            raise ValueError(
                f"a grid of {grid.of} has no bias to estimate: correction='row_sum' gives each row "
                "its missing mass without calibration"
            )
        self.grid = grid
        self.steps = None if steps is None else check_count(steps, "steps", 1, 1 << 20)
        self.threads = check_threads(threads)
        # (heads, classes, 4) of every step seen, and the empty rows: replaced, never written to
        self._state: tuple[dict[int, np.ndarray], int] = ({}, 0)

    @property
    def _sums(self) -> dict[int, np.ndarray]:
        return self._state[0]

    @property
    def empty_rows(self) -> int:
        """Rows without an allowed key."""
        return self._state[1]

    def update(
        self,
        P: Any,
        allowed: Any = None,
        causal: bool = False,
        step: int | None = None,
        *,
        queries: Any = None,
    ) -> None:
        """Add a batch of probabilities.

        Parameters
        ----------
        P : array or tensor, shape (..., heads, q, k)
            Softmax over the last axis, before rounding. float32 is read as it is.
        allowed : array or tensor of bool or int, optional
            Keys, (batch, k); or entries, with the axes of ``P``, each full or 1. Entries that are
            not allowed count for nothing, whatever they hold; a row without an allowed key is
            counted in ``empty_rows`` only.
        causal : bool
            Query i sees the keys up to ``i + k - q`` only, and of these the ``allowed`` ones.
        step : int, optional
            Time step, from 0; needed if ``steps`` was given.
        queries : array or tensor of bool or int, shape (batch, q), optional
            Rows that count; those of padding must not.

        Raises
        ------
        ValueError
            Wrong shape or step; NaN, negative probabilities, or a row whose allowed entries do not
            sum to 1 within ``SUM_TOLERANCE`` (``HALF_SUM_TOLERANCE`` for float16 and bfloat16).
        TypeError
            P is not floating point.
        """
        at = self._check_step(step)
        half = getattr(getattr(P, "dtype", None), "itemsize", 4) == 2
        P, shape = as_attention(P, "P")
        if P.shape[1] != self.heads:
            raise ValueError(
                f"P must have shape (..., {self.heads}, q, k): {self.heads} head(s); it has {shape}"
            )
        mask = as_allowed(allowed, P.shape, shape)
        rows = as_queries(queries, P.shape[0], P.shape[2])
        sums = np.empty((self.heads, LENGTH_CLASSES, 4), np.int64)
        tolerance = HALF_SUM_TOLERANCE if half else SUM_TOLERANCE
        bad, empty = _core.softmax_statistics(
            P, mask, rows, int(bool(causal)), self.grid._tuple(), tolerance, sums, self.threads
        )
        if bad >= 0:
            self._raise_row(P, bad, shape, mask, causal, tolerance)
        self._add({at: sums}, empty)

    def _add(self, batch: dict[int, np.ndarray], empty: int) -> None:
        with self._lock:
            seen, empty_before = self._state
            added = {at: sums + seen[at] if at in seen else sums for at, sums in batch.items()}
            self._state = ({**seen, **added}, empty_before + empty)

    def _check_step(self, step: int | None) -> int:
        if self.steps is None:
            if step is not None:
                raise ValueError(f"step={step!r}, but SoftmaxBias was made without steps=")
            return 0
        if step is None:
            raise ValueError(f"step must be given: there are {self.steps} of them")
        return check_count(step, "step", 0, self.steps - 1)

    @staticmethod
    def _raise_row(
        P: np.ndarray,
        bad: int,
        shape: tuple[int, ...],
        mask: np.ndarray | None,
        causal: bool,
        tolerance: float,
    ) -> None:
        """Raise ValueError with the reason why the core refused a row."""
        row, at = allowed_entries(P, bad, shape, mask, causal)
        where = f"P[{at}]"
        if not np.isfinite(row).all():
            raise ValueError(f"{where} holds NaN or Inf; the batch was not added")
        if (row < 0).any():
            raise ValueError(f"{where} holds a negative value: P must be probabilities, not scores")
        raise ValueError(
            f"{where}: the allowed entries sum to {row.sum(dtype=np.float64):.6g}, not 1 within "
            f"{tolerance:g}. P must be a softmax over its last axis, without dropout, and allowed "
            "the mask that it was taken with"
        )

    def merge(self, other: SoftmaxBias) -> None:
        """Add what ``other`` has seen; it must have the same heads, grid and steps."""
        if not isinstance(other, SoftmaxBias):
            raise TypeError(f"other must be a SoftmaxBias, not {type(other).__name__}")
        for name in ("heads", "grid", "steps"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"cannot merge: {name} is {mine!r} here and {theirs!r} there")
        self._add(*other._state)

    def copy(self) -> SoftmaxBias:
        """Return an independent copy."""
        result = SoftmaxBias(self.heads, grid=self.grid, steps=self.steps, threads=self.threads)
        result.merge(self)
        return result

    def _totals(self, granularity: str, field: int) -> np.ndarray:
        """Return the sum of a field over all but the granularity's axes (steps, heads), int64."""
        check_choice("granularity", granularity, GRANULARITIES)
        axes = GRANULARITIES[granularity]
        if 0 not in axes and self.steps is None:
            raise ValueError(f"granularity={granularity!r} needs SoftmaxBias(..., steps=...)")
        found = np.zeros((self.steps or 1, self.heads), np.int64)
        for at, sums in self._sums.items():
            found[at] = sums[..., field].sum(axis=1)
        return found.sum(axis=axes)

    def _seen(self, granularity: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of rows and entries, none of them 0."""
        rows, entries = (self._totals(granularity, f) for f in (ROWS, ENTRIES))
        if not np.all(rows):
            missing = "" if rows.ndim == 0 else f" for {granularity} {np.argwhere(rows == 0)[0]}"
            raise CalibrationError(
                f"no row of probabilities has been seen{missing}; call update(P) first"
            )
        return rows, entries

    def bias(self, granularity: str = "tensor") -> np.ndarray:
        """Return beta, float64.

        Parameters
        ----------
        granularity : {"tensor", "head", "step", "step_head"}
            Shape (), (heads,), (steps,) or (steps, heads).

        Raises
        ------
        CalibrationError
            If a head or step has seen no row.
        """
        rows, entries = self._seen(granularity)
        return (rows - self.grid.scale * self._totals(granularity, CODES)) / entries

    def row_sums(self, granularity: str = "tensor") -> np.ndarray:
        """Return the mean sum of a rounded row, before correction; shapes as in :meth:`bias`."""
        rows, _ = self._seen(granularity)
        return self.grid.scale * self._totals(granularity, CODES) / rows

    def shares_zero(self, granularity: str = "tensor") -> np.ndarray:
        """Return the share of allowed entries that round to 0; shapes as in :meth:`bias`."""
        _, entries = self._seen(granularity)
        return self._totals(granularity, ZEROS) / entries

    def bias_by_length(self, keys: int, granularity: str = "tensor") -> np.ndarray:
        """Return one beta per row length, for ``softmax_on_grid(correction="row_length")``.

        Entry n is m / n, for rows of n allowed keys: m is the mean mass that rounding takes from
        rows of about this length (exact below 16 keys, then 8 classes per octave), so the mean
        error on the data seen is zero in every class. Between lengths seen m is interpolated over
        log n, beyond them it is that of the nearest; entry 0 is 0.

        Parameters
        ----------
        keys : int
            Longest row.
        granularity : {"tensor", "head"}
            Shape (keys + 1,) or (heads, keys + 1).
        """
        keys = check_count(keys, "keys", 1, 1 << 24)
        check_choice("granularity", granularity, ("tensor", "head"))
        self._seen(granularity)
        sums = functools.reduce(np.add, self._sums.values())
        if granularity == "head":
            mass = np.stack([self._mass(s) for s in sums])
        else:
            mass = self._mass(sums.sum(axis=0))
        lengths = np.arange(1, keys + 1)
        beta = mass[..., length_class(lengths)] / lengths
        return np.concatenate([np.zeros((*beta.shape[:-1], 1)), beta], axis=-1)

    def _mass(self, sums: np.ndarray) -> np.ndarray:
        """Return the mean missing mass of every class of lengths, from sums (classes, 4)."""
        seen = np.flatnonzero(sums[:, ROWS])
        rows = sums[seen, ROWS]
        middle = np.log(_class_start(np.arange(LENGTH_CLASSES)))
        mass = 1.0 - self.grid.scale * sums[seen, CODES] / rows
        return np.interp(middle, middle[seen], mass)

    @property
    def mean_row_sum(self) -> float:
        """Mean sum of a rounded row, before correction."""
        return float(self.row_sums())

    @property
    def zero_fraction(self) -> float:
        """Share of the allowed entries that round to 0."""
        return float(self.shares_zero())

    @property
    def rows(self) -> int:
        """Rows seen, without empty ones."""
        return int(self._totals("tensor", ROWS))

    @property
    def entries(self) -> int:
        """Allowed entries seen."""
        return int(self._totals("tensor", ENTRIES))

    def __repr__(self) -> str:
        steps = "" if self.steps is None else f", steps={self.steps}"
        return f"SoftmaxBias(heads={self.heads}, bits={self.grid.bits}{steps}, rows={self.rows})"


def length_class(lengths: np.ndarray) -> np.ndarray:
    """Return the class of each row length: exact below 16, then 8 classes per octave.

    Parameters
    ----------
    lengths : ndarray of int, not negative

    Returns
    -------
    ndarray of int64, same shape
    """
    lengths = np.asarray(lengths, np.int64)
    octave = np.frexp(np.maximum(lengths, 1))[1].astype(np.int64) - 1  # floor of log2
    eighths = lengths >> np.maximum(octave - 3, 0)
    return np.where(lengths < 16, lengths, 8 * (octave - 3) + eighths)


def _class_start(classes: np.ndarray) -> np.ndarray:
    """Return the smallest length of each class (1 for class 0, which no row has)."""
    octave, eighth = np.divmod(np.maximum(classes - 16, 0), 8)
    return np.where(classes < 16, np.maximum(classes, 1), (8 + eighth) << (octave + 1))
