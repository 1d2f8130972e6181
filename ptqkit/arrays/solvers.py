"""Quantize one weight matrix: round to nearest, GPTQ, OBQ."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

import ptqkit._core as _core
from ptqkit.arrays._grids import (
    GridSpec,
    check_scales,
    check_values,
    far_exponent,
    grid_spec,
    group_width,
    named_grid,
    outputs,
    row_exponents,
)
from ptqkit.arrays._inputs import as_matrix, check_count, check_threads, label
from ptqkit.arrays.factorization import Factorization, as_hessian, check_inputs, factorize
from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.errors import NotPositiveDefiniteError

__all__ = ["gptq", "objective", "obq", "rtn"]


def rtn(
    W: Any,
    *,
    bits: int | str = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    per_tensor: bool = False,
    grid: str = "minmax",
    H: Any = None,
    scale_dtype: str = "float32",
    min_zero_point: int = 0,
    grid_steps: int = 40,
    grid_min_shrink: float = 0.3,
    grid_norm: float = 2.4,
    grid_candidates: int = 4,
    threads: int = 0,
    name: str | None = None,
) -> QuantizedMatrix:
    """Round each weight to the nearest point of its group's grid.

    Parameters
    ----------
    W : array or tensor, shape (out, in), floating point
    bits : int from 2 to 8, or "ternary"
    group_size : int or None
        Consecutive inputs that share a grid; None: one grid per output channel.
    symmetric : bool
        Zero-point fixed in the middle (always so for ternary).
    per_tensor : bool
        One min-max grid for all of W; ``group_size`` must be None.
    grid : {"minmax", "mse", "hessian"}
        Range of the grid: min-max; or shrunk by the factor (of ``grid_steps`` from 1 to
        ``grid_min_shrink``) with the least ``sum |d|^grid_norm``; or with the least ``d H_gg d^T``,
        d the rounding error and H_gg the group's block of H, which must then be given. Of the
        factors, the ``grid_candidates`` best under the diagonal of H are compared under all of it.
        ("feedback" is a grid of :func:`gptq` alone.)
    H : Hessian, Factorization or array, shape (in, in), optional
        With it the result also reports its objective.
    scale_dtype : {"float32", "float16", "bfloat16"}
        Scales are rounded to this type before weights are quantized on them.
    min_zero_point : int
        Smallest zero-point allowed (GPTQ v1 checkpoints need 1).
    threads : int
        0 means automatic. The result does not depend on it.
    name : str, optional
        Layer name for error messages.

    Returns
    -------
    QuantizedMatrix

    Raises
    ------
    TypeError, ValueError
        For a wrong dtype or shape, NaN or Inf, a group that does not divide, bits out of range;
        ``per_tensor`` with groups or with a grid search.
    """
    result_grid = named_grid(bits, group_size, symmetric, per_tensor, scale_dtype, name=name)
    spec = grid_spec(
        result_grid, grid, min_zero_point, grid_steps, grid_min_shrink, grid_norm, grid_candidates
    )
    if grid == "feedback":
        raise ValueError(
            f"{label(name)}grid='feedback' is a grid of gptq: here nothing is fed back"
        )
    if per_tensor and grid != "minmax":
        raise ValueError(
            f"{label(name)}per_tensor=True needs grid='minmax': a search shrinks each group's range"
        )
    threads = check_threads(threads)
    W = as_matrix(W, "W", name, threads)
    rows, n = W.shape
    size = group_width(result_grid, n, name)
    matrix = None if H is None else as_hessian(H, name, threads, inputs=n)
    if grid == "hessian" and matrix is None:
        raise ValueError(f"{label(name)}grid='hessian' needs H")
    if per_tensor:
        codes, scales, zeros = _rtn_per_tensor(W, spec, threads)
    else:
        codes, scales, zeros = outputs(rows, n, n // size)
        far, read = row_exponents(W, scale_dtype), matrix if grid == "hessian" else None
        moderate = W if far is None else np.ldexp(W, -far)
        if read is not None and (shift := far_exponent(read)):
            read = np.ldexp(read, -shift)
        _core.rtn(moderate, size, spec, read, codes, scales, zeros, threads)
        if far is not None:
            scales = np.ldexp(scales, far)
    check_scales(scales, scale_dtype, name)
    g_idx = (np.arange(n) // size).astype(np.int32)
    q = QuantizedMatrix(codes, scales, zeros, g_idx, result_grid)
    check_values(q, name)
    if matrix is None:
        return q
    found = _objective(W, q, matrix, threads)
    return replace(q, row_objectives=found[None], rtn_objectives=found)


def _rtn_per_tensor(
    W: np.ndarray, spec: GridSpec, threads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes, scales and zero-points on the grid of the range of all of W."""
    rows = len(W)
    scale, zero = np.empty((1, 1), np.float32), np.empty((1, 1), np.uint8)
    ends = np.array([[W.min(), W.max()]])  # a row with the range of W, so with its grid
    _core.rtn(ends, 2, spec, None, np.empty((1, 2), np.uint8), scale, zero, 1)
    scales, zeros = np.repeat(scale, rows, axis=0), np.repeat(zero, rows, axis=0)
    codes = np.empty(W.shape, np.uint8)
    _core.codes_on_grid(W, scales[:, 0], zeros[:, 0], spec.max_code, codes, threads)
    return codes, scales, zeros


