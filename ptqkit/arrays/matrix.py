"""Describe weight grids and quantized matrices: the result of every solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np

from ptqkit._repr import one_line_repr
from ptqkit.errors import check_choice

__all__ = [
    "GRID_METHODS",
    "SCALE_TYPES",
    "QuantizedMatrix",
    "WeightGrid",
    "parse_bits",
    "stack_rows",
]

TERNARY_BITS = float(np.log2(3.0))
GRID_METHODS = {"minmax": 0, "mse": 1, "hessian": 2, "feedback": 3}  # ptq_grid_method
SCALE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}  # ptq_scale_type


def parse_bits(bits: int | str) -> int:
    """Return the largest code of a grid: ``2**bits - 1``, or 2 for ``"ternary"``.

    Raises
    ------
    ValueError
        If ``bits`` is neither an integer from 2 to 8 nor ``"ternary"``.
    """
    if isinstance(bits, str):
        if bits == "ternary":
            return 2
        raise ValueError(f"bits must be an integer from 2 to 8 or 'ternary', not {bits!r}")
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)) or not 2 <= bits <= 8:
        raise ValueError(f"bits must be an integer from 2 to 8 or 'ternary', not {bits!r}")
    return (1 << int(bits)) - 1


@dataclass(frozen=True)
class WeightGrid:
    """Describe the grids of a weight matrix: what is stored, not how it was found.

    Attributes
    ----------
    bits : int from 2 to 8, or "ternary"
    group_size : int or None
        Inputs per grid; None: one grid per output channel, or per tensor.
    symmetric : bool
        Every zero-point is ``middle``.
    per_tensor : bool
        One grid for the whole matrix; excludes ``group_size``.
    scale_dtype : {"float32", "float16", "bfloat16"}
        Type that every scale fits exactly.
    """

    __repr__ = one_line_repr

    bits: int | str = 4
    group_size: int | None = 128
    symmetric: bool = False
    per_tensor: bool = False
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        parse_bits(self.bits)
        size = self.group_size
        if size is not None:
            if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
                raise TypeError(f"group_size must be an integer or None, not {size!r}")
            if size < 1:
                raise ValueError(f"group_size {size} is below 1; use None for one grid per channel")
            if self.per_tensor:
                raise ValueError(
                    f"per_tensor=True is one grid for all of W: pass group_size=None, not {size}"
                )
            object.__setattr__(self, "group_size", int(size))
        check_choice("scale_dtype", self.scale_dtype, SCALE_TYPES)
        object.__setattr__(self, "symmetric", bool(self.symmetric))
        object.__setattr__(self, "per_tensor", bool(self.per_tensor))

    @property
    def max_code(self) -> int:
        """Largest code: ``2**bits - 1``, or 2 for ternary."""
        return parse_bits(self.bits)

    @property
    def middle(self) -> int:
        """Zero-point of a symmetric grid: ``2**(bits - 1)``, or 1 for ternary."""
        return (self.max_code + 1) // 2


@dataclass(frozen=True)
class QuantizedMatrix:
    """Hold a weight matrix on a uniform grid: ``w = scale * (code - zero_point)``.

    Attributes
    ----------
    codes : ndarray of uint8, shape (out, in)
        Unsigned codes in ``[0, grid.max_code]``, original column order.
    scales : ndarray of float32, shape (out, groups)
        Exactly representable in ``scale_dtype``; all equal if ``per_tensor``, as zero-points are.
    zero_points : ndarray of uint8, shape (out, groups)
    g_idx : ndarray of int32, shape (in,)
        Group of each input. ``i // group_size`` unless act-order ran without static groups.
    grid : WeightGrid
    row_objectives : ndarray of float64, shape (1 + steps, out), or None
        Objective of each output row after the solve and after each step: a coordinate-descent
        sweep, or a fit of the scales.
    rtn_objectives : ndarray of float64, shape (out,), or None
        Objective of each output row if it is rounded to nearest by :func:`ptqkit.rtn` with the
        same options, on grids of consecutive inputs. Their sum is ``objective_rtn``.
    damping : float
        Damping used, as a fraction of the mean diagonal of H (0 if none was needed).
    damping_raised : int
        How many times it had to be raised before H could be factorized.
    dead_inputs : int
        Inputs with a zero diagonal in H.
    """

    __repr__ = one_line_repr

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    g_idx: np.ndarray
    grid: WeightGrid
    row_objectives: np.ndarray | None = None
    rtn_objectives: np.ndarray | None = None
    damping: float = 0.0
    damping_raised: int = 0
    dead_inputs: int = 0

    bits = property(attrgetter("grid.bits"), doc='Bits per code, or "ternary".')
    group_size = property(attrgetter("grid.group_size"), doc="Inputs per grid, or None.")
    symmetric = property(attrgetter("grid.symmetric"), doc="Whether zero-points are constant.")
    per_tensor = property(attrgetter("grid.per_tensor"), doc="Whether one grid holds for all.")
    scale_dtype = property(attrgetter("grid.scale_dtype"), doc="Type that every scale fits.")
    max_code = property(attrgetter("grid.max_code"), doc="Largest code of the grid.")

    @property
    def objective(self) -> float:
        """tr((W - Q) H (W - Q)^T) with the undamped H; NaN if no H was given."""
        return float("nan") if self.row_objectives is None else float(self.row_objectives[-1].sum())

    @property
    def objective_rtn(self) -> float:
        """Objective of rounding to nearest with the same options; NaN if it was not computed."""
        return float("nan") if self.rtn_objectives is None else float(self.rtn_objectives.sum())

    @property
    def sweep_objectives(self) -> tuple[float, ...]:
        """Objective after the solve and after each sweep or fit of the scales."""
        if self.row_objectives is None:
            return ()
        return tuple(float(v) for v in self.row_objectives.sum(axis=1))

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix, (out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def permuted_groups(self) -> bool:
        """Whether the groups are not runs of consecutive inputs (act-order with g_idx)."""
        return bool(np.any(np.diff(self.g_idx) < 0))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: codes, scales, zero-points (asymmetric), g_idx (if permuted)."""
        out, inputs = self.codes.shape
        code_bits = TERNARY_BITS if self.bits == "ternary" else float(self.bits)
        total = code_bits * out * inputs
        grids = 1 if self.per_tensor else self.scales.size
        total += grids * (32 if self.scale_dtype == "float32" else 16)
        if not self.symmetric:
            total += grids * code_bits
        if self.permuted_groups:
            total += 32.0 * inputs
        return total / max(1, out * inputs)

    def dequantize(self, dtype: np.dtype | type = np.float32) -> np.ndarray:
        """Return ``scale * (code - zero_point)`` as an array of shape (out, in)."""
        zero = self.zero_points.astype(np.int16)[:, self.g_idx]
        steps = (self.codes.astype(np.int16) - zero).astype(dtype)
        steps *= self.scales.astype(dtype, copy=False)[:, self.g_idx]
        return steps

    def rows(self, start: int, stop: int) -> QuantizedMatrix:
        """Return output rows ``start:stop`` (for layers that were solved together)."""
        return replace(
            self,
            codes=self.codes[start:stop],
            scales=self.scales[start:stop],
            zero_points=self.zero_points[start:stop],
            row_objectives=None
            if self.row_objectives is None
            else self.row_objectives[:, start:stop],
            rtn_objectives=None if self.rtn_objectives is None else self.rtn_objectives[start:stop],
        )


