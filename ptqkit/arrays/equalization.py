"""Activation-weight equalization: scales that move range from activations into weights [AWEQ]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import ptqkit._core as _core
from ptqkit._repr import one_line_repr
from ptqkit.arrays._grids import grid_spec, group_width, named_grid
from ptqkit.arrays._inputs import (
    F32,
    as_array,
    as_matrix,
    as_vector,
    check_count,
    check_number,
    check_threads,
    label,
)
from ptqkit.arrays.ranges import ChannelRanges, batch_ranges, span_of
from ptqkit.errors import check_choice

__all__ = [
    "SCALE_LIMITS",
    "EqualizationPrecision",
    "EqualizationSearch",
    "equalization_precision",
    "equalization_scales",
    "search_equalization",
    "weight_span",
]

SCALE_LIMITS = (2.0**-20, 2.0**20)  # every scale lies between: about 1e-6 and 1e6
MOST_LAYERS = 64  # of one input; the core's limit
ALPHAS = tuple(i / 20 for i in range(21))


def weight_span(W: Any, *, threads: int = 0) -> np.ndarray:
    """Return max - min of every input column over all given layers together.

    Parameters
    ----------
    W : array or tensor, shape (out, in), or a sequence of them
        All layers that one tensor feeds (q, k, v; gate, up).

    Returns
    -------
    ndarray of float32, shape (in,)
        r^W of [AWEQ, eq. 10].

    Raises
    ------
    TypeError, ValueError
        No layer, a wrong dtype or shape, different inputs, NaN or Inf.
    """
    threads = check_threads(threads)
    layers = _weights(W, None, threads)
    lows, highs, _ = zip(*(batch_ranges(w, F32, None, threads) for w in layers), strict=True)
    return span_of(np.minimum.reduce(lows), np.maximum.reduce(highs))


def _weights(W: Any, name: str | None, threads: int) -> list[np.ndarray]:
    """Return a list of finite float32 matrices with the same number of columns."""
    if not isinstance(W, (list, tuple)):
        W = [W]
    if not 1 <= len(W) <= MOST_LAYERS:
        raise ValueError(
            f"{label(name)}weights must hold at least one layer and at most {MOST_LAYERS}, not "
            f"{len(W)}"
        )
    found = [
        as_matrix(w, "W" if len(W) == 1 else f"W[{i}]", name, threads) for i, w in enumerate(W)
    ]
    inputs = [w.shape[1] for w in found]
    if len(set(inputs)) > 1:
        raise ValueError(
            f"{label(name)}layers fed by one tensor must have the same inputs, not {inputs} (W is "
            "(out, in), as in torch.nn.Linear)"
        )
    return found


def _span(x: Any, what: str) -> np.ndarray:
    x = as_vector(x, what)
    if not np.all(x >= 0):
        raise ValueError(f"{what} must not be negative: it is maximum - minimum")
    return x


def _spans(activation_span: Any, weight_span: Any) -> tuple[np.ndarray, np.ndarray]:
    rx, rw = _span(activation_span, "activation_span"), _span(weight_span, "weight_span")
    if rx.shape != rw.shape:
        raise ValueError(f"activation_span has {len(rx)} channels, but weight_span has {len(rw)}")
    return rx, rw


def _tied(channel_of: Any, n: int) -> np.ndarray | None:
    """Return the group of each channel, counted from 0, int64 (n,), or None for None."""
    if channel_of is None:
        return None
    channel_of = np.asarray(channel_of)
    if not np.issubdtype(channel_of.dtype, np.integer):
        raise TypeError(f"channel_of must be integer, not {channel_of.dtype}")
    if channel_of.shape != (n,):
        raise ValueError(f"channel_of must have shape ({n},), not {channel_of.shape}")
    return np.unique(channel_of, return_inverse=True)[1]


def _check_alpha(alpha: Any) -> float:
    alpha = check_number(alpha, "alpha")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], not {alpha}")
    return alpha


def equalization_scales(
    activation_span: Any, weight_span: Any, alpha: float = 0.5, *, channel_of: Any = None
) -> np.ndarray:
    """Return s = rx^alpha / rw^(1 - alpha): X becomes X / s and W becomes W s, X W^T stays.

    alpha = 1/2 is the closed form [AWEQ, eq. 10], s = sqrt(rx / rw): it minimises
    max_j(rx_j / s_j) max_k(s_k rw_k). 0 makes all columns of W equal in range, 1 all channels of X.

    Parameters
    ----------
    activation_span, weight_span : array, shape (in,)
        max - min of every channel of X over the tokens, and of every column of W
        (:attr:`ChannelRanges.span`, :func:`weight_span`).
    alpha : float in [0, 1]
    channel_of : array of int, shape (in,), optional
        Channels with the same number share a scale (grouped-query attention: one channel of v feeds
        several columns of o). The largest span of each group counts, for X and W apart; who wants
        the span of the pooled values merges minima and maxima beforehand.

    Returns
    -------
    ndarray of float32, shape (in,)
        A channel that is dead in X or in W (span 0) keeps s = 1, whole groups likewise; all
        others lie in ``SCALE_LIMITS`` = [2^-20, 2^20].

    Raises
    ------
    TypeError, ValueError
        Extents that are not floating point, negative or not finite; shapes that differ; alpha
        outside [0, 1].
    """
    rx, rw = _spans(activation_span, weight_span)
    alpha, group = _check_alpha(alpha), _tied(channel_of, len(rx))
    if group is not None:
        rx, rw = _largest(rx, group), _largest(rw, group)
    scales = np.empty(len(rx), np.float32)
    _core.equalization_scales(rx, rw, alpha, *SCALE_LIMITS, scales)
    return scales if group is None else scales[group]


def _largest(span: np.ndarray, group: np.ndarray) -> np.ndarray:
    most = np.zeros(group.max() + 1)
    np.maximum.at(most, group, span)
    return most


@dataclass(frozen=True)
class EqualizationPrecision:
    """Hold what each channel gets of the range of its tensor [AWEQ, eqs. 4-8].

    Attributes
    ----------
    activation, weight : ndarray of float64, shape (in,)
        p^X and p^W: span of a channel over the largest span of all, from 0 to 1.
    total : float
        Sum over the channels of p^X p^W, which equalization maximises.
    bound : float
        The largest total that any scales reach: sum(rx rw) / max(rx rw).
    """

    __repr__ = one_line_repr

    activation: np.ndarray
    weight: np.ndarray
    total: float
    bound: float

    @property
    def reached(self) -> float:
        """Share of the bound, from 0 to 1; 1 if there is nothing to equalize (all spans 0)."""
        return self.total / self.bound if self.bound > 0 else 1.0


def equalization_precision(
    activation_span: Any, weight_span: Any, scales: Any = None
) -> EqualizationPrecision:
    """Return the precision of each channel, and their sum, for X / s and W s [AWEQ, eqs. 4-8].

    With rx and rw the spans of the channels, p^X_i = (rx_i / s_i) / max_j(rx_j / s_j) and
    p^W_i = s_i rw_i / max_k(s_k rw_k). In sum_i p^X_i p^W_i the scales cancel in every numerator,
    so the sum is largest where the product of both maxima is least, which is max_i(rx_i rw_i). The
    scales of :func:`equalization_scales` reach it with every alpha, so this sum does not choose
    among them; those of eq. 10 alone give p^X_i = p^W_i in every channel.

    Parameters
    ----------
    activation_span, weight_span : array, shape (in,)
        max - min of every channel of X, and of every column of W.
    scales : array, shape (in,), optional
        Positive; all 1 by default.

    Returns
    -------
    EqualizationPrecision

    Raises
    ------
    TypeError, ValueError
        Values that are not floating point, negative or not finite; shapes that differ.
    """
    rx, rw = _spans(activation_span, weight_span)
    s = np.ones(len(rx)) if scales is None else np.asarray(as_vector(scales, "scales"), np.float64)
    if s.shape != rx.shape:
        raise ValueError(f"scales must have shape {rx.shape}, not {s.shape}")
    if not np.all(s > 0):
        raise ValueError("scales must be positive")
    rx, rw = rx.astype(np.float64), rw.astype(np.float64)
    products = rx * rw
    px, pw = _share(rx / s), _share(rw * s)
    largest = products.max(initial=0)
    bound = float(products.sum() / largest) if largest > 0 else 0.0
    return EqualizationPrecision(px, pw, float(px @ pw), bound)


def _share(span: np.ndarray) -> np.ndarray:
    largest = span.max(initial=0)
    return span / largest if largest > 0 else np.zeros_like(span)


@dataclass(frozen=True)
class EqualizationSearch:
    """Hold what :func:`search_equalization` found.

    Attributes
    ----------
    alpha : float
        The exponent with the least error; NaN if no equalization is best.
    scales : ndarray of float32, shape (in,)
        Its scales (all 1 for NaN).
    alphas : ndarray of float64, shape (candidates,)
        What was tried, in the order that settles ties: NaN (no equalization), 0.5, the others.
    errors : ndarray of float64, shape (candidates,)
        Sum over tokens and outputs of (Q_a(X / s) Q_w(W s)^T - X W^T)^2.
    """

    __repr__ = one_line_repr

    alpha: float
    scales: np.ndarray
    alphas: np.ndarray
    errors: np.ndarray

    @property
    def error(self) -> float:
        """Least error."""
        return float(self.errors.min())


class EqualizationOptions(NamedTuple):
    """Options of one search: the tuple ``options`` of the core's ``equalization_errors``."""

    group_size: int
    per_tensor: int
    activation_max_code: int  # 0: activations stay as they are
    activation_symmetric: int
    activation_per_tensor: int