def _objective(W: np.ndarray, q: QuantizedMatrix, matrix: np.ndarray, threads: int) -> np.ndarray:
    return _quadratic(W - q.dequantize(), matrix, threads)


def _quadratic(E: np.ndarray, matrix: np.ndarray, threads: int) -> np.ndarray:
    """Return e H e^T of each row, float64 (rows,), of any size."""
    far, shift = row_exponents(E), far_exponent(matrix)
    if far is not None:
        E = np.ldexp(E, -far)
    if shift:
        matrix = np.ldexp(matrix, -shift)
    out = np.empty(len(E), np.float64)
    _core.objective(E, matrix, out, threads)
    return _unscale(out, far, shift)


def _unscale(objectives: np.ndarray, far: np.ndarray | None, shift: int) -> np.ndarray:
    """Return the objectives (..., rows) of W and H from those of 2^-far W and 2^-shift H."""
    if far is None and not shift:
        return objectives
    return np.ldexp(objectives, shift if far is None else shift + 2 * far[:, 0])


def objective(W: Any, W_hat: Any, H: Any, *, threads: int = 0) -> np.ndarray:
    """Return e H e^T for each row e of W - W_hat; the sum is tr((W - W_hat) H (W - W_hat)^T).

    Parameters
    ----------
    W, W_hat : array or tensor, shape (out, in)
        ``W_hat`` may be the scalar 0.
    H : Hessian, Factorization or array, shape (in, in)

    Returns
    -------
    ndarray of float64, shape (out,)
    """
    threads = check_threads(threads)
    W = as_matrix(W, "W", None, threads)
    matrix = as_hessian(H, None, threads, inputs=W.shape[1])
    E = W
    if not (np.isscalar(W_hat) and W_hat == 0):
        W_hat = as_matrix(W_hat, "W_hat", None, threads)
        if W_hat.shape != W.shape:
            raise ValueError(f"W_hat must have the shape {W.shape} of W, not {W_hat.shape}")
        E = W - W_hat
    return _quadratic(E, matrix, threads)


