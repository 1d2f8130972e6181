"""GPTQ with the weights on a device: the same codes as the host's core but for rounding.

The form is that of the core: with H = R R^T in the order of the solve and the errors so far, E, a
column's codes are those nearest to w_j + (E R)_j / R_jj. Blocks of columns are a step of
:mod:`ptqkit.nn.kernels`; what they add to the sums of all later columns is one float32 product.
No sum runs over rows: a row's result is the same whichever rows are solved with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ptqkit.arrays._grids import (
    SEARCH,
    GridSpec,
    check_scales,
    check_values,
    far_exponent,
    far_values,
    grid_spec,
    group_width,
    largest_exponents,
    named_grid,
)
from ptqkit.arrays._inputs import label
from ptqkit.arrays.factorization import Factorization
from ptqkit.arrays.matrix import GRID_METHODS
from ptqkit.errors import NotPositiveDefiniteError
from ptqkit.nn.device_factor import factor_on, hessian_on
from ptqkit.nn.device_grids import GRID_BLOCK, GridFit
from ptqkit.nn.device_matrix import DeviceMatrix
from ptqkit.nn.kernels.choice import groups_on, steps_on, why_no_kernels
from ptqkit.nn.kernels.plain import round_even
from ptqkit.nn.row_objectives import row_objectives
from ptqkit.nn.row_products import add_product, rows_at_once
from ptqkit.nn.transfer import host_copy
from ptqkit.recipe.recipe import Recipe

__all__ = ["gptq_on", "why_on_host"]

# Columns whose errors reach the later ones of as many as are below together.
_COLUMNS = 128
# Columns whose errors reach all later ones together: products of many are quicker.
_WIDE = 1024


def why_on_host(device: torch.device, options: Recipe) -> str:
    """Return why the solve of a matrix is made by the host; empty if the device makes it.

    Parameters
    ----------
    device : torch.device
        Of the weights. On a CPU that stands for a device, in tests, plain torch makes it.
    options : Recipe
        Of the layer.
    """
    if options.method != "gptq":
        return f"method {options.method!r}"
    if options.beam_width > 1:
        return f"beam_width={options.beam_width}"
    if options.grid == "feedback":
        return "grid 'feedback'"
    return "" if device.type == "cpu" else why_no_kernels(device)


def gptq_on(
    weight: torch.Tensor,
    factor: Factorization,
    options: Recipe,
    *,
    compare_rtn: bool | None = None,
    name: str | None = None,
) -> DeviceMatrix:
    """Quantize a weight as :func:`ptqkit.gptq` does, without passes after the solve.

    Parameters
    ----------
    weight : Tensor of float32, shape (out, in)
        On the device that solves.
    factor : Factorization
        Of its inputs' Hessian.
    options : Recipe
        Of the layer, with ``scale_dtype`` set.
    compare_rtn, name
        As :func:`ptqkit.gptq` takes them.

    Raises
    ------
    NotPositiveDefiniteError
        If the solve overflows.
    ValueError
        If a group does not divide, or weights are beyond what scales hold.
    """
    solve = _solve(weight, factor, options, name)
    runs = weight.split(rows_at_once(*weight.shape))
    parts = [solve.rows(run) for run in runs]
    codes, scales, zeros, objectives = (torch.cat(each) for each in zip(*parts, strict=True))
    # The host waits for the solve here, and nowhere else in it.
    finite, largest = torch.stack([objectives.isfinite().all().float(), scales.max()]).tolist()
    if not finite:
        raise NotPositiveDefiniteError(
            f"{label(name)}the solve overflowed: the Hessian is too close to singular at damping "
            f"{factor.damping:g}. Raise damping",
            -1,
            factor.damping,
        )
    check_scales(np.array([largest], np.float32), options.scale_dtype or "float32", name)
    g_idx = np.empty(len(factor.order), np.int32)
    g_idx[factor.order] = solve.group
    matrix = DeviceMatrix(
        codes,
        scales,
        zeros,
        g_idx,
        solve.grid,
        row_objectives=objectives[None],
        damping=factor.damping,
        damping_raised=factor.damping_raised,
        dead_inputs=int(factor.dead.sum()),
    )
    if far_values(largest, solve.grid.max_code):
        check_values(matrix.finish(), name)
    if not (solve.follows if compare_rtn is None else compare_rtn):
        return matrix
    return replace(matrix, rtn_objectives=torch.cat([solve.nearest(run) for run in runs]))


def _solve(
    weight: torch.Tensor, factor: Factorization, options: Recipe, name: str | None
) -> _Solve:
    """Return what all rows of a solve share."""
    device, inputs = weight.device, weight.shape[1]
    grid = named_grid(
        options.bits if not isinstance(options.bits, float) else options.whole_bits,
        options.group_size,
        options.symmetric,
        scale_dtype=options.scale_dtype or "float32",
        name=name,
    )
    spec = grid_spec(grid, options.grid, options.min_zero_point, **SEARCH)
    size = group_width(grid, inputs, name)
    static = options.static_groups or size == inputs
    follows = factor.order_name == "act" and not static
    group = (np.arange(inputs) if follows else factor.order) // size
    H, R = hessian_on(device, factor), factor_on(device, factor)
    shift = far_exponent(host_copy(H.diagonal()))
    if shift:
        H, R = H * math.ldexp(1.0, -shift), R * math.ldexp(1.0, -shift // 2)
    return _Solve(
        grid,
        spec,
        size,
        static,
        follows,
        options.feedback,
        group.astype(np.int32),
        factor.order,
        factor.dead,
        H,
        R,
        shift,
        name,
    )


def _scaled(values: torch.Tensor, exponents: np.ndarray) -> torch.Tensor:
    """Return values times powers of two, also of those that a float does not hold."""
    return torch.from_numpy(np.ldexp(host_copy(values), exponents)).to(values.device)


@dataclass
class _Solve:
    """The options of a solve, and its matrices on the device.

    Attributes
    ----------
    grid : WeightGrid
    spec : GridSpec
    size : int
        Inputs of a group.
    static, follows, feedback : bool
        Whether grids are fitted beforehand; whether groups are runs of the order; whether errors
        reach later columns.
    group : ndarray of int32, shape (in,)
        Of the columns in order.
    order : ndarray of int64, shape (in,)
    dead : ndarray of bool, shape (in,)
    H, R : Tensor of float32, shape (in, in)
        H as the inputs are stored, R in the order of the solve; both times ``2**-shift``.
    shift : int
    name : str or None
        For messages.
    """

    grid: Any
    spec: GridSpec
    size: int
    static: bool
    follows: bool
    feedback: bool
    group: np.ndarray
    order: np.ndarray
    dead: np.ndarray
    H: torch.Tensor
    R: torch.Tensor
    shift: int
    name: str | None

    def __post_init__(self) -> None:
        device, inputs = self.R.device, len(self.order)
        self._steps, self._fit = steps_on(device), GridFit(self.spec, device)
        natural = np.array_equal(self.order, np.arange(inputs))
        self._turned = None if natural else torch.from_numpy(self.order).to(device)
        self._back = None if natural else torch.from_numpy(np.argsort(self.order)).to(device)
        self._group = torch.from_numpy(self.group).to(device)
        hessian = self.spec.method == GRID_METHODS["hessian"]
        self._blocks = self._diagonal_blocks(self.static) if hessian else []
        self._groups = None if self.static or self.size > _COLUMNS else groups_on(device)
        self._places = self._group[:: self.size].contiguous()
        self._stacked = self._blocks[0] if self._groups is not None and self._blocks else None
        self._inverses = None
        if self.feedback and not self.static:
            self._inverses = self._inverse_blocks()

    def rows(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return codes, scales, zero-points and objectives of some rows."""
        weight, far = self._moderate(weight)
        if self.dead.any():
            weight = weight * torch.from_numpy(~self.dead).to(weight.device)
        rows, inputs = weight.shape
        groups = inputs // self.size
        scales = torch.zeros(rows, groups, dtype=torch.float32, device=weight.device)
        zeros = torch.zeros_like(scales)
        if self.static:
            self._fit_all(weight, scales, zeros, self._blocks)
        W = weight if self._turned is None else weight[:, self._turned]
        sums = torch.zeros_like(W)
        codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
        for wide, block, parts in self._cuts(inputs):
            if self._groups is not None:
                self._all_groups(self._groups, W, sums, wide, scales, zeros, codes)
            else:
                for part in parts:
                    if not self.static and part.start % self.size == 0:
                        self._fit_group(W, sums, part.start, scales, zeros)
                    self._step(W, sums, part, scales, zeros, codes)
                    self._spread(sums, part, slice(part.stop, block.stop))
                self._spread(sums, block, slice(block.stop, wide.stop))
            if block.stop == wide.stop:
                self._spread(sums, wide, slice(wide.stop, inputs))
        del W
        if self._back is not None:
            codes, sums = codes[:, self._back], sums[:, self._back]
        if far is not None:
            scales = _scaled(scales, far)
        objectives = self._unscaled(row_objectives(sums, self.H), far)
        return codes, scales, zeros.to(torch.uint8), objectives

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the objectives of rows that are rounded to nearest, on groups of neighbours."""
        weight, far = self._moderate(weight)
        groups = weight.shape[1] // self.size
        scales = torch.zeros(len(weight), groups, dtype=torch.float32, device=weight.device)
        zeros, errors = torch.zeros_like(scales), torch.empty_like(weight)
        hessian = self.spec.method == GRID_METHODS["hessian"]
        self._fit_all(weight, scales, zeros, self._diagonal_blocks(True) if hessian else [])
        for g in range(groups):
            part = slice(g * self.size, (g + 1) * self.size)
            scale, zero = scales[:, g, None], zeros[:, g, None]
            code = round_even(weight[:, part] / scale).add_(zero)
            code.clamp_(0.0, float(self.spec.max_code))
            torch.sub(weight[:, part], code.sub_(zero).mul_(scale), out=errors[:, part])
        return self._unscaled(row_objectives(errors, self.H), far)

    def _moderate(self, weight: torch.Tensor) -> tuple[torch.Tensor, np.ndarray | None]:
        """Return rows that float32 can square, and the exponents (rows, 1) of what was taken."""
        low, high = torch.aminmax(weight, dim=1)
        largest = host_copy(torch.maximum(high, -low))
        if not np.isfinite(largest).all():
            raise ValueError(f"{label(self.name)}W holds NaN or Inf (or values beyond float32)")
        far = largest_exponents(largest, self.grid.scale_dtype)
        if far is None:
            return weight, None
        return torch.ldexp(weight, torch.from_numpy(-far).to(weight.device)), far

    def _unscaled(self, objectives: torch.Tensor, far: np.ndarray | None) -> torch.Tensor:
        """Return objectives of the weights and H as they were; rounding makes none negative."""
        objectives = objectives.clamp(min=0.0)  # NaN stays
        if far is None and not self.shift:
            return objectives
        exponents = np.array(self.shift) if far is None else self.shift + 2 * far[:, 0]
        return _scaled(objectives, exponents)

    def _cuts(self, inputs: int) -> Iterator[tuple[slice, slice, list[slice]]]:
        """Yield blocks of columns, each after the wide one it is in, with its groups.

        A wide block begins with a group, as a block does or is part of one. Where one kernel makes
        all groups of a wide block, it is one block.
        """
        small = not self.static and self.size <= _COLUMNS
        width = _COLUMNS // self.size * self.size if small else _COLUMNS
        unit = width if small or self.static else self.size
        reach = max(1, _WIDE // unit) * unit
        for first in range(0, inputs, reach):
            wide = slice(first, min(first + reach, inputs))
            if self._groups is not None:
                yield wide, wide, []
                continue
            period = self.size if unit == self.size else reach
            for begin in range(wide.start, wide.stop, period):
                end = min(begin + period, wide.stop)
                for start in range(begin, end, width):
                    block = slice(start, min(start + width, end))
                    inner = range(start, block.stop, self.size) if small else [start]
                    size = self.size if small else block.stop - start
                    yield wide, block, [slice(c, c + size) for c in inner]

    def _step(
        self,
        W: torch.Tensor,
        sums: torch.Tensor,
        part: slice,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        codes: torch.Tensor,
    ) -> None:
        self._steps.quantize_columns(
            W[:, part],
            sums[:, part],
            self.R[part, part],
            scales,
            zeros,
            self._group[part],
            codes[:, part],
            self.spec.max_code,
            self.feedback,
        )

    def _all_groups(
        self,
        groups: ModuleType,
        W: torch.Tensor,
        sums: torch.Tensor,
        wide: slice,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        codes: torch.Tensor,
    ) -> None:
        """Fit the grids of all groups of a wide block and round it, by one kernel."""
        own = slice(wide.start // self.size, wide.stop // self.size)
        groups.quantize_groups(
            W[:, wide],
            sums[:, wide],
            self.R[wide, wide],
            None if self._inverses is None else self._inverses[own],
            None if self._stacked is None else self._stacked[own],
            self._fit.of_group(groups),
            scales,
            zeros,
            self._places[own],
            codes[:, wide],
            self.feedback,
        )

    def _spread(self, sums: torch.Tensor, done: slice, later: slice) -> None:
        """Add to the sums of later columns what the errors of some columns give."""
        if self.feedback and later.start < later.stop:
            add_product(sums[:, later], sums[:, done], self.R[done, later])

    def _fit_group(
        self,
        W: torch.Tensor,
        sums: torch.Tensor,
        start: int,
        scales: torch.Tensor,
        zeros: torch.Tensor,
    ) -> None:
        """Fit the grid of a group to its weights, corrected for the errors before it.

        They are W_g + D with D R_gg = (E R)_g.
        """
        part, number = slice(start, start + self.size), start // self.size
        values = W[:, part]
        if self._inverses is not None and start > 0:
            values = values.clone()
            add_product(values, sums[:, part], self._inverses[number])
        place = int(self.group[start])
        own = [blocks[number] for blocks in self._blocks]
        scales[:, place], zeros[:, place] = self._fit(values, own)

    def _fit_all(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        blocks: list[torch.Tensor],
    ) -> None:
        for g in range(scales.shape[1]):
            values = weight[:, g * self.size : (g + 1) * self.size]
            own = [each[g] for each in blocks]
            scales[:, g], zeros[:, g] = self._fit(values, own)

    def _diagonal_blocks(self, stored: bool) -> list[torch.Tensor]:
        """Return the blocks of H that searches read, of all groups of inputs as stored or in order.

        Of a group they are of ``GRID_BLOCK`` inputs and of the rest: tensors (groups, block, block)
        for the first, the second, ... of each group.
        """
        index = self._turned
        if stored or index is None:
            index = torch.arange(len(self.order), dtype=torch.int64, device=self.H.device)
        groups = index.view(-1, self.size).split(GRID_BLOCK, 1)
        return [self.H[part[:, :, None], part[:, None, :]] for part in groups]

    def _inverse_blocks(self) -> torch.Tensor:
        """Return the inverses of the blocks of R on the diagonal, (groups, size, size)."""
        count, size = len(self.order) // self.size, self.size
        blocks = self.R.view(count, size, count, size).diagonal(0, 0, 2).permute(2, 0, 1)
        one = torch.eye(self.size, dtype=torch.float64, device=self.R.device)
        wide = torch.triu(blocks).double()
        found = torch.linalg.solve_triangular(wide, one.expand(count, -1, -1), upper=True)
        return found.float()