def search_equalization(
    weights: Any,
    X: Any,
    ranges: ChannelRanges,
    *,
    bits: int | str = 4,
    group_size: int | None = None,
    symmetric: bool = False,
    per_tensor: bool = False,
    activation_bits: int | None = None,
    activation_granularity: str = "token",
    activation_symmetric: bool | None = None,
    alphas: Sequence[float] | None = None,
    channel_of: Any = None,
    threads: int = 0,
    name: str | None = None,
) -> EqualizationSearch:
    """Find the alpha of :func:`equalization_scales` with the least quantized output error on X.

    No equalization and alpha = 0.5 are always among the candidates, so on this measure the result
    is never worse than either [AWEQ, section 3.2].

    Parameters
    ----------
    weights : array or tensor, shape (out, in), or a sequence of them
        All layers that X feeds.
    X : array or tensor, shape (..., in), floating point
        Calibration inputs to measure on; a few hundred tokens suffice.
    ranges : ChannelRanges
        Of the layers' inputs over the whole calibration set.
    bits, group_size, symmetric : int or "ternary", int or None, bool
        Weights are rounded to nearest on their min-max grid, as :func:`rtn` does.
    per_tensor : bool
        One grid for each whole weight matrix; excludes ``group_size``.
    activation_bits : int from 2 to 16 or None
        None leaves activations as they are.
    activation_granularity : {"token", "tensor"}
        One grid per token, from its own values; or one for all, from ``ranges`` divided by s.
    activation_symmetric : bool, optional
        Default: True per token, False per tensor.
    alphas : sequence of float in [0, 1], optional
        Default 0, 0.05, ... 1.
    channel_of : array of int, shape (in,), optional
        See :func:`equalization_scales`.
    threads : int
        0 means automatic. The result does not depend on it.
    name : str, optional
        Layer name for error messages.

    Returns
    -------
    EqualizationSearch

    Raises
    ------
    TypeError, ValueError
        Wrong dtypes, shapes or options, NaN or Inf, no token, or an output error beyond float64.
    """
    threads = check_threads(threads)
    W = _weights(weights, name, threads)
    n = W[0].shape[1]
    X = _inputs(X, n, name, threads)
    _check_ranges(ranges, n, name)
    weight_grid = named_grid(bits, group_size, symmetric, per_tensor, name=name)
    size = group_width(weight_grid, n, name)
    levels = _activation_codes(activation_bits, activation_granularity, name)
    static = activation_granularity == "tensor"
    if activation_symmetric is None:
        activation_symmetric = not static
    grid = _alpha_grid(alphas)
    rx, rw = ranges.span, weight_span(W, threads=threads)
    tried = [equalization_scales(rx, rw, a, channel_of=channel_of) for a in grid[1:]]
    scales = np.stack([np.ones(n, np.float32), *tried])
    errors = np.empty(len(grid), np.float64)
    options = EqualizationOptions(
        group_size=size,
        per_tensor=int(weight_grid.per_tensor),
        activation_max_code=levels,
        activation_symmetric=int(bool(activation_symmetric)),
        activation_per_tensor=int(static),
    )
    spec, low, high = grid_spec(weight_grid), ranges.minimum, ranges.maximum
    _core.equalization_errors(X, tuple(W), scales, options, spec, low, high, errors, threads)
    best = int(np.argmin(np.where(np.isfinite(errors), errors, np.inf)))
    if not np.isfinite(errors[best]):
        raise ValueError(f"{label(name)}the outputs overflow: X or W holds huge values")
    return EqualizationSearch(float(grid[best]), scales[best], grid, errors)