def gptq(
    W: Any,
    H: Any,
    *,
    bits: int | str = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    order: str = "natural",
    static_groups: bool = False,
    grid: str = "minmax",
    refine_passes: int = 0,
    refit_rounds: int = 0,
    beam_width: int = 1,
    damping: float = 0.01,
    max_damping: float = 1.0,
    feedback: bool = True,
    scale_dtype: str = "float32",
    min_zero_point: int = 0,
    grid_steps: int = 40,
    grid_min_shrink: float = 0.3,
    grid_norm: float = 2.4,
    grid_candidates: int = 4,
    block_size: int = 128,
    compare_rtn: bool | None = None,
    threads: int = 0,
    name: str | None = None,
) -> QuantizedMatrix:
    """Quantize a weight matrix with GPTQ [GPTQ, Algorithm 1].

    By default the published form: natural order, min-max grids fitted to the updated weights when
    their group is reached. ``order="group-act", grid="hessian", refine_passes=1`` gave the best
    models of all variants measured (the ``quality`` recipe).

    Parameters
    ----------
    W : array or tensor, shape (out, in), floating point
    H : Hessian, Factorization or array, shape (in, in)
        ``(2/N) X^T X``. A Factorization brings its own order and damping.
    bits, group_size, symmetric, scale_dtype, min_zero_point, threads, name
        As in :func:`rtn`; ternary is published with groups of 8.
    grid : {"minmax", "mse", "hessian", "feedback"}
        As in :func:`rtn`; or shrunk by the factor of ``grid_steps`` that leaves the least objective
        once the group itself is solved, each column fed back to the next: ``grid_steps`` solves
        of every group. A channel counts as groups of 128, each solved by itself.
    order : {"natural", "act", "group-act"}
        As stored; by decreasing H_jj (act-order: with groups, ``g_idx`` is permuted
        unless ``static_groups``); or groups by importance and columns inside them by H_jj
        (groups stay whole). Act-order puts inputs of unlike groups on one grid: where weights or
        inputs are of very unlike scale it may be worse than rounding to nearest.
    static_groups : bool
        Fit all grids to the original weights beforehand, groups of consecutive inputs.
    refine_passes : int
        Coordinate-descent passes over the codes after the solve; none raises the objective.
    refit_rounds : int
        After them, so often: fit all scales of a row at once to its codes under H, and make one
        more such pass. A row whose objective would not fall, its scales rounded to
        ``scale_dtype``, keeps its scales.
    beam_width : int from 1 to 16
        Above 1: in the end, search the codes of each row anew on its grids, keeping so many partial
        roundings instead of one (K-best), and make one more such pass over the best. A row whose
        objective would not fall keeps its codes. Takes about ``beam_width`` times the solve.
    damping, max_damping : float
        See :func:`ptqkit.factorize`.
    feedback : bool
        False: every column is rounded as it is; with natural order and min-max grids this is RTN.
    block_size : int
        Columns per block of the solver. Changes its speed only.
    compare_rtn : bool, optional
        Compute ``objective_rtn`` of the result, which takes part of the solver's time again. By
        default where act-order permutes the groups.

    Returns
    -------
    QuantizedMatrix
        With the objective per row after the solve, each pass, each fit of the scales, and the
        search with ``beam_width``.

    Raises
    ------
    NotPositiveDefiniteError
        If H cannot be factorized with any damping up to ``max_damping``.
    TypeError, ValueError
        As in :func:`rtn`; ``grid="feedback"`` without feedback or with ``static_groups``.
    """
    result_grid = named_grid(bits, group_size, symmetric, False, scale_dtype, name=name)
    spec = grid_spec(
        result_grid, grid, min_zero_point, grid_steps, grid_min_shrink, grid_norm, grid_candidates
    )
    threads = check_threads(threads)
    check_count(refine_passes, "refine_passes", 0, 1000)
    check_count(refit_rounds, "refit_rounds", 0, 1000)
    check_count(beam_width, "beam_width", 1, 16)
    if beam_width > 1 and not feedback:
        raise ValueError(f"beam_width={beam_width} searches with feedback: use feedback=True or 1")
    if grid == "feedback" and (static_groups or not feedback):
        raise ValueError(
            f"{label(name)}grid='feedback' tries a group's grid by its solve: it needs "
            "feedback=True and static_groups=False"
        )
    check_count(block_size, "block_size", 1, 1 << 20)
    W = as_matrix(W, "W", name, threads)
    size = group_width(result_grid, W.shape[1], name)
    F = H
    if not isinstance(F, Factorization):
        F = factorize(
            H,
            order=order,
            group_size=group_size,
            damping=damping,
            max_damping=max_damping,
            threads=threads,
            name=name,
        )
    elif order not in ("natural", F.order_name):
        raise ValueError(
            f"{label(name)}order={order!r}, but the Factorization was made with {F.order_name!r}"
        )
    check_inputs(F.matrix, W.shape[1], name)
    if F.order_name == "group-act" and F.group_size != group_size:
        raise ValueError(f"{label(name)}the Factorization was ordered for another group_size")
    original = W
    if F.dead.any():
        W = np.where(F.dead, np.float32(0), W)
    # No feedback has reached the weights when a channel's only grid is fitted: it is static.
    static = bool(static_groups) or size == W.shape[1]
    options = SolverOptions(
        group_size=size,
        block_size=block_size,
        static_groups=int(static),
        groups_follow_order=int(F.order_name == "act" and not static),
        feedback=int(bool(feedback)),
        refine_passes=refine_passes,
        refit_rounds=refit_rounds,
        shift=F.damping_value,
    )
    codes, scales, zeros, g_idx, history = _solve(
        W, F, options, spec, scale_dtype, beam_width, threads, name
    )
    check_scales(scales, scale_dtype, name)
    q = QuantizedMatrix(
        codes,
        scales,
        zeros,
        g_idx,
        result_grid,
        row_objectives=history,
        damping=F.damping,
        damping_raised=F.damping_raised,
        dead_inputs=int(F.dead.sum()),
    )
    check_values(q, name)
    if not feedback:  # the solver tracks differences only
        history += _objective(W, q, F.matrix, threads) - history[-1]
    if not (options.groups_follow_order if compare_rtn is None else compare_rtn):
        return q
    nearest = rtn(
        original,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        grid="hessian" if grid == "feedback" else grid,
        H=F,
        scale_dtype=scale_dtype,
        min_zero_point=min_zero_point,
        grid_steps=grid_steps,
        grid_min_shrink=grid_min_shrink,
        grid_norm=grid_norm,
        grid_candidates=grid_candidates,
        threads=threads,
        name=name,
    )
    return replace(q, rtn_objectives=nearest.rtn_objectives)


