"""The damped Hessian's factor, shared by all layers that read the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import ptqkit._core as _core
from ptqkit._repr import one_line_repr
from ptqkit.arrays._inputs import as_matrix, check_count, check_number, check_threads, label
from ptqkit.arrays.hessian import SYMMETRY_TOLERANCE, Hessian
from ptqkit.errors import NotPositiveDefiniteError, check_choice

__all__ = ["Factorization", "factorize", "quantization_order"]

ORDERS = ("natural", "act", "group-act")


@dataclass(frozen=True)
class Factorization:
    """Hold a Hessian, the order of its inputs and the factor R of the damped, permuted matrix.

    Attributes
    ----------
    matrix : ndarray of float32, shape (n, n)
        The undamped Hessian, original order.
    R : ndarray of float32, shape (n, n)
        Upper triangular, ``R R^T = P (H + damping) P^T``; below the diagonal undefined.
    order : ndarray of int64, shape (n,)
        ``order[i]`` is the input that is quantized i-th.
    order_name : str
        "natural", "act" or "group-act".
    group_size : int or None
        Group size the order was made for ("group-act" only).
    damping : float
        Damping used, as a fraction of the mean diagonal over live inputs.
    damping_value : float
        What was added to the diagonal.
    damping_raised : int
        Times the damping had to be raised.
    dead : ndarray of bool, shape (n,)
        Inputs with a zero diagonal.
    """

    __repr__ = one_line_repr

    matrix: np.ndarray
    R: np.ndarray
    order: np.ndarray
    order_name: str
    group_size: int | None
    damping: float
    damping_value: float
    damping_raised: int
    dead: np.ndarray


def quantization_order(diagonal: np.ndarray, order: str, group_size: int | None) -> np.ndarray:
    """Return the inputs in the order in which they are quantized.

    "natural": as they are. "act": decreasing H_jj [GPTQ, code]. "group-act": groups by
    decreasing sum of H_jj, the inputs of a group by decreasing H_jj, so that groups stay whole.
    Ties keep the original order.
    """
    n = len(diagonal)
    if order == "natural":
        return np.arange(n, dtype=np.int64)
    decreasing = np.argsort(-diagonal, kind="stable")
    if order == "group-act":
        size = group_size or n
        totals = diagonal.astype(np.float64).reshape(-1, size).sum(axis=1)
        rank = np.empty(n // size, np.int64)
        rank[np.argsort(-totals, kind="stable")] = np.arange(n // size)
        decreasing = decreasing[np.argsort(rank[decreasing // size], kind="stable")]
    return decreasing.astype(np.int64, copy=False)


def check_inputs(matrix: np.ndarray, inputs: int, name: str | None) -> None:
    """Raise ValueError unless a Hessian has the inputs of a weight matrix."""
    if len(matrix) != inputs:
        raise ValueError(
            f"{label(name)}H has {len(matrix)} inputs, but W has {inputs} (W is (out, in), as in "
            "torch.nn.Linear)"
        )


def as_hessian(
    H: Any, name: str | None = None, threads: int = 0, inputs: int | None = None
) -> np.ndarray:
    """Return a finite, symmetric float32 matrix from a Hessian, a Factorization or an array."""
    if isinstance(H, (Hessian, Factorization)):
        matrix = H.matrix
    else:
        matrix = as_matrix(H, "H", name, threads)
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{label(name)}H must be square, but has shape {matrix.shape}")
    reach = float(np.abs(np.diagonal(matrix)).max())
    verdict = _core.symmetric_check(matrix, SYMMETRY_TOLERANCE * reach, threads)
    if verdict == 1:
        raise ValueError(f"{label(name)}H holds NaN or Inf")
    if verdict == 2:
        raise ValueError(f"{label(name)}H must be symmetric: it is the Hessian (2/N) X^T X")
    if inputs is not None:
        check_inputs(matrix, inputs, name)
    return matrix


def check_damping(damping: float, max_damping: float) -> None:
    """Raise unless both are finite numbers with 0 <= damping <= max_damping."""
    check_number(damping, "damping")
    check_number(max_damping, "max_damping")
    if not (np.isfinite(damping) and np.isfinite(max_damping) and 0 <= damping <= max_damping):
        raise ValueError(
            f"damping must be a fraction of the mean diagonal with 0 <= damping <= max_damping, "
            f"not damping={damping!r}, max_damping={max_damping!r}"
        )


def _attempts(damping: float, max_damping: float) -> Iterator[float]:
    """Yield the dampings to try: the requested one, then ten times more, up to the largest."""
    yield damping
    step = damping if damping > 0 else 1e-4
    while damping < max_damping:
        damping = min(max(step, damping * 10), max_damping)
        yield damping


def _factor(
    matrix: np.ndarray, threads: int, order: np.ndarray, shift: np.ndarray
) -> np.ndarray | int:
    R = np.empty_like(matrix)
    failed = _core.factor(matrix, order, shift, R, threads)
    return R if failed < 0 else failed


def factorize(
    H: Any,
    *,
    order: str = "natural",
    group_size: int | None = 128,
    damping: float = 0.01,
    max_damping: float = 1.0,
    threads: int = 0,
    name: str | None = None,
) -> Factorization:
    """Dampen and factorize a Hessian once, for all layers that read the same inputs.

    Parameters
    ----------
    H : Hessian or array, shape (n, n)
        ``(2/N) X^T X``, symmetric.
    order : {"natural", "act", "group-act"}
        Quantization order, see :func:`quantization_order`.
    group_size : int or None
        Needed by order "group-act" only.
    damping, max_damping : float
        Fraction of the mean diagonal (over live inputs) added to the diagonal. If a pivot is
        not positive it is raised tenfold, up to ``max_damping``; the result says how often.
    threads : int
        0 means automatic.
    name : str, optional
        Layer name for error messages.

    Returns
    -------
    Factorization

    Raises
    ------
    NotPositiveDefiniteError
        If no damping in the allowed range works.
    ValueError
        If H is not a finite symmetric matrix or an option is out of range.
    """
    threads = check_threads(threads)
    check_choice("order", order, ORDERS)
    check_damping(damping, max_damping)
    matrix = as_hessian(H, name, threads)
    found, facts = factor_damped(
        np.diagonal(matrix),
        order=order,
        group_size=group_size,
        damping=damping,
        max_damping=max_damping,
        factor=partial(_factor, matrix, threads),
        name=name,
    )
    return Factorization(matrix, found, **facts._asdict())


class FactorFacts(NamedTuple):
    """What a :class:`Factorization` holds beside its matrices."""

    order: np.ndarray
    order_name: str
    group_size: int | None
    damping: float
    damping_value: float
    damping_raised: int
    dead: np.ndarray


def factor_damped(
    diagonal: np.ndarray,
    *,
    order: str,
    group_size: int | None,
    damping: float,
    max_damping: float,
    factor: Callable[[np.ndarray, np.ndarray], Any],
    name: str | None = None,
) -> tuple[Any, FactorFacts]:
    """Factorize a Hessian of which the diagonal is given, with as much damping as it takes.

    Parameters
    ----------
    diagonal : ndarray of float32, shape (n,)
    order, group_size, damping, max_damping, name
        As :func:`factorize` takes them; checked here are those that the diagonal tells about.
    factor : callable
        ``factor(order, shift)`` returns the factor of ``(H + diag(shift))[order][:, order]``, or
        the input whose pivot is not positive, as an int.

    Returns
    -------
    The factor, and how it was made.
    """
    n = len(diagonal)
    if (
        order == "group-act"
        and group_size is not None
        and n % check_count(group_size, f"{label(name)}group_size", 1, n)
    ):
        raise ValueError(f"{label(name)}group_size {group_size} does not divide {n} inputs")
    dead = diagonal == 0
    live = np.abs(diagonal[~dead], dtype=np.float64)
    mean = float(live.mean()) if live.size else 0.0
    perm = quantization_order(diagonal, order, group_size)
    failed, tried = -1, 0.0
    for raised, tried in enumerate(_attempts(float(damping), float(max_damping))):
        shift = np.where(dead, 1.0, tried * mean)
        found = factor(perm, shift)
        if not isinstance(found, int):
            facts = FactorFacts(perm, order, group_size, tried, tried * mean, raised, dead)
            return found, facts
        failed = found
    raise NotPositiveDefiniteError(
        f"{label(name)}the Hessian is not positive definite: the pivot of input {failed} failed "
        f"with damping up to {tried:g} of the mean diagonal. Use more calibration tokens or "
        "raise max_damping",
        failed,
        tried,
    )