def _inputs(X: Any, n: int, name: str | None, threads: int) -> np.ndarray:
    X = as_array(X, f"{label(name)}X")
    if X.ndim == 0 or X.shape[-1] != n:
        raise ValueError(f"{label(name)}X must have shape (..., {n}), but has {X.shape}")
    return as_matrix(X.reshape(-1, n), "X", name, threads)


def _check_ranges(ranges: Any, n: int, name: str | None) -> None:
    if not isinstance(ranges, ChannelRanges):
        raise TypeError(f"{label(name)}ranges must be ChannelRanges, not {type(ranges).__name__}")
    if ranges.channels != n:
        raise ValueError(f"{label(name)}ranges has {ranges.channels} channels, but W has {n}")


def _activation_codes(bits: int | None, granularity: str, name: str | None) -> int:
    """Return the largest activation code, or 0 if activations stay as they are."""
    check_choice(f"{label(name)}activation_granularity", granularity, ("token", "tensor"))
    if bits is None:
        return 0
    return (1 << check_count(bits, "activation_bits", 2, 16)) - 1


def _alpha_grid(alphas: Sequence[float] | None) -> np.ndarray:
    """Return NaN (no equalization), 0.5, then the others as given, float64."""
    others = [_check_alpha(a) for a in (ALPHAS if alphas is None else alphas)]
    return np.array([np.nan, *dict.fromkeys([0.5, *others])])