def stack_rows(matrices: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """Put matrices that were solved apart, each under an H of its own, on top of each other.

    Dead inputs add up, and the damping is the largest. Objectives are kept if all have them.

    Raises
    ------
    ValueError
        If their grids or the groups of their inputs differ.
    """
    first = matrices[0]
    if len(matrices) == 1:
        return first
    for other in matrices[1:]:
        if other.grid != first.grid or not np.array_equal(other.g_idx, first.g_idx):
            raise ValueError("matrices with different grids or groups of inputs cannot be stacked")
    histories = [m.row_objectives for m in matrices]
    nearest = [m.rtn_objectives for m in matrices]
    return QuantizedMatrix(
        np.concatenate([m.codes for m in matrices]),
        np.concatenate([m.scales for m in matrices]),
        np.concatenate([m.zero_points for m in matrices]),
        first.g_idx,
        first.grid,
        row_objectives=_joined(histories, axis=1),
        rtn_objectives=_joined(nearest, axis=0),
        damping=max(m.damping for m in matrices),
        damping_raised=max(m.damping_raised for m in matrices),
        dead_inputs=sum(m.dead_inputs for m in matrices),
    )


def _joined(values: Sequence[np.ndarray | None], axis: int) -> np.ndarray | None:
    """Return the arrays in one; None if one is missing."""
    found = [v for v in values if v is not None]
    return np.concatenate(found, axis=axis) if len(found) == len(values) else None