class SolverOptions(NamedTuple):
    """Options of one solve: the tuple ``options`` of the core's ``gptq``."""

    group_size: int
    block_size: int
    static_groups: int  # 1: grids from W beforehand, groups in original order
    groups_follow_order: int  # 1: groups are runs of the order (act-order with g_idx)
    feedback: int
    refine_passes: int
    refit_rounds: int
    shift: float  # what was added to the diagonal for R


def _solve(
    W: np.ndarray,
    F: Factorization,
    options: SolverOptions,
    spec: GridSpec,
    scale_dtype: str,
    beam_width: int,
    threads: int,
    name: str | None,
) -> tuple[np.ndarray, ...]:
    """Run the core's solver and search; return codes, scales, zero-points, g_idx and history."""
    rows, n = W.shape
    codes, scales, zeros = outputs(rows, n, n // options.group_size)
    g_idx = np.empty(n, np.int32)
    steps = options.refine_passes + 2 * options.refit_rounds
    history = np.empty((1 + steps, rows), np.float64)
    matrix, R, far, shift = F.matrix, F.R, row_exponents(W, scale_dtype), far_exponent(F.matrix)
    if far is not None:
        W = np.ldexp(W, -far)
    if shift:
        with np.errstate(all="ignore"):  # below its diagonal R is undefined
            matrix, R = np.ldexp(matrix, -shift), np.ldexp(R, -shift // 2)
        options = options._replace(shift=math.ldexp(options.shift, -shift))
    try:
        _core.gptq(
            W, matrix, R, F.order, options, spec, codes, scales, zeros, g_idx, history, threads
        )
        if beam_width > 1:
            history = np.concatenate([history, history[-1:]])
            search = (np.arange(rows), (spec.max_code, beam_width), codes, history[-1], threads)
            _core.best_paths(W, matrix, R, F.order, g_idx, scales, zeros, *search)
    except FloatingPointError:
        if not (np.isfinite(np.triu(F.R)).all() and (np.diagonal(F.R) > 0).all()):
            raise ValueError(f"{label(name)}R of the Factorization is no factor of H") from None
        raise NotPositiveDefiniteError(
            f"{label(name)}the solve overflowed: the Hessian is too close to singular at damping "
            f"{F.damping:g}. Raise damping",
            -1,
            F.damping,
        ) from None
    if far is not None:
        scales = np.ldexp(scales, far)
    return codes, scales, zeros, g_idx, _unscale(history, far, shift)


def obq(
    W: Any,
    H: Any,
    *,
    bits: int | str = 4,
    group_size: int | None = None,
    symmetric: bool = False,
    grid: str = "minmax",
    damping: float = 0.01,
    scale_dtype: str = "float32",
    min_zero_point: int = 0,
    threads: int = 0,
    name: str | None = None,
) -> QuantizedMatrix:
    """Quantize with Optimal Brain Quantization [OBQ], the slow reference that GPTQ approximates.

    Per row, the column whose rounding costs least is quantized next and the others compensate
    [GPTQ, equations 2 and 3]. In double, O(in^3) per row: for a few hundred inputs.

    Parameters
    ----------
    W, H, bits, group_size, symmetric, grid, damping, scale_dtype, min_zero_point, threads, name
        As in :func:`gptq`; grids are fitted to the original weights.

    Returns
    -------
    QuantizedMatrix
    """
    threads = check_threads(threads)
    W = as_matrix(W, "W", name, threads)
    F = factorize(H, damping=damping, max_damping=damping, threads=threads, name=name)
    check_inputs(F.matrix, W.shape[1], name)
    if F.dead.any():
        W = np.where(F.dead, np.float32(0), W)
    grids = rtn(
        W,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        grid=grid,
        H=F.matrix,
        scale_dtype=scale_dtype,
        min_zero_point=min_zero_point,
        threads=threads,
        name=name,
    )
    damped = F.matrix.astype(np.float64)
    damped[np.diag_indices_from(damped)] += np.where(F.dead, 1.0, F.damping_value)
    codes = np.empty(W.shape, np.uint8)
    scale = np.take(grids.scales.astype(np.float64), grids.g_idx, axis=1)  # C order, unlike [:, g]
    zero = np.take(grids.zero_points.astype(np.float64), grids.g_idx, axis=1)
    inverse: np.ndarray = np.linalg.inv(damped)
    _core.obq(W.astype(np.float64), inverse, scale, zero, grids.max_code, codes, threads)
    q = replace(grids, codes=codes, damping=F.damping, dead_inputs=int(F.dead.sum()))
    found = _objective(W, q, F.matrix, threads)
    return replace(q, row_objectives=found[None], rtn_objectives=grids.rtn_objectives)
