"""Rules that say which channels of activations are outliers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ptqkit.arrays._inputs import check_number

__all__ = ["outlier_dimensions", "relative_outliers"]


def outlier_dimensions(
    counts: Sequence[Any],
    tokens_seen: int | Sequence[int],
    *,
    layers: float = 0.25,
    tokens: float = 0.06,
) -> np.ndarray:
    """Return the outlier dimensions of a model's hidden states [LLM.int8()].

    A dimension is one if it holds a magnitude of at least a value (6.0 in the paper: the
    ``threshold`` of :class:`ActivationStatistics`) in a share of the layers, at one token or more,
    and in a share of the tokens of all layers.

    Parameters
    ----------
    counts : sequence of array, shape (channels,)
        Per layer, tokens with such a magnitude: ``channel_counts``.
    tokens_seen : int or sequence of int
        Tokens that were counted, per layer.
    layers, tokens : float from 0 to 1

    Returns
    -------
    ndarray of int64
        Ascending.
    """
    for name, share in (("layers", layers), ("tokens", tokens)):
        if not 0 <= check_number(share, name) <= 1:
            raise ValueError(f"{name} must be a share from 0 to 1, not {share!r}")
    widths = sorted({np.shape(row) for row in counts})
    if len(widths) != 1 or len(widths[0]) != 1:
        raise ValueError(f"counts must be vectors of one length, not of shapes {widths}")
    table = np.stack([np.asarray(row, np.int64) for row in counts])
    seen = np.broadcast_to(np.asarray(tokens_seen, np.int64), len(table))
    if (seen < 1).any() or (table > seen[:, None]).any():
        raise ValueError("tokens_seen must be at least 1 and at least as large as every count")
    in_layers = (table > 0).mean(axis=0)
    in_tokens = table.sum(axis=0) / seen.sum()
    return np.flatnonzero((in_layers >= layers) & (in_tokens >= tokens) & (table > 0).any(axis=0))


def relative_outliers(channel_absmax: Any, ratio: float = 6.0) -> np.ndarray:
    """Return the channels whose largest magnitude is at least ``ratio`` times the median channel's.

    Unlike a fixed value it holds for models of any size and scale.

    Parameters
    ----------
    channel_absmax : array, shape (channels,)
    ratio : float above 1

    Returns
    -------
    ndarray of int64
        Ascending; empty if the median is 0.
    """
    if not check_number(ratio, "ratio") > 1:
        raise ValueError(f"ratio must be above 1, not {ratio!r}")
    absmax = np.asarray(channel_absmax, np.float64)
    if absmax.ndim != 1 or not np.isfinite(absmax).all():
        raise ValueError("channel_absmax must be a vector of finite numbers")
    median = np.median(absmax)
    return np.flatnonzero(absmax >= ratio * median) if median > 0 else np.empty(0, np.int64)
