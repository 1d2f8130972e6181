"""Take a softmax, round it to a grid and correct it in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import ptqkit._core as _core
from ptqkit._repr import one_line_repr
from ptqkit.arrays._attention import allowed_entries, as_allowed, as_attention
from ptqkit.arrays._inputs import as_float32, check_count, check_number, check_threads
from ptqkit.errors import check_choice

__all__ = [
    "CORRECTIONS_OF",
    "GRIDS_OF",
    "UNFITTED",
    "QuantizedProbabilities",
    "SoftmaxGrid",
    "check_correction",
    "softmax_grid",
    "softmax_on_grid",
]

CORRECTIONS = {None: 0, "bias": 1, "row_length": 1, "row_sum": 2, "code_sum": 3}  # ptq_correction

UNFITTED = (None, "row_sum", "code_sum")
"""Corrections that need no constants, and so no calibration."""

CORRECTIONS_OF: dict[str, tuple[str | None, ...]] = {
    "probabilities": (None, "bias", "row_length", "row_sum"),
    "exponentials": UNFITTED,
    "squares": UNFITTED,
}
"""What can be rounded to a grid, and the corrections that exist there."""
GRIDS_OF = tuple(CORRECTIONS_OF)  # in the order of ptq_grid_of


@dataclass(frozen=True)
class SoftmaxGrid:
    """Describe an asymmetric grid of probabilities, one per tensor: ``y = s * code - s * z``.

    Or one of exponentials ``e = exp(x - the row's largest x)``, which are rounded before they are
    divided by their sum: ``y = s * code / sum(e)``. Every row then has the whole grid to itself.
    Or one of squares: the codes are of ``sqrt(e)``, and ``y = (s * code)**2 / sum(e)``. Its steps
    grow from ``s**2`` next to 0, where most keys of a long row are, to about ``2 * s`` at 1.

    Attributes
    ----------
    bits : int
        Codes run from 0 to ``2**bits - 1``.
    scale : float
        A float32 number, above 0.
    zero_point : int
        Code of 0; 0 for exponentials and squares.
    of : {"probabilities", "exponentials", "squares"}
    """

    __repr__ = one_line_repr

    bits: int
    scale: float
    zero_point: int = 0
    of: str = "probabilities"

    def __post_init__(self) -> None:
        check_count(self.bits, "bits", 2, 16)
        check_count(self.zero_point, "zero_point", 0, self.max_code)
        scale = check_number(self.scale, "scale")
        if not 0 < scale < 1e30 or float(np.float32(scale)) != scale:
            raise ValueError(f"scale must be a positive float32 number, not {scale!r}")
        check_choice("of", self.of, GRIDS_OF)
        if self.of != "probabilities" and (self.zero_point or scale > 1):
            raise ValueError(f"a grid of {self.of} must have zero_point 0 and a scale of at most 1")

    @property
    def max_code(self) -> int:
        """Largest code, ``2**bits - 1``."""
        return (1 << self.bits) - 1

    def offset(self, bias: float = 0.0) -> float:
        """Return ``c' = s * z - bias``: the offset that has absorbed a correction [SBC, eq. 4]."""
        bias = check_number(bias, "bias")
        if not np.isfinite(bias):
            raise ValueError(f"bias must be finite, not {bias!r}")
        return self.scale * self.zero_point - bias

    def quantize(self, P: Any) -> np.ndarray:
        """Return the codes ``clamp(round(p * (1 / s)) + z)``, ties to even, in float32.

        On a grid of squares, those of the roots of P.

        Returns
        -------
        ndarray of uint8 (uint16 above 8 bits), shape of P
        """
        P = as_float32(P, "P")
        if not np.isfinite(P).all():
            raise ValueError("P holds NaN or Inf")
        if self.of == "squares":
            P = np.sqrt(np.maximum(P, np.float32(0)))
        low, high = np.float32(-self.zero_point), np.float32(self.max_code - self.zero_point)
        steps = np.clip(P * (np.float32(1) / np.float32(self.scale)), low, high)
        return (np.rint(steps) + np.float32(self.zero_point)).astype(self._code_type)

    def dequantize(self, codes: np.ndarray, bias: float = 0.0) -> np.ndarray:
        """Return float32 ``s * (code - z) + bias``: ``s * code - offset(bias)``, rounded.

        On a grid of squares ``(s * code)**2 + bias``.
        """
        values = np.float32(self.scale) * (
            np.asarray(codes).astype(np.float32) - np.float32(self.zero_point)
        )
        return (values * values if self.of == "squares" else values) + np.float32(bias)

    @property
    def _code_type(self) -> type:
        return np.uint8 if self.bits <= 8 else np.uint16

    def _tuple(self) -> tuple[float, int, int]:
        return self.scale, self.zero_point, self.max_code


def softmax_grid(
    bits: int = 8, minimum: float = 0.0, maximum: float = 1.0, of: str = "probabilities"
) -> SoftmaxGrid:
    """Return the min-max grid of a range; 0 always belongs to it.

    Parameters
    ----------
    bits : int
        2 to 16.
    minimum, maximum : float
        Fixed range of a softmax, [0, 1], or the range seen in calibration.
    of : {"probabilities", "exponentials", "squares"}
        What is rounded, see :class:`SoftmaxGrid`; the largest exponential of every row is 1. The
        range of squares is that of the roots.

    Raises
    ------
    ValueError
        If they are not finite, or the range holds 0 only; if that of exponentials or squares starts
        below 0 or has steps longer than 1.
    """
    bits = check_count(bits, "bits", 2, 16)
    low = min(check_number(minimum, "minimum"), 0.0)
    high = max(check_number(maximum, "maximum"), 0.0)
    if not (minimum <= maximum and low < high and high - low < 1e30):
        raise ValueError(
            f"minimum and maximum must be finite and span a range, not [{minimum!r}, {maximum!r}]"
        )
    max_code = (1 << bits) - 1
    scale = float(np.maximum(np.float32((high - low) / max_code), np.finfo(np.float32).tiny))
    return SoftmaxGrid(bits, scale, min(round(-low / scale), max_code), of)


def check_correction(grid: SoftmaxGrid, correction: str | None) -> None:
    """Raise UsageError unless a correction exists and is one of this kind of grid's."""
    check_choice("correction", correction, CORRECTIONS)
    check_choice(f"correction of a grid of {grid.of}", correction, CORRECTIONS_OF[grid.of])


@dataclass(frozen=True)
class QuantizedProbabilities:
    """Hold codes of a softmax and the offset of each row: ``y = s * code - offset`` if allowed.

    On a grid of exponentials every row has a scale of its own as well; on one of squares it
    multiplies the squares of the codes.

    Attributes
    ----------
    codes : ndarray of uint8 (uint16 above 8 bits), shape (..., q, k)
        The zero-point if a key is not allowed; its value is 0 and not ``s z - offset``.
    corrections : ndarray of float32, shape (..., q)
        Value added to each row's allowed entries.
    grid : SoftmaxGrid
    empty_rows : int
        Rows without an allowed key: all 0, correction 0.
    scales : ndarray of float32, shape (..., q), or None
        Scale s of each row's codes, or of their squares; None if it is that of the grid.
    """

    __repr__ = one_line_repr

    codes: np.ndarray
    corrections: np.ndarray
    grid: SoftmaxGrid
    empty_rows: int
    scales: np.ndarray | None = None

    @property
    def offsets(self) -> np.ndarray:
        """Offset ``c' = s * z - correction`` of each row, float64 (..., q)."""
        return self.grid.scale * self.grid.zero_point - self.corrections.astype(np.float64)

    def dequantize(self, allowed: Any = None, causal: bool = False) -> np.ndarray:
        """Return float32 values, the same bits as the call with this mask and ``codes=False``.

        Parameters
        ----------
        allowed, causal
            As in :func:`softmax_on_grid`; the codes alone do not say which keys were allowed.
        """
        codes, shape = as_attention(self.codes.astype(np.float32), "codes")
        mask = as_allowed(allowed, codes.shape, shape)
        seen = np.ones((1, 1, 1, 1), bool) if mask is None else mask
        if causal:
            seen = seen & np.tri(shape[-2], shape[-1], shape[-1] - shape[-2], dtype=bool)
        steps = codes - np.float32(self.grid.zero_point)
        rows = self.corrections.reshape(*codes.shape[:3], 1)
        scale: Any = np.float32(self.grid.scale)
        if self.scales is not None:
            scale = self.scales.reshape(rows.shape)
        if self.grid.of == "squares":
            steps = steps * steps
        values = scale * steps + rows
        return np.where(seen, values, np.float32(0)).reshape(shape)


def _bias_table(correction: str | None, bias: Any, heads: int, k: int) -> np.ndarray:
    """Return the table of the core, float64 (heads or 1, k + 1 or 1)."""
    if correction in UNFITTED:
        if bias is not None:
            raise ValueError(f"correction={correction!r} takes no bias")
        return np.zeros((1, 1))
    if bias is None:
        raise ValueError(f"correction={correction!r} needs bias=, see ptqkit.SoftmaxBias")
    try:
        table = np.asarray(bias, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"bias must be numbers: {error}") from None
    by_length = correction == "row_length"
    shapes = "(lengths,) or (heads, lengths)" if by_length else "() or (heads,)"
    heads_of = table.shape[: table.ndim - by_length]
    if table.ndim not in (by_length, by_length + 1) or any(n != heads for n in heads_of):
        raise ValueError(f"bias must have shape {shapes}, {heads} head(s); it has {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError("bias holds NaN or Inf")
    if not by_length:
        return np.ascontiguousarray(table.reshape(-1, 1))
    if table.shape[-1] <= k:
        raise ValueError(
            f"bias has entries for rows of up to {table.shape[-1] - 1} keys, but there are {k}; "
            "SoftmaxBias.bias_by_length(keys) gives a longer table"
        )
    return np.ascontiguousarray(table.reshape(-1, table.shape[-1])[:, : k + 1])


def _check_out(out: Any, scores: np.ndarray, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    if out is None:
        return np.empty(shape, dtype)
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a NumPy array, not {type(out).__name__}")
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise ValueError(
            f"out must be a C-contiguous {np.dtype(dtype)} array of shape {shape}, not {out.dtype} "
            f"{out.shape}"
        )
    if not (out.flags.writeable and out.flags.aligned):
        raise ValueError("out must be writable and aligned")
    same = out.ctypes.data == scores.ctypes.data and out.dtype == scores.dtype
    if not same and np.may_share_memory(out, scores):
        raise ValueError("out may be scores itself, but must not share a part of its memory")
    return out


def softmax_on_grid(
    scores: Any,
    grid: SoftmaxGrid,
    *,
    correction: str | None = None,
    bias: Any = None,
    allowed: Any = None,
    causal: bool = False,
    out: np.ndarray | None = None,
    codes: bool = False,
    threads: int = 0,
) -> np.ndarray | QuantizedProbabilities:
    """Return a softmax over the last axis, rounded to a grid and corrected, in one pass.

    Keys that are not allowed, and scores of -Inf, get exactly 0 and no correction; their scores do
    not affect the result. A row without an allowed key is all 0. A row depends on its own scores
    only, so that fewer rows or a longer cache of keys change nothing. Exponentials are accurate to
    1.2 ulp, sums are in double; a code can differ from exact arithmetic only if the exact value is
    within a relative distance of about 1e-6 from a tie.

    Parameters
    ----------
    scores : array or tensor, shape (..., heads, q, k)
        float32; halves are widened, float64 is rounded. Scaled, not masked.
    grid : SoftmaxGrid
        If it is one of exponentials or squares, exponentials are rounded and then divided by their
        sum before rounding.
    correction : {None, "bias", "row_sum", "row_length", "code_sum"}
        "bias": beta is added to every allowed entry [SBC, eq. 4]. "row_sum": each row's own missing
        mass, ``(1 - sum of the rounded row) / (number of allowed keys)``; needs no calibration.
        "row_length": beta by the number of allowed keys. "code_sum": exponentials are divided by
        the sum of the rounded ones. Exponentials and squares have "row_sum" and "code_sum" alone.
    bias : float or array, optional
        "bias": () or (heads,). "row_length": (lengths,) or (heads, lengths), entry n for rows of n
        allowed keys. See :class:`ptqkit.SoftmaxBias`.
    allowed : array or tensor of bool or int, optional
        Keys, (batch, k); or entries, with the axes of ``scores``, each full or 1.
    causal : bool
        Query i sees the keys up to ``i + k - q`` only, and of these the ``allowed`` ones.
    out : ndarray, optional
        Array to write to; float32 (or the type of the codes), C-contiguous. May be ``scores``.
        Undefined after an error.
    codes : bool
        Return codes and row corrections instead of values.
    threads : int
        0 means automatic. The result does not depend on it.

    Returns
    -------
    ndarray of float32, shape of scores; or QuantizedProbabilities

    Raises
    ------
    ValueError
        NaN or +Inf at an allowed key; shapes, bias or out that do not fit; with ``codes`` and a
        correction, -Inf at an allowed key (codes could not say that it takes no correction).
    TypeError
        Scores that are not floating point, a mask of floats.
    """
    if not isinstance(grid, SoftmaxGrid):
        raise TypeError(f"grid must be a SoftmaxGrid, see softmax_grid(); not {grid!r}")
    threads = check_threads(threads)
    x, shape = as_attention(scores, "scores")
    mask = as_allowed(allowed, x.shape, shape)
    check_correction(grid, correction)
    table = _bias_table(correction, bias, x.shape[1], x.shape[3])
    result = _check_out(out, x, shape, grid._code_type if codes else np.float32)
    rows = np.empty(x.size // x.shape[3], np.float32) if codes else None
    of = GRIDS_OF.index(grid.of)
    scales = np.empty_like(rows) if rows is not None and of else None
    bad, empty = _core.softmax_quantize(
        x,
        mask,
        int(bool(causal)),
        grid._tuple(),
        CORRECTIONS[correction],
        table,
        result.reshape(x.shape),
        rows,
        scales,
        of,
        threads,
    )
    if bad >= 0:
        _raise_row(x, bad, shape, mask, causal)
    if rows is None:
        return result
    row_scales = None if scales is None else scales.reshape(shape[:-1])
    return QuantizedProbabilities(result, rows.reshape(shape[:-1]), grid, empty, row_scales)


def _raise_row(
    x: np.ndarray, bad: int, shape: tuple[int, ...], mask: np.ndarray | None, causal: bool
) -> None:
    """Raise ValueError with the reason why the core refused a row of scores."""
    row, where = allowed_entries(x, bad, shape, mask, causal)
    if np.isnan(row).any() or (row == np.inf).any():
        raise ValueError(
            f"scores[{where}] holds NaN or +Inf at an allowed key; check the model's dtype "
            "(float16 overflows easily)"
        )
    raise ValueError(
        f"scores[{where}] is -Inf at an allowed key, which codes cannot exclude from the "
        "correction; pass the mask as allowed= or causal=True, or take codes=False"
    )
