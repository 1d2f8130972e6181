"""Convert scores, probabilities and masks of attention to what the core takes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ptqkit.arrays._inputs import as_bool, as_float32

__all__ = ["allowed_entries", "as_allowed", "as_attention", "as_queries"]


def as_attention(x: Any, what: str) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return x (..., heads, q, k) as float32 (batch, heads, q, k), and its own shape.

    Two axes are one head of one sample.
    """
    x = as_float32(x, what)
    if x.ndim < 2 or x.shape[-1] == 0 or (x.ndim > 2 and x.shape[-3] == 0):
        raise ValueError(
            f"{what} must have shape (..., heads, q, k) with at least one head and one key, but "
            f"has shape {x.shape}"
        )
    heads = x.shape[-3] if x.ndim > 2 else 1
    return x.reshape(math.prod(x.shape[:-3]), heads, *x.shape[-2:]), x.shape


ADDED_MASK = "; a mask that is added to the scores allows a key if it is 0: pass mask == 0"


def as_allowed(allowed: Any, sizes: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the mask as (batch or 1, heads or 1, q or 1, k), or None for None.

    Parameters
    ----------
    allowed : array or tensor of bool or int, or None
        Keys, (batch, k); or entries, an array with the axes of ``shape``, each full or 1.
    sizes : tuple
        (batch, heads, q, k).
    shape : tuple
        Shape of the scores as the user passed them.
    """
    if allowed is None:
        return None
    allowed = as_bool(allowed, "allowed", ADDED_MASK)
    batch, _, _, k = sizes
    pairs = zip(allowed.shape, shape, strict=False)
    if allowed.shape == (batch, k) and len(shape) > 2:
        allowed = allowed.reshape(batch, 1, 1, k)
    elif allowed.ndim != len(shape) or any(a not in (1, b) for a, b in pairs):
        raise ValueError(
            f"allowed must have shape {(batch, k)} (batch, keys), or that of the scores, {shape}, "
            f"where any axis may be 1; but it has shape {allowed.shape}"
        )
    else:
        lead, rest = allowed.shape[:-3], ((1,) * 3 + allowed.shape)[-3:]
        if math.prod(lead) != 1:  # several axes that become one cannot be broadcast one by one
            allowed, lead = np.broadcast_to(allowed, shape[:-3] + rest), shape[:-3]
        allowed = allowed.reshape(math.prod(lead), *rest)
    return np.ascontiguousarray(np.broadcast_to(allowed, (*allowed.shape[:-1], k)))


def as_queries(queries: Any, batch: int, q: int) -> np.ndarray | None:
    """Return the rows that count, bool (batch, q), or None for None."""
    if queries is None:
        return None
    queries = as_bool(queries, "queries")
    if queries.shape != (batch, q):
        raise ValueError(f"queries must have shape {(batch, q)} (batch, q), not {queries.shape}")
    return np.ascontiguousarray(queries)


def allowed_entries(
    x: np.ndarray, row: int, shape: tuple[int, ...], mask: np.ndarray | None, causal: bool
) -> tuple[np.ndarray, str]:
    """Return the allowed entries of a row of (batch, heads, q, k), and its index in ``shape``."""
    b, h, i = (int(n) for n in np.unravel_index(row, x.shape[:3]))
    q, k = x.shape[2:]
    entries = x[b, h, i, : min(k, k - q + i + 1) if causal else k]
    if mask is not None:
        entries = entries[np.broadcast_to(mask, x.shape)[b, h, i, : len(entries)]]
    return entries, ", ".join(str(int(n)) for n in np.unravel_index(row, shape[:-1]))
